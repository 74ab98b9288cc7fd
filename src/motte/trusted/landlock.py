"""Landlock: this process gives up the file system but for what it must still read, TCP, and signals to others.

The kernel restricts the calling thread and what it starts later, not threads that exist: so it comes before any other
thread does (docs.kernel.org/userspace-api/landlock.html). Descriptors that are open already stay usable; that is how a
worker gets its link, and how it can be given a file that it may not open by name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from motte.errors import ResourceError
from motte.trusted.kernel import system_call

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1

_READ_FILE: Final = 1 << 2
_READ_FOLDER: Final = 1 << 3
_WRITE_FILE, _REMOVE_FOLDER, _MAKE_FOLDER, _CUT_OFF = 1 << 1, 1 << 4, 1 << 7, 1 << 14
_CHANGING: Final = _WRITE_FILE | _REMOVE_FOLDER | _MAKE_FOLDER | _CUT_OFF
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""ABI -> rights that it added: to read, write, run, make and remove; to move between folders; to cut off; to make
requests of devices. All are given up, and only reading is given back."""
_NETWORK_ABI: Final = 4
_NETWORK_RIGHTS: Final = 0b11
"""Bind and connect TCP sockets."""
_SCOPE_ABI: Final = 6
_SCOPES: Final = 0b11
"""Abstract Unix sockets and signals of processes outside."""

_LIBRARY_FOLDERS: Final = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
_SYSTEM_FILES: Final = (
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/openssl.cnf",
    "/etc/crypto-policies",
    "/dev/urandom",
)
_MACHINE: Final = ("/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm", "/proc/cpuinfo", "/proc/meminfo")
"""What engines read to learn the cores, caches and memory of the machine, when they are loaded and later."""
_PINNED: list[int] = []


def abi() -> int:
    """The version of Landlock in this kernel, from 1.

    Raises:
        OSError: ENOSYS: it has none; EOPNOTSUPP: it was not switched on at boot.
    """
    return system_call(_CREATE_RULESET, 0, 0, _VERSION)


def interpreter_paths() -> tuple[Path, ...]:
    """The folders and files that this interpreter, its packages and their libraries may still read: those that exist.

    Modules are imported late, and the list of loaded files (:mod:`motte.trusted.tcb`) is made from them; of /proc there
    is only what describes this process and the machine.
    """
    own = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__), *sys.path]
    own = [entry for entry in own if entry and entry != os.sep]
    # Debian's own Python has the prefix /usr: its libraries are below, and no more of it is needed.
    own = [f"{entry}/lib" if entry == "/usr" else entry for entry in own]
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    every = dict.fromkeys((*own, *libraries, *_LIBRARY_FOLDERS, *_SYSTEM_FILES, *_MACHINE, f"/proc/{os.getpid()}"))
    return tuple(Path(entry) for entry in every if os.path.isabs(entry) and os.path.exists(entry))


def restrict(readable: Sequence[Path], *, writable: Sequence[Path] = ()) -> int:
    """Give up, for good, all of the file system but reading ``readable`` (files, or folders with all below them).

    From ABI 4 on TCP too, and from ABI 6 on abstract Unix sockets of others and signals to them.

    Args:
        writable: folders below which files that exist may be read and written, and folders made and removed; no file
            can be made there, moved or removed.

    Returns:
        The ABI that was used, at most 7: what later ones add is not known here.

    Raises:
        OSError: the kernel has no Landlock, or refuses.
        ResourceError: another thread runs already, which the kernel would not restrict; a path cannot be opened.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise ResourceError("Landlock comes before other threads", expected="1 thread", got=str(threads))
    version = min(abi(), 7)
    handled = sum(rights for first, rights in _FILE_RIGHTS.items() if version >= first)
    fields = [handled]
    fields += [_NETWORK_RIGHTS] if version >= _NETWORK_ABI else []
    fields += [_SCOPES] if version >= _SCOPE_ABI else []
    ruleset = _make_ruleset(struct.pack(f"={len(fields)}Q", *fields))
    try:
        _allow_reading(ruleset, readable)
        for path in writable:
            _allow(ruleset, path, handled & (_READ_FILE | _READ_FOLDER | _CHANGING))
        system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def why_not(problem: OSError) -> str:
    """In words, why :func:`abi` or :func:`restrict` failed."""
    if problem.errno == errno.ENOSYS:
        return "this kernel does not have Landlock (ENOSYS)"
    if problem.errno == errno.EOPNOTSUPP:
        return "Landlock is built into this kernel, but not switched on at boot (EOPNOTSUPP)"
    return f"Landlock: {problem.strerror}"


def _allow_reading(ruleset: int, paths: Iterable[Path]) -> None:
    for path in paths:
        _allow(ruleset, path, _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0))


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as problem:
        raise ResourceError(
            "a path that should stay readable cannot be opened", where=str(path), got=str(problem)
        ) from problem
    try:
        _add_rule(ruleset, rights, fd)
    except OSError:
        os.close(fd)
        raise
    if path.parts[1:2] == ("proc",):
        # A rule is about an inode, and /proc makes a new one when it is looked up again after being forgotten;
        # an open descriptor keeps it.
        _PINNED.append(fd)
    else:
        os.close(fd)


def _add_rule(ruleset: int, rights: int, fd: int) -> None:
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
    system_call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.addressof(rule), 0)


def _make_ruleset(attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes)
    return system_call(_CREATE_RULESET, ctypes.addressof(buffer), len(attributes), 0)
