"""Memory for keys and plaintext weights: memfd_secret(2) where the kernel has it, else locked, else ordinary memory.

Pages of memfd_secret(2) are taken out of the kernel's own map. The kernel itself then reaches them only through the
page tables of the process that maps them, so that ``process_vm_readv``, ``/proc/PID/mem`` and ``PTRACE_PEEKDATA`` fail,
for root as well, and they are never swapped. **Root who injects code into the process reads them all the same.**

Its size counts against RLIMIT_MEMLOCK, the one limit that mlock(2) has too, unless the process has CAP_IPC_LOCK. It has
no huge pages: the first write to each page costs more than in ordinary memory (measured: docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Literal, Self

from motte.errors import ResourceError
from motte.limits import KIB
from motte.trusted.kernel import LIBC, last_error, system_call

Kind = Literal["secret", "locked", "ordinary"]
"""``secret``: memfd_secret(2). ``locked``: private memory that is never swapped. ``ordinary``: may reach the swap.
None of them stands in a core file or is handed to a forked process."""
KEY_RESERVE_BYTES: Final = 64 * KIB
"""Of the limit on locked memory, left free by every block that is not for keys."""

_MEMFD_SECRET: Final = 447
_FAILED: Final = ctypes.c_void_p(-1).value
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class Block:
    """Page-aligned memory of this process, in the best kind that the kernel gives.

    It is overwritten with zeros and given back when the last view of it is gone.

    Args:
        size_bytes: 0 is allowed.
        secret: whether memfd_secret(2) is tried.
        reserve_bytes: how much of the limit on locked memory must be left free; where it would not be, the next
            kind is taken.

    Attributes:
        bytes: its size. kind: what it is. view: all of it, writable.

    Raises:
        ResourceError: not even ordinary memory can be had.
    """

    def __init__(self, size_bytes: int, *, secret: bool = True, reserve_bytes: int = 0) -> None:
        self.bytes = size_bytes
        self._mapped = max(-(-size_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        self._address, self.kind = _best(self._mapped, secret, reserve_bytes)
        memory = (ctypes.c_char * self._mapped).from_address(self._address)
        # Not at exit: by then the kernel clears the pages itself, and views may still be read by other threads.
        weakref.finalize(memory, _give_back, self._address, self._mapped, self.kind).atexit = False
        self.view = memoryview(memory).cast("B")[:size_bytes]

    def resident_bytes(self) -> int:
        """How much of the block the kernel holds in memory now, by mincore(2), in whole pages.

        Raises:
            ResourceError: the kernel does not tell.
        """
        held = (ctypes.c_ubyte * (self._mapped // mmap.PAGESIZE))()
        if LIBC.mincore(ctypes.c_void_p(self._address), ctypes.c_size_t(self._mapped), held) != 0:
            raise ResourceError("the kernel does not tell which pages are in memory", got=str(last_error()))
        return sum(page & 1 for page in held) * mmap.PAGESIZE

    def wipe(self) -> None:
        """Overwrite everything with zeros."""
        ctypes.memset(self._address, 0, self.bytes)


class SecretBytes:
    """Key material outside of Python's heap, wiped by :meth:`wipe`, at the end of a ``with`` block, or when it goes.

    What this does not do: it cannot move what was ``bytes`` before. Python never clears freed memory, so that a copy of
    a key that was ever a ``bytes`` object may lie in the heap until the process ends; and a cipher object made from
    ``view`` holds the expanded key in OpenSSL's heap, in ordinary memory, for as long as it lives.
    """

    __slots__ = ("_block",)

    def __init__(self, size_bytes: int) -> None:
        self._block = Block(size_bytes)

    @classmethod
    def take(cls, source: bytes | bytearray | memoryview) -> Self:
        """A copy of ``source``, which is overwritten with zeros if it can be written to (``bytes`` cannot)."""
        taken = cls(len(source))
        taken.view[:] = source
        if not memoryview(source).readonly:
            memoryview(source).cast("B")[:] = bytes(len(source))
        return taken

    @classmethod
    def random(cls, size_bytes: int) -> Self:
        """Random bytes of the kernel, written where they stay: no other copy of them was ever made here."""
        made = cls(size_bytes)
        done = 0
        while done < size_bytes:
            # Not os.urandom, which hands them over in an object of the heap.
            with open("/dev/urandom", "rb", buffering=0) as source:
                done += source.readinto(made.view[done:]) or 0
        return made

    @property
    def kind(self) -> Kind:
        """What memory it lies in."""
        return self._block.kind

    @property
    def view(self) -> memoryview:
        """The bytes in place, writable. Goes where a buffer is taken, such as ``AESGCM(secret.view)``."""
        return self._block.view

    def wipe(self) -> None:
        """Overwrite it with zeros."""
        self._block.wipe()

    def __len__(self) -> int:
        return self._block.bytes

    def __repr__(self) -> str:
        return f"<{len(self)} secret bytes in {self.kind} memory>"

    def __reduce__(self) -> str:
        raise TypeError("secret bytes do not leave this process")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()


def why_no_secret_memory() -> str | None:
    """Why memfd_secret(2) gives no memory here; None: it gave a page."""
    try:
        address = _map_secret(mmap.PAGESIZE)
    except OSError as problem:
        if problem.errno == errno.ENOSYS:
            return "this kernel does not have memfd_secret(2), or has it switched off (ENOSYS)"
        if problem.errno == errno.EAGAIN:
            return "the limit on locked memory is used up (EAGAIN)"
        return f"memfd_secret(2): {os.strerror(problem.errno or 0)}"
    _give_back(address, mmap.PAGESIZE, "secret")
    return None


def _best(size_bytes: int, secret: bool, reserve_bytes: int) -> tuple[int, Kind]:
    with _kept_free(reserve_bytes):
        if secret:
            with contextlib.suppress(OSError):
                return _map_secret(size_bytes), "secret"
        try:
            address = _map(size_bytes, -1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as problem:
            raise ResourceError(
                "no memory", got=str(problem), expected=f"{size_bytes} bytes", hint="run with --mode streamed"
            ) from problem
        _advise(address, size_bytes, mmap.MADV_DONTDUMP)
        # Huge pages: a streamed part is written and read once, so page faults and TLB misses are all overhead.
        _advise(address, size_bytes, mmap.MADV_HUGEPAGE)
        locked = LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes)) == 0
    return address, "locked" if locked else "ordinary"


@contextlib.contextmanager
def _kept_free(size_bytes: int) -> Iterator[None]:
    """Hold ``size_bytes`` of the limit on locked memory for the length of a ``with`` block, if they are free.

    The kernel's own books are asked, not ours: libraries lock memory too.
    """
    held = None
    if size_bytes:
        with contextlib.suppress(OSError):
            held = _map(size_bytes, -1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # Locked on fault: counted at once, while no page of it is ever touched.
            LIBC.mlock2(ctypes.c_void_p(held), ctypes.c_size_t(size_bytes), ctypes.c_uint(1))
    try:
        yield
    finally:
        if held is not None:
            LIBC.munmap(ctypes.c_void_p(held), ctypes.c_size_t(size_bytes))


def _map_secret(size_bytes: int) -> int:
    fd = system_call(_MEMFD_SECRET, os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes)
        return _map(size_bytes, fd, mmap.MAP_SHARED)
    finally:
        # mmap.mmap would keep a descriptor: root could take it over (pidfd_getfd) and map the memory elsewhere.
        os.close(fd)


def _map(size_bytes: int, fd: int, flags: int) -> int:
    address = LIBC.mmap(None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address is None or address == _FAILED:
        raise last_error()
    found = int(address)
    _advise(found, size_bytes, mmap.MADV_DONTFORK)
    return found


def _advise(address: int, size_bytes: int, advice: int) -> None:
    # Refused where the kernel was built without it (huge pages); the memory serves as well.
    LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), advice)


def _give_back(address: int, size_bytes: int, kind: Kind) -> None:
    # The kernel clears pages of memfd_secret(2) itself when they are given back, and others only before their next use.
    if kind != "secret":
        ctypes.memset(address, 0, size_bytes)
    LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes))
