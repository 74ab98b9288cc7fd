"""Files of records: appending a line whole or not at all, and the strict reader of docs/spec/records.md."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from motte.errors import MeasureError, RecordError, ResourceError
from motte.limits import (
    MAX_RECORD_BYTES,
    MAX_RECORD_ENTRIES,
    MAX_RECORD_FILE_BYTES,
    MAX_RECORD_SAMPLES,
    MAX_RECORD_TEXT_BYTES,
)
from motte.measure.clock import Segments
from motte.measure.machine import Machine
from motte.measure.provenance import Revision
from motte.measure.record import (
    ENCLAVE_KINDS,
    FORMAT,
    NO_DIGESTS,
    READ_FORMATS,
    STATISTICS,
    UNITS,
    Digests,
    Enclave,
    Interval,
    Parameter,
    Record,
    Setting,
)
from motte.strict_json import Fields, canonical, parse

T = TypeVar("T")
_MAX_INTEGER = (1 << 53) - 1


def dumps(record: Record) -> str:
    """The one line that stands for ``record``, without its newline: canonical JSON (sorted keys, no spaces, ASCII).

    Raises:
        MeasureError: the line would be longer than the reader takes.
    """
    value = asdict(record) | {"segments": record.segments.to_json(), "format": record.format}
    line = canonical(value)
    if len(line) > MAX_RECORD_BYTES:
        raise MeasureError(
            "the record is too long", expected=f"at most {MAX_RECORD_BYTES} bytes", got=f"{len(line)} bytes"
        )
    return line.decode("ascii")


def loads(line: str | bytes, *, where: str = "record") -> Record:
    """Read one **unverified** line.

    Raises:
        RecordError: anything that docs/spec/records.md does not allow, unknown fields included.
    """
    fields = Fields(
        parse(line, max_bytes=MAX_RECORD_BYTES, what=where, error=RecordError), where=where, error=RecordError
    )
    has_digests = fields.choice("format", READ_FORMATS) == FORMAT
    try:
        record = Record(
            time=_text(fields, "time"),
            series=_text(fields, "series"),
            what=_text(fields, "what"),
            value=fields.number("value"),
            unit=fields.choice("unit", UNITS),
            statistic=fields.choice("statistic", STATISTICS),
            samples=tuple(fields.items("samples", max_items=MAX_RECORD_SAMPLES, read=_read_number)),
            interval=_optional(fields, "interval", _read_interval),
            parameters=_read_mapping(fields, "parameters", _read_parameter),
            segments=Segments.from_json(fields.any("segments"), where=f"{where}.segments", error=RecordError),
            setting=_read_setting(fields.fields("setting")),
            machine=read_machine(fields.fields("machine")),
            packages=_read_mapping(fields, "packages", _read_text),
            revision=_optional(fields, "revision", read_revision),
            command=tuple(fields.items("command", max_items=MAX_RECORD_ENTRIES, read=_read_text)),
            digests=_read_digests(fields.fields("digests")) if has_digests else NO_DIGESTS,
        )
    except MeasureError as problem:
        at = where if problem.where is None else f"{where}.{problem.where}"
        raise RecordError(problem.message, expected=problem.expected, got=problem.got, where=at) from problem
    fields.done()
    return record


def read(path: Path) -> list[Record]:
    """Every record of the **unverified** file ``path``, in order.

    Raises:
        RecordError: a line is malformed, or the last one has no newline (a writer was cut off, or the file was).
        ResourceError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_FILE_BYTES + 1)
    except OSError as problem:
        raise ResourceError("the records cannot be read", where=str(path), got=problem.strerror) from problem
    if len(data) > MAX_RECORD_FILE_BYTES:
        raise RecordError("the file is too large", where=str(path), expected=f"at most {MAX_RECORD_FILE_BYTES} bytes")
    if data and not data.endswith(b"\n"):
        raise RecordError("the last line is incomplete", where=str(path), hint="remove it; its writer was cut off")
    lines = data.split(b"\n")[:-1]
    return [loads(line, where=f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def append(path: Path, record: Record) -> None:
    """Add ``record`` to ``path`` (made, with its folder, when absent), whole or not at all, and sync it to the disk.

    Several processes may append to one file: each takes its lock first. A write that the disk cuts short is undone.

    Raises:
        RecordError: the file ends in half a line; nothing is added.
        ResourceError: it cannot be written.
    """
    line = dumps(record).encode("ascii") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _append_line(handle, line, path)
        finally:
            os.close(handle)
        _sync_folder(path.parent)
    except OSError as problem:
        raise ResourceError("the record cannot be written", where=str(path), got=problem.strerror) from problem


def _append_line(handle: int, line: bytes, path: Path) -> None:
    fcntl.flock(handle, fcntl.LOCK_EX)  # released when the handle is closed
    end = os.fstat(handle).st_size
    if end and os.pread(handle, 1, end - 1) != b"\n":
        raise RecordError("the last line is incomplete", where=str(path), hint="remove it; its writer was cut off")
    try:
        # O_APPEND: one write is one line, wherever another writer that takes no lock has moved the end.
        written = os.write(handle, line)
        if written != len(line):
            raise ResourceError("the disk took only a part of the record", where=str(path), got=f"{written} bytes")
        os.fsync(handle)
    except BaseException:
        os.ftruncate(handle, end)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- the strict reader, field by field -----------------------------------------------------------------------------
def _text(fields: Fields, name: str) -> str:
    return fields.text(name, max_bytes=MAX_RECORD_TEXT_BYTES)


def _optional(fields: Fields, name: str, read_value: Callable[[Any, str], T]) -> T | None:
    value = fields.any(name)
    return None if value is None else read_value(value, f"{fields.where}.{name}")


def _read_text(value: object, where: str) -> str:
    return Fields({"text": value}, where=where, error=RecordError).text("text", max_bytes=MAX_RECORD_TEXT_BYTES)


def _read_number(value: object, where: str) -> float:
    return Fields({"number": value}, where=where, error=RecordError).number("number")


def _read_parameter(value: object, where: str) -> Parameter:
    if isinstance(value, str):
        return _read_text(value, where)
    if isinstance(value, bool):
        return value
    number = _read_number(value, where)
    return value if isinstance(value, int) and abs(value) <= _MAX_INTEGER else number


def _read_mapping(fields: Fields, name: str, read_value: Callable[[Any, str], T]) -> dict[str, T]:
    value = fields.any(name)
    where = f"{fields.where}.{name}"
    if not isinstance(value, dict) or len(value) > MAX_RECORD_ENTRIES:
        raise RecordError("not an object in bounds", where=where, expected=f"at most {MAX_RECORD_ENTRIES} entries")
    return {_read_text(key, where): read_value(item, f"{where}.{key[:80]}") for key, item in value.items()}


def _read_interval(value: object, where: str) -> Interval:
    fields = Fields(value, where=where, error=RecordError)
    found = Interval(fields.number("low"), fields.number("high"), fields.number("confidence"))
    fields.done()
    return found


def read_revision(value: object, where: str) -> Revision:
    """A revision out of an **unverified** value.

    Raises:
        RecordError: malformed.
    """
    fields = Fields(value, where=where, error=RecordError)
    found = Revision(_text(fields, "commit"), fields.boolean("dirty"))
    fields.done()
    return found


def _read_setting(fields: Fields) -> Setting:
    inner = fields.fields("enclave")
    enclave = Enclave(inner.choice("kind", ENCLAVE_KINDS), inner.boolean("simulated"))
    inner.done()
    found = Setting(
        threads=fields.integer("threads", low=1, high=1 << 20),
        dtype=_text(fields, "dtype"),
        device=_text(fields, "device"),
        engine=_text(fields, "engine"),
        enclave=enclave,
    )
    fields.done()
    return found


def _read_digests(fields: Fields) -> Digests:
    found = Digests(model=_optional(fields, "model", _read_text), bundle=_optional(fields, "bundle", _read_text))
    fields.done()
    return found


def read_machine(fields: Fields) -> Machine:
    """The machine's facts out of **unverified** fields, which are then used up.

    Raises:
        RecordError: malformed.
    """
    found = Machine(
        cpu_model=_text(fields, "cpu_model"),
        architecture=_text(fields, "architecture"),
        logical_cores=fields.integer("logical_cores", low=1, high=1 << 20),
        physical_cores=_optional(fields, "physical_cores", _read_cores),
        usable_cores=fields.integer("usable_cores", low=1, high=1 << 20),
        governor=_optional(fields, "governor", _read_text),
        memory_bytes=fields.integer("memory_bytes", low=1, high=_MAX_INTEGER),
        kernel=_text(fields, "kernel"),
        virtual=fields.boolean("virtual"),
    )
    fields.done()
    return found


def _read_cores(value: object, where: str) -> int:
    return Fields({"cores": value}, where=where, error=RecordError).integer("cores", low=1, high=1 << 20)
