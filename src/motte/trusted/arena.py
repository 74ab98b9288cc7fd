"""Memory that holds plaintext weights: in the best kind of memory that this process can have."""

from __future__ import annotations

from motte.trusted.secret_memory import KEY_RESERVE_BYTES, Block, Kind


class Arena:
    """A fixed block of private memory; its size is the most plaintext weights that this process will hold.

    Two ends: :meth:`low` and :meth:`high` give views from the start and up to the end, so that two parts of any sizes
    fit whenever their sum does.

    Args:
        size_bytes: its size.
        secret: whether it may lie in memfd_secret(2) memory, where the kernel and the limit on locked memory allow it.

    Attributes:
        bytes: its size. view: all of it.
        kind: what memory it is, see :data:`motte.trusted.secret_memory.Kind`.
        locked: whether it can never be swapped out.
    """

    def __init__(self, size_bytes: int, *, secret: bool = True) -> None:
        self._block = Block(size_bytes, secret=secret, reserve_bytes=KEY_RESERVE_BYTES)
        self.bytes = size_bytes
        self.view = self._block.view
        self.kind: Kind = self._block.kind
        self.locked = size_bytes == 0 or self.kind != "ordinary"

    @property
    def secret_bytes(self) -> int:
        """How many of its bytes direct reads of this process's memory do not reach."""
        return self.bytes if self.kind == "secret" else 0

    def low(self, count: int) -> memoryview:
        """The first ``count`` bytes."""
        return self.view[:count]

    def high(self, count: int, *, alignment: int = 4096) -> memoryview:
        """``count`` bytes as near to the end as ``alignment`` allows."""
        start = (self.bytes - count) // alignment * alignment
        return self.view[start : start + count]

    def resident_bytes(self) -> int:
        """How much of the block the kernel holds in memory now, in whole pages.

        Raises:
            ResourceError: the kernel does not tell.
        """
        return self._block.resident_bytes()

    def wipe(self) -> None:
        """Overwrite everything with zeros."""
        self._block.wipe()
