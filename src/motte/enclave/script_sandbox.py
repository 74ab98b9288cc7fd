"""What a script's process gives up before the script begins. Needs no privilege; keeps out no administrator.

Applied: what :func:`motte.trusted.harden.harden` does (not dumpable, no core files, no new privileges), and Landlock:
the script reads the interpreter, its packages and what it is named; it writes below the folders that it is named; it
runs no programs, sends no signals outside, and connects to no TCP port but its accelerator's. Ranks that meet each
other listen on ports of their own choice, so with several ranks TCP stays open.

Not applied, because a script is not one of our engines, whose every call is known:

* **seccomp**: a script opens files for writing and sockets to its accelerator, which the worker's filter ends it for.
* **secret memory**: torch allocates where it likes; keys and tensors lie in ordinary memory.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from motte.attest.platforms.tsm import TSM_ROOT
from motte.errors import ResourceError
from motte.trusted import landlock
from motte.trusted.harden import LANDLOCK, SECCOMP, SECRET_MEMORY, Hardening, harden
from motte.trusted.kernel import system_call

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH, _NET_PORT = 1, 2
_WRITE_FILE, _READ_FILE, _READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
_REMOVE, _MAKE = 1 << 4 | 1 << 5, 1 << 7 | 1 << 8
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_WRITING: Final = _WRITE_FILE | _REMOVE | _MAKE
_OF_FILES: Final = _WRITE_FILE | _READ_FILE | _TRUNCATE
_HANDLED: Final = {1: (1 << 13) - 1, 2: _REFER, 3: _TRUNCATE, 5: 1 << 15}
"""ABI -> rights that it added; all are given up, and what stands in a rule is given back."""
_NETWORK_ABI, _SCOPE_ABI, _NEWEST_ABI = 4, 6, 7
_BIND, _CONNECT = 1, 2
_SCOPES: Final = 0b11
_ALWAYS: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NAMES: Final = ("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf")
"""Read where a host is looked up by its name."""
NOT_FOR_SCRIPTS: Final = {
    SECCOMP: "not for scripts, which open files and sockets",
    SECRET_MEMORY: "not for scripts, whose tensors lie where torch puts them",
}
_TEMPORARY: Final = Path("/tmp")  # noqa: S108  (of the container, or of the guest's service alone)
IN_IMAGE: Final = {"process": (_TEMPORARY,), "vm": (_TEMPORARY, TSM_ROOT)}
"""What surrounds an image (``process``: a container) -> folders that a script in it may write to, where they are."""
_PINNED: list[int] = []


def confine(readable: Sequence[Path], writable: Sequence[Path], *, ports: Sequence[int] | None) -> Hardening:
    """Harden this process, which must still have one thread, for good.

    Args:
        readable: files, or folders with all below them, beside the interpreter's own.
        writable: folders in which files may be made, changed and removed.
        ports: TCP ports that may be connected to; None: TCP stays open.

    Returns:
        What holds, with the reason for each measure that does not.

    Raises:
        ResourceError: the kernel refused, another thread runs already, or a path is not there.
    """
    hardened = harden()
    found = replace(hardened, secret_memory=False, lacking={**hardened.lacking, **NOT_FOR_SCRIPTS})
    try:
        version = _restrict(readable, writable, ports)
    except OSError as problem:
        return replace(found, lacking={**found.lacking, LANDLOCK: landlock.why_not(problem)})
    lacking = {name: why for name, why in found.lacking.items() if name != LANDLOCK}
    return replace(found, landlock_abi=version, lacking=lacking)


def _restrict(readable: Sequence[Path], writable: Sequence[Path], ports: Sequence[int] | None) -> int:
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise ResourceError("Landlock comes before other threads", expected="1 thread", got=str(threads))
    version = min(landlock.abi(), _NEWEST_ABI)
    handled = sum(rights for first, rights in _HANDLED.items() if version >= first)
    network = version >= _NETWORK_ABI and ports is not None
    fields = [handled]
    fields += [_BIND | _CONNECT if network else 0] if version >= _NETWORK_ABI else []
    fields += [_SCOPES] if version >= _SCOPE_ABI else []
    buffer = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields))
    ruleset = system_call(_CREATE_RULESET, ctypes.addressof(buffer), 8 * len(fields), 0)
    try:
        own = [*landlock.interpreter_paths(), *map(Path, _ALWAYS), *(map(Path, _NAMES) if ports != () else ())]
        reading, writing = _READ_FILE | _READ_FOLDER, handled & (_WRITING | _REFER | _TRUNCATE)
        _allow(ruleset, (path for path in own if path.exists()), reading)
        _allow(ruleset, readable, reading)
        _allow(ruleset, (Path("/dev/null"),), reading | handled & (_WRITE_FILE | _TRUNCATE))
        _allow(ruleset, writable, reading | writing)
        for port in ports or () if network else ():
            _rule(ruleset, _NET_PORT, struct.pack("=QQ", _CONNECT, port))
        system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, paths: Iterable[Path], rights: int) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as problem:
            raise ResourceError(
                "a path for the script cannot be opened", where=str(path), got=str(problem)
            ) from problem
        try:
            granted = rights if os.path.isdir(path) else rights & _OF_FILES
            _rule(ruleset, _PATH_BENEATH, struct.pack("=Qi", granted, fd))
        finally:
            if path.parts[1:2] == ("proc",):
                # A rule is about an inode, and /proc makes a new one when it forgets; an open descriptor keeps it.
                _PINNED.append(fd)
            else:
                os.close(fd)


def _rule(ruleset: int, kind: int, packed: bytes) -> None:
    rule = ctypes.create_string_buffer(packed)
    system_call(_ADD_RULE, ruleset, kind, ctypes.addressof(rule), 0)
