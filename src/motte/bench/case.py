"""What a run of the benches measured, as data: cases, results, traces, per-layer times, drawings of plans.

Import these names from :mod:`motte.bench.results`. Everywhere: a figure that is not there is None **and** has a reason
in ``missing``; nothing else can be constructed. Zero means zero.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from motte.errors import MeasureError
from motte.limits import MAX_RECORD_TEXT_BYTES
from motte.measure.compare import Ratio, Series
from motte.measure.machine import Machine, examine_machine
from motte.measure.provenance import Revision, command_line, package_versions, revision
from motte.measure.record import Enclave, Record, check_number, check_text
from motte.measure.traces import SEGMENTS as _SEGMENTS
from motte.measure.traces import TRACED as _TRACED

MODES: Final = ("native", "resident", "streamed", "asymmetric", "accelerator")
"""``native``: the plain engine, no worker. ``resident``, ``streamed``: all parts in the worker, open all at once or in
turn. ``asymmetric``: linear layers split with an accelerator. ``accelerator``: everything outside, nothing protected.
"""
SEGMENTS: Final = _SEGMENTS
"""In order of time; docs/spec/records.md says from where to where each runs."""
TRACED: Final = _TRACED
"""Columns of a trace that may be None, with a reason."""
DIRECTIONS: Final = ("forward", "backward")
SIDES: Final = ("trusted", "outside")
RESERVED: Final = ("summary", "layers")
"""No model is called so: these are the names of other tables of the folder."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
_MAX_COUNT: Final = (1 << 53) - 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """The key of every row. ``str(case)`` is a slug that is safe as a file name and tells any two cases apart.

    ``enclave``: a kind of :data:`motte.measure.record.ENCLAVE_KINDS`, ``none`` where nothing trusted runs; ``parts`` is
    1 for the whole model. ``scheme`` tells two asymmetric cases apart ("rank8", "rank8-noise"); empty where there is
    one alone.

    Raises:
        MeasureError: a word that is no file name, an unknown mode or enclave, a count below 1, a native enclave.
    """

    model: str
    mode: str
    parts: int
    batch: int
    engine: str
    enclave: str
    scheme: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "engine"):
            _check_word(getattr(self, name), f"case.{name}")
        if self.scheme:
            _check_word(self.scheme, "case.scheme")
        if self.model.lower() in RESERVED:
            raise MeasureError("no model may be called so", where="case.model", got=self.model)
        _check_choice(self.mode, MODES, "case.mode")
        for name in ("parts", "batch"):
            _check_count(getattr(self, name), f"case.{name}", low=1)
        Enclave(self.enclave, simulated=self.enclave in ("process", "gramine-direct"))  # refuses an unknown kind
        if self.mode == "native" and self.enclave != "none":
            raise MeasureError("a native case has no enclave", where="case.enclave", expected="none", got=self.enclave)

    def __str__(self) -> str:
        words = [self.model, self.mode, f"p{self.parts}", f"b{self.batch}", self.engine, self.enclave, self.scheme]
        return "-".join(word for word in words if word)


NULLABLE: Final = (
    "ratio",
    "peak_memory_bytes",
    "mean_memory_bytes",
    "weight_memory_bytes",
    "memory_bound_bytes",
    "cpu_percent",
    "energy_j",
    "power_w",
    "accuracy",
    "bytes_out",
    "bytes_in",
    "trusted_flops",
    "outside_flops",
    "exposed",
)
"""Fields of :class:`CaseResult` that may be None; ``missing`` says why, under this name or that of a segment."""
_COUNTS: Final = frozenset(name for name in NULLABLE if name.endswith(("_bytes", "_flops", "bytes_out", "bytes_in")))


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What one case cost. Units are in the names, see docs/spec/records.md; memory is of the processes under test.

    ``seconds``: steady latencies of one request each, input decoded before it begins, in the order of the rounds.
    ``ratio``: over the native case of the same model, batch and engine; None for that case itself ("the baseline").
    ``missing``: name of a None field, or of a segment that is not in ``segments`` -> why there is no figure.
    ``exposed``: share of the activations' energy that left, 0 to 1.

    Raises:
        MeasureError: a None without a reason, a reason without a None, a figure that is not finite or out of range.
    """

    case: Case
    simulated: bool
    threads: int
    dtype: str
    seconds: Series
    ratio: Ratio | None
    segments: Mapping[str, float]
    peak_memory_bytes: int | None
    mean_memory_bytes: int | None
    weight_memory_bytes: int | None
    memory_bound_bytes: int | None
    cpu_percent: float | None
    energy_j: float | None
    power_w: float | None
    accuracy: float | None
    bytes_out: int | None
    bytes_in: int | None
    trusted_flops: int | None
    outside_flops: int | None
    exposed: float | None
    missing: Mapping[str, str]

    def __post_init__(self) -> None:
        where = str(self.case)
        Enclave(self.case.enclave, simulated=self.simulated)
        _check_count(self.threads, f"{where}.threads", low=1)
        check_text(self.dtype, f"{where}.dtype")
        if not self.seconds.samples:
            raise MeasureError("a case without a sample was not measured", where=f"{where}.seconds")
        for sample in self.seconds.samples:
            _check_figure(sample, f"{where}.seconds")
        for name, seconds in self.segments.items():
            _check_choice(name, SEGMENTS, f"{where}.segments")
            _check_figure(seconds, f"{where}.segments.{name}")
        for name in NULLABLE[1:]:
            _check_optional(getattr(self, name), name in _COUNTS, f"{where}.{name}")
        if self.ratio is not None:
            for name in ("median", "low", "high", "confidence"):
                _check_figure(getattr(self.ratio, name), f"{where}.ratio.{name}")
        for name in ("exposed", "accuracy"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise MeasureError("a share is at most 1", where=f"{where}.{name}", got=repr(value))
        absent = {name for name in NULLABLE if getattr(self, name) is None} | (set(SEGMENTS) - set(self.segments))
        _check_missing(absent, self.missing, where)


_TRACED_COUNTS: Final = frozenset(TRACED) - {"cpu_percent", "power_w", "energy_j", "gpu_percent", "gpu_power_w"}


@dataclass(frozen=True, kw_only=True)
class TracePoint:
    """One sample of the processes of one case, summed over them; of nothing else, but for power and energy.

    ``time_s``: since the first mark of the case. ``segment``: one of :data:`SEGMENTS`. ``cpu_percent``: since the
    sample before, 100 = one core busy. ``page_faults``, ``context_switches``, ``link_bytes``, ``energy_j``: counted
    since the start of the case. ``model_bytes``: memory of the model alone, as the worker says. ``power_w``,
    ``energy_j``, ``gpu_power_w``: of whole devices, which know no processes. ``missing``: name of a None -> why.

    Raises:
        MeasureError: as :class:`CaseResult`.
    """

    case: Case
    time_s: float
    segment: str
    cpu_percent: float | None
    rss_bytes: int | None
    pss_bytes: int | None
    power_w: float | None
    page_faults: int | None
    context_switches: int | None
    link_bytes: int | None
    model_bytes: int | None = None
    energy_j: float | None = None
    gpu_percent: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_power_w: float | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"{self.case} at {self.time_s} s"
        _check_figure(self.time_s, where)
        _check_choice(self.segment, SEGMENTS, f"{where}.segment")
        for name in TRACED:
            _check_optional(getattr(self, name), name in _TRACED_COUNTS, f"{where}.{name}")
        _check_missing({name for name in TRACED if getattr(self, name) is None}, self.missing, where)


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Where the time of one split layer went in one direction of a step: median over the steady steps, in seconds.

    ``trusted_s``: arithmetic inside. ``transfer_s``: copying out and in. ``accelerator_s``: what the accelerator says
    that it computed (**unverified**). ``wait_s``: spent waiting for it. ``bytes_out``, ``bytes_in``: of tensors.
    """

    case: Case
    layer: str
    direction: str
    trusted_s: float
    transfer_s: float
    accelerator_s: float
    wait_s: float
    bytes_out: int
    bytes_in: int

    def __post_init__(self) -> None:
        where = f"{self.case}.{self.layer}"
        if check_text(self.layer, where)[0] in "=+-@":
            raise MeasureError("a spreadsheet would run this name as a formula", where=where, got=repr(self.layer)[:80])
        _check_choice(self.direction, DIRECTIONS, f"{where}.direction")
        for name in ("trusted_s", "transfer_s", "accelerator_s", "wait_s"):
            _check_figure(getattr(self, name), f"{where}.{name}")
        for name in ("bytes_out", "bytes_in"):
            _check_count(getattr(self, name), f"{where}.{name}")


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """One part of a plan as it is drawn: ``first`` and ``last`` node, how many nodes, sizes in bytes.

    ``side``: where the part as a whole runs; ``outside``: names of its linear layers that run split.
    """

    first: str
    last: str
    nodes: int
    weight_bytes: int
    activation_bytes: int
    side: str
    outside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("first", "last", *self.outside):
            check_text(getattr(self, name, name), "plan part")
        _check_choice(self.side, SIDES, "plan part.side")
        for name in ("nodes", "weight_bytes", "activation_bytes"):
            _check_count(getattr(self, name), f"plan part.{name}")


@dataclass(frozen=True, kw_only=True)
class PlanDrawing:
    """The parts of one case in the order in which they run. ``objective``: what the cuts were chosen by."""

    objective: str
    parts: tuple[PlanPart, ...]
    memory_bound_bytes: int | None = None

    def __post_init__(self) -> None:
        check_text(self.objective, "plan.objective")
        if not self.parts:
            raise MeasureError("a plan has at least one part", where="plan.parts")
        if self.memory_bound_bytes is not None:
            _check_count(self.memory_bound_bytes, "plan.memory_bound_bytes")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was asked, and on what it ran. ``asked``: JSON values; ``caveats``: sentences that a reader has to know."""

    time: str
    asked: Mapping[str, Any]
    machine: Machine
    packages: Mapping[str, str]
    revision: Revision | None
    command: tuple[str, ...]
    caveats: tuple[str, ...] = ()


def state_run(asked: Mapping[str, Any], *, caveats: Sequence[str] = ()) -> Run:
    """A :class:`Run` of this process, on this machine, now.

    Raises:
        ResourceError: the machine's facts are not readable.
    """
    return Run(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        asked=dict(asked),
        machine=examine_machine(),
        packages=package_versions(),
        revision=revision(),
        command=command_line(),
        caveats=tuple(caveats),
    )


@dataclass(frozen=True)
class Results:
    """All of one run. ``plans``: ``str(case)`` -> its parts. ``audit``: what ``motte audit`` wrote, **unverified**.

    Raises:
        MeasureError: two results of one case; a trace, layer or plan of a case that has no result; a trace that goes
            back in time; two cases with the very same trace, which two measurements never are.
    """

    cases: tuple[CaseResult, ...]
    traces: tuple[TracePoint, ...]
    layers: tuple[LayerTime, ...]
    plans: Mapping[str, PlanDrawing]
    records: tuple[Record, ...]
    audit: Mapping[str, Any] | None
    run: Run

    def __post_init__(self) -> None:
        slugs = [str(result.case) for result in self.cases]
        _refuse_repeated(slugs, "two results of one case")
        # A file system may not tell AlexNet from alexnet, and each model has a table of its own.
        spellings = {result.case.model for result in self.cases}
        _refuse_repeated([name.lower() for name in spellings], "two models whose tables would have one name")
        known = set(slugs)
        named = [*(str(p.case) for p in self.traces), *(str(layer.case) for layer in self.layers), *self.plans]
        for slug in named:
            if slug not in known:
                raise MeasureError("a trace, layer or plan of a case without a result", got=slug)
        _refuse_repeated([(each.case, each.layer, each.direction) for each in self.layers], "a layer twice")
        _check_traces(self.traces)

    def __getitem__(self, case: Case) -> CaseResult:
        """The result of ``case``; a missing one is an error."""
        for result in self.cases:
            if result.case == case:
                return result
        raise MeasureError("this case was not measured", got=str(case))

    def trace(self, case: Case) -> tuple[TracePoint, ...]:
        """The samples of ``case`` in order of time; empty when it was not traced."""
        return tuple(point for point in self.traces if point.case == case)

    @property
    def simulated(self) -> bool:
        """Whether any case ran its trusted side without hardware protection."""
        return any(result.simulated for result in self.cases)


def _check_traces(points: Sequence[TracePoint]) -> None:
    by_case: dict[Case, list[TracePoint]] = {}
    for point in points:
        trace = by_case.setdefault(point.case, [])
        if trace and point.time_s <= trace[-1].time_s:
            raise MeasureError("a trace goes back in time", where=str(point.case), got=f"{point.time_s} s")
        trace.append(point)
    seen: dict[tuple[tuple[object, ...], ...], Case] = {}
    for case, trace in by_case.items():
        figures = tuple((p.time_s, p.segment, *(getattr(p, name) for name in TRACED)) for p in trace)
        if len(figures) >= 3 and figures in seen:
            raise MeasureError("one series stands under two cases", where=str(seen[figures]), got=str(case))
        seen[figures] = case


def _refuse_repeated(keys: Sequence[object], message: str) -> None:
    seen: set[object] = set()
    for key in keys:
        if key in seen:
            raise MeasureError(message, got=str(key)[:200])
        seen.add(key)


def _check_word(value: object, where: str) -> None:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise MeasureError("not a word for a file name", where=where, expected=_WORD.pattern, got=repr(value)[:80])


def _check_choice(value: str, known: Sequence[str], where: str) -> None:
    if value not in known:
        raise MeasureError("unknown value", where=where, expected=" or ".join(known), got=repr(value)[:80])


def _check_count(value: object, where: str, *, low: int = 0) -> None:
    if type(value) is not int or not low <= value <= _MAX_COUNT:
        raise MeasureError("not a count", where=where, expected=f"{low} to {_MAX_COUNT}", got=repr(value)[:80])


def _check_figure(value: object, where: str) -> None:
    if check_number(value, where) < 0:
        raise MeasureError("a figure is negative", where=where, got=repr(value)[:80])


def _check_optional(value: object, count: bool, where: str) -> None:
    if value is None:
        return
    if count:
        _check_count(value, where)
    else:
        _check_figure(value, where)


def _check_missing(absent: Collection[str], reasons: Mapping[str, str], where: str) -> None:
    """Every None has a reason, and every reason a None."""
    if silent := sorted(set(absent) - set(reasons)):
        raise MeasureError("a figure is missing without a reason", where=where, got=", ".join(silent))
    if idle := sorted(set(reasons) - set(absent)):
        raise MeasureError("a reason for a figure that is there", where=where, got=", ".join(idle))
    for name, why in reasons.items():
        check_text(why, f"{where}.missing.{name}")
        if len(why.encode()) > MAX_RECORD_TEXT_BYTES // 4:
            raise MeasureError("a reason is too long", where=f"{where}.missing.{name}")
