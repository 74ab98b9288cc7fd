"""``motte bench open``, ``start`` and ``split``: what there is to pay once, before the first answer.

``start``: a process is spawned until it says its first word: for a worker its libraries are imported and it is
hardened; the native peer has imported its engine. ``open``: a bundle is given until the worker is ready; natively the
model is built from its weights, or an exported file read. ``split``: a captured graph to a sealed bundle on the disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from motte.bench.bundles import Bundles, Kind, SealedModel
from motte.bench.case import Case, CaseResult, PlanDrawing
from motte.bench.facts import Facts, result_of
from motte.bench.inputs import make_inputs
from motte.bench.interleave import Progress, interleave
from motte.bench.outcome import Outcome, outcome
from motte.bench.request import SEALED, Refused, Request, cases_of
from motte.bench.runners import PeerRunner, Runner, SealedRunner
from motte.bench.subject import Subject, drawing, subject_of
from motte.bench.tracing import NoMarks
from motte.errors import UnsupportedError
from motte.measure.record import Digests

_STARTING: Final = {"start": ("start",), "open": ("open", "load")}
"""Segments whose sum is the series of a verb."""


def bench_lifecycle(request: Request, progress: Progress) -> Outcome:
    """Measure ``request``, whose verb is ``open``, ``start`` or ``split``.

    Raises:
        MotteError: a model that cannot be built, a bundle that cannot be written.
    """
    found: list[CaseResult] = []
    refused: list[Refused] = []
    plans: dict[str, PlanDrawing] = {}
    digests: dict[str, Digests] = {}
    with Bundles(request, say=progress.say) as bundles:
        for model in request.models:
            built, captured = bundles.built(model)
            for batch in request.batches:
                subject = subject_of(captured.graph, built.name, built.signature.weights_origin, batch, request.dims)
                bench = _Lifecycle(request, bundles, model, subject, progress)
                bench.run(batch)
                found += bench.results
                refused += bench.refused
                plans |= bench.plans
                digests |= {str(result.case): Digests(model=subject.graph_digest) for result in bench.results}
            bundles.forget(model)
    return outcome(request, found, refused, plans=plans, digests=digests)


class _Lifecycle:
    def __init__(self, request: Request, bundles: Bundles, model: str, subject: Subject, progress: Progress) -> None:
        self._request = request
        self._bundles = bundles
        self._model = model
        self._subject = subject
        self._progress = progress
        self._segments: dict[Case, dict[str, float]] = {}
        self._simulated: dict[Case, bool] = {}
        self.results: list[CaseResult] = []
        self.refused: list[Refused] = []
        self.plans: dict[str, PlanDrawing] = {}

    def run(self, batch: int) -> None:
        """Measure every case that can be."""
        request = self._request
        wanted, self.refused = cases_of(request, self._subject.name, batch)
        if request.verb == "split":
            # At the owner's: nothing trusted runs.
            wanted = list(dict.fromkeys(replace(case, enclave="none") for case in wanted))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="motte-split-")))
            candidates: dict[Case, Callable[[], object]] = {}
            for case in wanted:
                call = self._candidate(case, folder)
                if call is not None:
                    candidates[case] = call
            self._progress.expect(request.repeats)
            self._progress.say(f"measuring {self._subject.name}")
            rounds = interleave(
                candidates,
                baseline=next((case for case in candidates if case.mode == "native"), None),
                warmup=request.warmup,
                repeats=request.repeats,
                seed=request.seed,
                reported=True,
                on_round=lambda _: self._progress.advance(1),
            )
        self.refused += rounds.failed
        for case, measured in rounds.measured.items():
            facts = Facts(
                otherwise=f"motte bench {request.verb} does not measure it",
                simulated=self._simulated.get(case, False),
                segments=self._segments.get(case, {}),
            )
            row = result_of(case, facts, measured, threads=request.threads, dtype=self._subject.dtype)
            self.results.append(row)

    def _candidate(self, case: Case, folder: Path) -> Callable[[], object] | None:
        kind: Kind = "asymmetric" if case.mode == "asymmetric" else "trusted"
        try:
            if self._request.verb == "split":
                return self._splitting(case, kind, folder)
            if case.mode in SEALED:
                sealed = self._bundles.sealed(self._model, case.parts, kind)
                self.plans[str(case)] = drawing(self._subject, sealed.manifest.plan)
                return lambda: self._started(case, sealed)
        except UnsupportedError as problem:
            self.refused.append(Refused(case, str(problem)))
            return None
        return lambda: self._started(case, None)

    def _splitting(self, case: Case, kind: Kind, folder: Path) -> Callable[[], object] | None:
        if case.mode not in ("resident", "asymmetric"):
            whole = "the same bundle serves resident and streamed" if case.mode == "streamed" else "nothing is split"
            self.refused.append(Refused(case, whole))
            return None
        _, captured = self._bundles.built(self._model)
        # Once outside of what is timed: a plan that cannot be made is found before the first round.
        self.plans[str(case)] = drawing(self._subject, self._bundles.plan(self._model, captured, case.parts, kind))

        def split() -> float:
            return self._bundles.split(folder / f"{case}.motte", self._model, case.parts, kind)

        return split

    def _started(self, case: Case, sealed: SealedModel | None) -> float:
        """One start from nothing, to the end; the seconds of the segments that the verb names."""
        inputs = make_inputs(self._subject.inputs, self._request.seed)
        runner: Runner
        if sealed is not None:
            runner = SealedRunner(case, self._request, sealed, self._subject, inputs, NoMarks())
        else:
            runner = PeerRunner(case, self._request, self._model, self._subject, NoMarks())
        try:
            self._segments[case] = {
                name: seconds for name, seconds in runner.segments.items() if name not in ("build", "steady")
            }
            self._simulated[case] = runner.simulated
            return sum(runner.segments.get(name, 0.0) for name in _STARTING[self._request.verb])
        finally:
            runner.close()
