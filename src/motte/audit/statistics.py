"""Exact binomial limits and ROC curves: what attacks that answer yes or no are judged with, in numpy alone.

Intervals by resampling are in :mod:`motte.audit.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from motte.audit.interface import Bracket
from motte.errors import MeasureError, SettingError

CONFIDENCE: Final = 0.95
NORMAL: Final = NormalDist()
_BISECTIONS: Final = 200
_TERMS: Final = 100_000


# --- binomial counts ------------------------------------------------------------------------------------------------
def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P[X >= successes] for X binomial: the regularised incomplete beta function (DLMF 8.17.5).

    Raises:
        SettingError: negative trials, or a probability outside [0, 1].
    """
    if trials < 0 or not 0.0 <= probability <= 1.0:
        raise SettingError("no binomial distribution", got=f"{trials} trials, probability {probability!r}")
    if successes <= 0:
        return 1.0
    if successes > trials:
        return 0.0
    return incomplete_beta(successes, trials - successes + 1, probability)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), regularised, a and b above 0, by its continued fraction (DLMF 8.17.22; Lentz's algorithm).

    Raises:
        MeasureError: the fraction does not settle, which it does for every a and b below some 10^9.
    """
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    # The fraction converges fast below the mean; above it the symmetric one does (DLMF 8.17.4).
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / a * _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1.0 / _away(1.0 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, _TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away(1.0 + term * d, tiny)
            c = _away(1.0 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return value
    raise MeasureError("the incomplete beta function did not settle", got=f"a {a}, b {b}, x {x}")


def _away(value: float, tiny: float) -> float:
    return tiny if abs(value) < tiny else value


def lower_limit(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided exact lower limit of a probability (Clopper, Pearson 1934): it lies below the true one with a
    frequency of at least ``confidence``.

    Raises:
        SettingError: no trials, counts that contradict, or a confidence that is none.
    """
    _check_counts(successes, trials, confidence)
    if successes == 0:
        return 0.0
    return _root(lambda p: binomial_tail(successes, trials, p) - (1.0 - confidence))


def upper_limit(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided exact upper limit of a probability, see :func:`lower_limit`.

    Raises:
        SettingError: no trials, counts that contradict, or a confidence that is none.
    """
    return 1.0 - lower_limit(trials - successes, trials, confidence)


def clopper_pearson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Bracket:
    """A rate with its exact two-sided interval: it holds the true probability in at least ``confidence`` of all cases.

    Raises:
        SettingError: no trials, counts that contradict, or a confidence that is none.
    """
    _check_counts(successes, trials, confidence)
    side = 0.5 + confidence / 2
    return Bracket(successes / trials, lower_limit(successes, trials, side), upper_limit(successes, trials, side))


def _check_counts(successes: int, trials: int, confidence: float) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise SettingError("not a count out of trials", got=f"{successes} of {trials}")
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise SettingError("confidence out of range", expected="above 0, below 1", got=repr(confidence))


def _root(rising: Callable[[float], float]) -> float:
    """The largest number in [0, 1] known not to be above the root of ``rising``."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if rising(middle) <= 0 else (low, middle)
    return low


# --- two populations of scores --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Roc:
    """The curve of a test that says yes where a score is at least a threshold. Scores that are equal stay together.

    Attributes:
        fpr, tpr: (k,) rising from 0 to 1, one point a distinct score and (0, 0) first.
        thresholds: (k,) falling; the first is infinite.
        positives, negatives: how many scores of each kind there were.
    """

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    positives: int
    negatives: int

    @property
    def auc(self) -> float:
        """The area below: how often a positive scores above a negative, ties counted half."""
        return float(((self.tpr[1:] + self.tpr[:-1]) / 2 * np.diff(self.fpr)).sum())

    def auc_interval(self, confidence: float = CONFIDENCE) -> Bracket:
        """The area with a score interval (Newcombe 2006, "Confidence intervals for an effect size measure based on the
        Mann-Whitney statistic", part 2, method 5), which has a width at areas of 0 and 1 too."""
        _check_confidence(confidence)
        area, z = self.auc, NORMAL.inv_cdf(0.5 + confidence / 2)
        low = _root(lambda theta: theta + z * self._deviation(theta) - area)
        high = 1.0 - _root(lambda rest: rest + z * self._deviation(1.0 - rest) - (1.0 - area))
        return Bracket(area, min(low, area), max(high, area))

    def _deviation(self, theta: float) -> float:
        """Standard deviation of the area if the true one is ``theta`` (Hanley, McNeil 1982, exponential scores)."""
        more = (self.positives + self.negatives) / 2 - 1
        bracket = 1 + more * (1 - theta) / (2 - theta) + more * theta / (1 + theta)
        return math.sqrt(theta * (1 - theta) * bracket / (self.positives * self.negatives))

    def tpr_at(self, fpr: float, confidence: float = CONFIDENCE) -> Bracket:
        """The highest true-positive rate among thresholds whose false-positive rate is at most ``fpr``, with the exact
        interval of a rate at that threshold. With fewer than 1 / fpr negatives: the rate without any false positive.

        Raises:
            SettingError: a rate outside [0, 1].
        """
        if not 0.0 <= fpr <= 1.0:
            raise SettingError("not a rate", where="fpr", got=repr(fpr))
        # Counts are compared, not quotients.
        allowed = self.fpr * self.negatives <= math.floor(fpr * self.negatives + 1e-9) + 0.5
        place = int(np.flatnonzero(allowed)[-1])
        return clopper_pearson(round(self.tpr[place] * self.positives), self.positives, confidence)

    def best_accuracy(self) -> float:
        """The best mean of true-positive and true-negative rate. Chosen on the same scores, hence optimistic."""
        return float(((self.tpr + 1.0 - self.fpr) / 2).max())

    def points(self, most: int = 200) -> tuple[tuple[float, float], ...]:
        """At most ``most`` (fpr, tpr) for a plot on log axes: evenly spread by log of the rates, ends included."""
        if len(self.fpr) <= most:
            return tuple(zip(self.fpr.tolist(), self.tpr.tolist(), strict=True))
        grid = np.geomspace(1.0 / self.negatives, 1.0, most - 2)
        places = np.unique(np.searchsorted(self.fpr, grid, side="right") - 1)
        chosen = np.unique(np.concatenate(([0], places, [len(self.fpr) - 1])))
        return tuple((float(self.fpr[each]), float(self.tpr[each])) for each in chosen)


def roc(positives: ArrayLike, negatives: ArrayLike) -> Roc:
    """The curve for scores of two populations, higher = more likely positive.

    Args:
        positives, negatives: (n,) and (m,), at least one each, not NaN.

    Raises:
        MeasureError: no scores of a kind, or one that is no number.
    """
    yes, no = np.asarray(positives, dtype=np.float64).ravel(), np.asarray(negatives, dtype=np.float64).ravel()
    if not len(yes) or not len(no):
        raise MeasureError("a curve needs scores of both kinds", got=f"{len(yes)} and {len(no)}")
    scores = np.concatenate((yes, no))
    if np.isnan(scores).any():
        raise MeasureError("a score is not a number")
    order = np.argsort(-scores, kind="stable")
    ranked, is_yes = scores[order], order < len(yes)
    # The last of each run of equal scores: only whole runs can be told apart from the rest.
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    true, false = np.cumsum(is_yes)[ends], np.cumsum(~is_yes)[ends]
    return Roc(
        np.concatenate(([0.0], false / len(no))),
        np.concatenate(([0.0], true / len(yes))),
        np.concatenate(([np.inf], ranked[ends])),
        len(yes),
        len(no),
    )


def balanced_accuracy(positives: ArrayLike, negatives: ArrayLike, threshold: float) -> float:
    """Mean of true-positive and true-negative rate of "score at least ``threshold``"."""
    yes, no = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    return float(((yes >= threshold).mean() + (no < threshold).mean()) / 2)


def best_threshold(curve: Roc) -> float:
    """The threshold of the best balanced accuracy on ``curve``; use it on other scores."""
    return float(curve.thresholds[int(np.argmax(curve.tpr - curve.fpr))])
