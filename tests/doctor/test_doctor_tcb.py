"""``motte doctor --tcb``: the real thing with torch, which needs nothing lowered, and what it prints of any engine."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from motte.cli import main
from motte.doctor import tcb as doctor_tcb
from motte.doctor.tcb import WorkerTcb, chosen_engines, measure_tcb, strippable_bytes
from motte.errors import SettingError, UnsupportedError
from motte.trusted.tcb import LoadedFile, LoadedPackage, Tcb

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_a_worker_answers_and_lists_its_files_and_nothing_remains(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, out, err = run("doctor", "--tcb", "--engine", "torch", "--json")
    assert code == 0, err
    assert "SIMULATED" in err
    document = json.loads(out)
    assert document["simulated"] is True
    assert document["enclave"] == "process"
    (engine,) = document["engines"]
    assert engine["engine"] == "torch"
    assert engine["answer"] == "ankle boot"
    sizes = {package["name"]: sum(f["bytes"] for f in package["files"]) for package in engine["packages"]}
    assert sum(sizes.values()) == engine["bytes"]
    assert max(sizes, key=lambda name: sizes[name]) == "torch"
    assert {"interpreter", "standard library", "system libraries", "numpy", "cryptography", "motte"} <= set(sizes)
    assert 0 <= engine["strippable_bytes"] < engine["bytes"]
    assert 10**8 < engine["rss_after_import_bytes"] < engine["rss_after_answer_bytes"] < 10**10
    assert list(tmp_path.iterdir()) == []


def test_people_get_packages_in_order_of_size_and_the_same_figures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = (
        LoadedPackage("little", (LoadedFile("/l/a.py", 1_000_000, "little"),)),
        LoadedPackage("large", (LoadedFile("/g/a.so", 30_000_000, None), LoadedFile("/g/b.so", 10_240_000, None))),
    )
    found = WorkerTcb("onnxruntime", "1.2", 1, True, "boot", Tcb(packages, 7), 4_000_000, 55_500_000, 61_000_000)
    monkeypatch.setattr(doctor_tcb, "measure_tcb", lambda engines, tell: iter([found]))
    code, out, err = run("doctor", "--tcb", "--engine", "torch")
    assert code == 0, err
    words = out.split()
    assert words.index("large") < words.index("little")
    assert words[words.index("large") + 1 : words.index("large") + 3] == ["2", "40.2"]
    assert words[words.index("all") + 1 : words.index("all") + 3] == ["3", "41.2"]
    assert "4.0 MB are symbols and debug information" in out
    assert "37.2 MB without" in out
    assert "55.5 MB after import, 61.0 MB after the answer (boot), 1 thread" in out
    assert "SIMULATED: no hardware protection (enclave kind: process)" in out


def test_a_failure_leaves_no_file_and_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(*_: object, **__: object) -> None:
        assert list(tmp_path.iterdir()) != []
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_tcb, "seal_shipped", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(measure_tcb(("torch",), lambda text: None))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_asked_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("doctor", "--engine", "torch")
    assert (code, out) == (2, "")
    assert "--tcb" in err
    with pytest.raises(SettingError, match="unknown engine"):
        chosen_engines("tensorflow")
    monkeypatch.setattr(doctor_tcb, "find_spec", lambda name: object() if name == "torch" else None)
    assert chosen_engines(None) == ("torch",)
    with pytest.raises(UnsupportedError, match=r"not installed.*openvino"):
        chosen_engines("openvino")


def elf(tmp_path: Path, sections: list[tuple[int, int, int]]) -> Path:
    """A 64-bit ELF file of 64 bytes, then 1000 bytes, then headers of (type, flags, size)."""
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", 0, kind, flags, 0, 64, size, 0, 0, 1, 0) for kind, flags, size in sections
    )
    head = (
        b"\x7fELF\x02\x01".ljust(40, b"\0")
        + struct.pack("<Q", 1064)
        + bytes(10)
        + struct.pack("<HHH", 64, len(sections), 0)
    )
    path = tmp_path / "planted.so"
    path.write_bytes(head.ljust(64, b"\0") + bytes(1000) + table)
    return path


def test_symbols_and_debug_information_are_told_from_what_is_mapped(tmp_path: Path) -> None:
    code, debug, zeros, beyond = (1, 2, 300), (1, 0, 500), (8, 0, 900), (1, 0, 1 << 40)
    path = elf(tmp_path, [code, debug, zeros, beyond, (2, 0, 40)])
    assert strippable_bytes(str(path)) == 540
    path.write_bytes(path.read_bytes()[:-1])
    assert strippable_bytes(str(path)) == 0
    for raw in (b"", b"\x7fELF\x02\x01", b"#!/bin/sh\n" * 20):
        path.write_bytes(raw)
        assert strippable_bytes(str(path)) == 0
    assert strippable_bytes(str(tmp_path / "missing")) == 0
