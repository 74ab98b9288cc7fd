"""From what a case was found to cost to the row that states it, with a reason for every figure that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from motte.bench.case import NULLABLE, SEGMENTS, Case, CaseResult
from motte.bench.interleave import Measured
from motte.bench.tracing import NOT_TRACED, Traced

NO_BASELINE: Final = "there is no native case of this model, batch and engine to compare it with"
OF_ITSELF: Final = "it is the baseline"


@dataclass(frozen=True)
class Books:
    """What a case held and sent, beside its times. None has its reason in ``missing``, by field of a result."""

    peak_memory_bytes: int | None = None
    weight_memory_bytes: int | None = None
    memory_bound_bytes: int | None = None
    bytes_out: int | None = None
    bytes_in: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything about a case but its series. ``segments`` without the steady one, which follows from the series.

    ``missing``: why a figure is None or a segment absent; what it does not name gets the reason ``otherwise``.
    """

    otherwise: str
    simulated: bool = False
    segments: Mapping[str, float] = field(default_factory=dict)
    books: Books = field(default_factory=Books)
    trace: Traced = NOT_TRACED
    accuracy: float | None = None
    trusted_flops: int | None = None
    outside_flops: int | None = None
    exposed: float | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def result_of(case: Case, facts: Facts, measured: Measured, *, threads: int, dtype: str) -> CaseResult:
    """The row of ``case``."""
    books, trace = facts.books, facts.trace
    segments = {**facts.segments, "steady": measured.seconds.median}
    figures = {
        "ratio": measured.ratio,
        "peak_memory_bytes": books.peak_memory_bytes,
        "mean_memory_bytes": trace.mean_memory_bytes,
        "weight_memory_bytes": books.weight_memory_bytes,
        "memory_bound_bytes": books.memory_bound_bytes,
        "cpu_percent": trace.cpu_percent,
        "energy_j": trace.energy_j,
        "power_w": trace.power_w,
        "accuracy": facts.accuracy,
        "bytes_out": books.bytes_out,
        "bytes_in": books.bytes_in,
        "trusted_flops": facts.trusted_flops,
        "outside_flops": facts.outside_flops,
        "exposed": facts.exposed,
    }
    reasons = {**trace.missing, **books.missing, **facts.missing}
    reasons["ratio"] = OF_ITSELF if case.mode == "native" else NO_BASELINE
    absent = [name for name in NULLABLE if figures[name] is None]
    absent += [name for name in SEGMENTS if name not in segments]
    return CaseResult(
        case=case,
        simulated=facts.simulated,
        threads=threads,
        dtype=dtype,
        seconds=measured.seconds,
        ratio=measured.ratio,
        segments=segments,
        peak_memory_bytes=books.peak_memory_bytes,
        mean_memory_bytes=trace.mean_memory_bytes,
        weight_memory_bytes=books.weight_memory_bytes,
        memory_bound_bytes=books.memory_bound_bytes,
        cpu_percent=trace.cpu_percent,
        energy_j=trace.energy_j,
        power_w=trace.power_w,
        accuracy=facts.accuracy,
        bytes_out=books.bytes_out,
        bytes_in=books.bytes_in,
        trusted_flops=facts.trusted_flops,
        outside_flops=facts.outside_flops,
        exposed=facts.exposed,
        missing={name: reasons.get(name, facts.otherwise) for name in absent},
    )
