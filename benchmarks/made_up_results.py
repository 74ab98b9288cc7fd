"""Results that nobody measured, in the shape of real ones: for the benchmark and the tests of the report alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from motte.bench.results import (
    NULLABLE,
    SEGMENTS,
    TRACED,
    Case,
    CaseResult,
    LayerTime,
    PlanDrawing,
    PlanPart,
    Results,
    Run,
    TracePoint,
)
from motte.limits import MIB
from motte.measure.clock import Segments
from motte.measure.compare import Ratio, Series
from motte.measure.machine import Machine
from motte.measure.provenance import Revision
from motte.measure.record import PROCESS, Record, Setting

CLASSICS = {
    "alexnet": (0.058, 34.9, 233),
    "vgg16": (0.185, 26.9, 528),
    "vgg19": (0.206, 24.8, 548),
    "squeezenet1_0": (0.022, 10.2, 5),
    "resnet50": (0.079, 15.6, 98),
    "resnet101": (0.140, 14.6, 170),
    "mobilenet_v3_large": (0.038, 8.8, 21),
    "mobilenet_v3_small": (0.024, 6.8, 10),
}
"""Name -> (native seconds, ratio, MiB of weights), of the order of published ones."""
NO_POWER = "this machine shows no energy counter"
NO_LABELS = "random weights: an accuracy would mean nothing"
NOTHING_LEAVES = "no layer runs outside"


def results(
    models: Sequence[str] = tuple(CLASSICS),
    *,
    parts: Sequence[int] = (1, 12),
    modes: Sequence[str] = ("native", "resident"),
    enclaves: Sequence[str] = ("process",),
    trace_points: int = 1200,
    audit: Mapping[str, Any] | None = None,
    words: str = "",
) -> Results:
    """One :class:`Results`; ``words`` is put into every free text, to see what a hostile one does."""
    rng = np.random.default_rng(7)
    cases: list[CaseResult] = []
    for model in models:
        cases += [_result(case, rng, words) for case in _cases(model, modes, parts, enclaves)]
    traces = [point for each in cases for point in _trace(each, trace_points, rng, words)]
    layers = [row for each in cases if each.case.mode == "asymmetric" for row in _layers(each.case, rng, words)]
    plans = {str(each.case): _plan(each.case, words) for each in cases if each.case.mode != "native"}
    run = Run(
        time="2030-01-02T03:04:05Z",
        asked={"suite": "classic", "repeats": 11, "words": words or "none"},
        machine=_machine(words),
        packages={"python": "3.11.2", "motte": "0.1.0", "torch": "2.13.0" + words},
        revision=Revision("0" * 40, dirty=False),
        command=("motte", "bench", "infer", "--suite", "classic", words or "--out"),
        caveats=("Two cores, shared with other work." + words,),
    )
    return Results(tuple(cases), tuple(traces), tuple(layers), plans, (_record(run, words),), audit, run)


def _cases(model: str, modes: Sequence[str], parts: Sequence[int], enclaves: Sequence[str]) -> Iterator[Case]:
    for mode in modes:
        alone = mode in ("native", "accelerator")
        for enclave in ("none",) if alone else enclaves:
            for count in (1,) if alone or mode == "asymmetric" else parts:
                scheme = "rank8" if mode == "asymmetric" else ""
                yield Case(model=model, mode=mode, parts=count, batch=1, engine="torch", enclave=enclave, scheme=scheme)


def _result(case: Case, rng: np.random.Generator, words: str) -> CaseResult:
    native, ratio, weights = CLASSICS.get(case.model, (0.05, 5.0, 20))
    factor = {"native": 1.0, "resident": ratio, "streamed": ratio * 1.3, "asymmetric": ratio / 3, "accelerator": 0.6}
    slower = factor[case.mode] * (1.2 if case.enclave == "gramine-sgx" else 1.0)
    samples = tuple(float(value) for value in native * slower * rng.lognormal(0, 0.05, 15))
    inside = case.mode not in ("native", "accelerator")
    held = {"native": 1.4, "accelerator": 0.2, "asymmetric": 0.9}.get(case.mode, 1.2)
    peak = int(
        (120 + held * weights * (1.0 if case.mode != "streamed" else 1.5 / case.parts)) * MIB * rng.uniform(1, 1.05)
    )
    segments = {name: float(rng.uniform(0.05, 2)) for name in SEGMENTS if inside or name in ("load", "first", "steady")}
    values: dict[str, Any] = {
        "ratio": None
        if case.mode == "native"
        else Ratio(str(case), "native", slower, slower * 0.97, slower * 1.04, 0.95),
        "peak_memory_bytes": peak,
        "mean_memory_bytes": int(peak * 0.9),
        "weight_memory_bytes": weights * MIB if case.mode != "accelerator" else None,
        "memory_bound_bytes": max(1, int(weights * MIB * 1.5 / case.parts)) if inside else None,
        "cpu_percent": float(rng.uniform(80, 190)),
        "energy_j": None,
        "power_w": None,
        "accuracy": None,
        "bytes_out": {"asymmetric": 9_000_000, "accelerator": 60_000_000}.get(case.mode, 0),
        "bytes_in": {"asymmetric": 8_000_000, "accelerator": 4_000}.get(case.mode, 0),
        "trusted_flops": 4_000_000_000 if inside else 0,
        "outside_flops": 3_000_000_000 if case.mode in ("asymmetric", "accelerator") else 0,
        "exposed": {"asymmetric": 0.13, "accelerator": 1.0, "native": None}.get(case.mode, 0.0),
    }
    why = {"energy_j": NO_POWER, "power_w": NO_POWER, "accuracy": NO_LABELS, "ratio": "the baseline"}
    absent = [name for name in NULLABLE if values[name] is None] + [name for name in SEGMENTS if name not in segments]
    missing = {name: why.get(name, "nothing of the kind happens in this mode") + words for name in absent}
    return CaseResult(
        case=case, simulated=case.enclave == "process", threads=2, dtype="float32" + words,
        seconds=Series(str(case), samples), segments=segments, missing=missing, **values,
    )  # fmt: skip


def _trace(result: CaseResult, count: int, rng: np.random.Generator, words: str) -> Iterator[TracePoint]:
    names = [name for name in SEGMENTS if name in result.segments]
    peak = result.peak_memory_bytes or 1
    noise = rng.uniform(-1, 1, (count, 2))
    for at in range(count):
        share = (at + 1) / count
        values: dict[str, Any] = {
            "cpu_percent": max(0.0, (result.cpu_percent or 0) + 20 * float(noise[at, 0])),
            "rss_bytes": int(peak * min(1.0, 0.3 + share + 0.02 * float(noise[at, 1]))),
            "page_faults": 1000 + 3 * at,
            "context_switches": 10 + at,
        }
        absent = dict.fromkeys((name for name in TRACED if name not in values), NO_POWER + words)
        yield TracePoint(
            case=result.case, time_s=0.05 * (at + 1), segment=names[min(len(names) - 1, at * len(names) // count)],
            **{name: values.get(name) for name in TRACED}, missing=absent,
        )  # fmt: skip


def _layers(case: Case, rng: np.random.Generator, words: str) -> Iterator[LayerTime]:
    for index in range(1, 9):
        trusted, transfer, wait = (float(value) for value in rng.uniform(1e-4, 4e-3, 3))
        yield LayerTime(
            case=case, layer=f"layer{index}.conv{words}", direction="forward", trusted_s=trusted, transfer_s=transfer,
            accelerator_s=wait * 0.7, wait_s=wait, bytes_out=120_000, bytes_in=110_000,
        )  # fmt: skip


def _plan(case: Case, words: str) -> PlanDrawing:
    _, _, weights = CLASSICS.get(case.model, (0.05, 5.0, 20))
    shares = np.linspace(1, 3, case.parts)
    sizes = shares / shares.sum() * weights * MIB
    side = "outside" if case.mode == "accelerator" else "trusted"
    outside = tuple(f"layer{index}.conv{words}" for index in range(1, 9)) if case.mode == "asymmetric" else ()
    parts = tuple(
        PlanPart(
            first=f"features.{index}.conv{words}", last=f"features.{index}.relu", nodes=3 + index,
            weight_bytes=int(size), activation_bytes=(case.parts - index) * MIB // 4, side=side, outside=outside,
        )
        for index, size in enumerate(sizes)
    )  # fmt: skip
    return PlanDrawing(
        objective="the largest part as small as possible" + words, parts=parts,
        memory_bound_bytes=int(max(sizes) * 1.2) if case.parts > 1 else None,
    )  # fmt: skip


def _machine(words: str) -> Machine:
    return Machine(
        cpu_model="Made-up CPU @ 2.10GHz" + words, architecture="x86_64", logical_cores=2, physical_cores=1,
        usable_cores=2, governor=None, memory_bytes=24 << 30, kernel="6.1.0", virtual=True,
    )  # fmt: skip


def _record(run: Run, words: str) -> Record:
    return Record(
        time=run.time, series="bench_infer", what="steady: request sent until answer open" + words, value=0.079,
        unit="s", statistic="median", samples=(0.078, 0.079, 0.081), interval=None,
        parameters={"model": "resnet50", "mode": "resident", "parts": 12, "batch": 1}, segments=Segments(()),
        setting=Setting(threads=2, dtype="float32", device="cpu", engine="torch", enclave=PROCESS),
        machine=run.machine, packages=dict(run.packages), revision=run.revision, command=run.command,
    )  # fmt: skip
