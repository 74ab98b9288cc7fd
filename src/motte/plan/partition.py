"""The arithmetic of cutting a line of n nodes into contiguous parts, on plain numbers. The proofs: docs/spec/plan.md.

Two kinds of cost. A *monotone* one never falls when a part grows: distinct items held (weights, seconds) plus the
largest level inside (activations). The *boundary* cost of a part is what crosses its two ends. Both are minimised over
the largest part first; among all optimal partitions the total over the cuts is minimised next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from motte.errors import PlanError

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) while a plan is made."""

Int64s = NDArray[np.int64]
_NEVER = np.int64(1) << np.int64(60)
"""A total that no partition reaches: MAX_PARTS cuts of MAX_TENSOR_BYTES each are 2^48."""
MAX_BOUNDARY_CELLS = 1 << 25
"""Parts times nodes that the boundary objective takes: 256 MiB in each of its two tables."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a partition is chosen by; n nodes.

    Attributes:
        items: per node, the indices of the items that it needs; an item counts once a part.
        item_sizes: size of each item, not negative.
        levels: per node, what is held while it runs, not negative; a part counts its largest.
        cuts: n + 1 totals; ``cuts[i]`` crosses between node i-1 and node i.
    """

    items: Sequence[Sequence[int]]
    item_sizes: Sequence[int]
    levels: Sequence[int]
    cuts: Sequence[int]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(slots=True)
class _Window:
    """The monotone cost of the nodes [start, end), which both only move forward: amortised O(1) a step."""

    line: Line
    start: int = 0
    end: int = 0
    _held: dict[int, int] = field(default_factory=dict)
    _total: int = 0
    _peaks: deque[int] = field(default_factory=deque)

    @property
    def cost(self) -> int:
        return self._total + (self.line.levels[self._peaks[0]] if self._peaks else 0)

    def push(self) -> None:
        node, levels = self.end, self.line.levels
        for item in self.line.items[node]:
            count = self._held.get(item, 0)
            self._held[item] = count + 1
            if not count:
                self._total += self.line.item_sizes[item]
        while self._peaks and levels[self._peaks[-1]] <= levels[node]:
            self._peaks.pop()
        self._peaks.append(node)
        self.end += 1

    def pop(self) -> None:
        for item in self.line.items[self.start]:
            self._held[item] -= 1
            if not self._held[item]:
                self._total -= self.line.item_sizes[item]
        if self._peaks[0] == self.start:
            self._peaks.popleft()
        self.start += 1

    def restart(self) -> None:
        self._held.clear()
        self._peaks.clear()
        self._total = 0
        self.start = self.end


def costs_of_parts(line: Line, ends: Sequence[int]) -> list[int]:
    """Monotone cost of each part of the partition that ends its parts before the nodes ``ends``."""
    window, found = _Window(line), []
    for end in ends:
        while window.end < end:
            window.push()
        found.append(window.cost)
        window.restart()
    return found


def greedy(line: Line, bound: int) -> list[int] | None:
    """The fewest parts with a monotone cost of at most ``bound`` each: every part as long as it can be.

    Returns where each part ends, the last at n; None when one node alone is above the bound.
    """
    window, ends = _Window(line), []
    while window.end < len(line):
        window.push()
        if window.cost > bound:
            # Begin a new part with this node.
            node = window.end - 1
            if node > window.start:
                ends.append(node)
            window.restart()
            window.end = window.start = node
            window.push()
            if window.cost > bound:
                return None
    return [*ends, len(line)]


def smallest_bound(line: Line, parts: int, progress: Progress | None = None) -> int:
    """The smallest possible cost of the largest of exactly ``parts`` non-empty parts (``parts`` <= n), monotone.

    Splitting a part further never raises the largest cost, so exactly ``parts`` can do what at most ``parts`` can.
    Bisection over the bound; each probe is one greedy pass, and a passing one jumps down to the cost that it reached.
    """
    low, high = -1, costs_of_parts(line, [len(line)])[0]
    total, done = max(high, 1).bit_length(), 0
    while high - low > 1:
        middle = (low + high) // 2
        ends = greedy(line, middle)
        if ends is not None and len(ends) <= parts:
            high = max(costs_of_parts(line, ends))
        else:
            low = middle
        done += 1
        if progress is not None:
            progress(min(done, total), total)
    return high


def best_monotone(line: Line, parts: int, bound: int, progress: Progress | None = None) -> list[int]:
    """Exactly ``parts`` parts, each of a monotone cost of at most ``bound``, with the least total over the cuts.

    Layer k holds, for every end b, the least total of k parts that end there: cuts[b] + min over the starts of the last
    part that keep the bound, which are a window [first(b), b-1] since the cost is monotone. Layers are kept at every
    sqrt(parts)-th step only and made again for the way back.
    """
    count = len(line)
    window = _WindowMinimum(_first_starts(line, bound))
    cuts = np.asarray(line.cuts, dtype=np.int64)
    cuts = np.concatenate([cuts[:count], [0]])
    first = np.full(count + 1, _NEVER, dtype=np.int64)
    first[0] = 0

    def layer(before: Int64s) -> Int64s:
        found: Int64s = np.minimum(window.of(before) + cuts, _NEVER)
        found[0] = _NEVER
        return found

    stride = isqrt(parts) + 1
    kept, current = [first], first
    for index in range(1, parts + 1):
        current = layer(current)
        if index % stride == 0 and index < parts:
            kept.append(current)
        if progress is not None:
            progress(index, parts)
    if current[count] >= _NEVER:
        raise PlanError("no partition within the bound", expected=f"{parts} parts of at most {bound}")

    def layers_backwards() -> Iterator[Int64s]:
        for block in reversed(range(len(kept))):
            layers = [kept[block]]
            for _ in range(block * stride + 1, min((block + 1) * stride, parts)):
                layers.append(layer(layers[-1]))
            yield from reversed(layers)

    ends = [count]
    for before in layers_backwards():
        low = int(window.first[ends[-1]])
        ends.append(low + int(np.argmin(before[low : ends[-1]])))
    return ends[-2::-1]


def _first_starts(line: Line, bound: int) -> Int64s:
    """For each end b in 1..n, the smallest start of a part [start, b) within the bound; n + 1 entries, the first 0."""
    window, found = _Window(line), [0]
    for _ in range(len(line)):
        window.push()
        while window.cost > bound:
            window.pop()
            if window.start == window.end:
                raise PlanError("no partition within the bound", expected=f"every node at most {bound}")
        found.append(window.start)
    return np.asarray(found, dtype=np.int64)


class _WindowMinimum:
    """The minimum over the window [first(b), b-1] for every b in 1..n at once: a sparse table, O(n log n) a call."""

    def __init__(self, first: Int64s) -> None:
        self.first = first
        ends = np.arange(len(first), dtype=np.int64)
        ends[0] = 1  # entry 0 stands for no part and is overwritten by the caller
        level = np.floor(np.log2(ends - first)).astype(np.int64)
        self._by_level = []
        for power in range(int(level.max()) + 1):
            at = np.nonzero(level == power)[0]
            self._by_level.append((at, first[at], ends[at] - (1 << power)))

    def of(self, values: Int64s) -> Int64s:
        """Entry b is the least of ``values[first(b) : b]``."""
        found = np.empty_like(values)
        table = values
        for power, (at, left, right) in enumerate(self._by_level):
            if power:
                half = 1 << (power - 1)
                table = np.minimum(table[:-half], table[half:])
            found[at] = np.minimum(table[left], table[right])
        return found


def smallest_boundary(cuts: Sequence[int], parts: int, progress: Progress | None = None) -> int:
    """The smallest possible value of the largest (bytes entering + bytes leaving) of exactly ``parts`` parts.

    This cost may rise when a part is split, so every probe of the bisection decides exactly ``parts`` by layers: end b
    is reachable with k parts if the cheapest end before b that is reachable with k-1 parts fits beside it.
    """
    crossing = np.asarray(cuts, dtype=np.int64)

    def possible(bound: int) -> bool:
        reachable = np.full(len(crossing), _NEVER, dtype=np.int64)
        reachable[0] = crossing[0]
        for _ in range(parts):
            cheapest = np.concatenate([[_NEVER], np.minimum.accumulate(reachable)[:-1]])
            reachable = np.where(cheapest + crossing <= bound, crossing, _NEVER)
        return bool(reachable[-1] < _NEVER)

    low, high = -1, 2 * int(crossing.max())
    total, done = max(high, 1).bit_length(), 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(middle) else (middle, high)
        done += 1
        if progress is not None:
            progress(min(done, total), total)
    return high


def best_boundary(cuts: Sequence[int], parts: int, bound: int) -> list[int]:
    """Exactly ``parts`` parts, each with at most ``bound`` crossing its two ends, with the least total over the cuts.

    For every end b in turn, all layers at once: the least total among starts a < b with cuts[a] <= bound - cuts[b] is
    a prefix minimum over the starts sorted by what crosses there, kept in a Fenwick tree of rows.

    Raises:
        PlanError: parts times nodes above ``MAX_BOUNDARY_CELLS``, or no such partition.
    """
    count = len(cuts) - 1
    if count * parts > MAX_BOUNDARY_CELLS:
        raise PlanError(
            "too many parts for this many nodes with the objective boundary",
            expected=f"at most {MAX_BOUNDARY_CELLS // count} parts of {count} nodes",
            got=str(parts),
        )
    crossing = np.asarray(cuts, dtype=np.int64)
    ranks = np.argsort(np.argsort(crossing, kind="stable"), kind="stable")
    visible = np.searchsorted(np.sort(crossing), bound - crossing, side="right")
    totals = np.full((count + 1, parts + 1), _NEVER, dtype=np.int64)
    totals[0, 0] = 0
    tree = np.full((count + 2, parts + 1), _NEVER, dtype=np.int64)
    for end in range(1, count + 1):
        at = int(ranks[end - 1]) + 1
        while at < len(tree):
            np.minimum(tree[at], totals[end - 1], out=tree[at])
            at += at & -at
        at, least = int(visible[end]), totals[end, 1:]
        while at > 0:
            np.minimum(least, tree[at, :-1], out=least)
            at -= at & -at
        if end < count:
            np.minimum(least + crossing[end], _NEVER, out=least)
    if totals[count, parts] >= _NEVER:
        raise PlanError("no partition within the bound", expected=f"{parts} parts of at most {bound}")
    ends = [count]
    for layer in range(parts, 1, -1):
        end = ends[-1]
        before = np.where(crossing[:end] <= bound - crossing[end], totals[:end, layer - 1], _NEVER)
        ends.append(int(np.argmin(before)))
    return ends[::-1]
