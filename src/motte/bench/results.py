"""A folder of results: written whole or not at all, read back strictly. Format: docs/spec/records.md.

    records.jsonl        one record a figure (motte.measure.record)
    run.json             what was asked, the machine, every case with its samples (motte-bench/1)
    summary.csv          a row a case
    MODEL.csv            the time series of a model, a row a sample
    layers.csv           a row a split layer and direction
    plans/CASE.json      the parts of a case, to be drawn
    audit.json           what ``motte audit`` found (motte-audit/1), where it was run

``motte bench`` and ``motte compare`` write it, ``motte report`` reads it. Nothing in it is signed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from motte.bench.case import (
    DIRECTIONS,
    MODES,
    NULLABLE,
    SIDES,
    Case,
    CaseResult,
    LayerTime,
    PlanDrawing,
    PlanPart,
    Results,
    Run,
    TracePoint,
    state_run,
)
from motte.bench.csv_files import check_summary, layer_table, read_layers, read_traces, summary_table, trace_table
from motte.bench.run_file import RunFile, names_of, plan_bytes, read_plan, read_run, run_bytes
from motte.errors import InputError, MeasureError, RecordError, ResourceError
from motte.limits import MAX_RESULTS_FILE_BYTES
from motte.measure.record_file import dumps, read
from motte.measure.traces import SEGMENTS, TRACED
from motte.strict_json import canonical, parse

__all__ = [
    "AUDIT_FORMAT",
    "DIRECTIONS",
    "MODES",
    "NULLABLE",
    "SEGMENTS",
    "SIDES",
    "TRACED",
    "Case",
    "CaseResult",
    "LayerTime",
    "PlanDrawing",
    "PlanPart",
    "Results",
    "Run",
    "TracePoint",
    "read_results",
    "state_run",
    "write_results",
]
AUDIT_FORMAT: Final = "motte-audit/1"
_RUN, _RECORDS, _SUMMARY, _LAYERS, _AUDIT = "run.json", "records.jsonl", "summary.csv", "layers.csv", "audit.json"


def write_results(folder: Path, results: Results, *, overwrite: bool = False) -> None:
    """Write ``results`` to ``folder``, which is made when absent; what else lies there is left alone.

    Everything is written beside its place first and then moved, ``run.json`` last: after an error, or Ctrl-C, an
    earlier run is as it was, and a folder without ``run.json`` is never taken for results.

    Args:
        overwrite: replace an earlier run's files; its tables of models that this run has not are removed.

    Raises:
        InputError: an earlier run lies there and ``overwrite`` is false.
        MeasureError: a record is too long. ResourceError: the folder cannot be written to, or is full.
    """
    run = folder / _RUN
    if not overwrite and os.path.lexists(run):
        raise InputError("results lie there already", where=str(run), hint="choose another folder, or overwrite them")
    stale = _stale(folder, results) if overwrite else []
    files = _contents(results)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".results-", suffix=".partial", dir=folder))
        try:
            for name, data in files.items():
                _write(staged / name, data)
            _move(staged, folder, list(files), stale)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except BaseException as problem:
        if made:
            with suppress(OSError):
                folder.rmdir()  # takes away an empty folder alone
        if isinstance(problem, OSError):
            raise ResourceError("the results cannot be written", where=str(folder), got=problem.strerror) from problem
        raise


def read_results(folder: Path) -> Results:
    """Read the **unverified** results in ``folder``.

    Raises:
        InputError: there are none.
        RecordError: a file is malformed, incomplete, missing, or contradicts ``run.json``.
        ResourceError: a file cannot be read.
    """
    if not (folder / _RUN).is_file():
        raise InputError("no results lie there", where=str(folder), expected=_RUN, hint="write some with: motte bench")
    file = read_run(_bytes(folder / _RUN), where=str(folder / _RUN))
    check_summary(folder / _SUMMARY, file.cases)
    layers = read_layers(folder / _LAYERS)
    expected = {_LAYERS, *map(_table_name, names_of(file.cases))}
    if set(file.tables) != expected:
        where = str(folder / _RUN)
        raise RecordError(
            "other tables than models", where=where, expected=", ".join(sorted(expected)), got=str(list(file.tables))
        )
    traces = {name: read_traces(folder / name) for name in file.tables if name != _LAYERS}
    for name, rows in ((_LAYERS, layers), *traces.items()):
        if len(rows) != file.tables[name]:
            got, told = str(len(rows)), str(file.tables[name])
            raise RecordError("rows were cut off or added", where=str(folder / name), expected=told, got=got)
    for name, points in traces.items():
        if strangers := [point for point in points if _table_name(point.case.model) != name]:
            raise RecordError("a row of another model", where=str(folder / name), got=str(strangers[0].case))
    records = read(folder / _RECORDS)
    if len(records) < file.records:
        got, told = str(len(records)), f"at least {file.records}"
        raise RecordError("records were cut off", where=str(folder / _RECORDS), expected=told, got=got)
    known = {str(result.case) for result in file.cases}
    if unknown := [slug for slug in file.plans if slug not in known]:
        raise RecordError("a plan of a case without a result", where=str(folder / _RUN), got=unknown[0][:200])
    plans = {slug: _plan(folder, slug) for slug in file.plans}
    audit = _read_audit(folder / _AUDIT) if (folder / _AUDIT).exists() else None
    found = tuple(point for points in traces.values() for point in points)
    try:
        return Results(file.cases, found, layers, plans, tuple(records), audit, file.run)
    except MeasureError as problem:
        raise RecordError(
            problem.message, where=problem.where or str(folder), expected=problem.expected, got=problem.got
        ) from problem


def _contents(results: Results) -> dict[str, bytes]:
    """File name -> bytes, ``run.json`` last."""
    models = names_of(results.cases)
    traces = {model: [point for point in results.traces if point.case.model == model] for model in models}
    tables = {_table_name(model): len(points) for model, points in traces.items()} | {_LAYERS: len(results.layers)}
    files = {_table_name(model): trace_table(points).encode() for model, points in traces.items()}
    files[_SUMMARY] = summary_table(results.cases).encode()
    files[_LAYERS] = layer_table(results.layers).encode()
    files[_RECORDS] = "".join(dumps(record) + "\n" for record in results.records).encode("ascii")
    files |= {_plan_name(slug): plan_bytes(drawing) for slug, drawing in results.plans.items()}
    if results.audit is not None:
        if results.audit.get("format") != AUDIT_FORMAT:
            raise MeasureError("not an audit", expected=AUDIT_FORMAT, got=repr(results.audit.get("format")))
        files[_AUDIT] = canonical(dict(results.audit))
    file = RunFile(results.run, results.cases, tables, tuple(results.plans), len(results.records))
    files[_RUN] = run_bytes(file)
    return files


def _stale(folder: Path, results: Results) -> list[str]:
    """Files of the run that lies in ``folder`` which this one does not replace."""
    if not (folder / _RUN).is_file():
        return []
    earlier = read_run(_bytes(folder / _RUN), where=str(folder / _RUN))
    # Names are formed from checked words of the cases, never taken from the file as they stand.
    models = set(names_of(earlier.cases)) - set(names_of(results.cases))
    plans = {str(result.case) for result in earlier.cases} & set(earlier.plans) - set(results.plans)
    return [*map(_table_name, sorted(models)), *map(_plan_name, sorted(plans))]


def _move(staged: Path, folder: Path, names: list[str], stale: list[str]) -> None:
    if any(name.startswith("plans/") for name in names):
        (folder / "plans").mkdir(exist_ok=True)
    # The old run.json goes first: from here until the last move there are no results, rather than mixed ones.
    with suppress(FileNotFoundError):
        os.unlink(folder / _RUN)
    for name in stale:
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    for name in names:
        os.replace(staged / name, folder / name)
    for changed in (folder / "plans", folder):
        if changed.is_dir():
            _sync(changed)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RESULTS_FILE_BYTES + 1)
    except OSError as problem:
        raise ResourceError("a file of the results cannot be read", where=str(path), got=problem.strerror) from problem
    if len(data) > MAX_RESULTS_FILE_BYTES:
        raise RecordError("the file is too large", where=str(path), expected=f"at most {MAX_RESULTS_FILE_BYTES} bytes")
    return data


def _plan(folder: Path, slug: str) -> PlanDrawing:
    path = folder / _plan_name(slug)
    return read_plan(_bytes(path), where=str(path))


def _read_audit(path: Path) -> Mapping[str, Any]:
    value = parse(_bytes(path), max_bytes=MAX_RESULTS_FILE_BYTES, what=str(path), error=RecordError)
    if not isinstance(value, dict) or value.get("format") != AUDIT_FORMAT:
        raise RecordError("not an audit", where=str(path), expected=AUDIT_FORMAT)
    return value


def _table_name(model: str) -> str:
    return f"{model}.csv"


def _plan_name(slug: str) -> str:
    return f"plans/{slug}.json"
