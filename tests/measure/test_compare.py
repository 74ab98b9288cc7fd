"""The interleaved comparison: order, known distributions, coverage of the interval, and no silent zero."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import MeasureError, SettingError
from motte.measure.compare import MIN_REPEATS, bootstrap_interval, compare, compare_samples


class Bench:
    """A clock that advances by what the callables claim to take, so that no test depends on the machine."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.calls: list[str] = []

    def takes(self, name: str, cost_ns: Callable[[], int]) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now_ns += cost_ns()

        return call

    def now(self) -> int:
        return self.now_ns


def test_known_costs_come_out() -> None:
    bench = Bench()
    found = compare(
        {"whole": bench.takes("whole", lambda: 2_000_000), "parts": bench.takes("parts", lambda: 3_000_000)},
        repeats=7,
        now=bench.now,
    )
    assert found["whole"].samples == (0.002,) * 7
    assert found["parts"].median == found["parts"].minimum == found["parts"].maximum == 0.003
    assert found["parts"].spread == 0
    ratio = found.ratio("parts")
    assert (ratio.median, ratio.low, ratio.high) == (pytest.approx(1.5),) * 3
    assert ratio.baseline == "whole"


def test_a_drift_that_slows_whole_rounds_cancels_in_the_ratio() -> None:
    bench = Bench()

    def drifting(factor: int) -> Callable[[], int]:
        return lambda: factor * 1_000 * (1 + len(bench.calls) // 2)

    found = compare(
        {"a": bench.takes("a", drifting(10)), "b": bench.takes("b", drifting(11))}, repeats=50, warmup=0, now=bench.now
    )
    assert found["a"].maximum / found["a"].minimum > 20
    # Within a round the second call may fall into the next step of the drift; half of the rounds each way.
    assert found.ratio("b").median == pytest.approx(1.1, rel=0.05)


def test_statistics_are_those_of_the_samples() -> None:
    found = compare_samples({"a": [1, 2, 3, 4, 100], "b": [2, 4, 6, 8, 200]})
    a = found["a"]
    assert (a.median, a.minimum, a.maximum, a.spread) == (3, 1, 100, 2)
    assert found.ratio("b").median == 2
    rows = found.rows()
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[0]["ratio"] is None
    expected = {"name": "b", "repeats": 5, "median": 6, "min": 2, "max": 200, "spread": 4}
    assert rows[1] == expected | dict.fromkeys(("ratio", "low", "high"), 2)


def test_every_round_runs_every_candidate_once_in_changing_order() -> None:
    bench = Bench()
    names = ("a", "b", "c")
    candidates = {name: bench.takes(name, lambda: 1_000) for name in names}
    found = compare(candidates, repeats=40, warmup=3, now=bench.now, order="shuffle", seed=5)
    rounds = [tuple(bench.calls[at : at + 3]) for at in range(0, len(bench.calls), 3)]
    assert len(rounds) == 43
    assert all(sorted(one) == list(names) for one in rounds)
    assert found.order == tuple(rounds[3:])
    assert len(set(rounds)) == 6, "a shuffle of 40 rounds meets all six orders"
    bench.calls.clear()
    again = compare(candidates, repeats=40, warmup=3, now=bench.now, order="shuffle", seed=5)
    other = compare(candidates, repeats=40, warmup=3, now=bench.now, order="shuffle", seed=6)
    assert again.order == found.order != other.order


def test_rotation_puts_each_candidate_in_each_place_equally_often() -> None:
    bench = Bench()
    candidates = {name: bench.takes(name, lambda: 1_000) for name in ("a", "b", "c")}
    order = compare(candidates, repeats=12, warmup=1, now=bench.now, order="rotate").order
    for place in range(3):
        assert Counter(row[place] for row in order) == {"a": 4, "b": 4, "c": 4}


def test_warmup_is_run_and_not_counted() -> None:
    bench = Bench()
    first = iter([9_000_000] * 2)
    found = compare(
        {"a": bench.takes("a", lambda: next(first, 1_000)), "b": bench.takes("b", lambda: 1_000)},
        repeats=5,
        warmup=2,
        now=bench.now,
    )
    assert found["a"].maximum == 1e-6
    assert Counter(bench.calls) == {"a": 7, "b": 7}


def test_inner_calls_are_averaged() -> None:
    bench = Bench()
    found = compare(
        {name: bench.takes(name, lambda: 1_000) for name in "ab"}, repeats=5, warmup=0, inner=10, now=bench.now
    )
    assert found["a"].samples == pytest.approx((1e-6,) * 5)
    assert len(bench.calls) == 100


def test_rounds_are_announced_outside_of_what_is_timed() -> None:
    bench = Bench()
    seen: list[int] = []

    def on_round(number: int) -> None:
        seen.append(number)
        bench.now_ns += 10**9

    found = compare(
        {name: bench.takes(name, lambda: 1_000) for name in "ab"}, repeats=5, now=bench.now, on_round=on_round
    )
    assert seen == [1, 2, 3, 4, 5]
    assert found["a"].maximum == found["b"].maximum == 1e-6


def test_reported_times_are_taken_from_the_callable() -> None:
    found = compare({"a": lambda: 2.0, "b": lambda: np.float64(3.0)}, repeats=5, timing="reported")
    assert found.ratio("b").median == 1.5


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, 0, 0.0, -1.0, True, "1", []])
def test_a_missing_sample_is_an_error_and_never_a_zero(missing: Any) -> None:
    with pytest.raises(MeasureError, match="sample"):
        compare({"a": lambda: 1.0, "b": lambda: missing}, repeats=5, timing="reported")
    with pytest.raises(MeasureError, match="sample"):
        compare_samples({"a": [1.0] * 5, "b": [1.0] * 4 + [missing]})


def test_a_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(MeasureError, match="above zero"):
        compare({"a": lambda: None, "b": lambda: None}, repeats=5, now=lambda: 7)


def test_what_a_candidate_raises_goes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        compare({"a": lambda: 1 / 0, "b": lambda: None}, repeats=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"repeats": MIN_REPEATS - 1},
        {"repeats": 5.0},
        {"repeats": True},
        {"warmup": -1},
        {"inner": 0},
        {"order": "random"},
        {"timing": "there"},
        {"baseline": "c"},
        {"confidence": 1.0},
        {"confidence": 0.0},
        {"resamples": 10},
    ],
)
def test_settings_out_of_range_are_refused_before_anything_runs(settings: dict[str, Any]) -> None:
    ran: list[int] = []
    with pytest.raises(SettingError):
        compare({"a": lambda: ran.append(1), "b": lambda: ran.append(1)}, **settings)
    assert ran == []


def test_one_candidate_is_no_comparison() -> None:
    with pytest.raises(SettingError):
        compare({"a": lambda: None})
    with pytest.raises(SettingError):
        compare_samples({"a": [1.0] * 5})


def test_unpaired_or_too_few_samples_are_refused() -> None:
    with pytest.raises(MeasureError, match="same rounds"):
        compare_samples({"a": [1.0] * 6, "b": [1.0] * 5})
    with pytest.raises(MeasureError, match="too few"):
        compare_samples({"a": [1.0] * 4, "b": [1.0] * 4})


def test_asking_for_what_was_not_measured_is_an_error() -> None:
    found = compare_samples({"a": [1.0] * 5, "b": [1.0] * 5})
    with pytest.raises(MeasureError, match="no such ratio"):
        found.ratio("a")
    with pytest.raises(MeasureError, match="no such candidate"):
        found["c"]


# --- the interval --------------------------------------------------------------------------------------------------
def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    # Skewed, as times are: the true median of exp(N(0, s)) is 1.
    trials = [np.exp(generator.normal(0, 0.3, 25)) for _ in range(400)]
    covered = 0
    for index, trial in enumerate(trials):
        low, high = bootstrap_interval(trial.tolist(), confidence=0.9, resamples=1000, seed=index)
        covered += low <= 1 <= high
    # 400 trials at 0.9: the standard error is 0.015; the percentile bootstrap of a median is slightly conservative.
    assert 0.85 <= covered / 400 <= 0.97


def test_the_paired_ratio_is_covered_despite_a_common_drift() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for index in range(200):
        drift = np.cumsum(generator.normal(0, 0.2, 30))
        a = np.exp(drift + generator.normal(0, 0.02, 30))
        b = 1.1 * np.exp(drift + generator.normal(0, 0.02, 30))
        ratio = compare_samples({"a": a.tolist(), "b": b.tolist()}, resamples=1000, seed=index).ratio("b")
        assert ratio.high - ratio.low < 0.06, "the drift of both must not widen the interval of their ratio"
        covered += ratio.low <= 1.1 <= ratio.high
    assert 0.9 <= covered / 200 <= 1


def test_more_confidence_is_wider_and_the_seed_decides() -> None:
    values = np.random.default_rng(3).normal(10, 1, 40).tolist()
    low90, high90 = bootstrap_interval(values, confidence=0.9)
    low99, high99 = bootstrap_interval(values, confidence=0.99)
    assert low99 <= low90 < high90 <= high99
    assert (low90, high90) == bootstrap_interval(values, confidence=0.9)


def test_slicing_of_many_resamples_does_not_change_the_interval_much() -> None:
    values = np.random.default_rng(4).normal(0, 1, 5000).tolist()
    low, high = bootstrap_interval(values, resamples=1700)
    assert low < float(np.median(values)) < high
    # The asymptotic standard error of a median of N(0, 1) is 1.2533 / sqrt(n).
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / math.sqrt(5000), rel=0.15)


@given(st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=30))
def test_the_interval_lies_within_the_values(values: list[float]) -> None:
    low, high = bootstrap_interval(values, resamples=1000)
    assert min(values) <= low <= high <= max(values) * (1 + 1e-12)


@pytest.mark.parametrize("values", [[1.0] * 4, [1.0] * 4 + [math.nan], [1.0] * 4 + [math.inf]])
def test_no_interval_of_too_few_or_missing_values(values: list[float]) -> None:
    with pytest.raises(MeasureError):
        bootstrap_interval(values)
