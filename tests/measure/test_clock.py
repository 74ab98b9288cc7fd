"""Segments follow each other, never nest, and never vanish."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import FormatError, MeasureError
from motte.measure.clock import Clock, Segment, Segments


def ticks(*readings: int) -> Callable[[], int]:
    return iter(readings).__next__


def test_a_segment_runs_from_mark_to_mark() -> None:
    clock = Clock(now=ticks(1_000, 3_500))
    with clock.segment("open", since="file opened", until="last chunk decrypted"):
        pass
    segment = clock.segments()["open"]
    assert segment == Segment("open", "file opened", "last chunk decrypted", 1_000, 3_500)
    assert segment.seconds == 2.5e-6


def test_the_real_clock_never_runs_backwards() -> None:
    clock = Clock()
    for name in ("a", "b", "c"):
        with clock.segment(name, since="x", until="y"):
            pass
    items = clock.segments().items
    assert [item.name for item in items] == ["a", "b", "c"]
    assert all(before.stop_ns <= after.start_ns for before, after in pairwise(items))


def test_what_no_segment_covers_is_reported() -> None:
    segments = Segments(
        (Segment("a", "x", "y", 0, 1_000_000_000), Segment("b", "y", "z", 3_000_000_000, 4_000_000_000))
    )
    assert segments.total_s == 4.0
    assert segments.unaccounted_s == 2.0


def test_nesting_is_refused_and_leaves_the_outer_segment_open() -> None:
    clock = Clock(now=ticks(0, 10))
    clock.start("outer", since="x")
    with pytest.raises(MeasureError, match="do not nest"), clock.segment("inner", since="x", until="y"):
        pytest.fail("the block ran")
    assert clock.stop("outer", until="y").stop_ns == 10


def test_stopping_what_is_not_open_is_refused() -> None:
    clock = Clock()
    with pytest.raises(MeasureError, match="not the open one"):
        clock.stop("a", until="y")
    clock.start("a", since="x")
    with pytest.raises(MeasureError, match="not the open one"):
        clock.stop("b", until="y")
    with pytest.raises(MeasureError, match="still open"):
        clock.segments()


def test_a_failed_block_is_no_figure_and_does_not_block_the_clock() -> None:
    clock = Clock()
    with pytest.raises(ZeroDivisionError), clock.segment("a", since="x", until="y"):
        _ = 1 / 0
    assert clock.segments().items == ()
    with clock.segment("a", since="x", until="y"):
        pass
    assert len(clock.segments().items) == 1


def test_a_name_is_used_once() -> None:
    clock = Clock()
    with clock.segment("a", since="x", until="y"):
        pass
    with pytest.raises(MeasureError, match="one name"):
        clock.start("a", since="x")
    with pytest.raises(MeasureError, match="one name"):
        clock.add(Segment("a", "x", "y", 0, 1))


def test_a_missing_segment_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(MeasureError, match="no such segment"):
        Segments(())["open"]
    with pytest.raises(MeasureError, match="no segment was measured"):
        _ = Segments(()).total_s


def test_segments_of_another_process_fit_in_by_their_time() -> None:
    clock = Clock(now=ticks(10, 20, 40, 50))
    for name in ("a", "c"):
        with clock.segment(name, since="x", until="y"):
            pass
    clock.add(Segment("b", "x", "y", 20, 40))
    assert [item.name for item in clock.segments().items] == ["a", "b", "c"]
    with pytest.raises(MeasureError, match="overlap"):
        clock.add(Segment("d", "x", "y", 45, 60))
    assert len(clock.segments().items) == 3


@pytest.mark.parametrize(
    "broken", [("", "x", "y", 0, 1), ("a", "", "y", 0, 1), ("a", "x", "", 0, 1), ("a", "x", "y", 2, 1)]
)
def test_a_segment_without_marks_or_with_negative_length_is_refused(broken: tuple[str, str, str, int, int]) -> None:
    with pytest.raises(MeasureError):
        Segment(*broken)


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), max_size=8))
def test_json_round_trips(steps: list[tuple[int, int]]) -> None:
    items, now = [], 0
    for index, (gap, length) in enumerate(steps):
        items.append(Segment(f"s{index}", "from", "to", now + gap, now + gap + length))
        now += gap + length
    segments = Segments(tuple(items))
    assert Segments.from_json(json.loads(json.dumps(segments.to_json()))) == segments


GOOD = {"name": "a", "since": "x", "until": "y", "start_ns": 0, "stop_ns": 1}


@pytest.mark.parametrize(
    "value",
    [
        {},
        [GOOD, GOOD],
        [GOOD | {"extra": 1}],
        [{key: value for key, value in GOOD.items() if key != "until"}],
        [GOOD | {"stop_ns": -1}],
        [GOOD | {"start_ns": 5}],
        [GOOD | {"stop_ns": 1.5}],
        [GOOD | {"stop_ns": None}],
        [GOOD | {"name": ""}],
        [GOOD | {"stop_ns": 9}, GOOD | {"name": "b", "start_ns": 5, "stop_ns": 10}],
        [GOOD] * 1000,
    ],
)
def test_malformed_json_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        Segments.from_json(value)
