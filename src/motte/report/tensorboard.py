"""Records and results as event files of TensorBoard, one run a case. Written by tensorboard's own record writer."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from motte.bench.results import NULLABLE, TRACED, CaseResult, Results, read_results
from motte.errors import InputError, ResourceError
from motte.measure.record import Record
from motte.measure.record_file import read

_WRITER: Final = "tensorboard.summary.writer.record_writer"
_FILE: Final = "events.out.tfevents.0.motte"
Scalar = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Export:
    """What was written: the folder, its runs (one a case, and ``records``), and how many scalars."""

    folder: Path
    runs: tuple[str, ...]
    scalars: int


def export(folder: Path, log_folder: Path) -> Export:
    """Write what lies in ``folder`` (results, or records alone) as event files below ``log_folder``.

    A case has its latencies (``seconds``, by round), its figures (``summary/...``) and its trace (``trace/...``; steps
    are milliseconds since its first mark); ``records`` has every record by its series, what it is and its parameters,
    a step a sample. Figures that are not there are no scalars. Everything read is **unverified**.

    Raises:
        InputError: neither results nor records lie there, or ``log_folder`` exists and is not empty.
        RecordError: a file is malformed.
        ResourceError: tensorboard is not installed, or the folder cannot be written.
    """
    _module(_WRITER)
    has_results = (folder / "run.json").is_file()
    if not has_results and not (folder / "records.jsonl").is_file():
        raise InputError(
            "neither results nor records lie there", where=str(folder), expected="run.json or records.jsonl"
        )
    if log_folder.exists() and (not log_folder.is_dir() or any(log_folder.iterdir())):
        raise InputError("something lies there already", where=str(log_folder), hint="name a new folder")
    results = read_results(folder) if has_results else None
    records = results.records if results is not None else tuple(read(folder / "records.jsonl"))
    try:
        return _write_all(results, records, log_folder)
    except OSError as problem:
        raise ResourceError("event files cannot be written", where=str(log_folder), got=problem.strerror) from problem


def _write_all(results: Results | None, records: tuple[Record, ...], log_folder: Path) -> Export:
    log_folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{log_folder.name}.", suffix=".partial", dir=log_folder.parent))
    runs: list[str] = []
    scalars = 0
    try:
        for result in results.cases if results is not None else ():
            with _events(staged / str(result.case)) as events:
                _write_case(events, results, result)
            runs.append(str(result.case))
            scalars += events.count
        if records:
            with _events(staged / "records") as events:
                for record in records:
                    _write_record(events, record)
            runs.append("records")
            scalars += events.count
        staged.chmod(0o755)
        os.replace(staged, log_folder)  # an empty folder may lie there; a full one makes this fail
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Export(log_folder, tuple(runs), scalars)


class _Events:
    """One event file."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._event = _module("tensorboard.compat.proto.event_pb2").Event
        self._summary = _module("tensorboard.compat.proto.summary_pb2").Summary
        self.count = 0
        self._put(self._event(file_version="brain.Event:2", wall_time=0.0))

    def add(self, step: int, wall_time: float, scalars: list[Scalar]) -> None:
        """Scalars of one step."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
        self.count += len(values)
        self._put(self._event(wall_time=wall_time, step=step, summary=self._summary(value=values)))

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


@contextmanager
def _events(folder: Path) -> Iterator[_Events]:
    folder.mkdir(parents=True)
    with (folder / _FILE).open("xb") as file:
        yield _Events(_module(_WRITER).RecordWriter(file))
        file.flush()
        os.fsync(file.fileno())


def _write_case(events: _Events, results: Results | None, result: CaseResult) -> None:
    if results is None:
        return
    began = _seconds_of(results.run.time)
    for index, sample in enumerate(result.seconds.samples):
        events.add(index, began, [("seconds", sample)])
    numbers: Mapping[str, Any] = {name: getattr(result, name) for name in NULLABLE if name != "ratio"}
    figures = [(f"summary/{name}", float(value)) for name, value in numbers.items() if value is not None]
    figures += [(f"summary/segment_{name}_s", seconds) for name, seconds in result.segments.items()]
    if result.ratio is not None:
        figures.append(("summary/ratio", result.ratio.median))
    events.add(0, began, figures)
    for point in results.trace(result.case):
        found = {name: getattr(point, name) for name in TRACED}
        scalars = [(f"trace/{name}", float(value)) for name, value in found.items() if value is not None]
        if scalars:
            events.add(round(point.time_s * 1000), began + point.time_s, scalars)


def _write_record(events: _Events, record: Record) -> None:
    settings = " ".join(f"{name}={value}" for name, value in record.parameters.items())
    tag = f"{record.series}/{record.what} [{record.unit}]" + (f" {settings}" if settings else "")
    for index, value in enumerate(record.samples or (record.value,)):
        events.add(index, _seconds_of(record.time), [(tag, value)])


def _seconds_of(time: str) -> float:
    return datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


def _module(name: str) -> Any:
    """A module of tensorboard, which has no types."""
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise ResourceError(
            "event files need tensorboard", got=str(problem), hint="pip install 'motte[tensorboard]'"
        ) from problem
