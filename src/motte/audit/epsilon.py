"""Empirical epsilon: what an attack proves about a mechanism, beside what the accountant promises of it.

The accountant (:mod:`motte.offload.accounting`) gives an **upper** bound on epsilon: nobody can do better. An attack
that tells two neighbouring worlds apart gives a **lower** bound: no smaller epsilon is true. A lower bound above the
upper one means that the noise, the sensitivity, the count of releases or this attack is wrong. It is never a finding
about a user's data; it is an error of ours, and :meth:`EmpiricalEpsilon.require_consistent` raises it.

Three lower bounds, each with a confidence:

* *hypothesis test* (Jagielski, Ullman, Oprea, NeurIPS 2020; Nasr, Song, Thakurta, Papernot, Carlini, S&P 2021): an
  (epsilon, delta)-private mechanism has TPR <= e^epsilon FPR + delta for every test, and the same with both worlds
  exchanged. Exact limits (Clopper, Pearson) of the counted rates give a bound that assumes nothing. It ends near
  log(trials), however broken a mechanism is.
* *Gaussian* (Nasr, Hayes, Steinke, Balle, Tramer, Jagielski, Carlini, Terzis, USENIX Security 2023): the accountant
  claims that the releases are as private as one Gaussian mechanism of some mu, whose trade-off curve is known; a point
  above that curve refutes the claim. Far tighter, and against this accountant just as binding.
* *one run* (Steinke, Nasr, Jagielski, NeurIPS 2023): many canaries, each in or out by a coin, in a single training;
  the number of right guesses is no larger than that of randomised response, but for delta.

The threshold is chosen on one half of the scores and counted on the other, so that choosing costs no confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from motte.audit.statistics import CONFIDENCE, NORMAL, lower_limit, upper_limit
from motte.errors import ContradictionError, MeasureError, SettingError
from motte.offload.analytic import check_delta, epsilon_of

Method = Literal["hypothesis test", "gaussian", "one run"]
MIN_SCORES: Final = 8
"""Of each world: fewer, and a half of them can prove nothing."""
_MOST_THRESHOLDS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EmpiricalEpsilon:
    """A measured lower bound beside the stated upper one.

    Attributes:
        lower: epsilon is at least this, with ``confidence``; 0: the attack proved nothing.
        upper: what the accountant states; infinite where it promises nothing.
        upper_because: how the upper bound was made, or why there is none.
        delta: of both.
        adjacency: ``replace`` or ``add-remove``: which worlds were told apart, and which the accountant means.
        method: how ``lower`` was found.
        trials: games, or canaries, that it rests on.
        counted: the counts in words.
    """

    lower: float
    upper: float
    upper_because: str
    delta: float
    adjacency: str
    confidence: float
    method: Method
    trials: int
    counted: str

    @property
    def contradiction(self) -> bool:
        """Whether the measurement refutes the accountant."""
        return self.lower > self.upper

    def require_consistent(self) -> None:
        """Nothing, unless the measurement refutes the accountant.

        Raises:
            ContradictionError: it does. An error of motte's, never of the user's.
        """
        if self.contradiction:
            raise ContradictionError(
                "an attack proves a larger epsilon than the accountant states",
                where=f"{self.method}, delta {self.delta:g}, adjacency {self.adjacency}",
                expected=f"at most {self.upper:.4g} ({self.upper_because})",
                got=f"at least {self.lower:.4g} at confidence {self.confidence:g} ({self.counted})",
                hint="noise, sensitivity or accounting is wrong: believe no epsilon of this version, and report it",
            )

    def __str__(self) -> str:
        upper = f"{self.upper:.4g}" if math.isfinite(self.upper) else "infinite"
        return (
            f"epsilon at least {self.lower:.3g} (measured, {self.method}, confidence {self.confidence:g},"
            f" {self.counted}) and at most {upper} ({self.upper_because})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite upper bound is the text ``infinite``."""
        return {
            "lower": self.lower,
            "upper": self.upper if math.isfinite(self.upper) else "infinite",
            "upper_because": self.upper_because,
            "delta": self.delta,
            "adjacency": self.adjacency,
            "confidence": self.confidence,
            "method": self.method,
            "trials": self.trials,
            "counted": self.counted,
            "contradiction": self.contradiction,
        }


@dataclass(frozen=True, slots=True)
class LowerBound:
    """What scores prove: epsilon is at least ``epsilon``; the counts, in words."""

    epsilon: float
    counted: str


# --- counts ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Counts:
    """One test in both worlds: of ``positives`` games in one world it said yes ``hits`` times, of ``negatives`` in the
    other world ``alarms`` times.

    Raises:
        SettingError: counts that contradict each other.
    """

    hits: int
    positives: int
    alarms: int
    negatives: int

    def __post_init__(self) -> None:
        if not (0 <= self.hits <= self.positives and 0 <= self.alarms <= self.negatives and self.positives):
            raise SettingError("not counts of a test", got=str(self))
        if not self.negatives:
            raise SettingError("a test needs games in both worlds", got=str(self))

    @property
    def exchanged(self) -> Counts:
        """The opposite answer about the other world."""
        return Counts(self.negatives - self.alarms, self.negatives, self.positives - self.hits, self.positives)

    def __str__(self) -> str:
        return f"{self.hits} of {self.positives} against {self.alarms} of {self.negatives}"


def hypothesis_test_bound(counts: Counts, *, delta: float, confidence: float = CONFIDENCE) -> float:
    """Epsilon is at least this: log((TPR - delta) / FPR) at the exact limits of both, each half of the error.

    Raises:
        SettingError: a delta or a confidence that is none.
    """
    check_delta(delta)
    hit, alarm = _limits(counts, confidence)
    return max(0.0, math.log((hit - delta) / alarm)) if hit > delta else 0.0


def gaussian_bound(counts: Counts, *, delta: float, confidence: float = CONFIDENCE) -> float:
    """Epsilon at ``delta`` is at least this **if** the mechanism is as private as a Gaussian one of some mu: the test
    shows mu >= quantile(TPR) - quantile(FPR).

    Raises:
        SettingError: a delta or a confidence that is none.
    """
    check_delta(delta)
    hit, alarm = _limits(counts, confidence)
    if hit <= 0.0 or alarm >= 1.0:
        return 0.0
    return epsilon_of(delta, max(0.0, NORMAL.inv_cdf(hit) - NORMAL.inv_cdf(alarm)))


def _limits(counts: Counts, confidence: float) -> tuple[float, float]:
    side = 0.5 + confidence / 2
    return lower_limit(counts.hits, counts.positives, side), upper_limit(counts.alarms, counts.negatives, side)


# --- scores ---------------------------------------------------------------------------------------------------------
def bound_from_scores(
    inside: ArrayLike,
    outside: ArrayLike,
    *,
    delta: float,
    seed: int,
    method: Literal["hypothesis test", "gaussian"] = "hypothesis test",
    confidence: float = CONFIDENCE,
) -> LowerBound:
    """What independent games prove, one score a game, higher = more likely ``inside``.

    Args:
        inside, outside: (n,) and (m,), the scores of games in each world. **Games must be independent**: one trained
            model gives one game, whatever the number of records; for that see :func:`one_run_bound`.
        seed: of the halves.

    Raises:
        MeasureError: too few scores, or one that is no number.
        SettingError: a delta, a confidence or a method that is none.
    """
    if method not in ("hypothesis test", "gaussian"):
        raise SettingError("unknown method", expected="hypothesis test or gaussian", got=repr(method))
    generator = np.random.default_rng(seed)
    yes, no = (_scores(each, generator) for each in (inside, outside))
    threshold, exchanged = _chosen(yes[::2], no[::2], delta=delta, method=method)
    # The other halves have had no say in the threshold.
    yes, no = yes[1::2], no[1::2]
    counts = Counts(int((yes >= threshold).sum()), len(yes), int((no >= threshold).sum()), len(no))
    if exchanged:
        counts = counts.exchanged
    bound = gaussian_bound if method == "gaussian" else hypothesis_test_bound
    return LowerBound(bound(counts, delta=delta, confidence=confidence), str(counts))


def _scores(values: ArrayLike, generator: np.random.Generator) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64).ravel()
    if len(scores) < MIN_SCORES:
        raise MeasureError("too few games", expected=f"{MIN_SCORES} in each world", got=str(len(scores)))
    if np.isnan(scores).any():
        raise MeasureError("a score is not a number")
    return generator.permutation(scores)


def _chosen(yes: NDArray[np.float64], no: NDArray[np.float64], *, delta: float, method: str) -> tuple[float, bool]:
    """The threshold and the direction with the best rough bound on these scores. Any choice is valid, none exact."""
    candidates = np.unique(np.concatenate((yes, no)))
    if len(candidates) > _MOST_THRESHOLDS:
        candidates = np.unique(np.quantile(candidates, np.linspace(0, 1, _MOST_THRESHOLDS)))
    hits = (yes[None, :] >= candidates[:, None]).mean(1)
    alarms = (no[None, :] >= candidates[:, None]).mean(1)
    best: tuple[float, float, bool] = (-math.inf, float(candidates[0]), False)
    for high, n, low, m, exchanged in (
        (hits, len(yes), alarms, len(no), False),
        (1 - alarms, len(no), 1 - hits, len(yes), True),
    ):
        sure, doubt = _wilson(high, n, -1), _wilson(low, m, +1)
        if method == "gaussian":
            values = np.array([NORMAL.inv_cdf(a) - NORMAL.inv_cdf(b) for a, b in zip(sure, doubt, strict=True)])
        else:
            values = np.log(np.maximum(sure - delta, 1e-300) / doubt)
        place = int(values.argmax())
        best = max(best, (float(values[place]), float(candidates[place]), exchanged))
    return best[1], best[2]


def _wilson(rate: NDArray[np.float64], trials: int, side: int) -> NDArray[np.float64]:
    """Approximate limits of a rate, strictly between 0 and 1."""
    z = 1.96
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return np.clip(centre + side * half, 1e-12, 1 - 1e-12)


# --- one run --------------------------------------------------------------------------------------------------------
def one_run_bound(correct: int, guesses: int, canaries: int, *, delta: float, confidence: float = CONFIDENCE) -> float:
    """Epsilon is at least this (Steinke, Nasr, Jagielski 2023, theorem 5.2 and appendix D).

    Args:
        canaries: each was in or out (or one of two records, under ``replace``) by an independent fair coin.
        guesses: for how many the attack ventured a guess; which ones may depend on everything that it saw.
        correct: of these.

    Raises:
        SettingError: counts, a delta or a confidence that contradict.
    """
    check_delta(delta)
    if not 0 <= correct <= guesses <= canaries or not canaries:
        raise SettingError("not counts of guesses", got=f"{correct} of {guesses} of {canaries}")
    if not 0.0 < confidence < 1.0:
        raise SettingError("confidence out of range", expected="above 0, below 1", got=repr(confidence))
    # The chance of as many right guesses rises with epsilon.
    if _one_run_chance(correct, guesses, canaries, 0.0, delta) >= 1 - confidence:
        return 0.0
    low, high = 0.0, 1.0
    while _one_run_chance(correct, guesses, canaries, high, delta) < 1 - confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        below = _one_run_chance(correct, guesses, canaries, middle, delta) < 1 - confidence
        low, high = (middle, high) if below else (low, middle)
    return low


def _one_run_chance(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """At most how likely that many right guesses are under (epsilon, delta)."""
    right, wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    count = np.arange(guesses + 1)
    chances = np.exp(_log_choices(guesses) + count * right + (guesses - count) * wrong)
    below = np.cumsum(chances[:correct][::-1])
    # At most so much delta can move: the average over i of what lies within i guesses below.
    worst = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, float(chances[correct:].sum()) + 2 * canaries * delta * worst)


def _log_choices(trials: int) -> NDArray[np.float64]:
    """log(trials over k) for k from 0 to ``trials``."""
    factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, trials + 1, dtype=np.float64)))))
    return np.asarray(factorials[-1] - factorials - factorials[::-1])


def beside(
    bound: LowerBound,
    *,
    upper: float,
    upper_because: str,
    delta: float,
    adjacency: str,
    method: Method,
    trials: int,
    confidence: float = CONFIDENCE,
) -> EmpiricalEpsilon:
    """A measured bound beside the accountant's; the caller asks :meth:`EmpiricalEpsilon.require_consistent`."""
    return EmpiricalEpsilon(
        lower=bound.epsilon,
        upper=upper,
        upper_because=upper_because,
        delta=delta,
        adjacency=adjacency,
        confidence=confidence,
        method=method,
        trials=trials,
        counted=bound.counted,
    )


def require_all_consistent(found: Mapping[str, EmpiricalEpsilon]) -> None:
    """Refuse the first that contradicts.

    Raises:
        ContradictionError: one does; the name stands in front.
    """
    for each in found.values():
        each.require_consistent()
