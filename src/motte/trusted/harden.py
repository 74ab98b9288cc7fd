"""What a worker process does to itself before it sees a key. Needs no privilege; protects from no administrator."""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass

from motte.errors import ResourceError

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True, slots=True)
class Hardening:
    """What holds for this process: no core files, /proc entries closed to other users, no new privileges."""

    dumpable: bool
    core_limit_bytes: int
    no_new_privileges: bool


def harden() -> Hardening:
    """Make this process non-dumpable, without core files or new privileges.

    Not tied to its parent by ``PR_SET_PDEATHSIG``: that signal comes when the *thread* that started us ends. The end of
    the link is what ends a worker.

    Raises:
        ResourceError: the kernel refused; nothing secret may be received then.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, argument: int) -> int:
        result: int = libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0)
        if result < 0:
            raise ResourceError(
                "the kernel refused to harden the worker", where=f"prctl {option}", got=os.strerror(ctypes.get_errno())
            )
        return result

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl(_PR_SET_DUMPABLE, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return Hardening(bool(prctl(_PR_GET_DUMPABLE, 0)), resource.getrlimit(resource.RLIMIT_CORE)[1], True)
