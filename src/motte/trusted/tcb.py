"""Which files this process has loaded: what of a machine's software has to be trusted along with the worker.

Inside an enclave every one of these files is part of what is measured, and is hashed at each start.

Two sources, both of the process itself: the files that the kernel has mapped into it (interpreter, shared libraries,
data), and the file behind every imported Python module: the ``.pyc`` that was read, or the ``.py`` if none was valid.
Modules that are built into the interpreter have no file. What a library only opened, read and closed again leaves no
trace and is not listed.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Final

from motte.errors import FrameError, ResourceError
from motte.limits import MAX_NAME_BYTES, MAX_TCB_FILES, MAX_TENSOR_BYTES
from motte.measure.memory import read_memory
from motte.strict_json import Fields

INTERPRETER: Final = "interpreter"
STANDARD_LIBRARY: Final = "standard library"
SYSTEM_LIBRARIES: Final = "system libraries"
OTHER_FILES: Final = "other files"
"""The groups that are no Python package."""
_MAX_PATH_BYTES: Final = 4096
_PYC_HEADER_BYTES: Final = 16
_SELF: Final = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """One file: where it lies, its whole size, and the Python module that was read from it; None: a mapped file."""

    path: str
    bytes: int
    module: str | None


@dataclass(frozen=True, slots=True)
class LoadedPackage:
    """The files of one package, or of one of the groups that are none."""

    name: str
    files: tuple[LoadedFile, ...]

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(file.bytes for file in self.files)

    @property
    def modules(self) -> tuple[str, ...]:
        """The Python modules that were read from its files, sorted."""
        return tuple(sorted(file.module for file in self.files if file.module is not None))


@dataclass(frozen=True, slots=True)
class Tcb:
    """All loaded files, each once, by package; and the resident set when they were listed, in bytes.

    A process says this of itself, and nothing proves it: **unverified**.
    """

    packages: tuple[LoadedPackage, ...]
    rss_bytes: int

    @property
    def files(self) -> int:
        """How many files."""
        return sum(len(package.files) for package in self.packages)

    @property
    def bytes(self) -> int:
        """Size of all files: what an enclave would hash at its start."""
        return sum(package.bytes for package in self.packages)

    def package(self, name: str) -> LoadedPackage:
        """The package ``name``, empty where nothing of it was loaded."""
        return next((each for each in self.packages if each.name == name), LoadedPackage(name, ()))

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        packages = [
            {
                "name": package.name,
                "files": [{"path": f.path, "bytes": f.bytes, "module": f.module} for f in package.files],
            }
            for package in self.packages
        ]
        return {"packages": packages, "rss_bytes": self.rss_bytes}

    @staticmethod
    def from_json(value: object) -> Tcb:
        """Read **unverified** JSON values.

        Raises:
            FrameError: a missing, unknown or ill-typed field, a file or package that stands twice, too many of them.
        """
        fields = Fields(value, where="tcb", error=FrameError)
        found = Tcb(
            packages=tuple(fields.items("packages", max_items=MAX_TCB_FILES, read=_read_package)),
            rss_bytes=fields.integer("rss_bytes", low=0, high=1 << 62),
        )
        fields.done()
        if found.files > MAX_TCB_FILES:
            raise FrameError("too many files", where="tcb", expected=f"at most {MAX_TCB_FILES}", got=str(found.files))
        _refuse_twice("package", [package.name for package in found.packages])
        _refuse_twice("file", [file.path for package in found.packages for file in package.files])
        return found


def _read_package(value: object, where: str) -> LoadedPackage:
    fields = Fields(value, where=where, error=FrameError)
    name = fields.text("name", max_bytes=MAX_NAME_BYTES)
    files = fields.items("files", max_items=MAX_TCB_FILES, read=_read_file)
    fields.done()
    return LoadedPackage(name, tuple(files))


def _read_file(value: object, where: str) -> LoadedFile:
    fields = Fields(value, where=where, error=FrameError)
    path = fields.text("path", max_bytes=_MAX_PATH_BYTES)
    size = fields.integer("bytes", low=0, high=MAX_TENSOR_BYTES)
    module = fields.any("module")
    if module is not None and not (isinstance(module, str) and len(module) <= MAX_NAME_BYTES):
        raise FrameError("not the name of a module", where=f"{where}.module", got=repr(module)[:80])
    fields.done()
    return LoadedFile(path, size, module)


def _refuse_twice(what: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FrameError(f"a {what} stands twice", where="tcb", got=repr(twice)[:80])


# --- the files of this process --------------------------------------------------------------------------------------


def loaded_files() -> Tcb:
    """List the files of this process. Imports nothing that a worker has not loaded already.

    A non-dumpable process may read its own entries in /proc, also as an ordinary user.

    Raises:
        ResourceError: /proc is not mounted, or one of the files may not be looked at.
    """
    # Mapped files first: an extension module is one of them, and its name is added.
    sizes = mapped_files(_maps())
    modules = module_files(dict(sys.modules))
    sizes |= {path: size for path in modules if (size := _size(path)) is not None}
    groups = Groups.here()
    packages: dict[str, list[LoadedFile]] = {}
    for path, size in sorted(sizes.items()):
        # A name that is not UTF-8 could not be sent.
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        packages.setdefault(groups.of(path), []).append(LoadedFile(shown, size, modules.get(path)))
    return Tcb(
        tuple(LoadedPackage(name, tuple(files)) for name, files in sorted(packages.items())), read_memory().rss_bytes
    )


def _maps() -> list[str]:
    try:
        return (_SELF / "maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as problem:
        raise ResourceError(
            "the files of this process cannot be listed", where=str(_SELF / "maps"), got=str(problem)
        ) from problem


def mapped_files(lines: Iterable[str]) -> dict[str, int]:
    """Path -> size of every regular file in lines of /proc/PID/maps (proc_pid_maps(5)).

    A file that no longer exists is listed if code of it is mapped, with the size of what is mapped.

    Raises:
        ResourceError: one of the files may not be looked at.
    """
    sizes: dict[str, int] = {}
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) < 6 or not words[5].startswith("/") or words[5] in sizes:
            continue
        size = _size(words[5])
        if size is None and "x" in words[1] and not os.path.lexists(words[5]):
            low, _, high = words[0].partition("-")
            size = int(words[2], 16) + int(high, 16) - int(low, 16)
        if size is not None:
            sizes[words[5]] = size
    return sizes


def _size(path: str) -> int | None:
    """Size of a regular file; None: something else, or nothing at all. Not being allowed to look is neither."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        raise ResourceError("a loaded file cannot be looked at", where=path, got=str(problem)) from problem
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def module_files(modules: Mapping[str, object]) -> dict[str, str]:
    """Real path of the file that was read -> module name, for all ``modules`` (``sys.modules``) that have one."""
    found: dict[str, str] = {}
    for name, module in sorted(modules.items()):
        # Not by attribute: a lazy module would load more when asked.
        held = getattr(module, "__dict__", {})
        spec = held.get("__spec__")
        if spec is not None and not spec.has_location:
            continue
        source, cached = (held.get("__file__"), None) if spec is None else (spec.origin, spec.cached)
        if not isinstance(source, str):
            continue
        path = cached if cached is not None and was_read(Path(cached), Path(source)) else source
        if _size(path) is not None:
            # One module may have several names (os.path); the program's own is __main__.
            found.setdefault(os.path.realpath(path), name if spec is None else spec.name)
    return found


def was_read(cached: Path, source: Path) -> bool:
    """Whether Python reads the ``.pyc`` file ``cached`` instead of ``source`` (PEP 552)."""
    try:
        with cached.open("rb") as file:
            head = file.read(_PYC_HEADER_BYTES)
        if len(head) < _PYC_HEADER_BYTES or head[:4] != util.MAGIC_NUMBER:
            return False
        flags = int.from_bytes(head[4:8], "little")
        if flags & 1:
            return not flags & 2 or head[8:16] == util.source_hash(source.read_bytes())
        facts = source.stat()
    except OSError:
        return False
    stated = int.from_bytes(head[8:12], "little"), int.from_bytes(head[12:16], "little")
    return stated == (int(facts.st_mtime) & 0xFFFFFFFF, facts.st_size & 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Groups:
    """Which package a file belongs to, by its place.

    ``standard`` and ``folders`` are where Python looks for modules: its own and all others.
    """

    interpreter: str
    standard: tuple[str, ...]
    folders: tuple[str, ...]

    @staticmethod
    def here() -> Groups:
        """Of this process."""
        own = os.path.realpath(os.path.dirname(os.__file__))
        entries = [os.path.realpath(entry) for entry in sys.path if os.path.isdir(entry)]
        standard = {own, *(entry for entry in entries if os.path.dirname(entry) == own and _dynamic(entry))}
        return Groups(
            os.path.realpath(_SELF / "exe"), tuple(standard), tuple(each for each in entries if each not in standard)
        )

    def of(self, path: str) -> str:
        """The package that holds ``path``: the name below the innermost of the folders that holds it."""
        name = os.path.basename(path)
        if path == self.interpreter or name.startswith("libpython"):
            return INTERPRETER
        inside = max(_holding((*self.standard, *self.folders), path), key=len, default=None)
        if inside in self.standard:
            return STANDARD_LIBRARY
        if inside is None:
            return SYSTEM_LIBRARIES if ".so" in name or name.startswith("ld-") else OTHER_FILES
        parts = os.path.relpath(path, inside).split(os.sep)
        # numpy/..., numpy.libs/..., six.py, __pycache__/six.cpython-311.pyc, _cffi_backend.cpython-311-....so
        return (parts[1] if parts[0] == "__pycache__" else parts[0]).partition(".")[0]


def _holding(folders: Iterable[str], path: str) -> Iterator[str]:
    return (folder for folder in folders if path.startswith(folder.rstrip(os.sep) + os.sep))


def _dynamic(entry: str) -> bool:
    return os.path.basename(entry) == "lib-dynload"
