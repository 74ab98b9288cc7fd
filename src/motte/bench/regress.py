"""``--compare OLD NEW``: two runs side by side, and a gate on how much slower the newer one may be.

The two were measured at different times, so their samples are not paired: the ratio is that of the two medians, and its
interval the percentile bootstrap over both series, each resampled by itself. What made the whole machine slower in
between is in it; compare runs of one quiet machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from motte.bench.case import Case, Results
from motte.errors import SettingError
from motte.measure.compare import MIN_REPEATS, Ratio
from motte.measure.gate import Bound, Gate

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 10_000
DEFAULT_BOUND: Final = 1.10


@dataclass(frozen=True)
class Compared:
    """One case of the older run. ``ratio``: NEW over OLD; None: ``why`` says what is missing.

    ``passed``: whether it is within the bound; what is missing never is.
    """

    case: Case
    ratio: Ratio | None
    why: str | None
    passed: bool
    said: str


@dataclass(frozen=True)
class Comparison:
    """``added``: cases that only the newer run has; no bound is on them.

    ``overlapping`` of the ``overlap_of`` cases that have a ratio over their native case in both runs have it with
    intervals that overlap: what made the whole machine slower in between is not in these ratios.
    """

    rows: tuple[Compared, ...]
    added: tuple[Case, ...]
    bound: float
    overlapping: int
    overlap_of: int

    @property
    def passed(self) -> bool:
        """Whether every case of the older run is in the newer one, and within the bound."""
        return all(row.passed for row in self.rows)


def compare_runs(old: Results, new: Results, *, bound: float = DEFAULT_BOUND, seed: int = 0) -> Comparison:
    """Compare every case of ``old`` with the same case of ``new``.

    Args:
        bound: the most that the median of a case may have grown by; 1.10 is ten per cent slower.

    Raises:
        SettingError: a bound that is none, or two runs of different verbs.
    """
    verbs = [run.run.asked.get("verb") for run in (old, new)]
    if verbs[0] != verbs[1]:
        raise SettingError("these runs measured different things", got=f"bench {verbs[0]} and bench {verbs[1]}")
    if not np.isfinite(bound) or bound <= 0:
        raise SettingError("not a bound", where="--bound", expected="such as 1.10", got=repr(bound))
    later = {result.case: result for result in new.cases}
    reasons = _reasons(new)
    ratios: dict[str, Ratio | None] = {}
    missing: dict[str, str] = {}
    for result in old.cases:
        name = str(result.case)
        if result.case not in later:
            ratios[name] = None
            missing[name] = reasons.get(name, "the newer run does not have it")
            continue
        ratios[name] = median_ratio(name, later[result.case].seconds.samples, result.seconds.samples, seed=seed)
        if ratios[name] is None:
            missing[name] = f"fewer than {MIN_REPEATS} samples"
    gate = Gate(tuple(Bound(name, high=bound) for name in ratios))
    rows = tuple(
        Compared(result.case, ratios[str(result.case)], missing.get(str(result.case)), outcome.passed, str(outcome))
        for result, outcome in zip(old.cases, gate.check(ratios, missing=missing), strict=True)
    )
    known = {result.case for result in old.cases}
    pairs = [(result.ratio, later[result.case].ratio) for result in old.cases if result.case in later]
    both = [(before, after) for before, after in pairs if before is not None and after is not None]
    return Comparison(
        rows,
        tuple(case for case in later if case not in known),
        bound,
        overlapping=sum(before.low <= after.high and after.low <= before.high for before, after in both),
        overlap_of=len(both),
    )


def median_ratio(name: str, new: Sequence[float], old: Sequence[float], *, seed: int = 0) -> Ratio | None:
    """Median of ``new`` over median of ``old`` with its bootstrap interval; None for too few samples."""
    if min(len(new), len(old)) < MIN_REPEATS:
        return None
    generator = np.random.default_rng(seed)
    above, below = _medians(np.asarray(new), generator), _medians(np.asarray(old), generator)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(above / below, [tail, 1 - tail])
    middle = float(np.median(new) / np.median(old))
    # With few samples the bootstrap need not reach round the middle by itself.
    return Ratio(name, "the older run", middle, min(float(low), middle), max(float(high), middle), CONFIDENCE)


def _medians(
    samples: np.ndarray[tuple[int], np.dtype[np.float64]], generator: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    drawn = generator.integers(0, samples.size, (RESAMPLES, samples.size))
    medians: np.ndarray[tuple[int], np.dtype[np.float64]] = np.median(samples[drawn], axis=1)
    return medians


def _reasons(results: Results) -> dict[str, str]:
    """Why cases of a run are missing, as far as it says so itself."""
    listed = results.run.asked.get("missing_cases", ())
    return {
        str(each["case"]): str(each["why"])
        for each in listed
        if isinstance(each, dict) and {"case", "why"} <= set(each)
    }
