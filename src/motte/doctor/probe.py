"""System calls that tell what the kernel allows, tried for real.

They run in a short-lived process of their own: a sandbox may answer an unknown call by killing the caller, and that
must not be the doctor. Numbers, not names: no C library wraps these calls everywhere.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Final

from motte.errors import FormatError
from motte.strict_json import Fields, parse

_TIMEOUT_S: Final = 20
_MAX_ANSWER_BYTES: Final = 4096

# memfd_secret(2) and landlock_create_ruleset(2) came after the kernel gave all architectures one table of numbers.
MEMFD_SECRET: Final = dict.fromkeys(("x86_64", "aarch64", "riscv64", "loongarch64"), 447)
LANDLOCK_CREATE_RULESET: Final = dict.fromkeys((*MEMFD_SECRET, "ppc64le", "s390x", "armv7l"), 444)

_SCRIPT = """
import ctypes, errno, json, mmap, os, platform, sys
numbers = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
call = libc.syscall
call.restype = ctypes.c_long

def name(number):
    return errno.errorcode.get(number, str(number))

def memfd_secret(number):
    handle = call(ctypes.c_long(number), ctypes.c_uint(0))
    if handle < 0:
        return name(ctypes.get_errno())
    try:
        os.ftruncate(handle, mmap.PAGESIZE)
        with mmap.mmap(handle, mmap.PAGESIZE) as page:
            page[:5] = b"motte"
            return "ok" if page[:5] == b"motte" else "wrong"
    except OSError as problem:
        return "page " + name(problem.errno)
    finally:
        os.close(handle)

def landlock(number):
    version = call(ctypes.c_long(number), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return str(version) if version > 0 else name(ctypes.get_errno())

def seccomp():
    mode = libc.prctl(21, 0, 0, 0, 0)  # PR_GET_SECCOMP
    return str(mode) if mode >= 0 else name(ctypes.get_errno())

calls = {"memfd_secret": memfd_secret, "landlock": landlock}
which = sys.argv[2]
print(json.dumps(seccomp() if which == "seccomp" else calls[which](numbers[which])))
"""


@dataclass(frozen=True)
class Answer:
    """What a call answered: ``ok``, a number, or the name of an error (``ENOSYS``); ``killed``: by a signal."""

    text: str
    killed: bool = False


def ask(which: str, machine: str) -> Answer:
    """Try the call ``which`` (``memfd_secret``, ``landlock`` or ``seccomp``) on a machine of this architecture.

    An architecture without a known number answers ``unnumbered``; a probe that fails in a way of its own, ``failed``.
    """
    numbers = {"memfd_secret": MEMFD_SECRET.get(machine), "landlock": LANDLOCK_CREATE_RULESET.get(machine)}
    if which != "seccomp" and numbers[which] is None:
        return Answer("unnumbered")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SCRIPT, json.dumps(numbers), which],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Answer("failed")
    if done.returncode < 0:
        return Answer(_signal_name(-done.returncode), killed=True)
    return _read(done.stdout) if done.returncode == 0 else Answer("failed")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(data: bytes) -> Answer:
    try:
        value: Any = parse(data, max_bytes=_MAX_ANSWER_BYTES, what="probe")
        return Answer(Fields({"answer": value}, where="probe").text("answer", max_bytes=200))
    except FormatError:
        return Answer("failed")
