"""Confidence intervals of findings: of a mean, of a share, of any statistic by resampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from motte.audit.interface import Bracket
from motte.errors import SettingError

_LEVEL = 0.95
_RESAMPLES = 1000


def of_mean(samples: Sequence[float], *, seed: int) -> Bracket:
    """The mean of independent samples with its bootstrap interval (percentiles, Efron 1979), 95 %.

    Raises:
        SettingError: fewer than two samples, which tell no interval.
    """
    rows = _rows(samples)
    generator = np.random.default_rng(seed)
    return _widened(float(rows.mean()), rows[generator.integers(len(rows), size=(_RESAMPLES, len(rows)))].mean(1))


def of_statistic(
    samples: Sequence[float] | NDArray[np.float64], statistic: Callable[[NDArray[np.float64]], float], *, seed: int
) -> Bracket:
    """``statistic`` of the rows of ``samples`` with its bootstrap interval, 95 %, widened to hold the value.

    Raises:
        SettingError: fewer than two samples, which tell no interval.
    """
    rows = _rows(samples)
    generator = np.random.default_rng(seed)
    drawn = [statistic(rows[generator.integers(len(rows), size=len(rows))]) for _ in range(_RESAMPLES)]
    return _widened(statistic(rows), np.asarray(drawn))


def _rows(samples: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    rows = np.asarray(samples, dtype=np.float64)
    if len(rows) < 2:
        raise SettingError("an interval needs two samples", got=str(len(rows)))
    return rows


def _widened(value: float, drawn: NDArray[np.float64]) -> Bracket:
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Bracket(value, min(float(low), value), max(float(high), value))


def of_share(hits: int, tries: int) -> Bracket:
    """A share with its Clopper-Pearson interval (1934): exact, never narrower than 95 %.

    Raises:
        SettingError: no try, or more hits than tries.
    """
    if not 0 <= hits <= tries or tries < 1:
        raise SettingError("not a share", got=f"{hits} of {tries}")
    tail = (1 - _LEVEL) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: _above(hits, tries, p) - tail)
    high = 1.0 if hits == tries else _solve(lambda p: tail - (1 - _above(hits + 1, tries, p)))
    return Bracket(hits / tries, min(low, hits / tries), max(high, hits / tries))


def exactly(value: float) -> Bracket:
    """A figure that is computed, not estimated: the interval is the value."""
    return Bracket(value, value, value)


def _above(hits: int, tries: int, share: float) -> float:
    """Probability of ``hits`` or more."""
    if share <= 0.0:
        return 0.0 if hits > 0 else 1.0
    if share >= 1.0:
        return 1.0 if hits <= tries else 0.0
    logs = [
        math.lgamma(tries + 1)
        - math.lgamma(each + 1)
        - math.lgamma(tries - each + 1)
        + each * math.log(share)
        + (tries - each) * math.log1p(-share)
        for each in range(hits, tries + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _solve(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
