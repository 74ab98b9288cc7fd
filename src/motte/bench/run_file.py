"""``run.json`` (``motte-bench/1``) and the drawings of plans (``motte-plan-drawing/1``): to JSON values and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from motte.bench.case import NULLABLE, Case, CaseResult, PlanDrawing, PlanPart, Run
from motte.errors import MeasureError, RecordError
from motte.limits import (
    MAX_PARTS,
    MAX_PLAN_LAYERS,
    MAX_RECORD_ENTRIES,
    MAX_RECORD_SAMPLES,
    MAX_RECORD_TEXT_BYTES,
    MAX_RESULT_CASES,
    MAX_RESULTS_FILE_BYTES,
)
from motte.measure.compare import Ratio, Series
from motte.measure.record_file import read_machine, read_revision
from motte.measure.traces import SEGMENTS
from motte.strict_json import Fields, canonical, parse

FORMAT: Final = "motte-bench/1"
PLAN_FORMAT: Final = "motte-plan-drawing/1"
T = TypeVar("T")
_MAX_INTEGER: Final = (1 << 53) - 1


@dataclass(frozen=True)
class RunFile:
    """What ``run.json`` holds. ``tables``: file name of each other table -> its rows; ``records``: at least so many."""

    run: Run
    cases: tuple[CaseResult, ...]
    tables: Mapping[str, int]
    plans: tuple[str, ...]
    records: int


def run_bytes(file: RunFile) -> bytes:
    """The one encoding of ``file``."""
    return canonical(
        {
            "format": FORMAT,
            "run": asdict(file.run),
            "cases": [asdict(result) for result in file.cases],
            "tables": dict(file.tables),
            "plans": list(file.plans),
            "records": file.records,
        }
    )


def read_run(data: bytes, *, where: str) -> RunFile:
    """Read **unverified** bytes.

    Raises:
        RecordError: anything that docs/spec/records.md does not allow.
    """
    fields = _parsed(data, where)
    fields.choice("format", (FORMAT,))
    tables = _mapping(fields, "tables", MAX_RESULT_CASES)
    try:
        found = RunFile(
            run=_read_run(fields.fields("run")),
            cases=tuple(fields.items("cases", max_items=MAX_RESULT_CASES, read=_read_result)),
            tables={name: _count(rows, f"{where}.tables") for name, rows in tables.items()},
            plans=tuple(fields.items("plans", max_items=MAX_RESULT_CASES, read=_text)),
            records=fields.integer("records", low=0, high=_MAX_INTEGER),
        )
    except MeasureError as problem:
        raise _as_ours(problem, where) from problem
    fields.done()
    return found


def plan_bytes(drawing: PlanDrawing) -> bytes:
    """The one encoding of ``drawing``."""
    return canonical({"format": PLAN_FORMAT, **asdict(drawing)})


def read_plan(data: bytes, *, where: str) -> PlanDrawing:
    """Read **unverified** bytes.

    Raises:
        RecordError: malformed.
    """
    fields = _parsed(data, where)
    fields.choice("format", (PLAN_FORMAT,))
    try:
        found = PlanDrawing(
            objective=fields.text("objective", max_bytes=MAX_RECORD_TEXT_BYTES),
            parts=tuple(fields.items("parts", max_items=MAX_PARTS, read=_read_part)),
            memory_bound_bytes=_optional(fields, "memory_bound_bytes", _count),
        )
    except MeasureError as problem:
        raise _as_ours(problem, where) from problem
    fields.done()
    return found


# --- the strict reader, object by object ---------------------------------------------------------------------------
def _read_run(fields: Fields) -> Run:
    asked = fields.any("asked")
    if not isinstance(asked, dict):
        raise RecordError("not an object", where=f"{fields.where}.asked")
    packages = _mapping(fields, "packages", MAX_RECORD_ENTRIES)
    found = Run(
        time=fields.text("time", max_bytes=64),
        asked=asked,
        machine=read_machine(fields.fields("machine")),
        packages={name: _text(version, "packages") for name, version in packages.items()},
        revision=_optional(fields, "revision", read_revision),
        command=_texts(fields, "command"),
        caveats=_texts(fields, "caveats"),
    )
    fields.done()
    return found


def _read_result(value: object, where: str) -> CaseResult:
    fields = Fields(value, where=where, error=RecordError)
    plain = {name: _read_nullable(fields, name) for name in NULLABLE[1:]}
    segments = fields.fields("segments")
    missing = _mapping(fields, "missing", MAX_RECORD_ENTRIES)
    found = CaseResult(
        case=_read_case(fields.fields("case")),
        simulated=fields.boolean("simulated"),
        threads=fields.integer("threads", low=1, high=1 << 20),
        dtype=fields.text("dtype", max_bytes=MAX_RECORD_TEXT_BYTES),
        seconds=_read_series(fields.fields("seconds")),
        ratio=_optional(fields, "ratio", _read_ratio),
        segments={name: segments.number(name) for name in SEGMENTS if segments.has(name)},
        missing={name: _text(why, f"{where}.missing") for name, why in missing.items()},
        **plain,
    )
    segments.done()
    fields.done()
    return found


def _read_nullable(fields: Fields, name: str) -> Any:
    # A count stays the integer that it is; what each field may be, CaseResult checks.
    value = fields.any(name)
    return value if value is None or type(value) is int else _number(value, f"{fields.where}.{name}")


def _read_case(fields: Fields) -> Case:
    words: dict[str, Any] = {
        name: fields.text(name, max_bytes=MAX_RECORD_TEXT_BYTES)
        for name in ("model", "mode", "engine", "enclave", "scheme")
    }
    counts: dict[str, Any] = {name: fields.integer(name, low=1, high=_MAX_INTEGER) for name in ("parts", "batch")}
    fields.done()
    return Case(**words, **counts)


def _read_series(fields: Fields) -> Series:
    samples = fields.items("samples", max_items=MAX_RECORD_SAMPLES, read=_number)
    found = Series(fields.text("name", max_bytes=MAX_RECORD_TEXT_BYTES), tuple(samples))
    fields.done()
    return found


def _read_ratio(value: object, where: str) -> Ratio:
    fields = Fields(value, where=where, error=RecordError)
    name, baseline = (fields.text(key, max_bytes=MAX_RECORD_TEXT_BYTES) for key in ("name", "baseline"))
    found = Ratio(name, baseline, *(fields.number(key) for key in ("median", "low", "high", "confidence")))
    fields.done()
    return found


def _read_part(value: object, where: str) -> PlanPart:
    fields = Fields(value, where=where, error=RecordError)
    words: dict[str, Any] = {
        name: fields.text(name, max_bytes=MAX_RECORD_TEXT_BYTES) for name in ("first", "last", "side")
    }
    counts: dict[str, Any] = {
        name: fields.integer(name, low=0, high=_MAX_INTEGER) for name in ("nodes", "weight_bytes", "activation_bytes")
    }
    outside = tuple(fields.items("outside", max_items=MAX_PLAN_LAYERS, read=_text))
    fields.done()
    return PlanPart(**words, **counts, outside=outside)


def _parsed(data: bytes, where: str) -> Fields:
    value = parse(data, max_bytes=MAX_RESULTS_FILE_BYTES, what=where, error=RecordError)
    return Fields(value, where=where, error=RecordError)


def _optional(fields: Fields, name: str, read: Callable[[Any, str], T]) -> T | None:
    value = fields.any(name)
    return None if value is None else read(value, f"{fields.where}.{name}")


def _mapping(fields: Fields, name: str, most: int) -> dict[str, Any]:
    value = fields.any(name)
    if not isinstance(value, dict) or len(value) > most:
        raise RecordError("not an object in bounds", where=f"{fields.where}.{name}", expected=f"at most {most} entries")
    return value


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    return tuple(fields.items(name, max_items=MAX_RECORD_ENTRIES, read=_text))


def _text(value: object, where: str) -> str:
    return Fields({"text": value}, where=where, error=RecordError).text("text", max_bytes=MAX_RECORD_TEXT_BYTES)


def _number(value: object, where: str) -> float:
    return Fields({"number": value}, where=where, error=RecordError).number("number")


def _count(value: object, where: str) -> int:
    return Fields({"count": value}, where=where, error=RecordError).integer("count", low=0, high=_MAX_INTEGER)


def _as_ours(problem: MeasureError, where: str) -> RecordError:
    at = where if problem.where is None else f"{where}: {problem.where}"
    return RecordError(problem.message, expected=problem.expected, got=problem.got, where=at)


def names_of(cases: Sequence[CaseResult]) -> tuple[str, ...]:
    """The models of ``cases``, each once, in order."""
    return tuple(dict.fromkeys(result.case.model for result in cases))
