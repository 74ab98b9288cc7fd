"""Memory that holds plaintext weights: page-aligned, out of core files, locked into memory where the limit allows."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

from motte.errors import ResourceError


class Arena:
    """A fixed block of private memory; its size is the most plaintext weights that this process will hold.

    Two ends: :meth:`low` and :meth:`high` give views from the start and up to the end, so that two parts of any sizes
    fit whenever their sum does.
    """

    def __init__(self, size_bytes: int) -> None:
        self.bytes = size_bytes
        self._map = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._map.madvise(mmap.MADV_DONTFORK)
        # Huge pages: a streamed part is written and read once, so page faults and TLB misses are all overhead.
        # A kernel without them answers EINVAL, and small pages serve as well.
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)[:size_bytes]
        self.locked = self._lock()

    def low(self, count: int) -> memoryview:
        """The first ``count`` bytes."""
        return self.view[:count]

    def high(self, count: int, *, alignment: int = 4096) -> memoryview:
        """``count`` bytes as near to the end as ``alignment`` allows."""
        start = (self.bytes - count) // alignment * alignment
        return self.view[start : start + count]

    def resident_bytes(self) -> int:
        """How much of the block the kernel holds in memory now, by mincore(2), in whole pages."""
        pages = -(-len(self._map) // mmap.PAGESIZE)
        held = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(self._address()), ctypes.c_size_t(len(self._map)), held) != 0:
            raise ResourceError(
                "the kernel does not tell which pages are in memory", got=os.strerror(ctypes.get_errno())
            )
        return sum(page & 1 for page in held) * mmap.PAGESIZE

    def wipe(self) -> None:
        """Overwrite everything with zeros."""
        ctypes.memset(self._address(), 0, self.bytes)

    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def _lock(self) -> bool:
        libc = ctypes.CDLL(None, use_errno=True)
        return self.bytes == 0 or libc.mlock(ctypes.c_void_p(self._address()), ctypes.c_size_t(self.bytes)) == 0
