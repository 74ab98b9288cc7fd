"""Which files of this machine go where in an image: from what a real worker loaded, to fixed places.

Places do not depend on where things lie here: the interpreter at ``/usr/bin/python3``, every module below
``/usr/lib/pythonX.Y``, libraries in one folder, and the C library by itself in ``/lib``, since Gramine brings its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import source_from_cache
from pathlib import Path
from typing import Final

from motte.enclave.elf import is_elf, read_library
from motte.enclave.start import FIRST
from motte.errors import UnsupportedError
from motte.trusted.tcb import Tcb

VERSION: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
_ENTRY_POINTS: Final = "-info/entry_points.txt"
"""Of every installed package, read to find plug-ins: an image has none."""
MODULES: Final = f"usr/lib/{VERSION}"
"""Where modules lie in an image, without the leading slash."""
INTERPRETER: Final = "usr/bin/python3"
LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
C_LIBRARIES: Final = "lib/x86_64-linux-gnu"
LOADER: Final = "lib64/ld-linux-x86-64.so.2"
C_LIBRARY: Final = (
    "ld-linux-x86-64.so.2",
    "libanl.so.1",
    "libc.so.6",
    "libdl.so.2",
    "libm.so.6",
    "libmvec.so.1",
    "libpthread.so.0",
    "libresolv.so.2",
    "librt.so.1",
    "libutil.so.1",
)
"""The parts of glibc: Gramine has its own build of all of them, which calls it instead of the kernel."""
LOOKED_FOR: Final = {"torch": ("torch/bin/torch_shm_manager",)}
"""Engine -> files below a folder of modules that it only looks for when loaded: no list of what was read has them."""
_KERNEL: Final = ("/proc/", "/sys/", "/dev/")
_HOST_ONLY: Final = (
    "/etc/ld.so.cache",
    "/etc/os-release",
    "/usr/lib/os-release",
    "/usr/lib/locale/",
    "/usr/share/locale/",
    "/usr/lib/x86_64-linux-gnu/gconv/",
)
"""What is read where it is there, and says how this machine is set up: its libraries, its languages, its name."""


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One file of an image: its place (no leading slash), and the file here that it is made from.

    ``compiled``: it is a source, and its bytecode goes into the image. ``packed``: into the one file with all of it.
    """

    place: str
    source: str
    compiled: bool = False
    packed: bool = False


def module_folders() -> tuple[str, ...]:
    """Where this interpreter finds modules, real paths, the standard library first; our own package among them."""
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    library = os.path.realpath(os.path.dirname(os.__file__))
    found = [library, os.path.join(library, "lib-dynload"), own, *map(os.path.realpath, sys.path)]
    return tuple(dict.fromkeys(path for path in found if os.path.isdir(path) and path != os.path.realpath(os.getcwd())))


def members_of(
    tcbs: Iterable[Tcb], opened: Iterable[str], *, engine: str, folders: tuple[str, ...]
) -> tuple[Member, ...]:
    """What goes into the image, sorted by place.

    Args:
        tcbs: what workers said that they had loaded.
        opened: paths that Python opened in them.
        folders: where they found modules.

    Raises:
        UnsupportedError: two different files for one place.
    """
    found: dict[str, Member] = {}
    paths: set[str] = set()
    for tcb in tcbs:
        for package in tcb.packages:
            paths.update(file.path for file in package.files)
    for path in opened:
        real = os.path.realpath(path)
        if os.path.isfile(real):
            paths.add(real)
    wanted = [os.path.join(folder, name) for name in LOOKED_FOR.get(engine, ()) for folder in folders]
    paths.update(path for path in wanted if os.path.isfile(path))
    for path in sorted(paths):
        member = _member(path, folders)
        if member is None:
            continue
        before = found.setdefault(member.place, member)
        if before.source != member.source and Path(before.source).read_bytes() != Path(member.source).read_bytes():
            raise UnsupportedError(
                "two files for one place of the image", where=member.place, got=f"{before.source}, {member.source}"
            )
    # The module itself is part of the interpreter; by this file it knows where its library is.
    landmark = f"{MODULES}/os.pyc"
    found[landmark] = Member(landmark, os.path.realpath(os.__file__), compiled=True)
    return tuple(sorted(found.values()))


def _member(path: str, folders: tuple[str, ...]) -> Member | None:
    if path.startswith((*_KERNEL, *_HOST_ONLY)) or path.endswith(_ENTRY_POINTS):
        return None
    if path == os.path.realpath(sys.executable):
        return Member(INTERPRETER, path)
    if path.endswith((".py", ".pyc")):
        return _module(path, folders)
    folder = max((each for each in folders if path.startswith(each + os.sep)), key=len, default=None)
    with open(path, "rb") as file:
        library = is_elf(file.read(16))
    if folder is not None and not os.path.basename(path).startswith("libpython"):
        return Member(f"{MODULES}/{_below(path, folder)}", path)
    if library:
        return _library(path)
    return Member(path.lstrip("/"), path)


def _module(path: str, folders: tuple[str, ...]) -> Member | None:
    if path.endswith(".pyc") and "__pycache__" in path:
        path = source_from_cache(path)
    folder = max((each for each in folders if path.startswith(each + os.sep)), key=len, default=None)
    if folder is None or not path.endswith(".py"):
        return None
    inside = _below(path, folder)
    if os.path.basename(path) == "traced.py":
        return None
    name = inside.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Member(f"{MODULES}/{inside}c", path, compiled=True, packed=name not in FIRST)


def _library(path: str) -> Member:
    name = read_library(Path(path).read_bytes(), where=path).name or os.path.basename(path)
    if name == os.path.basename(LOADER):
        return Member(LOADER, path)
    return Member(f"{C_LIBRARIES if name in C_LIBRARY else LIBRARIES}/{name}", path)


def _below(path: str, folder: str) -> str:
    # lib-dynload is a folder of its own to Python, and keeps its name in the image.
    inside = os.path.relpath(path, folder)
    return f"lib-dynload/{inside}" if os.path.basename(folder) == "lib-dynload" else inside
