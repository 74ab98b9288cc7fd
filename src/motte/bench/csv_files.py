"""The tables of a folder of results: one of summaries, one of time series a model, one of layers.

CSV as in RFC 4180 with line feeds: one header row, the columns of docs/spec/records.md in their order, ``n/a`` where
there is no figure, and a last column ``missing`` that says why (a JSON object, column -> reason). Numbers are written
so that they read back to the bit. The reader takes exactly these columns and refuses everything else.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from motte.bench.case import NULLABLE, Case, CaseResult, LayerTime, TracePoint
from motte.errors import MeasureError, RecordError, ResourceError
from motte.limits import MAX_RECORD_TEXT_BYTES, MAX_TABLE_BYTES, MAX_TABLE_ROWS
from motte.measure.traces import SEGMENTS, TRACED
from motte.strict_json import Fields, canonical, parse

NOT_THERE: Final = "n/a"
CASE_COLUMNS: Final = ("model", "mode", "parts", "batch", "engine", "enclave", "scheme")
TRACE_COLUMNS: Final = (*CASE_COLUMNS, "time_s", "segment", *TRACED, "missing")
_LAYER_NUMBERS: Final = ("trusted_s", "transfer_s", "accelerator_s", "wait_s", "bytes_out", "bytes_in")
LAYER_COLUMNS: Final = (*CASE_COLUMNS, "layer", "direction", *_LAYER_NUMBERS)
SUMMARY_COLUMNS: Final = (
    *CASE_COLUMNS,
    "simulated",
    "threads",
    "dtype",
    "samples",
    "seconds",
    "seconds_minimum",
    "seconds_maximum",
    "seconds_spread",
    "native_seconds",
    "ratio",
    "ratio_low",
    "ratio_high",
    *(f"{name}_s" for name in SEGMENTS),
    *NULLABLE[1:],
    "missing",
)
_INTEGER = re.compile(r"0|[1-9][0-9]{0,15}")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
Row = Mapping[str, str]
T = TypeVar("T")


def summary_table(results: Sequence[CaseResult]) -> str:
    """One row a case; ``native_seconds`` is the median of the native case of the same model, batch and engine."""
    native = {_kin(each.case): each.seconds.median for each in results if each.case.mode == "native"}
    return _table(SUMMARY_COLUMNS, (_summary_row(each, native.get(_kin(each.case))) for each in results))


def trace_table(points: Iterable[TracePoint]) -> str:
    """One row a sample."""
    return _table(TRACE_COLUMNS, map(_trace_row, points))


def layer_table(layers: Iterable[LayerTime]) -> str:
    """One row a layer and direction."""
    return _table(LAYER_COLUMNS, map(_layer_row, layers))


def read_traces(path: Path) -> tuple[TracePoint, ...]:
    """The **unverified** time series of ``path``.

    Raises:
        RecordError: not such a table. ResourceError: it cannot be read.
    """
    return tuple(_rows(path, TRACE_COLUMNS, _read_point))


def read_layers(path: Path) -> tuple[LayerTime, ...]:
    """The **unverified** per-layer times of ``path``.

    Raises:
        RecordError: not such a table. ResourceError: it cannot be read.
    """
    return tuple(_rows(path, LAYER_COLUMNS, _read_layer))


def check_summary(path: Path, results: Sequence[CaseResult]) -> None:
    """Refuse a summary that does not say what ``results`` say: a cell may be spelt otherwise, not mean otherwise.

    Raises:
        RecordError: another number of rows, or another value. ResourceError: it cannot be read.
    """
    found = _rows(path, SUMMARY_COLUMNS, lambda row: row)
    expected = list(csv.DictReader(io.StringIO(summary_table(results)), strict=True))
    if len(found) != len(expected):
        raise RecordError("wrong number of rows", where=str(path), expected=str(len(expected)), got=str(len(found)))
    for number, (mine, theirs) in enumerate(zip(expected, found, strict=True), start=2):
        for name in SUMMARY_COLUMNS:
            if not _same(mine[name], theirs[name]):
                where = f"{path}:{number} {name}"
                raise RecordError("not what was measured", where=where, expected=mine[name], got=theirs[name][:200])


# --- writing -------------------------------------------------------------------------------------------------------
def _summary_row(result: CaseResult, native: float | None) -> dict[str, Any]:
    series, ratio = result.seconds, result.ratio
    missing = {f"{name}_s" if name in SEGMENTS else name: why for name, why in result.missing.items()}
    if ratio is None:
        missing |= dict.fromkeys(("ratio_low", "ratio_high"), missing["ratio"])
    if native is None:
        missing["native_seconds"] = "no native case of this model, batch and engine was run"
    return {
        **_case_cells(result.case),
        "simulated": result.simulated,
        "threads": result.threads,
        "dtype": result.dtype,
        "samples": len(series.samples),
        "seconds": series.median,
        "seconds_minimum": series.minimum,
        "seconds_maximum": series.maximum,
        "seconds_spread": series.spread,
        "native_seconds": native,
        "ratio": None if ratio is None else ratio.median,
        "ratio_low": None if ratio is None else ratio.low,
        "ratio_high": None if ratio is None else ratio.high,
        **{f"{name}_s": result.segments.get(name) for name in SEGMENTS},
        **{name: getattr(result, name) for name in NULLABLE[1:]},
        "missing": missing,
    }


def _trace_row(point: TracePoint) -> dict[str, Any]:
    own = {name: getattr(point, name) for name in ("time_s", "segment", *TRACED, "missing")}
    return {**_case_cells(point.case), **own}


def _layer_row(layer: LayerTime) -> dict[str, Any]:
    return {
        **_case_cells(layer.case),
        **{name: getattr(layer, name) for name in ("layer", "direction", *_LAYER_NUMBERS)},
    }


def _case_cells(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in CASE_COLUMNS}


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", strict=True)
    writer.writerow(columns)
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return NOT_THERE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(float(value))  # a numpy float writes its class into its repr
    if isinstance(value, Mapping):
        return canonical(dict(value)).decode("ascii") if value else ""
    return str(value)


def _kin(case: Case) -> tuple[str, int, str]:
    return case.model, case.batch, case.engine


# --- reading -------------------------------------------------------------------------------------------------------
def _rows(path: Path, columns: Sequence[str], read: Callable[[Row], T]) -> list[T]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except OSError as problem:
        raise ResourceError("the table cannot be read", where=str(path), got=problem.strerror) from problem
    if len(data) > MAX_TABLE_BYTES:
        raise RecordError("the table is too large", where=str(path), expected=f"at most {MAX_TABLE_BYTES} bytes")
    if not data.endswith(b"\n"):
        raise RecordError("the last row is incomplete", where=str(path))
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
        header = next(lines, [])
        if tuple(header) != tuple(columns):
            got = ",".join(header)[:200]
            raise RecordError("other columns", where=str(path), expected=",".join(columns), got=got)
        return [_one(read, cells, columns, f"{path}:{lines.line_num}") for cells in _bounded(lines, path)]
    except (csv.Error, UnicodeDecodeError) as problem:
        raise RecordError("not a table", where=str(path), got=str(problem)) from problem


def _bounded(lines: Iterable[list[str]], path: Path) -> Iterable[list[str]]:
    for number, cells in enumerate(lines):
        if number >= MAX_TABLE_ROWS:
            raise RecordError("too many rows", where=str(path), expected=f"at most {MAX_TABLE_ROWS}")
        yield cells


def _one(read: Callable[[Row], T], cells: list[str], columns: Sequence[str], where: str) -> T:
    if len(cells) != len(columns):
        raise RecordError("wrong number of cells", where=where, expected=str(len(columns)), got=str(len(cells)))
    if long := [name for name, cell in zip(columns, cells, strict=True) if len(cell) > 16 * MAX_RECORD_TEXT_BYTES]:
        raise RecordError("a cell is too long", where=f"{where} {long[0]}")
    try:
        return read(dict(zip(columns, cells, strict=True)))
    except (MeasureError, RecordError) as problem:
        at = where if problem.where is None else f"{where} {problem.where}"
        raise RecordError(problem.message, where=at, expected=problem.expected, got=problem.got) from problem


def _read_point(row: Row) -> TracePoint:
    fractions = ("cpu_percent", "power_w", "energy_j", "gpu_percent", "gpu_power_w")
    figures: dict[str, Any] = {
        name: (_optional_number if name in fractions else _optional_count)(row, name) for name in TRACED
    }
    return TracePoint(
        case=_read_case(row),
        time_s=_number(row, "time_s"),
        segment=row["segment"],
        missing=_read_missing(row["missing"]),
        **figures,
    )


def _read_layer(row: Row) -> LayerTime:
    seconds: dict[str, Any] = {name: _number(row, name) for name in _LAYER_NUMBERS[:4]}
    sizes: dict[str, Any] = {name: _count(row, name) for name in _LAYER_NUMBERS[4:]}
    return LayerTime(case=_read_case(row), layer=row["layer"], direction=row["direction"], **seconds, **sizes)


def _read_case(row: Row) -> Case:
    words = {name: row[name] for name in CASE_COLUMNS if name not in ("parts", "batch")}
    return Case(parts=_count(row, "parts"), batch=_count(row, "batch"), **words)


def _read_missing(cell: str) -> dict[str, str]:
    if not cell:
        return {}
    value = parse(cell, max_bytes=16 * MAX_RECORD_TEXT_BYTES, what="missing", error=RecordError)
    fields = Fields(value, where="missing", error=RecordError)
    found = {name: fields.text(name, max_bytes=MAX_RECORD_TEXT_BYTES) for name in list(value)}
    fields.done()
    return found


def _count(row: Row, name: str) -> int:
    if not _INTEGER.fullmatch(row[name]):
        raise RecordError("not a count", where=name, got=repr(row[name])[:80])
    return int(row[name])


def _number(row: Row, name: str) -> float:
    if not _NUMBER.fullmatch(row[name]):
        raise RecordError("not a number", where=name, got=repr(row[name])[:80])
    return float(row[name])


def _optional_count(row: Row, name: str) -> int | None:
    return None if row[name] == NOT_THERE else _count(row, name)


def _optional_number(row: Row, name: str) -> float | None:
    return None if row[name] == NOT_THERE else _number(row, name)


def _same(mine: str, theirs: str) -> bool:
    if mine == theirs:
        return True
    if _NUMBER.fullmatch(mine) and _NUMBER.fullmatch(theirs):
        return float(mine) == float(theirs)
    try:
        return bool(mine.startswith("{") and json.loads(mine) == json.loads(theirs))
    except ValueError:
        return False
