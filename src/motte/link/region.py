"""Memory that both sides of a link share, and the places in it.

Whoever is on the other side can write into it at any moment. So nothing in it is ever checked where it lies: it is
copied out first. The trusted side alone decides which place holds what; the other side only follows.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from bisect import insort
from pathlib import Path
from typing import Final

from motte.errors import FrameError, ResourceError, SettingError
from motte.limits import MAX_REGION_BYTES

ALIGNMENT: Final = 4096
"""Of places: a page, so that no two share one."""
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Region:
    """One mapping of the shared memory.

    ``memory`` is the mapping; tensors made from it keep it alive. :meth:`close` gives it back as soon as none is left.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.bytes = len(memory)

    @staticmethod
    def create(size_bytes: int) -> tuple[Region, int]:
        """New shared memory, and the descriptor to hand to the other side (the caller closes it).

        It cannot be made smaller later: a reader would get SIGBUS.
        """
        _bound(size_bytes, "shared memory")
        fd = os.memfd_create("motte-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return Region(mmap.mmap(fd, size_bytes)), fd
        except BaseException as problem:
            os.close(fd)
            if isinstance(problem, OSError | ValueError):
                raise ResourceError("cannot make shared memory", got=str(problem)) from problem
            raise

    @staticmethod
    def receive(fd: int, size_bytes: int, *, peer: str) -> Region:
        """Map what the **unverified** ``peer`` handed over; closes ``fd``.

        Raises:
            FrameError: no memory of this size, or one that the peer could shrink under our hands.
        """
        try:
            _bound(size_bytes, peer)
            try:
                seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
            except OSError as problem:
                raise FrameError("not shared memory", where=peer, got=str(problem)) from problem
            if not seals & fcntl.F_SEAL_SHRINK or size < size_bytes:
                raise FrameError(
                    "not shared memory of a fixed size",
                    where=peer,
                    expected=f"{size_bytes} bytes, sealed",
                    got=f"{size} bytes, seals {seals:#x}",
                )
            return Region(mmap.mmap(fd, size_bytes))
        except (OSError, ValueError) as problem:
            raise ResourceError("cannot map shared memory", where=peer, got=str(problem)) from problem
        finally:
            os.close(fd)

    @staticmethod
    def open(path: Path, size_bytes: int | None = None) -> Region:
        """Map a file that the host made and sized before, such as ``/dev/shm/NAME`` or Gramine's ``untrusted_shm``.

        Such memory cannot be sealed: whoever owns the file can cut it off, and end this process by that.

        Args:
            size_bytes: how much of it; None: all.

        Raises:
            ResourceError: it cannot be opened, or is smaller.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as problem:
            hint = "the host creates and sizes it first: truncate -s 256M PATH"
            raise ResourceError(
                "cannot open shared memory", where=str(path), got=problem.strerror, hint=hint
            ) from problem
        try:
            found = os.fstat(fd)
            size = found.st_size if size_bytes is None else size_bytes
            _bound(size, str(path))
            # In Gramine it is a device, and has no size of its own.
            if stat.S_ISREG(found.st_mode) and found.st_size < size:
                raise ResourceError(
                    "shared memory too small", where=str(path), expected=f"{size} bytes", got=str(found.st_size)
                )
            return Region(mmap.mmap(fd, size))
        except (OSError, ValueError) as problem:
            raise ResourceError("cannot map shared memory", where=str(path), got=str(problem)) from problem
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give the mapping back; where tensors still point into it, it goes with the last of them."""
        with contextlib.suppress(BufferError):
            self.memory.close()


class Places:
    """Which parts of a region are in use: first fit, so that the pages at its start stay warm.

    >>> places = Places(3 * 4096)
    >>> places.take(10), places.take(4097), places.take(1)
    (0, 4096, None)
    """

    def __init__(self, size_bytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size_bytes)] if size_bytes else []
        self._taken: dict[int, int] = {}

    @property
    def taken_bytes(self) -> int:
        """Bytes in use, rounded up to pages."""
        return sum(self._taken.values())

    def take(self, size_bytes: int) -> int | None:
        """Offset of a free place of at least ``size_bytes`` > 0, or None."""
        size = -(-size_bytes // ALIGNMENT) * ALIGNMENT
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(offset + size, free - size)] if free > size else []
                self._taken[offset] = size
                return offset
        return None

    def give_back(self, offset: int) -> None:
        """Free a place that :meth:`take` gave.

        Raises:
            KeyError: it is free already: a bug of the caller.
        """
        size = self._taken.pop(offset)
        insort(self._free, (offset, size))
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged


def _bound(size_bytes: int, where: str) -> None:
    if not 0 < size_bytes <= MAX_REGION_BYTES:
        raise SettingError(
            "size of the shared memory out of bounds", where=where, expected=f"1 to {MAX_REGION_BYTES} bytes",
            got=str(size_bytes),
        )  # fmt: skip
