"""What named processes used over time, segment by segment: the samples, and how they become rows of a table.

A trace is of the processes under test and of nothing else. It has a start and a stop mark for every segment, and what
lies outside of all segments is in no row. Segments come in the order of :data:`SEGMENTS` and never overlap, so that no
inference can begin before its bundle is open, or be timed from before its input was read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from motte.errors import MeasureError
from motte.measure.clock import Segment
from motte.measure.sampling import NOT_AT_MARK, ProcessSample
from motte.measure.self_report import SelfReport

SEGMENTS: Final = ("build", "sign", "start", "attest", "open", "load", "first", "steady")
"""In order of time; docs/spec/records.md says from where to where each runs."""
TRACED: Final = (
    "cpu_percent",
    "rss_bytes",
    "pss_bytes",
    "model_bytes",
    "page_faults",
    "context_switches",
    "link_bytes",
    "power_w",
    "energy_j",
    "gpu_percent",
    "gpu_memory_bytes",
    "gpu_power_w",
)
"""Figures of a row that may be None, with a reason."""
NO_RATE: Final = "the first sample of a process has no earlier one to compare with"
NOT_COUNTED: Final = "no link of this case is counted"
NOT_TOLD: Final = "the worker tells it at marks only"
_ENDED: Final = "all processes have ended"
_MIN_RATE_NS: Final = 2_000_000
"""Of two samples closer than this no rate is formed: a mark may fall right behind a sample."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a process said of itself at a mark: its own figures, and the memory of the model alone in bytes."""

    report: SelfReport | None = None
    model_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """All watched processes at one moment. ``mark``: the segment whose start or stop mark this is; empty in between.

    ``processes``: name -> its figures; None: it has ended. Energy and GPU: see :mod:`motte.measure.energy` and
    :mod:`motte.measure.gpu`; ``why``: why one of those is None, under its name.
    """

    time_ns: int
    processes: Mapping[str, ProcessSample | None]
    energy_j: float | None = None
    gpu_percent: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_power_w: float | None = None
    link_bytes: int | None = None
    mark: str = ""
    told: Mapping[str, Told] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row: the figures of :data:`TRACED`, summed over the processes; see ``motte.bench.case.TracePoint``."""

    time_s: float
    segment: str
    figures: Mapping[str, float | int | None]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Trace:
    """Samples in order of time, and the stretches that were marked. A segment may have several stretches.

    Raises:
        MeasureError: samples or stretches out of order, stretches that overlap, an unknown segment, a segment that
            begins before an earlier one of :data:`SEGMENTS` has ended.
    """

    samples: tuple[Sample, ...]
    stretches: tuple[Segment, ...]

    def __post_init__(self) -> None:
        for sample, later in zip(self.samples, self.samples[1:], strict=False):
            if later.time_ns <= sample.time_ns:
                raise MeasureError("samples out of order", got=f"{later.time_ns} ns after {sample.time_ns} ns")
        for stretch, after in zip(self.stretches, self.stretches[1:], strict=False):
            if after.start_ns < stretch.stop_ns:
                raise MeasureError("stretches overlap", got=f"{stretch.name} and {after.name}")
        check_order([stretch.name for stretch in self.stretches])

    def seconds(self, segment: str) -> float:
        """How long all stretches of ``segment`` took together; one that was not marked is an error, never a zero."""
        return sum(stretch.seconds for stretch in self._of(segment))

    def segments(self) -> dict[str, float]:
        """Seconds by segment, of those that were marked."""
        names = dict.fromkeys(stretch.name for stretch in self.stretches)
        return {name: self.seconds(name) for name in names}

    def cpu_percent(self, segment: str) -> float | None:
        """Processor time of all processes in ``segment``, from mark to mark; 100: one core busy. None: hidden."""
        used = self._difference(segment, lambda sample: sample.cpu_s)
        return None if used is None else 100 * used / self.seconds(segment)

    def mean_memory_bytes(self, segment: str) -> int | None:
        """The mean of the resident sets' sum over the samples of ``segment``, its marks included. None: hidden."""
        sums = [_sum(_filled(sample).values(), "rss_bytes") for sample in self._in(segment)]
        known = [each for each in sums if each is not None]
        return round(sum(known) / len(known)) if known and len(known) == len(sums) else None

    def peak_memory_bytes(self) -> int | None:
        """The sum of each process's own high-water mark: never less than what was held at once. None: hidden."""
        peaks: dict[str, int] = {}
        held: dict[str, int] = {}
        for sample in self.samples:
            for name, process in _filled(sample).items():
                peaks[name] = max(peaks.get(name, 0), process.peak_rss_bytes or 0)
                # Of a process that ended before a mark could read its own.
                held[name] = max(held.get(name, 0), process.rss_bytes or 0)
        if not peaks or 0 in peaks.values():
            return None
        return sum(max(peak, held[name]) for name, peak in peaks.items())

    def energy_j(self, segment: str) -> float | None:
        """What the processor packages took in ``segment``, everything that ran beside included. None: not to be had."""
        total = 0.0
        for first, last in self._ends(segment):
            if first.energy_j is None or last.energy_j is None:
                return None
            total += last.energy_j - first.energy_j
        return total

    def why(self, figure: str) -> str:
        """Why ``figure`` of :data:`TRACED` is None somewhere in this trace."""
        for point in self.points():
            if figure in point.missing:
                return point.missing[figure]
        return "no sample was taken"

    def points(self) -> tuple[Point, ...]:
        """A row for every sample that lies in a segment, its marks included."""
        return self._points

    @cached_property
    def _points(self) -> tuple[Point, ...]:
        began = min((sample.time_ns for sample in self.samples), default=0)
        starts = [stretch.start_ns for stretch in self.stretches]
        base: dict[str, ProcessSample] = {}
        points: list[Point] = []
        before: Sample | None = None
        zero = next((s.link_bytes for s in self.samples if s.link_bytes is not None), None)
        joules = next((s.energy_j for s in self.samples if s.energy_j is not None), None)
        counted = _Counters(zero, joules, base)
        for sample in self.samples:
            for name, process in _filled(sample).items():
                base.setdefault(name, process)
            segment = sample.mark or self._segment_at(sample.time_ns, starts)
            if segment is not None:
                figures, missing = counted.row(sample, before)
                points.append(
                    Point(time_s=(sample.time_ns - began) / 1e9, segment=segment, figures=figures, missing=missing)
                )
            counted.pass_over(sample)
            before = sample
        return tuple(points)

    def _of(self, segment: str) -> list[Segment]:
        found = [stretch for stretch in self.stretches if stretch.name == segment]
        if not found:
            known = ", ".join(dict.fromkeys(stretch.name for stretch in self.stretches)) or "none"
            raise MeasureError("no such segment was marked", expected=f"one of: {known}", got=segment)
        return found

    def _segment_at(self, time_ns: int, starts: Sequence[int]) -> str | None:
        place = bisect_right(starts, time_ns) - 1
        inside = place >= 0 and time_ns <= self.stretches[place].stop_ns
        return self.stretches[place].name if inside else None

    def _in(self, segment: str) -> list[Sample]:
        stretches = self._of(segment)
        return [
            sample
            for sample in self.samples
            if sample.mark == segment
            or (not sample.mark and any(each.start_ns <= sample.time_ns <= each.stop_ns for each in stretches))
        ]

    def _ends(self, segment: str) -> list[tuple[Sample, Sample]]:
        """The samples of the start mark and of the stop mark of every stretch."""
        marks = [sample for sample in self.samples if sample.mark == segment]
        stretches = self._of(segment)
        ends = []
        for stretch in stretches:
            first = [sample for sample in marks if sample.time_ns <= stretch.start_ns]
            last = [sample for sample in marks if sample.time_ns >= stretch.stop_ns]
            if not first or not last:
                raise MeasureError("a segment without its marks", where=segment)
            ends.append((first[-1], last[0]))
        return ends

    def _difference(self, segment: str, figure: Callable[[ProcessSample], float | None]) -> float | None:
        total = 0.0
        for first, last in self._ends(segment):
            earlier = _filled(first)
            for name, process in _filled(last).items():
                # A process that was started within the segment is counted from its first sample there.
                start = earlier.get(name) or self._first(name)
                now, then = figure(process), None if start is None else figure(start)
                if now is None or then is None:
                    return None
                total += now - then
        return total

    def _first(self, name: str) -> ProcessSample | None:
        for sample in self.samples:
            if (found := _filled(sample).get(name)) is not None:
                return found
        return None


class _Counters:
    """Counts since the start of the case, and rates since the sample before."""

    def __init__(self, link: int | None, joules: float | None, base: Mapping[str, ProcessSample]) -> None:
        self._link = link
        self._joules = joules
        self._base = base
        self._ended: dict[str, ProcessSample] = {}

    def pass_over(self, sample: Sample) -> None:
        """Remember what each process had used: it stays counted after its end."""
        for name, process in _filled(sample).items():
            before = self._ended.get(name)
            if process.context_switches is None and before is not None:
                # Read at marks only: the last count stands until the next.
                process = replace(process, context_switches=before.context_switches)
            self._ended[name] = process

    def row(self, sample: Sample, before: Sample | None) -> tuple[dict[str, float | int | None], dict[str, str]]:
        """The figures of one row, and the reasons of those that are None."""
        now = _filled(sample)
        figures: dict[str, float | int | None] = dict.fromkeys(TRACED)
        missing: dict[str, str] = {}
        for name in ("rss_bytes", "pss_bytes"):
            figures[name] = _sum(now.values(), name)
            if figures[name] is None:
                missing[name] = _reason(now, name)
        for name in ("page_faults", "context_switches"):
            figures[name] = self._since_start(now, name)
            if figures[name] is None:
                missing[name] = _reason(now, name)
        figures["cpu_percent"] = _rate(sample, before, now)
        if figures["cpu_percent"] is None:
            missing["cpu_percent"] = _reason(now, "cpu_s", otherwise=NO_RATE if now else _ENDED)
        told = [each.model_bytes for each in sample.told.values() if each.model_bytes is not None]
        figures["model_bytes"] = sum(told) if told else None
        if not told:
            missing["model_bytes"] = NOT_TOLD
        if sample.link_bytes is None or self._link is None:
            missing["link_bytes"] = NOT_COUNTED
        else:
            figures["link_bytes"] = sample.link_bytes - self._link
        self._devices(sample, before, figures, missing)
        return figures, missing

    def _since_start(self, now: Mapping[str, ProcessSample], name: str) -> int | None:
        total = 0
        for process, latest in {**self._ended, **now}.items():
            value, first = getattr(latest, name), getattr(self._base.get(process), name, None)
            if value is None or first is None:
                return None
            total += value - first
        return total

    def _devices(
        self, sample: Sample, before: Sample | None, figures: dict[str, float | int | None], missing: dict[str, str]
    ) -> None:
        if sample.energy_j is None or self._joules is None:
            missing |= dict.fromkeys(("energy_j", "power_w"), sample.why.get("energy_j", "no earlier reading"))
        else:
            figures["energy_j"] = sample.energy_j - self._joules
            apart_ns = 0 if before is None else sample.time_ns - before.time_ns
            if before is None or before.energy_j is None or apart_ns < _MIN_RATE_NS:
                missing["power_w"] = "no earlier reading to compare with"
            else:
                figures["power_w"] = (sample.energy_j - before.energy_j) / (apart_ns / 1e9)
        for name in ("gpu_percent", "gpu_memory_bytes", "gpu_power_w"):
            figures[name] = getattr(sample, name)
            if figures[name] is None:
                missing[name] = sample.why.get("gpu", "NVML does not tell it")


def check_order(names: Sequence[str]) -> None:
    """Refuse an unknown segment, and one that comes after a later one of :data:`SEGMENTS`.

    Raises:
        MeasureError: such a segment.
    """
    latest = 0
    for name in names:
        if name not in SEGMENTS:
            raise MeasureError("unknown segment", expected=" or ".join(SEGMENTS), got=repr(name)[:80])
        if SEGMENTS.index(name) < latest:
            raise MeasureError("a segment after a later one", expected=f"{name} before {SEGMENTS[latest]}", got=name)
        latest = SEGMENTS.index(name)


def _rate(sample: Sample, before: Sample | None, now: Mapping[str, ProcessSample]) -> float | None:
    if before is None or sample.time_ns - before.time_ns < _MIN_RATE_NS:
        return None
    earlier = _filled(before)
    used = []
    for name, process in now.items():
        start = earlier.get(name)
        if start is None or start.cpu_s is None or process.cpu_s is None:
            return None
        used.append(process.cpu_s - start.cpu_s)
    return max(0.0, 100 * sum(used) / ((sample.time_ns - before.time_ns) / 1e9)) if used else None


def _filled(sample: Sample) -> dict[str, ProcessSample]:
    """The processes that lived, hidden figures filled in with what they told of themselves at this mark."""
    return {
        name: _with_report(process, sample.told[name].report if name in sample.told else None)
        for name, process in sample.processes.items()
        if process is not None
    }


def _with_report(process: ProcessSample, report: SelfReport | None) -> ProcessSample:
    if report is None:
        return process
    merged: dict[str, Any] = {}
    why = dict(process.why)
    for name in ("cpu_s", "rss_bytes", "peak_rss_bytes", "pss_bytes", "page_faults", "context_switches"):
        seen = getattr(process, name)
        merged[name] = getattr(report, name) if seen is None else seen
        if merged[name] is not None:
            why.pop(name, None)
    return ProcessSample(**merged, why=why)


def _sum(processes: Iterable[ProcessSample], name: str) -> int | None:
    values = [getattr(process, name) for process in processes]
    return None if not values or None in values else sum(values)


def _reason(now: Mapping[str, ProcessSample], name: str, *, otherwise: str = _ENDED) -> str:
    for process, sample in now.items():
        if getattr(sample, name) is None:
            why = sample.why.get(name, "the kernel does not tell it")
            return why if why == NOT_AT_MARK else f"{process}: {why}"
    return otherwise
