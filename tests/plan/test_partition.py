"""The partition arithmetic against brute force over every partition of generated lines."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.errors import PlanError
from motte.plan import partition
from motte.plan.partition import (
    Line,
    best_boundary,
    best_monotone,
    costs_of_parts,
    greedy,
    smallest_bound,
    smallest_boundary,
)


@st.composite
def lines(draw: st.DrawFn, most: int = 9) -> Line:
    count = draw(st.integers(1, most))
    sizes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    items = draw(
        st.lists(st.lists(st.integers(0, len(sizes) - 1), max_size=3, unique=True), min_size=count, max_size=count)
    )
    levels = draw(st.lists(st.integers(0, 15), min_size=count, max_size=count))
    cuts = draw(st.lists(st.integers(0, 9), min_size=count + 1, max_size=count + 1))
    return Line(items, sizes, levels, cuts)


def cost(line: Line, start: int, end: int) -> int:
    """The definition: distinct items, and the highest level."""
    held = {item for node in range(start, end) for item in line.items[node]}
    return sum(line.item_sizes[item] for item in held) + max(line.levels[start:end])


def partitions(count: int, parts: int) -> list[list[int]]:
    return [[*ends, count] for ends in combinations(range(1, count), parts - 1)]


def largest(line: Line, ends: list[int]) -> int:
    return max(cost(line, a, b) for a, b in zip([0, *ends], ends, strict=False))


def crossing(line: Line, ends: list[int]) -> int:
    return sum(line.cuts[end] for end in ends[:-1])


@settings(max_examples=400, deadline=None)
@given(lines(), st.data())
def test_monotone_optimum_and_second_criterion(line: Line, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(line)))
    every = partitions(len(line), parts)
    best = min((largest(line, ends), crossing(line, ends)) for ends in every)
    bound = smallest_bound(line, parts)
    ends = best_monotone(line, parts, bound)
    assert ends in every
    assert (bound, crossing(line, ends)) == best
    assert max(costs_of_parts(line, ends)) == largest(line, ends) == bound


@settings(max_examples=400, deadline=None)
@given(lines(), st.data())
def test_boundary_optimum_and_second_criterion(line: Line, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(line)))
    every = partitions(len(line), parts)

    def widest(ends: list[int]) -> int:
        return max(line.cuts[a] + line.cuts[b] for a, b in zip([0, *ends], ends, strict=False))

    best = min((widest(ends), crossing(line, ends)) for ends in every)
    bound = smallest_boundary(line.cuts, parts)
    ends = best_boundary(line.cuts, parts, bound)
    assert ends in every
    assert (bound, widest(ends), crossing(line, ends)) == (best[0], *best)


@settings(max_examples=300, deadline=None)
@given(lines(), st.integers(0, 60))
def test_greedy_uses_the_fewest_parts(line: Line, bound: int) -> None:
    fewest = next(
        (
            parts
            for parts in range(1, len(line) + 1)
            if any(largest(line, ends) <= bound for ends in partitions(len(line), parts))
        ),
        None,
    )
    ends = greedy(line, bound)
    assert (None if ends is None else len(ends)) == fewest
    if ends is not None:
        assert ends[-1] == len(line)
        assert largest(line, ends) <= bound


def test_every_part_count_up_to_one_node_each() -> None:
    """Layers are kept at every square root only: all strides of the way back are met."""
    line = Line(
        [(i,) for i in range(30)], [(7 * i) % 11 for i in range(30)], [0] * 30, [(5 * i) % 13 for i in range(31)]
    )
    for parts in range(1, 31):
        ends = best_monotone(line, parts, smallest_bound(line, parts))
        assert len(ends) == parts
        assert ends == sorted(set(ends))
        assert ends[-1] == 30


def test_no_partition_within_a_bound_is_an_error() -> None:
    line = Line([(0,), (1,), (2,)], [5, 5, 5], [0, 0, 0], [1, 1, 1, 1])
    with pytest.raises(PlanError, match="no partition"):
        best_monotone(line, 1, 10)
    with pytest.raises(PlanError, match="no partition"):
        best_monotone(line, 3, 4)
    with pytest.raises(PlanError, match="no partition"):
        best_boundary(line.cuts, 2, 1)


def test_boundary_refuses_more_cells_than_its_tables_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "MAX_BOUNDARY_CELLS", 12)
    assert best_boundary([1] * 5, 3, 2) == [1, 2, 4]
    with pytest.raises(PlanError, match="too many parts") as refused:
        best_boundary([1] * 5, 4, 2)
    assert refused.value.expected == "at most 3 parts of 4 nodes"


def test_progress_reaches_its_end() -> None:
    steps: list[tuple[int, int]] = []
    line = Line([(i,) for i in range(8)], list(range(8)), [0] * 8, [1] * 9)
    best_monotone(line, 3, smallest_bound(line, 3), lambda done, total: steps.append((done, total)))
    assert steps[-1] == (3, 3)
    assert all(0 < done <= total for done, total in steps)
