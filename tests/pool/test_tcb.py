"""The list of loaded files against what Python and the kernel really did; and its strict reading."""

from __future__ import annotations

import copy
import importlib.util
import json
import mmap
import os
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from motte.errors import FrameError, ResourceError
from motte.limits import MAX_TCB_FILES
from motte.trusted import tcb as listing
from motte.trusted.tcb import (
    INTERPRETER,
    OTHER_FILES,
    STANDARD_LIBRARY,
    SYSTEM_LIBRARIES,
    Groups,
    Tcb,
    loaded_files,
    mapped_files,
    module_files,
    was_read,
)


def test_this_process_lists_what_it_has_and_the_list_travels(tmp_path: Path) -> None:
    data = tmp_path / "mapped data"
    data.write_bytes(bytes(5000))
    with data.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        found = loaded_files()
    assert Tcb.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "motte.trusted.tcb" in found.package("motte").modules
    assert "json.decoder" in found.package(STANDARD_LIBRARY).modules
    assert "pytest" in found.package("pytest").modules
    assert next(Path(file.path).name for file in found.package(INTERPRETER).files).startswith("python")
    assert any("libc" in file.path for file in found.package(SYSTEM_LIBRARIES).files)
    assert {file.path: file.bytes for file in found.package(OTHER_FILES).files}[str(data)] == 5000
    every = [file for package in found.packages for file in package.files]
    assert found.files == len(every) == len({file.path for file in every})
    assert found.bytes == sum(os.stat(file.path).st_size for file in every)
    assert 1_000_000 < found.rss_bytes < 1 << 40
    assert found.package("surely no package").files == ()


@pytest.mark.parametrize(
    ("mode", "change", "read"),
    [
        ("TIMESTAMP", "none", True),
        ("TIMESTAMP", "source", False),
        ("TIMESTAMP", "same size and time", True),
        ("CHECKED_HASH", "none", True),
        ("CHECKED_HASH", "same size and time", False),
        ("UNCHECKED_HASH", "source", True),
        ("TIMESTAMP", "magic", False),
        ("TIMESTAMP", "cut", False),
        ("TIMESTAMP", "gone", False),
    ],
)
def test_the_pyc_counts_exactly_when_python_reads_it(tmp_path: Path, mode: str, change: str, read: bool) -> None:
    source = tmp_path / "planted.py"
    source.write_text("x = 1\n")
    cached = Path(py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode[mode]) or "")
    facts = source.stat()
    if change in ("source", "same size and time"):
        source.write_text("x = 2\n" if change != "source" else "x = 22\n")
        os.utime(source, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    elif change == "gone":
        cached.unlink()
    elif change != "none":
        raw = bytearray(cached.read_bytes())
        raw[0] ^= 1
        cached.write_bytes(raw[:10] if change == "cut" else raw)
    before = source.read_text()
    assert was_read(cached, source) is read
    spec = importlib.util.spec_from_file_location("planted", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    expected = str(cached if read else source)
    assert module_files({"planted": module}) == {expected: "planted"}
    # The oracle: what Python itself executes. Where the source says something else, the two differ.
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = kept
    if before != "x = 1\n":
        assert (module.x == 1) is read


def test_modules_without_a_file_have_none_and_one_file_counts_once() -> None:
    class Lazy(type(sys)):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was loaded by looking")

    modules = {"sys": sys, "odd": 3, "lazy": Lazy("lazy"), "json": json, "other_name": json}
    (path,) = module_files(modules)
    assert "json" in path


def test_lines_of_the_kernel(tmp_path: Path) -> None:
    plain, spaced = tmp_path / "liba.so", tmp_path / "b c.so"
    plain.write_bytes(bytes(10))
    spaced.write_bytes(bytes(20))
    lines = [
        f"7f00-7f10 r--p 00000000 08:01 5 {plain}",
        f"7f10-7f20 r-xp 00001000 08:01 5 {plain}",
        f"7f20-7f30 r-xp 00000000 08:01 6                    {spaced}",
        "7f30-7f40 rw-p 00000000 00:00 0 ",
        "7f40-7f50 rw-p 00000000 00:00 0 [heap]",
        "7f50-7f60 rw-s 00000000 00:01 9 /dev/zero",
        "7f60-7f70 rw-s 00000000 00:01 9 /memfd:shared (deleted)",
        f"00001000-00003000 r-xp 00001000 08:01 7 {tmp_path}/gone.so (deleted)",
        f"00003000-00004000 r--p 00003000 08:01 7 {tmp_path}/data (deleted)",
        f"7f70-7f80 r--p 00000000 08:01 5 {tmp_path}",
    ]
    assert mapped_files(lines) == {str(plain): 10, str(spaced): 20, f"{tmp_path}/gone.so (deleted)": 0x3000}


def test_a_file_that_may_not_be_looked_at_is_no_file_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> os.stat_result:
        raise PermissionError(13, "no", path)

    monkeypatch.setattr(listing.os, "stat", refuse)
    with pytest.raises(ResourceError, match="cannot be looked at"):
        mapped_files(["7f00-7f10 r--p 00000000 08:01 5 /lib/liba.so"])


def test_where_a_file_belongs() -> None:
    groups = Groups("/opt/bin/python3.11", ("/opt/lib/python3.11", "/opt/lib/python3.11/lib-dynload"),
                    ("/opt/lib/python3.11/site-packages", "/home/me/src"))  # fmt: skip
    places = {
        "/opt/bin/python3.11": INTERPRETER,
        "/opt/lib/libpython3.11.so.1.0": INTERPRETER,
        "/opt/lib/python3.11/__pycache__/ast.cpython-311.pyc": STANDARD_LIBRARY,
        "/opt/lib/python3.11/lib-dynload/math.so": STANDARD_LIBRARY,
        "/opt/lib/python3.11/site-packages/numpy/core.py": "numpy",
        "/opt/lib/python3.11/site-packages/numpy.libs/libblas.so": "numpy",
        "/opt/lib/python3.11/site-packages/__pycache__/six.cpython-311.pyc": "six",
        "/opt/lib/python3.11/site-packages/_cffi_backend.cpython-311.so": "_cffi_backend",
        "/home/me/src/motte/errors.py": "motte",
        "/home/me/srcs/thing.txt": OTHER_FILES,
        "/usr/lib/libc.so.6": SYSTEM_LIBRARIES,
    }
    assert {path: groups.of(path) for path in places} == places


def test_a_hardened_process_of_an_ordinary_user_may_list_itself() -> None:
    script = (
        "import os\nfrom motte.trusted import tcb\nfrom motte.trusted.harden import harden\n"
        "if os.getuid() == 0:\n    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(*[65534] * 3)\n"
        "print(harden().dumpable, os.getuid(), sum('libc' in line for line in tcb._maps()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    dumpable, uid, lines = done.stdout.split()
    assert dumpable == "False"
    assert int(uid) > 0
    assert int(lines) > 1


GOOD = {
    "rss_bytes": 5,
    "packages": [
        {"name": "a", "files": [{"path": "/a", "bytes": 1, "module": "a"}, {"path": "/b", "bytes": 2, "module": None}]},
        {"name": "b", "files": []},
    ],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("rss_bytes"), "missing field"),
        (lambda v: v.update(rss_bytes=-1), "not an integer in range"),
        (lambda v: v.update(more=1), "unknown field"),
        (lambda v: v.update(packages={}), "not a list"),
        (lambda v: v["packages"].append(v["packages"][0]), "package stands twice"),
        (lambda v: v["packages"][1]["files"].append(v["packages"][0]["files"][0]), "file stands twice"),
        (lambda v: v["packages"][0].update(name=1), "not a string"),
        (lambda v: v["packages"][0]["files"][0].update(bytes="1"), "not an integer in range"),
        (lambda v: v["packages"][0]["files"][0].update(module=1), "not the name of a module"),
        (lambda v: v["packages"][0]["files"][0].update(module="m" * 600), "not the name of a module"),
        (lambda v: v["packages"][0]["files"][0].update(path="p" * 5000), "not a string"),
        (lambda v: v["packages"][0]["files"][0].update(extra=1), "unknown field"),
        (lambda v: v["packages"].extend([{"name": "n", "files": [{"path": f"/{i}", "bytes": 0, "module": None}
                                                                 for i in range(MAX_TCB_FILES)]}]), "too many files"),
    ],
)  # fmt: skip
def test_a_malformed_list_is_refused(change, message: str) -> None:
    assert Tcb.from_json(copy.deepcopy(GOOD)).bytes == 3
    value = copy.deepcopy(GOOD)
    change(value)
    with pytest.raises(FrameError, match=message):
        Tcb.from_json(value)
