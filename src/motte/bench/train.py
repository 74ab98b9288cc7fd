"""``motte bench train``: one training step, plain, inside, split, or wholly on the accelerator.

Every case is a process of its own. ``resident`` is the whole step inside; in the simulated kind that is the plain
process again, and the figures say so by being equal.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

from motte.bench.bundles import Bundles, weights_choice
from motte.bench.case import Case, CaseResult, TracePoint
from motte.bench.facts import Books, Facts, result_of
from motte.bench.interleave import Progress, interleave
from motte.bench.outcome import Outcome, outcome
from motte.bench.peer import Peer, PeerSpec
from motte.bench.request import Refused, Request, cases_of
from motte.bench.subject import Subject, subject_of
from motte.bench.tracing import Traced, Tracer
from motte.errors import MotteError, ResourceError, SettingError, UnsupportedError

_NOT_OF_A_STEP: Final = "not measured for training steps"
_REASONS: Final = {
    "build": "a model that is trained is not sealed",
    "sign": "a model that is trained is not sealed",
    "attest": "nothing is attested",
    "open": "a model that is trained is not sealed",
    "memory_bound_bytes": "nothing bounds it",
    "accuracy": "the data is noise",
    "exposed": "residuals and gradients leave: motte audit says what they tell",
}


def bench_train(request: Request, progress: Progress) -> Outcome:
    """Measure ``request``.

    Raises:
        SettingError: parts, or engines other than torch.
        MotteError: a model that cannot be built.
    """
    if request.parts != (1,):
        raise SettingError("a model that is trained is not cut into parts", where="--parts")
    if request.engines != ("torch",):
        raise SettingError("only torch trains", where="--engine", got=", ".join(request.engines))
    found: list[CaseResult] = []
    refused: list[Refused] = []
    points: list[TracePoint] = []
    with Bundles(request, say=progress.say) as bundles:
        for model in request.models:
            built, captured = bundles.built(model)
            for batch in request.batches:
                subject = subject_of(captured.graph, built.name, built.signature.weights_origin, batch, request.dims)
                _one(request, model, subject, batch, progress, found, refused, points)
            bundles.forget(model)
    return outcome(request, found, refused, traces=points)


def _one(
    request: Request, model: str, subject: Subject, batch: int, progress: Progress, found: list[CaseResult],
    refused: list[Refused], points: list[TracePoint],
) -> None:  # fmt: skip
    wanted, impossible = cases_of(request, subject.name, batch)
    refused += [each for each in impossible if each.case.mode != "streamed"]
    streamed = [each.case for each in impossible if each.case.mode == "streamed"]
    refused += [Refused(case, "a streamed worker drops weights that a step has to change") for case in streamed]
    progress.expect(len(wanted) + request.repeats)
    with ExitStack() as stack:
        peers: dict[Case, Peer] = {}
        first: dict[Case, float] = {}
        with Tracer(wanted=request.trace, gpu=request.device != "cpu") as tracer:
            for case in wanted:
                progress.say(f"starting {case}")
                marks = tracer.marks(case)
                try:
                    peer = stack.enter_context(Peer(_spec(case, request, model, subject), marks))
                    with marks.segment("first", since="step asked for", until="step done"):
                        first[case] = peer.timed_run()
                    tracer.steady(case, peer.run)
                    peers[case] = peer
                except (UnsupportedError, ResourceError, SettingError) as problem:
                    refused.append(Refused(case, str(problem)))
                except MotteError as problem:
                    refused.append(Refused(case, str(problem), failed=True))
                progress.advance(1)
            traces = tracer.finish()
        progress.say(f"measuring {subject.name}, batch {batch}")
        baseline = next((case for case in peers if case.mode == "native"), None)
        rounds = interleave(
            {case: peer.run for case, peer in peers.items()}, baseline=baseline, warmup=request.warmup,
            repeats=request.repeats, seed=request.seed, on_round=lambda _: progress.advance(1),
        )  # fmt: skip
        refused += rounds.failed
        for case, measured in rounds.measured.items():
            facts = _facts(case, peers[case], first[case], subject, traces.get(case, tracer.why_not))
            points += facts.trace.points
            found.append(result_of(case, facts, measured, threads=request.threads, dtype=subject.dtype))


def _facts(case: Case, peer: Peer, first: float, subject: Subject, trace: Traced) -> Facts:
    told = peer.books()
    crosses = case.mode == "asymmetric"
    apart = {} if crosses else dict.fromkeys(("bytes_out", "bytes_in"), "nothing crosses a boundary of trust")
    return Facts(
        otherwise=_NOT_OF_A_STEP,
        simulated=case.enclave != "none",
        segments={"start": peer.start_s, "load": peer.load_s, "first": first},
        books=Books(
            peak_memory_bytes=peer.memory()["rss_peak_bytes"],
            weight_memory_bytes=subject.weight_bytes,
            bytes_out=int(told["bytes_out"]) if crosses else None,
            bytes_in=int(told["bytes_in"]) if crosses else None,
        ),
        trace=trace,
        trusted_flops=int(told["trusted_flops"]),
        outside_flops=int(told["outside_flops"]),
        missing=_REASONS | apart,
    )


def _spec(case: Case, request: Request, model: str, subject: Subject) -> PeerSpec:
    outside = case.mode == "accelerator"
    return PeerSpec(
        job="train",
        model=model,
        weights=weights_choice(request),
        input_shape=request.input_shape,
        engine="torch",
        inputs=subject.inputs,
        seed=request.seed,
        threads=request.threads,
        device=request.device if outside else "cpu",
        outside=outside,
        train={
            "mode": case.mode,
            "noise": request.noise,
            "rank": request.rank,
            "integrity": request.integrity,
            "layers": list(request.layers),
            "accelerator": request.device,
        },
    )
