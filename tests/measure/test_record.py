"""Records against docs/spec/records.md: whole or not at all, nothing unknown, nothing missing, no silent zero."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import FormatError, MeasureError, RecordError, ResourceError
from motte.measure import record_file
from motte.measure.clock import Segment, Segments
from motte.measure.compare import compare_samples
from motte.measure.provenance import Revision, command_line, package_versions, revision
from motte.measure.record import (
    ALWAYS_SIMULATED,
    ENCLAVE_KINDS,
    PROCESS,
    UNITS,
    UNPROTECTED,
    Digests,
    Enclave,
    Interval,
    Record,
    Setting,
    state,
)
from motte.measure.record_file import append, dumps, loads, read

SETTING = Setting(threads=1, dtype="float32", device="cpu", engine="torch", enclave=PROCESS)


def a_record(**changes: Any) -> Record:
    settings: dict[str, Any] = {
        "series": "bench_open",
        "what": "open 12 parts: file opened until last chunk decrypted",
        "value": 0.25,
        "unit": "s",
        "statistic": "median",
        "samples": (0.2, 0.25, 0.3),
        "interval": Interval(0.2, 0.3, 0.95),
        "parameters": {"model": "resnet50", "parts": 12, "bias": 0.5, "streamed": False},
        "segments": Segments((Segment("open", "file opened", "last chunk decrypted", 5, 7),)),
        "setting": SETTING,
    }
    return state(**(settings | changes))


GOOD = json.loads(dumps(a_record()))


def changed(path: str, value: object) -> dict[str, Any]:
    """A copy of the good record with the field at ``path`` replaced, or removed when ``value`` is ``...``."""
    copy: dict[str, Any] = json.loads(json.dumps(GOOD))
    *way, last = path.split(".")
    inner = copy
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


def test_a_record_says_where_it_comes_from() -> None:
    record = a_record()
    assert record.machine.memory_bytes > 0
    assert record.machine.usable_cores >= 1
    assert record.packages["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "numpy" in record.packages
    assert record.command == command_line()
    assert record.time.endswith("Z")
    with pytest.raises(FrozenInstanceError):
        record.value = 1.0  # type: ignore[misc]


def test_a_line_round_trips() -> None:
    record = a_record()
    assert loads(dumps(record)) == record
    assert "\n" not in dumps(record)
    bare = a_record(statistic="single", samples=(), interval=None, parameters=None, segments=None)
    assert loads(dumps(bare)) == bare


def test_a_record_names_model_and_bundle_and_older_ones_are_still_read() -> None:
    digests = Digests(model="a" * 64, bundle="0" * 64)
    assert loads(dumps(a_record(digests=digests))).digests == digests
    assert loads(dumps(a_record())).digests == Digests()
    older = changed("digests", ...) | {"format": "motte-record/1"}
    assert loads(json.dumps(older)) == loads(json.dumps(GOOD)), "the first format had no digests"
    with pytest.raises(MeasureError):
        Digests(model="resnet50")


@pytest.mark.parametrize("kind", ENCLAVE_KINDS)
def test_every_kind_of_enclave_is_read_back(kind: str) -> None:
    enclave = Enclave(kind, simulated=kind in ALWAYS_SIMULATED)
    assert loads(dumps(a_record(setting=replace(SETTING, enclave=enclave)))).setting.enclave == enclave


def test_a_comparison_becomes_a_record() -> None:
    found = compare_samples({"whole": [1.0, 1.1, 1.0, 1.2, 1.0], "parts": [1.1, 1.2, 1.1, 1.3, 1.1]})
    ratio = found.ratio("parts")
    paired = [b / a for a, b in zip(found["whole"].samples, found["parts"].samples, strict=True)]
    record = a_record(
        value=ratio.median, unit="1", samples=paired, interval=Interval(ratio.low, ratio.high, ratio.confidence)
    )
    assert loads(dumps(record)).value == ratio.median


@pytest.mark.parametrize("field", sorted(GOOD))
def test_every_field_is_demanded(field: str) -> None:
    with pytest.raises(RecordError, match="missing field"):
        loads(json.dumps(changed(field, ...)))


@pytest.mark.parametrize(
    "path", ["extra", "machine.extra", "setting.extra", "setting.enclave.extra", "interval.extra", "digests.extra"]
)
def test_an_unknown_field_is_refused(path: str) -> None:
    with pytest.raises(RecordError, match="unknown field"):
        loads(json.dumps(changed(path, 1)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "motte-record/3"),
        ("format", "motte-record/1"),
        ("value", None),
        ("value", True),
        ("value", "0.25"),
        ("value", 0.26),
        ("unit", "ms"),
        ("statistic", "mean"),
        ("statistic", "single"),
        ("statistic", "maximum"),
        ("samples", []),
        ("samples", [0.2, None, 0.3]),
        ("samples", [0.25] * 100_001),
        ("interval", {"low": 2, "high": 1, "confidence": 0.95}),
        ("interval", {"low": 1, "high": 2, "confidence": 95}),
        ("interval", []),
        ("parameters", {"batch": None}),
        ("parameters", {"batch": [1]}),
        ("parameters", {"": 1}),
        ("parameters", {str(index): 1 for index in range(257)}),
        ("parameters", []),
        ("segments", [{"name": "open"}]),
        ("segments", None),
        ("setting.threads", 0),
        ("setting.threads", 1.5),
        ("setting.dtype", " "),
        ("setting.enclave", {"kind": "process", "simulated": False}),
        ("setting.enclave", {"kind": "none", "simulated": True}),
        ("setting.enclave", {"kind": "vault", "simulated": True}),
        ("setting.enclave", {"kind": "gramine-direct", "simulated": False}),
        ("digests", None),
        ("digests", {"model": None}),
        ("digests.model", "a" * 63),
        ("digests.bundle", "A" * 64),
        ("digests.bundle", 5),
        ("machine.memory_bytes", 0),
        ("machine.cpu_model", ""),
        ("machine.cpu_model", None),
        ("machine.virtual", None),
        ("machine.physical_cores", 0),
        ("machine.governor", 3),
        ("packages", {"torch": None}),
        ("packages", "torch"),
        ("revision", {"commit": "HEAD", "dirty": False}),
        ("revision", {"commit": "A" * 40, "dirty": False}),
        ("revision", {"commit": "a" * 40, "dirty": None}),
        ("command", []),
        ("command", "python"),
        ("time", "2024-02-30T00:00:00Z"),
        ("time", "2024-02-01 00:00:00"),
        ("time", None),
        ("series", ""),
        ("what", "x" * 5000),
    ],
)
def test_a_wrong_field_is_refused(path: str, value: object) -> None:
    with pytest.raises(RecordError):
        loads(json.dumps(changed(path, value)))


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"value": NaN}', '{"a":1,"a":2}', "[" * 100, "\xff"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        loads(text)


@given(st.binary(max_size=200))
def test_noise_is_refused_with_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(FormatError):
        loads(data)


@given(st.data())
def test_any_field_of_any_json_type_is_taken_or_refused_but_never_crashes(data: st.DataObject) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    paths = [*GOOD, *(f"machine.{name}" for name in GOOD["machine"]), *(f"setting.{name}" for name in GOOD["setting"])]
    line = json.dumps(changed(data.draw(st.sampled_from(sorted(paths))), data.draw(values)))
    try:
        record = loads(line)
    except RecordError:
        return
    assert loads(dumps(record)) == record


@pytest.mark.parametrize("value", [None, math.nan, math.inf, True, "1"])
def test_a_missing_value_is_an_error_and_never_a_zero(value: Any) -> None:
    with pytest.raises(MeasureError):
        a_record(value=value, statistic="single", samples=())
    with pytest.raises(MeasureError):
        a_record(samples=(0.2, value, 0.3))
    with pytest.raises(MeasureError):
        a_record(parameters={"x": value if not isinstance(value, str | bool) else None})


def test_a_zero_that_was_measured_is_a_zero() -> None:
    assert loads(dumps(a_record(value=0, unit="count", statistic="single", samples=(), interval=None))).value == 0


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_read_back(unit: str) -> None:
    assert loads(dumps(a_record(unit=unit))).unit == unit


def test_a_simulation_says_so() -> None:
    assert str(PROCESS) == "process (SIMULATED: no hardware protection)"
    assert str(UNPROTECTED) == "none"
    assert str(Enclave("sgx", simulated=True)).startswith("sgx (SIMULATED")
    with pytest.raises(MeasureError):
        Enclave("process", simulated=False)


# --- files ---------------------------------------------------------------------------------------------------------
def test_records_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    records = [a_record(parameters={"batch": batch}) for batch in (1, 5, 8)]
    for record in records:
        append(path, record)
    assert read(path) == records
    assert path.read_bytes().count(b"\n") == 3


def test_writers_side_by_side_lose_and_tear_nothing(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(path, a_record())
    script = (
        "import sys\nfrom pathlib import Path\nfrom motte.measure.record_file import append, read\n"
        "path = Path(sys.argv[1])\nrecord = read(path)[0]\nfor _ in range(20):\n    append(path, record)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert len(read(path)) == 61


def test_half_a_line_is_refused_by_reader_and_writer(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(dumps(a_record()), encoding="ascii")
    before = path.read_bytes()
    with pytest.raises(RecordError, match="incomplete"):
        read(path)
    with pytest.raises(RecordError, match="incomplete"):
        append(path, a_record())
    assert path.read_bytes() == before


@pytest.mark.parametrize("flaw", ["short", "error", "interrupt", "sync"])
def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flaw: str
) -> None:
    path = tmp_path / "records.jsonl"
    append(path, a_record())
    before = path.read_bytes()
    real: Callable[[int, bytes], int] = os.write

    def write(handle: int, data: bytes) -> int:
        if flaw == "error":
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(handle, data[:10] if flaw == "short" else data)
        if flaw == "interrupt":
            raise KeyboardInterrupt
        return count

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(record_file.os, "write", write)
    if flaw == "sync":
        monkeypatch.setattr(record_file.os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt if flaw == "interrupt" else ResourceError):
        append(path, a_record())
    monkeypatch.undo()
    assert path.read_bytes() == before
    append(path, a_record())
    assert len(read(path)) == 2


def test_the_place_of_a_flaw_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(path, a_record())
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(RecordError) as caught:
        read(path)
    assert f"{path}:2" in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError):
        read(tmp_path / "nothing")
    with pytest.raises(ResourceError):
        append(tmp_path, a_record())


# --- provenance ----------------------------------------------------------------------------------------------------
def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, timeout=60)


def test_the_revision_follows_the_checkout(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("1\n")
    assert revision(file) is None, "no checkout at all"
    git(tmp_path, "init", "-q")
    assert revision(file) is None, "an untracked file belongs to no revision"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = revision(file)
    assert clean is not None
    assert not clean.dirty
    assert len(clean.commit) == 40
    file.write_text("2\n")
    assert revision(file) == Revision(clean.commit, dirty=True)
    git(tmp_path, "checkout", "-q", "code.py")
    (tmp_path / "stray.py").write_text("")
    assert revision(file) == Revision(clean.commit, dirty=True)
    (tmp_path / ".gitignore").write_text("installed/\n")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "code.py").write_text("")
    assert revision(tmp_path / "installed" / "code.py") is None, "an installed copy inside of another repository"


def test_without_git_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision() is None
    assert loads(dumps(a_record())).revision is None


def test_versions_are_of_what_is_installed() -> None:
    assert set(package_versions(("numpy", "surely-not-installed-anywhere"))) == {"python", "numpy"}


def test_a_long_command_line_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "x" * 100_000, "\udcff.jpg", *map(str, range(1000))])
    words = command_line()
    assert len(words) == 256
    assert words[-1] == "... and 748 more"
    assert words[1].endswith("... (100000 bytes)")
    assert loads(dumps(a_record())).command == words


def test_a_record_too_long_to_read_back_is_not_written(tmp_path: Path) -> None:
    samples = tuple(0.1 + index * 1e-17 + 1e-9 / 3 for index in range(100_000))
    record = replace(
        a_record(),
        value=min(samples),
        statistic="minimum",
        samples=samples,
        parameters={f"{index:03}" + "n" * 4000: "\x01" * 4000 for index in range(200)},
    )
    with pytest.raises(MeasureError, match="too long"):
        append(tmp_path / "records.jsonl", record)
    assert list(tmp_path.iterdir()) == []
