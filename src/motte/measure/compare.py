"""Interleaved comparison of two or more callables.

A machine's speed drifts: other processes, frequency, temperature. Timing A many times and then B puts the drift into
the answer. Here every round runs each candidate once, in an order that changes from round to round, and the ratio is
formed within the round, so that what slows a whole round cancels. The stated ratio is the median of these paired
ratios; its interval is the percentile bootstrap over rounds (Efron 1979), seeded: the same samples give the same one.

What this does not do: rounds that follow each other closely are not independent, and no resampling knows of a slow
hour. Raise ``repeats``, or repeat the whole run, when the spread is wide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from motte.errors import MeasureError, SettingError

MIN_REPEATS: Final = 5
"""Fewer rounds give neither a spread nor an interval worth printing."""
MIN_RESAMPLES: Final = 1000

Order = Literal["rotate", "shuffle"]
Timing = Literal["here", "reported"]


@dataclass(frozen=True)
class Series:
    """The samples of one candidate in the order of the rounds, in seconds (any one unit in :func:`compare_samples`)."""

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return float(np.median(self.samples))

    @property
    def minimum(self) -> float:
        """The smallest sample."""
        return min(self.samples)

    @property
    def maximum(self) -> float:
        """The largest sample."""
        return max(self.samples)

    @property
    def spread(self) -> float:
        """The interquartile range: between which two values, how far apart, the middle half of the samples lies."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(high - low)


@dataclass(frozen=True)
class Ratio:
    """``name`` over ``baseline``: the median of the paired ratios and its bootstrap interval. 1.03 = 3 % slower."""

    name: str
    baseline: str
    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. ``order`` holds, round by round, the names as they ran; empty for given samples."""

    series: tuple[Series, ...]
    ratios: tuple[Ratio, ...]
    order: tuple[tuple[str, ...], ...]

    def __getitem__(self, name: str) -> Series:
        """The series ``name``; a missing one is an error."""
        for one in self.series:
            if one.name == name:
                return one
        raise MeasureError("no such candidate was measured", expected=", ".join(s.name for s in self.series), got=name)

    def ratio(self, name: str) -> Ratio:
        """The ratio of ``name`` over the baseline.

        Raises:
            MeasureError: ``name`` is the baseline itself, or was not measured.
        """
        for one in self.ratios:
            if one.name == name:
                return one
        raise MeasureError("no such ratio", expected=", ".join(r.name for r in self.ratios), got=name)

    def rows(self) -> list[dict[str, Any]]:
        """One row a candidate, for a table: name, repeats, median, min, max, spread, and ratio, low, high (None for the
        baseline, which has no ratio to itself)."""
        by_name = {ratio.name: ratio for ratio in self.ratios}
        return [
            {
                "name": one.name,
                "repeats": len(one.samples),
                "median": one.median,
                "min": one.minimum,
                "max": one.maximum,
                "spread": one.spread,
                "ratio": by_name[one.name].median if one.name in by_name else None,
                "low": by_name[one.name].low if one.name in by_name else None,
                "high": by_name[one.name].high if one.name in by_name else None,
            }
            for one in self.series
        ]


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    warmup: int = 2,
    repeats: int = 20,
    inner: int = 1,
    order: Order = "shuffle",
    timing: Timing = "here",
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 10_000,
    now: Callable[[], int] = time.perf_counter_ns,
    on_round: Callable[[int], None] | None = None,
) -> Comparison:
    """Run every candidate once a round and compare them.

    Args:
        candidates: name -> callable without arguments. What it raises goes through, and there is no comparison.
        baseline: what the ratios are over; the first candidate when None.
        warmup: rounds that are run and not counted.
        repeats: counted rounds, at least :data:`MIN_REPEATS`.
        inner: calls a sample; the sample is their mean. For calls too short for the clock.
        order: ``shuffle`` draws a new order for each round from ``seed``; ``rotate`` shifts it by one, so that after
            as many rounds as candidates each has stood in each place equally often.
        timing: ``here`` times the call with ``now`` (nanoseconds); ``reported`` takes what the callable returns,
            seconds, for work that another process timed.
        confidence: of the interval, in (0, 1).
        resamples: of the bootstrap.
        on_round: called with the number of each finished counted round, outside of what is timed.

    Raises:
        SettingError: an argument out of its range, fewer than two candidates, an unknown baseline.
        MeasureError: a sample is missing, not finite, or not above zero.
    """
    names = list(candidates)
    _check_settings(names, warmup=warmup, repeats=repeats, inner=inner, order=order, timing=timing)
    base = _baseline(names, baseline)
    _check_interval(confidence, resamples)

    def sample(name: str) -> float:
        call = candidates[name]
        if timing == "reported":
            return float(np.mean([_positive(call(), name) for _ in range(inner)]))
        start = now()
        for _ in range(inner):
            call()
        return _positive((now() - start) / 1e9 / inner, name)

    orders = _orders(names, warmup + repeats, order, seed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index, row in enumerate(orders):
        measured = {name: sample(name) for name in row}
        if index < warmup:
            continue
        for name, value in measured.items():
            samples[name].append(value)
        if on_round is not None:
            on_round(index - warmup + 1)
    return _comparison(samples, base, tuple(orders[warmup:]), confidence, resamples, seed)


def compare_samples(
    samples: Mapping[str, Sequence[float]],
    *,
    baseline: str | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Comparison:
    """Compare samples that were measured elsewhere; the i-th of every series must come from the same round.

    Raises:
        SettingError: fewer than two series, an unknown baseline, a confidence out of range.
        MeasureError: series of unequal length or below :data:`MIN_REPEATS`; a sample missing, not finite, not above 0.
    """
    names = list(samples)
    if len(names) < 2:
        raise SettingError("a comparison needs two candidates", got=str(len(names)))
    base = _baseline(names, baseline)
    _check_interval(confidence, resamples)
    lengths = {name: len(values) for name, values in samples.items()}
    if len(set(lengths.values())) != 1:
        raise MeasureError("paired samples need the same rounds for all", got=str(lengths))
    if lengths[base] < MIN_REPEATS:
        raise MeasureError("too few rounds", expected=f"at least {MIN_REPEATS}", got=str(lengths[base]))
    checked = {name: [_positive(value, name) for value in values] for name, values in samples.items()}
    return _comparison(checked, base, (), confidence, resamples, seed)


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the median of ``values``.

    Raises:
        SettingError: ``confidence`` or ``resamples`` out of range.
        MeasureError: fewer than :data:`MIN_REPEATS` values, or one that is not finite.
    """
    _check_interval(confidence, resamples)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < MIN_REPEATS:
        raise MeasureError("too few values for an interval", expected=f"at least {MIN_REPEATS}", got=str(array.size))
    if not np.isfinite(array).all():
        raise MeasureError("a value is not finite")
    generator = np.random.default_rng(seed)
    # In slices, so that many rounds and many resamples do not add up to gigabytes.
    step = max(1, 4_000_000 // array.size)
    medians = np.concatenate(
        [
            np.median(array[generator.integers(0, array.size, (min(step, resamples - at), array.size))], axis=1)
            for at in range(0, resamples, step)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


def _comparison(
    samples: Mapping[str, Sequence[float]],
    baseline: str,
    order: tuple[tuple[str, ...], ...],
    confidence: float,
    resamples: int,
    seed: int,
) -> Comparison:
    ratios = []
    under = np.asarray(samples[baseline])
    for name, values in samples.items():
        if name == baseline:
            continue
        paired = np.asarray(values) / under
        low, high = bootstrap_interval(paired.tolist(), confidence=confidence, resamples=resamples, seed=seed)
        ratios.append(Ratio(name, baseline, float(np.median(paired)), low, high, confidence))
    series = tuple(Series(name, tuple(values)) for name, values in samples.items())
    return Comparison(series, tuple(ratios), order)


def _orders(names: list[str], rounds: int, order: Order, seed: int) -> list[tuple[str, ...]]:
    if order == "rotate":
        return [tuple(names[(place + turn) % len(names)] for place in range(len(names))) for turn in range(rounds)]
    generator = np.random.default_rng(seed)
    return [tuple(names[place] for place in generator.permutation(len(names))) for _ in range(rounds)]


def _positive(value: object, name: str) -> float:
    """A sample; a missing one must not turn into a zero that makes a candidate look fast."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise MeasureError("a sample is missing", where=name, expected="seconds", got=repr(value)[:80])
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        hint = "raise `inner`: the call is too short for the clock" if number == 0 else None
        raise MeasureError("a sample is not a finite number above zero", where=name, got=repr(number), hint=hint)
    return number


def _check_settings(names: list[str], *, warmup: int, repeats: int, inner: int, order: str, timing: str) -> None:
    if len(names) < 2:
        raise SettingError("a comparison needs two candidates", got=str(len(names)))
    for what, value, low in (("warmup", warmup, 0), ("repeats", repeats, MIN_REPEATS), ("inner", inner, 1)):
        if type(value) is not int or value < low:
            raise SettingError("out of range", where=what, expected=f"an integer of at least {low}", got=repr(value))
    for what, text, known in (("order", order, ("rotate", "shuffle")), ("timing", timing, ("here", "reported"))):
        if text not in known:
            raise SettingError("unknown value", where=what, expected=" or ".join(known), got=repr(text))


def _check_interval(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise SettingError("out of range", where="confidence", expected="between 0 and 1", got=repr(confidence))
    if type(resamples) is not int or resamples < MIN_RESAMPLES:
        raise SettingError("out of range", where="resamples", expected=f"at least {MIN_RESAMPLES}", got=repr(resamples))


def _baseline(names: list[str], baseline: str | None) -> str:
    if baseline is None:
        return names[0]
    if baseline not in names:
        raise SettingError("unknown baseline", expected=" or ".join(names), got=baseline)
    return baseline
