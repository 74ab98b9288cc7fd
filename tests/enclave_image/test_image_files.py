"""Images of planted files: the same bytes wherever they are made; packed modules; libraries, and a stand-in for one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zlib
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest

from motte.enclave import image_files
from motte.enclave.elf import read_library, same_for_a_loader, stripped
from motte.enclave.image import RECORD, ROOT, make_pack, write_image
from motte.enclave.image_files import MODULES, Member, members_of
from motte.enclave.start import PackedFinder, read_pack
from motte.enclave.stub_library import make_stub
from motte.errors import FormatError, InputError, UnsupportedError
from motte.trusted.tcb import LoadedFile, LoadedPackage, Tcb

SOURCE = 'WORDS = {"a", "b", "c", "d"} | set()\n\n\ndef f(x):\n    return x in {"one", "two", "three"}\n'


def planted(folder: Path) -> list[Member]:
    folder.mkdir()
    names = {
        "pack/__init__.py": "from pack import inner\n",
        "pack/inner.py": SOURCE,
        "plain.py": SOURCE,
        "data.bin": "x",
    }
    members = []
    for name, text in names.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        source = name.endswith(".py")
        place = f"{MODULES}/{name}c" if source else f"{MODULES}/{name}"
        members.append(Member(place, str(path), compiled=source, packed=name.startswith("pack")))
    library = Path(sys.modules["_ctypes"].__file__ or "")
    return [*members, Member(f"{MODULES}/lib-dynload/{library.name}", str(library))]


def contents(folder: Path) -> dict[str, tuple[bytes, int, float]]:
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mode,
            path.stat().st_mtime,
        )
        for path in (folder / ROOT).rglob("*")
    }


def test_two_builds_in_different_places_are_the_same(tmp_path: Path) -> None:
    """Other folders, other times of the sources, another umask, another order."""
    first = write_image(tmp_path / "one", planted(tmp_path / "sources"), engine="onnxruntime", slim=False)
    members = planted(tmp_path / "elsewhere-with-a-longer-name")
    for member in members[:-1]:
        os.utime(member.source, (10, 10))
    before = os.umask(0o077)
    try:
        second = write_image(tmp_path / "deep" / "two", members[::-1], engine="onnxruntime", slim=False)
    finally:
        os.umask(before)
    assert contents(tmp_path / "one") == contents(tmp_path / "deep" / "two")
    assert first.files == second.files
    assert (tmp_path / "one" / RECORD).read_bytes() == (tmp_path / "deep" / "two" / RECORD).read_bytes()


def test_bytecode_is_of_the_unchecked_kind_and_names_no_path_here(tmp_path: Path) -> None:
    write_image(tmp_path / "image", planted(tmp_path / "sources"), engine="onnxruntime", slim=False)
    root = tmp_path / "image" / ROOT
    pack = read_pack(memoryview((root / MODULES / "modules.pack").read_bytes()))
    assert set(pack) == {"pack/__init__.pyc", "pack/inner.pyc"}
    for data in (*map(zlib.decompress, pack.values()), (root / MODULES / "plain.pyc").read_bytes()):
        assert data[:4] == MAGIC_NUMBER
        assert data[4:8] == b"\x01\0\0\0"  # PEP 552: with a hash, and nobody looks at it
        assert str(tmp_path).encode() not in data
        assert f"/{MODULES}".encode() in data


def test_packed_modules_are_imported_from_the_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "image", planted(tmp_path / "sources"), engine="onnxruntime", slim=False)
    pack = read_pack(memoryview((tmp_path / "image" / ROOT / MODULES / "modules.pack").read_bytes()))
    monkeypatch.setattr(sys, "meta_path", [PackedFinder("/nowhere", pack), *sys.meta_path])
    for name in ("pack", "pack.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import pack as package  # type: ignore[import-not-found]

    assert package.inner.f("two")
    assert package.__file__ == "/nowhere/pack/__init__.pyc"
    assert package.__path__ == ["/nowhere/pack"]
    assert package.inner.__spec__.origin == "/nowhere/modules.pack"
    for name in ("pack", "pack.inner"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "flaw", [b"", b"MOTTEPK1", make_pack({"a.pyc": b"abc"})[:-1], make_pack({"a.pyc": b"abc"}) + b"x"]
)
def test_a_pack_that_was_cut_is_refused(flaw: bytes) -> None:
    with pytest.raises(ValueError, match="pack"):
        read_pack(memoryview(flaw))


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    members = planted(tmp_path / "sources")
    Path(members[2].source).write_text("def broken(:\n", encoding="utf-8")
    with pytest.raises(UnsupportedError, match="compile"):
        write_image(tmp_path / "image", members, engine="onnxruntime", slim=False)
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]
    (tmp_path / "image").mkdir()
    with pytest.raises(InputError, match="exists"):
        write_image(tmp_path / "image", [], engine="onnxruntime", slim=False)


def test_places_do_not_depend_on_where_things_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    for name in ("pkg/__init__.py", "pkg/data.txt", "warnings.py", "other/pkg.libs/x"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n", encoding="utf-8")
    loaded = [
        LoadedFile(str(folder / "pkg/__init__.py"), 1, "pkg"),
        LoadedFile(str(folder / "warnings.py"), 1, "warnings"),
    ]
    tcb = Tcb((LoadedPackage("pkg", tuple(loaded)),), 1)
    opened = [str(folder / "pkg/data.txt"), "/proc/self/maps", "/etc/ld.so.cache", str(tmp_path / "gone")]
    found = {m.place: m for m in members_of([tcb], opened, engine="onnxruntime", folders=(str(folder),))}
    assert found.pop(f"{MODULES}/os.pyc").compiled
    assert {place: (m.compiled, m.packed) for place, m in found.items()} == {
        f"{MODULES}/pkg/__init__.pyc": (True, True),
        f"{MODULES}/pkg/data.txt": (False, False),
        f"{MODULES}/warnings.pyc": (True, False),
    }
    for path in Path("/lib/x86_64-linux-gnu").glob("libc.so.6"):
        assert image_files._library(str(path.resolve())).place == "lib/x86_64-linux-gnu/libc.so.6"


def test_stripping_keeps_what_a_loader_reads() -> None:
    data = Path(sys.modules["_ctypes"].__file__ or "").read_bytes()
    before, after = read_library(data), stripped(data)
    assert len(after) <= len(data)
    assert same_for_a_loader(before, after)
    assert before.needed
    assert not same_for_a_loader(before, b"no library")


def test_segments_that_no_loader_maps_keep_the_original() -> None:
    """What strip does to some libraries that patchelf changed: a segment whose offset and address disagree."""
    data = bytearray(Path(sys.modules["_ctypes"].__file__ or "").read_bytes())
    before = read_library(bytes(data))
    start = int.from_bytes(data[32:40], "little")
    for index in range(int.from_bytes(data[56:58], "little")):
        place = start + 56 * index
        if data[place : place + 4] == b"\x01\0\0\0":
            data[place + 8 : place + 16] = (int.from_bytes(data[place + 8 : place + 16], "little") + 64).to_bytes(
                8, "little"
            )
    assert not same_for_a_loader(before, bytes(data))


@pytest.mark.parametrize("cut", [0, 20, 64, 200])
def test_a_malformed_library_is_refused(cut: int) -> None:
    data = Path(sys.modules["_ctypes"].__file__ or "").read_bytes()
    with pytest.raises(FormatError):
        read_library(data[:cut])


def original_and_user() -> tuple[bytes, bytes]:
    numpy = pytest.importorskip("numpy")
    folder = Path(numpy.__file__).parent
    libraries = list((folder.parent / "numpy.libs").glob("*openblas*"))
    if len(libraries) != 1:
        pytest.skip("this numpy brings no OpenBLAS of its own")
    (user,) = (folder / "_core").glob("_multiarray_umath*.so")
    return libraries[0].read_bytes(), user.read_bytes()


def test_the_stand_in_for_openblas_has_its_name_and_symbols(tmp_path: Path) -> None:
    original, user = original_and_user()
    stub = make_stub(original, [user], where="openblas")
    read = read_library(stub)
    assert read.aligned
    assert read.name == read_library(original).name
    assert read.offered == read_library(user).missing & read_library(original).offered
    assert len(stub) < 64 << 10
    path = tmp_path / "stub.so"
    path.write_bytes(stub)
    library = ctypes.CDLL(str(path))
    for name, kind in (("sdot", ctypes.c_float), ("ddot", ctypes.c_double)):
        (symbol,) = (each for each in read.offered if each.endswith(f"cblas_{name}64_"))
        function = getattr(library, symbol)
        function.restype = kind
        function.argtypes = [ctypes.c_int64, ctypes.POINTER(kind), ctypes.c_int64, ctypes.POINTER(kind), ctypes.c_int64]
        x, y = (kind * 6)(1, 2, 3, 4, 5, 6), (kind * 3)(10, 20, 30)
        assert function(3, x, 2, y, 1) == 1 * 10 + 3 * 20 + 5 * 30
        assert function(3, x, 1, y, 1) == 140
        assert function(0, x, 1, y, 1) == 0


def test_a_call_of_anything_else_in_it_ends_the_process(tmp_path: Path) -> None:
    original, user = original_and_user()
    path = tmp_path / "stub.so"
    path.write_bytes(make_stub(original, [user], where="openblas"))
    (symbol,) = (each for each in read_library(path.read_bytes()).offered if each.endswith("cblas_sgemm64_"))
    done = subprocess.run([sys.executable, "-I", "-c", f"import ctypes; ctypes.CDLL({str(path)!r}).{symbol}()"])
    assert done.returncode == -4  # SIGILL


def test_an_openblas_with_other_integers_is_not_replaced() -> None:
    data = Path(sys.modules["_ctypes"].__file__ or "").read_bytes()
    with pytest.raises(UnsupportedError, match="left out"):
        make_stub(data, [data], where="planted")
