"""Gates: what is not there fails, what is there is compared, and a gate that could not fail cannot be made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from motte.errors import GateError, SettingError
from motte.measure.compare import Ratio
from motte.measure.gate import Bound, Gate

RATIO = Ratio("streamed", "resident", median=1.2, low=1.1, high=1.6, confidence=0.95)


@pytest.mark.parametrize("figure", [None, math.nan, math.inf, -math.inf, True, False, "1.0", [], {}, b"1"])
def test_what_is_no_figure_fails_every_bound(figure: Any) -> None:
    for bound in (Bound("x", high=1e300), Bound("x", low=-1e300), Bound("x", low=-1e300, high=1e300)):
        outcome = bound.check(figure)
        assert not outcome.passed
        assert "FAIL" in str(outcome)
        with pytest.raises(GateError, match="1 of 1 bounds do not hold"):
            Gate((bound,)).require({"x": figure})


def test_an_absent_figure_fails_and_says_why() -> None:
    gate = Gate((Bound("power", high=100.0), Bound("time", high=2.0)))
    with pytest.raises(GateError) as caught:
        gate.require({"time": 1.0}, missing={"power": "no RAPL"})
    assert caught.value.where == "power"
    assert caught.value.got == "no figure: no RAPL"
    assert [outcome.passed for outcome in gate.check({"time": 1.0})] == [False, True]


@pytest.mark.parametrize(
    ("bound", "value", "passes"),
    [
        (Bound("x", high=1.5), 1.5, True),
        (Bound("x", high=1.5), math.nextafter(1.5, 2), False),
        (Bound("x", low=0.5), 0.5, True),
        (Bound("x", low=0.5), 0.4, False),
        (Bound("x", low=0.5, high=1.0), 0.0, False),
        (Bound("x", low=0.0, high=1.0), 0, True),
    ],
)
def test_both_ends_belong_to_a_bound(bound: Bound, value: float, passes: bool) -> None:
    assert bound.check(value).passed is passes


@pytest.mark.parametrize(
    ("high", "median", "whole", "some"),
    [(1.0, False, False, False), (1.15, False, False, True), (1.3, True, False, True), (1.6, True, True, True)],
)
def test_what_of_an_interval_is_judged(high: float, median: bool, whole: bool, some: bool) -> None:
    assert Bound("x", high=high).check(RATIO).passed is median
    assert Bound("x", high=high, judged="whole").check(RATIO).passed is whole
    assert Bound("x", high=high, judged="any").check(RATIO).passed is some
    # The same bound from below, mirrored.
    mirrored = Ratio("a", "b", -RATIO.median, -RATIO.high, -RATIO.low, 0.95)
    assert Bound("x", low=-high).check(mirrored).passed is median
    assert Bound("x", low=-high, judged="whole").check(mirrored).passed is whole
    assert Bound("x", low=-high, judged="any").check(mirrored).passed is some


def test_a_value_without_an_interval_or_with_a_broken_one_fails() -> None:
    assert not Bound("x", high=2.0, judged="whole").check(1.0).passed
    assert not Bound("x", high=2.0, judged="any").check(1.0).passed
    for broken in (Ratio("a", "b", 1.0, math.nan, 1.1, 0.95), Ratio("a", "b", 1.0, 1.1, 0.9, 0.95)):
        assert not Bound("x", high=2.0).check(broken).passed


def test_a_gate_that_cannot_fail_cannot_be_made() -> None:
    for make in (
        lambda: Gate(()),
        lambda: Bound("x"),
        lambda: Bound(" ", high=1.0),
        lambda: Bound("x", low=2.0, high=1.0),
        lambda: Bound("x", high=math.nan),
        lambda: Bound("x", high=math.inf),
        lambda: Bound("x", high=1.0, judged="mean"),  # type: ignore[arg-type]
        lambda: Gate((Bound("x", high=1.0), Bound("x", low=0.0))),
    ):
        with pytest.raises(SettingError):
            make()


def test_a_misspelt_figure_is_no_success() -> None:
    with pytest.raises(SettingError, match="no bound has this name"):
        Gate((Bound("time", high=1.0),)).check({"time": 0.5, "tme": 9.0})


def test_what_holds_is_returned() -> None:
    outcomes = Gate((Bound("ratio", high=1.5), Bound("bytes", high=10))).require({"ratio": RATIO, "bytes": 10})
    assert [str(outcome) for outcome in outcomes] == [
        "pass: ratio: 1.2 (1.1 to 1.6) of streamed over resident, expected at most 1.5",
        "pass: bytes: 10, expected at most 10",
    ]
