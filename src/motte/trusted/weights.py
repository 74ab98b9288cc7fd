"""How a part's weights come to lie in memory while it runs: all parts at once, or two at a time within a bound."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from motte.engines.interface import Array, Engine
from motte.seal.manifest import LaidOutPart
from motte.seal.reader import UnlockedBundle
from motte.trusted.arena import Arena

_HIGH_END_ALIGNMENT = 4096


MODES = ("resident", "streamed")
"""The two ways, as :class:`ResidentWeights` and :class:`StreamedWeights` do them."""


class PartWeights(Protocol):
    """Gives each part's weights while it runs.

    ``arena_bytes`` is the memory set aside for plaintext weights, ``secret_bytes`` how much of it direct reads of this
    process's memory do not reach, ``locked`` whether it can never be swapped out,
    ``waited_s`` the time spent so far waiting for a part to be opened.
    """

    arena_bytes: int
    secret_bytes: int
    locked: bool
    waited_s: float

    def part(self, index: int) -> AbstractContextManager[Mapping[str, Array]]:
        """Hold the weights of part ``index`` (from 0) for the length of a ``with`` block."""
        ...

    def resident_bytes(self) -> int:
        """Bytes of ``arena_bytes`` that are in memory now, as the kernel counts."""
        ...

    def close(self) -> None:
        """Wipe what is held."""
        ...


def _views(engine: Engine, part: LaidOutPart, buffer: memoryview) -> dict[str, Array]:
    graph = part.part.graph
    return {
        name: engine.weight(graph, name, buffer[start : start + graph.weights[name].bytes])
        for name, start in part.layout.offsets.items()
    }


class ResidentWeights:
    """Every part opened once, into one arena each, and kept."""

    def __init__(self, bundle: UnlockedBundle, parts: Sequence[LaidOutPart], engine: Engine, *, threads: int) -> None:
        self._arenas = [Arena(part.layout.bytes) for part in parts]
        for index, arena in enumerate(self._arenas):
            bundle.open_part(index, arena.view, threads=threads)
        self._weights = [_views(engine, part, arena.view) for part, arena in zip(parts, self._arenas, strict=True)]
        self.arena_bytes = sum(arena.bytes for arena in self._arenas)
        self.secret_bytes = sum(arena.secret_bytes for arena in self._arenas)
        self.locked = all(arena.locked for arena in self._arenas)
        self.waited_s = 0.0

    @contextmanager
    def part(self, index: int) -> Iterator[Mapping[str, Array]]:
        """See :class:`PartWeights`."""
        yield self._weights[index]

    def resident_bytes(self) -> int:
        """See :class:`PartWeights`."""
        return sum(arena.resident_bytes() for arena in self._arenas)

    def close(self) -> None:
        """See :class:`PartWeights`."""
        self._weights.clear()
        for arena in self._arenas:
            arena.wipe()


class StreamedWeights:
    """Two parts at a time: while one runs, one thread opens the next into the other end of a fixed arena.

    Parts run in a cycle, so the first part of the next call is opened while the last one of this call runs. The ends
    alternate with every part opened, not with the part's number: the last and the first part may both be even.
    """

    def __init__(self, bundle: UnlockedBundle, parts: Sequence[LaidOutPart], engine: Engine, *, threads: int) -> None:
        sizes = [part.layout.bytes for part in parts]
        pairs = zip(sizes, sizes[1:] + sizes[:1], strict=True)
        needed = sizes[0] if len(sizes) == 1 else max(a + b for a, b in pairs)
        self._arena = Arena(needed + _HIGH_END_ALIGNMENT)
        self.arena_bytes = self._arena.bytes
        self.secret_bytes = self._arena.secret_bytes
        self.locked = self._arena.locked
        self.waited_s = 0.0
        self._bundle, self._parts, self._engine, self._threads = bundle, parts, engine, threads
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="open-next-part")
        self._cached: dict[tuple[int, int], Mapping[str, Array]] = {}
        self._end = 0
        self._next: tuple[int, Future[Mapping[str, Array]]] | None = None
        self._prefetch(0)

    @contextmanager
    def part(self, index: int) -> Iterator[Mapping[str, Array]]:
        """See :class:`PartWeights`."""
        start = time.perf_counter()
        if self._next is None or self._next[0] != index:
            # The call before ended early: what was opened ahead is not what is needed now.
            if self._next is not None:
                self._next[1].exception()
            self._prefetch(index)
        _, future = self._next or (index, Future())
        weights = future.result()
        self.waited_s += time.perf_counter() - start
        if len(self._parts) > 1:
            self._prefetch((index + 1) % len(self._parts))
        yield weights

    def resident_bytes(self) -> int:
        """See :class:`PartWeights`."""
        return self._arena.resident_bytes()

    def close(self) -> None:
        """See :class:`PartWeights`."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._cached.clear()
        self._arena.wipe()

    def _prefetch(self, index: int) -> None:
        end = self._end
        self._end = 1 - end
        self._next = (index, self._executor.submit(self._open, index, end))

    def _open(self, index: int, end: int) -> Mapping[str, Array]:
        part = self._parts[index]
        count = part.layout.bytes
        buffer = self._arena.low(count) if end == 0 else self._arena.high(count)
        self._bundle.open_part(index, buffer, threads=self._threads)
        if (index, end) not in self._cached:
            # The arena never moves, so the views of one part at one end are made once.
            self._cached[(index, end)] = _views(self._engine, part, buffer)
        return self._cached[(index, end)]
