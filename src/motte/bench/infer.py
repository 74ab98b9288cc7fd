"""``motte bench infer``: every way to answer a request, side by side on one machine in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from motte.bench.accuracy import accuracy, why_no_accuracy
from motte.bench.bundles import Bundles, Kind, SealedModel
from motte.bench.case import Case, CaseResult, LayerTime, PlanDrawing, TracePoint
from motte.bench.exposure import Exposure, measure_exposure
from motte.bench.facts import Books, Facts, result_of
from motte.bench.inputs import make_inputs, workload_of
from motte.bench.interleave import Measured, Progress, interleave, join
from motte.bench.outcome import Outcome, outcome
from motte.bench.request import SEALED, Refused, Request, cases_of
from motte.bench.runners import PeerRunner, Runner, SealedRunner
from motte.bench.subject import Subject, drawing, split_flops, subject_of, whole_drawing
from motte.bench.tracing import Traced, Tracer
from motte.capture.graph import Graph
from motte.capture.signature import Signature
from motte.errors import MotteError, ResourceError, SettingError, UnsupportedError
from motte.limits import MIB
from motte.measure.memory import available_bytes
from motte.measure.record import Digests
from motte.plan.offload import OffloadPlan
from motte.split.oracle import weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MAX_REASON: Final = 400
RANDOM: Final = "random weights: every answer means nothing; times hardly depend on it"
_COPIES: Final = 2.2
"""Weights, and what an engine may copy of them, over the weights."""
_PROCESS_BYTES: Final = 350 * MIB
"""A process with its libraries, activations of small batches included."""
_SHARE_OF_MEMORY: Final = 0.6


@dataclass
class _Collected:
    cases: list[CaseResult] = field(default_factory=list)
    traces: list[TracePoint] = field(default_factory=list)
    layers: list[LayerTime] = field(default_factory=list)
    plans: dict[str, PlanDrawing] = field(default_factory=dict)
    digests: dict[str, Digests] = field(default_factory=dict)
    workloads: dict[str, dict[str, str | int]] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    caveats: dict[str, None] = field(default_factory=dict)


def bench_infer(request: Request, progress: Progress) -> Outcome:
    """Measure ``request``.

    Raises:
        MotteError: a model that cannot be built at all; a folder of bundles that cannot be written.
    """
    found = _Collected()
    with Bundles(request, say=progress.say) as bundles:
        for model in request.models:
            for batch in request.batches:
                _Bench(request, bundles, model, batch, progress, found).run()
            bundles.forget(model)
    return outcome(
        request,
        found.cases,
        found.refused,
        caveats=list(found.caveats),
        traces=found.traces,
        layers=found.layers,
        plans=found.plans,
        digests=found.digests,
        workloads=found.workloads,
    )


class _Bench:
    """One model at one batch."""

    def __init__(
        self, request: Request, bundles: Bundles, model: str, batch: int, progress: Progress, found: _Collected
    ) -> None:
        self._request = request
        self._bundles = bundles
        self._model = model
        self._batch = batch
        self._progress = progress
        self._found = found
        self._sealed: dict[Case, SealedModel] = {}
        self._measured: dict[Case, Measured] = {}
        self._facts: dict[Case, Facts] = {}
        self._exposures: dict[OffloadPlan | None, Exposure] = {}

    def run(self) -> None:
        """Measure all of it, group by group."""
        graph, signature = self._captured()
        if signature.weights_origin == "random":
            self._found.caveats[RANDOM] = None
        name = signature.model
        wanted, refused = cases_of(self._request, name, self._batch)
        self._found.refused += refused
        try:
            subject = subject_of(graph, name, signature.weights_origin, self._batch, self._request.dims)
        except UnsupportedError as problem:
            self._found.refused += [Refused(case, str(problem)) for case in wanted]
            return
        ready = [case for case in wanted if case.mode not in SEALED or self._seal(case)]
        for engine in dict.fromkeys(case.engine for case in ready):
            own = [case for case in ready if case.engine == engine]
            native = next((case for case in own if case.mode == "native"), None)
            others = [case for case in own if case is not native]
            for group in _groups(others, subject.weight_bytes):
                self._group(native, group, subject, signature)
            if native is not None and not others:
                self._group(native, [], subject, signature)
        self._state(subject)

    def _captured(self) -> tuple[Graph, Signature]:
        """Graph and signature, from a bundle if one has to be there anyhow: then the model need not be built."""
        sealed_modes = [mode for mode in self._request.modes if mode in SEALED]
        if sealed_modes and 1 in self._request.parts and sealed_modes != ["asymmetric"]:
            manifest = self._bundles.sealed(self._model, 1, "trusted").manifest
            return manifest.graph, manifest.signature
        built, captured = self._bundles.built(self._model)
        return captured.graph, built.signature

    def _seal(self, case: Case) -> bool:
        try:
            kind: Kind = "asymmetric" if case.mode == "asymmetric" else "trusted"
            self._sealed[case] = self._bundles.sealed(self._model, case.parts, kind)
        except (UnsupportedError, SettingError) as problem:
            self._found.refused.append(Refused(case, str(problem)))
            return False
        return True

    def _group(self, native: Case | None, group: list[Case], subject: Subject, signature: Signature) -> None:
        request, progress = self._request, self._progress
        cases = [*([native] if native is not None else []), *group]
        progress.expect(len(cases) + request.repeats)
        inputs = make_inputs(subject.inputs, request.seed)
        with ExitStack() as stack:
            runners: dict[Case, Runner] = {}
            with Tracer(wanted=request.trace, gpu=request.device != "cpu") as tracer:
                for case in cases:
                    progress.say(f"starting {case}")
                    runner = self._start(case, subject, inputs, tracer)
                    progress.advance(1)
                    if runner is not None:
                        stack.callback(runner.close)
                        runners[case] = runner
                traces = tracer.finish()
            progress.say(f"measuring {subject.name}, batch {self._batch}")
            rounds = interleave(
                {case: runner.run for case, runner in runners.items()},
                baseline=native,
                warmup=request.warmup,
                repeats=request.repeats,
                seed=request.seed,
                on_round=lambda _: progress.advance(1),
            )
            self._found.refused += rounds.failed
            for case, measured in rounds.measured.items():
                if case in self._measured:
                    self._measured[case] = join(self._measured[case], measured)
                    continue
                self._measured[case] = measured
                progress.say(f"reading the books of {case}")
                trace = traces.get(case, tracer.why_not)
                self._facts[case] = self._read(runners[case], trace, subject, signature, inputs)

    def _start(self, case: Case, subject: Subject, inputs: Arrays, tracer: Tracer) -> Runner | None:
        marks = tracer.marks(case)
        runner: Runner | None = None
        try:
            if case.mode in SEALED:
                runner = SealedRunner(case, self._request, self._sealed[case], subject, inputs, marks)
            else:
                runner = PeerRunner(case, self._request, self._model, subject, marks)
            tracer.steady(case, runner.run)
            return runner
        except (UnsupportedError, ResourceError) as problem:
            self._found.refused.append(Refused(case, str(problem)))
        except MotteError as problem:
            self._found.refused.append(Refused(case, str(problem), failed=True))
        except BaseException:
            if runner is not None:
                runner.close()
            raise
        if runner is not None:
            runner.close()
        return None

    def _read(self, runner: Runner, trace: Traced, subject: Subject, signature: Signature, inputs: Arrays) -> Facts:
        """Everything that needs the running case."""
        case = runner.case
        books = runner.books()
        missing = dict(runner.missing)
        right: float | None = None
        why = why_no_accuracy(signature)
        if why is None:
            right = accuracy(runner.answer, signature, self._batch, subject.inputs[0].name)
        else:
            missing["accuracy"] = why
        trusted, outside = self._flops(case, subject)
        self._found.traces += trace.points
        self._found.plans[str(case)] = self._drawing(case, subject, books)
        bundle = self._sealed.get(case)
        digest = None if bundle is None else self._bundles.digest(bundle.path)
        self._found.workloads[str(case)] = workload_of(subject.inputs, self._request.seed).parameters()
        self._found.digests[str(case)] = Digests(model=subject.graph_digest, bundle=digest)
        return Facts(
            otherwise="not measured",
            simulated=runner.simulated,
            segments=runner.segments,
            books=books,
            trace=trace,
            accuracy=right,
            trusted_flops=trusted,
            outside_flops=outside,
            exposed=self._exposed(case, subject, inputs, missing),
            missing=missing,
        )

    def _flops(self, case: Case, subject: Subject) -> tuple[int, int]:
        if case.mode not in SEALED:
            return 0, subject.flops
        return split_flops(subject, self._sealed[case].manifest.plan)

    def _drawing(self, case: Case, subject: Subject, books: Books) -> PlanDrawing:
        if case.mode not in SEALED:
            return whole_drawing(subject, side="outside")
        return drawing(subject, self._sealed[case].manifest.plan, memory_bound_bytes=books.memory_bound_bytes)

    def _exposed(self, case: Case, subject: Subject, inputs: Arrays, missing: dict[str, str]) -> float | None:
        if case.mode != "asymmetric":
            return 0.0 if case.mode in SEALED else 1.0
        plan = self._sealed[case].manifest.plan
        section = plan.offload
        if section in self._exposures:
            # Where a cut falls changes nothing of what a layer sends.
            known = self._exposures[section]
            self._found.layers += [replace(each, case=case) for each in known.layers]
            return known.share
        self._progress.say(f"measuring what leaves in {case}")
        try:
            _, captured = self._bundles.built(self._model)
            found = measure_exposure(
                case,
                subject,
                plan,
                weights_of(captured.graph, captured.weights),
                [inputs[spec.name] for spec in subject.inputs],
                device=self._request.device,
                threads=self._request.threads,
            )
        except MotteError as problem:
            missing["exposed"] = f"it could not be measured: {problem}"[:MAX_REASON]
            return None
        self._exposures[section] = found
        self._found.layers += found.layers
        return found.share

    def _state(self, subject: Subject) -> None:
        """The rows, in the order of the cases."""
        for case, measured in self._measured.items():
            row = result_of(case, self._facts[case], measured, threads=self._request.threads, dtype=subject.dtype)
            self._found.cases.append(row)


def _groups(cases: Sequence[Case], weight_bytes: int) -> list[list[Case]]:
    """Cases that may run beside each other, and beside a native one, in the memory of this machine."""
    each = int(weight_bytes * _COPIES) + _PROCESS_BYTES
    room = max(1, int(available_bytes() * _SHARE_OF_MEMORY) // each - 1)
    return [list(cases[start : start + room]) for start in range(0, len(cases), room)]
