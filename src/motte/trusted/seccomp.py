"""seccomp: the list of system calls that a worker may still make, as a classic BPF program. x86_64 only.

Everything that is not listed answers EPERM. What only an attacker would try (tracing, running programs, opening
sockets, loading code into the kernel) ends the process instead, so that trying is seen. The list is what workers of all
three engines were seen to call while they open a bundle and run it, and what C libraries call in their place on other
versions. Of some calls only harmless arguments pass: files open for reading only, new threads and no new processes.

Threads may start later: ``clone3`` takes its flags in memory, where a filter cannot look, so it answers ENOSYS, and C
libraries then call ``clone``, whose flags are seen. The filter is put on all threads that exist (TSYNC) and inherited
by new ones, and cannot be taken off again.

Own program rather than libseccomp: ``pyseccomp`` needs that C library in every image that runs a worker, for what are
two pages here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from motte.errors import ResourceError
from motte.trusted.kernel import system_call

_SECCOMP: Final = 317
_SET_MODE_FILTER: Final = 1
_TSYNC: Final = 1
_ARCHITECTURE: Final = 0xC000003E
_X32_BIT: Final = 0x4000_0000

_ALLOW: Final = 0x7FFF_0000
_ERROR: Final = 0x0005_0000
_KILL: Final = 0x8000_0000

_LOAD, _EQUAL, _GREATER_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

ALLOWED: Final = {
    # files and descriptors that are open, or that Landlock lets be read
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "pread64": 17, "pwrite64": 18,
    "readv": 19, "writev": 20, "access": 21, "dup": 32, "dup2": 33, "fcntl": 72, "ftruncate": 77, "getdents": 78,
    "getcwd": 79, "readlink": 89, "statfs": 137, "fstatfs": 138, "getdents64": 217, "fadvise64": 221, "newfstatat": 262,
    "readlinkat": 267, "faccessat": 269, "dup3": 292, "preadv": 295, "pwritev": 296, "preadv2": 327, "pwritev2": 328,
    "statx": 332, "close_range": 436, "faccessat2": 439,
    # memory; code is made at run time by the engines, so pages may be both written and run
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28,
    "mlock": 149, "munlock": 150, "mbind": 237, "get_mempolicy": 239, "memfd_create": 319, "mlock2": 325,
    "memfd_secret": 447,
    # the links that it was started with
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "getsockname": 51, "getpeername": 52,
    "setsockopt": 54, "getsockopt": 55,
    # waiting
    "poll": 7, "select": 23, "pause": 34, "nanosleep": 35, "epoll_create": 213, "epoll_wait": 232, "epoll_ctl": 233,
    "clock_nanosleep": 230, "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291,
    "pipe2": 293,
    # threads and signals
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "exit": 60, "rt_sigsuspend": 130,
    "rt_sigtimedwait": 128, "sigaltstack": 131, "arch_prctl": 158, "gettid": 186, "futex": 202,
    "sched_setaffinity": 203, "sched_getaffinity": 204, "set_tid_address": 218, "restart_syscall": 219,
    "exit_group": 231, "set_robust_list": 273, "get_robust_list": 274, "getcpu": 309, "membarrier": 324, "rseq": 334,
    "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146, "sched_get_priority_min": 147,
    "getpriority": 140,
    # what it is, and what time it is
    "getpid": 39, "uname": 63, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115,
    "getpgid": 121, "getsid": 124, "capget": 125, "time": 201, "clock_gettime": 228, "clock_getres": 229,
    "getrandom": 318,
}  # fmt: skip
"""Calls that pass with any arguments."""

FATAL: Final = {
    # other processes: to trace them, read them, take what they hold
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_open": 434,
    "pidfd_getfd": 438, "process_madvise": 440, "userfaultfd": 323, "perf_event_open": 298,
    # to run or start anything
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322,
    # to reach anybody
    "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "accept4": 288,
    # calls past this filter
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    # the kernel and the machine
    "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320,
    "bpf": 321, "iopl": 172, "ioperm": 173, "reboot": 169, "swapon": 167, "swapoff": 168, "syslog": 103, "acct": 163,
    "add_key": 248, "request_key": 249, "keyctl": 250,
    # other roots and namespaces
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442,
    "name_to_handle_at": 303, "open_by_handle_at": 304,
}  # fmt: skip
"""Calls that end the process (SIGSYS)."""

ABSENT: Final = {"clone3": 435, "openat2": 437}
"""Calls that answer ENOSYS: their arguments lie in memory, and callers fall back to an older call."""

_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_OPENING: Final = {2: 1, 257: 2}
"""open and openat; which of their arguments says for what."""
_FOLDERS: Final = {"mkdir": 83, "rmdir": 84}
_CLONE_THREAD: Final = 0x0001_0000
_REQUESTS: Final = (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451)
"""ioctl: whether it is a terminal and how wide, non-blocking or not, how much waits, closed on exec or not."""
_CONTROLS: Final = (3, 15, 16, 21, 23, 39, 0x53564D41)
"""prctl: names of threads and of memory, and questions. None that would make the process dumpable again."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """A call of which some arguments pass. ``argument`` is looked at, its low 32 bits; otherwise ``refusal``.

    ``any_of``: values that pass. ``without`` and ``within``: bits that must not and that must be set.
    """

    number: int
    argument: int
    refusal: int
    any_of: tuple[int, ...] = ()
    without: int = 0
    within: int = 0


def unsupported() -> str | None:
    """Why there is no filter for this machine; None: there is."""
    machine = platform.machine()
    if machine != "x86_64" or struct.calcsize("P") != 8:
        return f"no list of system calls for {machine} ({struct.calcsize('P') * 8} bit)"
    return None


def program(pid: int, *, folders: bool = False) -> bytes:
    """The filter for the process ``pid``, as ``struct sock_filter`` (8 bytes each); ``folders``: see :func:`load`."""
    denied = _ERROR | errno.EPERM
    opening = () if folders else tuple(_Rule(call, flags, denied, without=_WRITING) for call, flags in _OPENING.items())
    rules = (
        *opening,
        _Rule(56, 0, _KILL, within=_CLONE_THREAD),  # clone
        _Rule(16, 1, denied, any_of=_REQUESTS),  # ioctl
        _Rule(157, 0, denied, any_of=_CONTROLS),  # prctl
        _Rule(62, 0, denied, any_of=(pid,)),  # kill
        _Rule(234, 0, denied, any_of=(pid,)),  # tgkill
    )
    code = [
        _step(_LOAD, _ARCHITECTURE_OFFSET),
        _step(_EQUAL, _ARCHITECTURE, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_OFFSET),
        # The x32 calls have the same architecture and other numbers.
        _step(_GREATER_EQUAL, _X32_BIT, 0, 1),
        _step(_RETURN, _KILL),
    ]
    code += _answer(ALLOWED.values(), _ALLOW)
    code += _answer((*_OPENING, *_FOLDERS.values()) if folders else (), _ALLOW)
    code += _answer(FATAL.values(), _KILL)
    code += _answer(ABSENT.values(), _ERROR | errno.ENOSYS)
    for rule in rules:
        code += _block(rule.number, _conditions(rule))
    code += _block(302, _only_asks(denied))  # prlimit64
    return b"".join((*code, _step(_RETURN, denied)))


def load(*, folders: bool = False) -> None:
    """Put the filter on every thread of this process, for good. Needs "no new privileges" or CAP_SYS_ADMIN.

    Args:
        folders: let it make and remove folders and open files for writing: for a process that Landlock leaves one place
            to do so (:mod:`motte.trusted.guest_reports`), since a filter sees no paths.

    Raises:
        OSError: the kernel has no seccomp filters, or refuses.
        ResourceError: there is no list for this architecture, or a thread could not be brought under the filter.
    """
    if (reason := unsupported()) is not None:
        raise ResourceError("the system calls of this process cannot be filtered", got=reason)
    code = program(os.getpid(), folders=folders)
    steps = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(steps)))
    if thread := system_call(_SECCOMP, _SET_MODE_FILTER, _TSYNC, ctypes.addressof(head)):
        raise ResourceError("a thread has a filter of its own, and cannot get this one", where=f"thread {thread}")


def why_not(problem: OSError) -> str:
    """In words, why :func:`load` failed."""
    if problem.errno in (errno.ENOSYS, errno.EINVAL):
        return f"this kernel was built without filters of system calls ({errno.errorcode[problem.errno]})"
    return f"seccomp: {problem.strerror}"


def mode() -> int:
    """As /proc says it of this process: 0: no filter, 2: filtered; the lowest of all its threads.

    Raises:
        ResourceError: /proc does not say.
    """
    found = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/status", "rb") as file:
                found += [int(line.split()[1]) for line in file if line.startswith(b"Seccomp:")]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except (OSError, ValueError) as problem:
            raise ResourceError("cannot read whether system calls are filtered", got=str(problem)) from problem
    if not found:
        return 0  # a kernel without seccomp has no such line
    return min(found)


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _answer(numbers: Iterable[int], result: int) -> list[bytes]:
    return [step for number in numbers for step in (_step(_EQUAL, number, 0, 1), _step(_RETURN, result))]


def _block(number: int, steps: Sequence[bytes]) -> list[bytes]:
    """``steps``, which return on every path, for one call only."""
    return [_step(_EQUAL, number, 0, len(steps)), *steps]


def _conditions(rule: _Rule) -> list[bytes]:
    load_argument = _step(_LOAD, _ARGUMENTS_OFFSET + 8 * rule.argument)
    if rule.any_of:
        return [load_argument, *_answer(rule.any_of, _ALLOW), _step(_RETURN, rule.refusal)]
    wanted, bits = (0, rule.without) if rule.without else (rule.within, rule.within)
    return [load_argument, _step(_AND, bits), *_answer((wanted,), _ALLOW), _step(_RETURN, rule.refusal)]


def _only_asks(refusal: int) -> list[bytes]:
    """prlimit64 with no new limit: its third argument is a null pointer, both halves."""
    low, high = (_step(_LOAD, _ARGUMENTS_OFFSET + 8 * 2 + half) for half in (0, 4))
    refuse = _step(_RETURN, refusal)
    return [low, _step(_EQUAL, 0, 1, 0), refuse, high, _step(_EQUAL, 0, 1, 0), refuse, _step(_RETURN, _ALLOW)]
