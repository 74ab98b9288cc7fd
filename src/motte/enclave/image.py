"""A closed image: exactly the files that a worker of one engine loads, each made the same way every time.

Made from a list of :class:`motte.enclave.image_files.Member`; what comes out depends on nothing but the bytes of their
sources, the interpreter and the version of ``strip``: no time, no path of this machine, no order of a folder. The
format: docs/spec/image.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from motte.enclave.elf import is_elf, strip_version, stripped
from motte.enclave.image_files import C_LIBRARIES, INTERPRETER, LIBRARIES, LOADER, MODULES, Member
from motte.enclave.start import MAGIC, PACK_NAME, START_NAME
from motte.enclave.stub_library import make_stub
from motte.errors import InputError, ResourceError, UnsupportedError
from motte.measure.provenance import package_versions, revision
from motte.seal.atomic import atomic_file

ROOT: Final = "root"
RECORD: Final = "image.json"
FORMAT: Final = "motte-image-1"
_FOLDER_MODE: Final = 0o755
EPOCH_S: Final = 0
"""Modification time of every file: Gramine shows the same whatever it is."""
_COMPILE_TIMEOUT_S: Final = 600
_LEVEL: Final = 6
"""Of zlib: 9 takes four times as long for one per cent less."""
_HERE: Final = Path(__file__).parent
_OPENBLAS: Final = "openblas"
SELF_READING: Final = {"torch": b"install_config_module("}
"""Engine -> what stands in those of its modules that look at the comments of their own source when imported."""
_FORTRAN: Final = ("libgfortran", "libquadmath")
_HASHLIB: Final = f"{MODULES}/lib-dynload/_hashlib."
_OPENSSL: Final = (f"{LIBRARIES}/libcrypto.", f"{LIBRARIES}/libssl.", _HASHLIB, f"{MODULES}/lib-dynload/_ssl.")
_DIGESTS: Final = ("_md5", "_sha1", "_sha256", "_sha512", "_sha3", "_blake2")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file as it lies in the image; ``how``: copied, stripped, compiled, packed together, or a stub."""

    path: str
    bytes: int
    sha256: str
    how: str


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One member of the pack of modules, as it is when expanded; ``source_sha256``: of the source that it was compiled
    from."""

    path: str
    bytes: int
    sha256: str
    source_sha256: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What an image holds and how it was made. The same for the same inputs, wherever it is built."""

    engine: str
    slim: bool
    files: tuple[ImageFile, ...]
    modules: tuple[PackedModule, ...]
    versions: Mapping[str, str]
    strip: str | None
    commit: str | None
    dirty: bool | None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    def hashed(self) -> tuple[ImageFile, ...]:
        """The files that Gramine hashes: all but the C library, in whose place it has its own."""
        return tuple(f for f in self.files if not f.path.startswith((C_LIBRARIES, LOADER)))

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"format": FORMAT, **asdict(self)}


def write_image(
    folder: Path,
    members: Sequence[Member],
    *,
    engine: str,
    slim: bool,
    replaced: Mapping[str, bytes | None] | None = None,
) -> ImageRecord:
    """Make an image in ``folder``, which must not exist; it appears whole or not at all.

    Args:
        replaced: places that have no original of their own, and the stub that comes there; None: nothing does.

    Raises:
        InputError: ``folder`` exists. UnsupportedError: a slim one of an engine that needs OpenBLAS, or a source that
            does not compile. ResourceError: it cannot be written.
    """
    if os.path.lexists(folder):
        raise InputError("the folder exists already", where=str(folder), hint="choose another name")
    if slim and engine == "torch":
        raise UnsupportedError("torch images are not made slim: their worker may compute with numpy", got=engine)
    folder.parent.mkdir(parents=True, exist_ok=True)
    passing = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        passing.chmod(_FOLDER_MODE)
        record = _write(passing, members, engine=engine, slim=slim, replaced=replaced or {})
        os.rename(passing, folder)
    except OSError as problem:
        raise ResourceError("the image cannot be written", where=str(folder), got=str(problem)) from problem
    finally:
        shutil.rmtree(passing, ignore_errors=True)
    return record


def _write(
    folder: Path, members: Sequence[Member], *, engine: str, slim: bool, replaced: Mapping[str, bytes | None]
) -> ImageRecord:
    root = folder / ROOT
    members = sorted(members)
    compiled = _compile([member for member in members if member.compiled])
    files = [_start(root, compiled)]
    left_out = (_left_out(members) if slim else {}) | dict(replaced)
    for member in [*members, *(_digests(members) if slim else ())]:
        if member.packed or left_out.get(member.place, b"") is None:
            continue
        if member.compiled:
            files.append(_place(root, member.place, compiled[member.place], "compiled"))
            continue
        stub = left_out.get(member.place)
        data = Path(member.source).read_bytes()
        made = stub if stub is not None else stripped(data) if is_elf(data) else data
        how = "stub" if stub is not None else "stripped" if made is not data else "copied"
        files.append(_place(root, member.place, made, how))
    packed = [member for member in members if member.packed]
    inside = {member.place: compiled[member.place] for member in packed} | _sources(packed, engine)
    files.append(_place(root, f"{MODULES}/{PACK_NAME}", make_pack(inside), "packed"))
    _settle(root)
    here = revision()
    record = ImageRecord(
        engine=engine,
        slim=slim or bool(replaced),
        files=tuple(sorted(files, key=lambda file: file.path)),
        modules=tuple(
            PackedModule(
                m.place, len(compiled[m.place]), _digest(compiled[m.place]), _digest(Path(m.source).read_bytes())
            )
            for m in packed
        ),
        versions=package_versions(),
        strip=strip_version(),
        commit=None if here is None else here.commit,
        dirty=None if here is None else here.dirty,
    )
    write_bytes(folder / RECORD, f"{json.dumps(record.to_json(), indent=1, sort_keys=True)}\n".encode())
    return record


def _sources(packed: Sequence[Member], engine: str) -> dict[str, bytes]:
    """Sources that go into the pack too: of modules that read their own when they are imported."""
    mark = SELF_READING.get(engine)
    if mark is None:
        return {}
    found = {member.place.removesuffix("c"): Path(member.source).read_bytes() for member in packed}
    return {place: data for place, data in found.items() if mark in data}


def make_pack(members: Mapping[str, bytes]) -> bytes:
    """The pack that :mod:`motte.enclave.start` reads, of place -> bytecode below the folder of modules."""
    inside = sorted((place.removeprefix(f"{MODULES}/"), zlib.compress(data, _LEVEL)) for place, data in members.items())
    index = "".join(f"{place}\t{len(data)}\n" for place, data in inside).encode()
    return b"".join((MAGIC, len(index).to_bytes(4, "big"), index, *(data for _, data in inside)))


def write_bytes(path: Path, data: bytes) -> None:
    """Write one new file beside the image, whole or not at all.

    Raises:
        InputError: it exists. ResourceError: it cannot be written.
    """
    with atomic_file(path, overwrite=False) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]


def _start(root: Path, compiled: Mapping[str, bytes]) -> ImageFile:
    return _place(root, f"{MODULES}/{START_NAME}", compiled[f"{MODULES}/{START_NAME}"], "compiled")


def _compile(members: Sequence[Member]) -> dict[str, bytes]:
    """Place -> bytecode, of all at once in a process of its own; the start program among them."""
    jobs = [*members, Member(f"{MODULES}/{START_NAME}", str(_HERE / "start.py"), compiled=True)]
    with tempfile.TemporaryDirectory(prefix="motte-compile-") as folder:
        targets = [os.path.join(folder, str(index)) for index in range(len(jobs))]
        words = [
            word
            for member, target in zip(jobs, targets, strict=True)
            for word in (member.source, target, f"/{member.place.removesuffix('c')}")
        ]
        # The seed of hashes orders sets, some of which become constants.
        done = subprocess.run(
            [sys.executable, "-S", "-s", "-P", "-B", str(_HERE / "compile_modules.py")],
            input="".join(f"{word}\0" for word in words).encode(),
            capture_output=True,
            timeout=_COMPILE_TIMEOUT_S,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise UnsupportedError("a source does not compile", got="".join(last)[:300])
        return {member.place: Path(target).read_bytes() for member, target in zip(jobs, targets, strict=True)}


def _left_out(members: Sequence[Member]) -> dict[str, bytes | None]:
    """Places that a slim image has no original of -> what comes there instead: a stub; None: nothing.

    Besides OpenBLAS it is Python's own link to OpenSSL: ``cryptography`` brings one of its own, and ``hashlib`` has its
    other implementations (:func:`_digests`). TLS has none: a slim worker cannot open an attested channel.
    """
    link = [m.place for m in members if m.place.startswith(_OPENSSL)]
    return {**without_openblas(members), **dict.fromkeys(link)}


def without_openblas(members: Sequence[Member]) -> dict[str, bytes | None]:
    """Place of numpy's OpenBLAS -> its stub; places of what only it needs -> None.

    Raises:
        UnsupportedError: there is no OpenBLAS, or it cannot be left out.
    """
    found = [m for m in members if not m.compiled and _OPENBLAS in os.path.basename(m.place)]
    if len(found) != 1:
        raise UnsupportedError("no one OpenBLAS to leave out", got=f"{len(found)} files", hint="build without --slim")
    inside = [m for m in members if m.place.startswith(f"{MODULES}/numpy/") and ".so" in m.place]
    users = [Path(m.source).read_bytes() for m in inside]
    stub = make_stub(Path(found[0].source).read_bytes(), users, where=found[0].source)
    folder = os.path.dirname(found[0].place)
    runtime = [m.place for m in members if m.place.startswith(tuple(f"{folder}/{name}" for name in _FORTRAN))]
    return {found[0].place: stub, **dict.fromkeys(runtime)}


def _digests(members: Sequence[Member]) -> list[Member]:
    """The implementations of ``hashlib`` that need no OpenSSL, where they are files and not part of the interpreter."""
    link = next((m for m in members if m.place.startswith(_HASHLIB)), None)
    if link is None:
        return []
    known = {m.place for m in members}
    names = [
        (m.place.replace("_hashlib", name), m.source.replace("_hashlib", name)) for m in (link,) for name in _DIGESTS
    ]
    return [Member(place, source) for place, source in names if place not in known and os.path.isfile(source)]


def _place(root: Path, place: str, data: bytes, how: str) -> ImageFile:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o755 if place in (INTERPRETER, LOADER) else 0o644)
    return ImageFile(place, len(data), _digest(data), how)


def _settle(root: Path) -> None:
    """Same times and modes everywhere, whatever the umask."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            os.utime(os.path.join(folder, name), (EPOCH_S, EPOCH_S))
        os.chmod(folder, _FOLDER_MODE)
        os.utime(folder, (EPOCH_S, EPOCH_S))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
