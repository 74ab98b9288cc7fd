"""The tables of costs: time, memory and power, what left, and the segments of the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from motte.bench.results import SEGMENTS, CaseResult
from motte.limits import MIB
from motte.report import words
from motte.report.gathered import Gathered, Slice
from motte.report.html import Markup, joined, tag
from motte.report.tables import Cell, Column, absent, table

Row = tuple[Slice, CaseResult]


@dataclass(frozen=True, slots=True)
class _Key:
    """The first columns of every table. What is the same in all rows stands above the table instead."""

    columns: tuple[Column, ...]
    cells: Callable[[CaseResult], list[Cell]]
    shared: str

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Key:
        found: list[tuple[Column, Callable[[CaseResult], str | int]]] = [
            (Column("Batch"), lambda each: each.case.batch),
            (Column("Engine", number=False), lambda each: each.case.engine),
            (Column("Enclave", number=False), _enclave),
        ]
        shown, shared = [], []
        for column, read in found:
            values = {read(each) for _, each in rows if column.title != "Enclave" or each.case.enclave != "none"}
            if len(values) > 1:
                shown.append((column, read))
            elif values:
                shared.append(f"{column.title.lower()} {values.pop()}")

        def cells(result: CaseResult) -> list[Cell]:
            case = result.case
            way = words.way(case)
            further = [read(result) for _, read in shown]
            return [Cell(case.model, case.model), Cell(way, way), *(Cell(str(value), value) for value in further)]

        columns = (Column("Model", number=False), Column("How it ran", number=False), *(column for column, _ in shown))
        return cls(columns, cells, ", ".join(shared))


def _enclave(result: CaseResult) -> str:
    return result.case.enclave + (" (SIMULATED)" if result.simulated else "")


def cost_tables(data: Gathered) -> Markup:
    """Four tables with a heading each."""
    rows = [(one, each) for one in data.slices for each in one.results]
    key = _Key.of(rows)
    shared = tag("p", f"In all rows: {key.shared}.", class_="note") if key.shared else Markup("")
    return joined(
        shared,
        tag("h3", "Time"), _time(key, rows),
        tag("h3", "Memory, CPU and power"), _resources(key, rows),
        tag("h3", "What left, and accuracy"), _left(key, rows),
        tag("h3", "Segments, from build to the steady state"), _segments(key, rows),
    )  # fmt: skip


def _time(key: _Key, rows: Sequence[Row]) -> Markup:
    columns = (
        *key.columns, Column("Median", "s"), Column("Middle half", "s"), Column("Least", "s"), Column("Most", "s"),
        Column("Samples"), Column("Times native"), Column("95 % interval" if _usual(rows) else "Interval"),
    )  # fmt: skip
    body = [[*key.cells(each), *_latency(each)] for _, each in rows]
    return table("t-time", "Inference time of one request, steady", columns, body)


def _usual(rows: Sequence[Row]) -> bool:
    return all(each.ratio is None or each.ratio.confidence == 0.95 for _, each in rows)


def _latency(result: CaseResult) -> Iterator[Cell]:
    series, ratio = result.seconds, result.ratio
    low, high = (float(value) for value in np.percentile(series.samples, [25, 75]))
    yield _number(series.median)
    yield Cell(f"{words.digits(low)} to {words.digits(high)}", high - low)
    yield _number(series.minimum)
    yield _number(series.maximum)
    yield Cell(str(len(series.samples)), len(series.samples))
    if ratio is None:
        yield absent(result.missing["ratio"])
        yield absent(result.missing["ratio"])
        return
    yield Cell(words.digits(ratio.median), ratio.median)
    yield Cell(f"{words.digits(ratio.low)} to {words.digits(ratio.high)}", ratio.high - ratio.low)


def _resources(key: _Key, rows: Sequence[Row]) -> Markup:
    columns = (
        *key.columns, Column("Peak memory", "MiB"), Column("Times native"), Column("Mean memory", "MiB"),
        Column("Opened weights", "MiB"), Column("Bound", "MiB"), Column("CPU", "%"), Column("Power", "W"),
        Column("Energy", "J"),
    )  # fmt: skip
    body = []
    for one, each in rows:
        get = _reader(each)
        native = one.native.peak_memory_bytes if one.native is not None else None
        if native and each.peak_memory_bytes is not None:
            factor = each.peak_memory_bytes / native
            over_native = Cell(words.digits(factor), factor)
        else:
            over_native = absent("the peak of this case or of the native one is not known")
        body.append([
            *key.cells(each), get("peak_memory_bytes", 1 / MIB), over_native, get("mean_memory_bytes", 1 / MIB),
            get("weight_memory_bytes", 1 / MIB), get("memory_bound_bytes", 1 / MIB), get("cpu_percent"),
            get("power_w"), get("energy_j"),
        ])  # fmt: skip
    return table("t-resources", "Memory, CPU and power of the processes under test", columns, body)


def _left(key: _Key, rows: Sequence[Row]) -> Markup:
    columns = (
        *key.columns, Column("Sent out", "KiB"), Column("Came in", "KiB"), Column("Exposed", "% of energy"),
        Column("Trusted", "MFLOP"), Column("Outside", "MFLOP"), Column("Accuracy", "%"),
    )  # fmt: skip
    body = []
    for _, each in rows:
        get = _reader(each)
        body.append([
            *key.cells(each), get("bytes_out", 1 / 1024), get("bytes_in", 1 / 1024), get("exposed", 100),
            get("trusted_flops", 1e-6), get("outside_flops", 1e-6), get("accuracy", 100),
        ])  # fmt: skip
    return table("t-left", "What left the trusted side in one request", columns, body)


def _segments(key: _Key, rows: Sequence[Row]) -> Markup:
    columns = (*key.columns, *(Column(name.capitalize(), "s") for name in SEGMENTS))
    body = [
        [
            *key.cells(each),
            *(
                _number(each.segments[name]) if name in each.segments else absent(each.missing[name])
                for name in SEGMENTS
            ),
        ]
        for _, each in rows
    ]
    return table("t-segments", "Seconds of each segment", columns, body)


def _number(value: float) -> Cell:
    return Cell(words.digits(value), value)


def _reader(result: CaseResult) -> Callable[..., Cell]:
    def read(name: str, factor: float = 1.0) -> Cell:
        value = getattr(result, name)
        return absent(result.missing[name]) if value is None else Cell(words.digits(value * factor), value * factor)

    return read
