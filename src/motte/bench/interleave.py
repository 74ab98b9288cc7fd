"""All cases of one model and batch in turn, round by round, so that what slows a whole round slows every case.

A case that fails in the middle is taken out, with its reason, and the rest is measured again without it: figures of
rounds in which another case died are nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from motte.bench.case import Case
from motte.bench.request import Refused
from motte.errors import MotteError
from motte.measure.compare import Ratio, Series, compare


class Progress(Protocol):
    """Told of what is done and of what is left."""

    def say(self, text: str) -> None:
        """What happens now."""
        ...

    def expect(self, more: int) -> None:
        """So many more steps are to come than was known."""
        ...

    def advance(self, steps: int) -> None:
        """So many steps are done."""
        ...


class Silent:
    """A :class:`Progress` that says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def expect(self, more: int) -> None:
        """Nothing."""

    def advance(self, steps: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Measured:
    """What one case's rounds gave; ``ratio`` is None for the baseline, and where there is none."""

    seconds: Series
    ratio: Ratio | None


@dataclass(frozen=True)
class Rounds:
    """All that were measured, and those that failed on the way."""

    measured: Mapping[Case, Measured]
    failed: tuple[Refused, ...]


class _Failed(Exception):
    def __init__(self, case: Case, problem: MotteError) -> None:
        super().__init__(str(case))
        self.case = case
        self.problem = problem


def interleave(
    candidates: Mapping[Case, Callable[[], object]], *, baseline: Case | None, warmup: int, repeats: int, seed: int,
    reported: bool = False, on_round: Callable[[int], None] | None = None,
) -> Rounds:  # fmt: skip
    """Measure ``candidates``, each once a round, in an order that is drawn anew for each round.

    Args:
        baseline: what ratios are over; None: there are no ratios.
        reported: the callables return their own seconds instead of being timed.
        on_round: told the number of each counted round.

    Raises:
        SettingError: fewer repeats than give an interval.
    """
    left = dict(candidates)
    failed: list[Refused] = []
    while left:
        try:
            return Rounds(_measure(left, baseline, warmup, repeats, seed, reported, on_round), tuple(failed))
        except _Failed as found:
            del left[found.case]
            failed.append(Refused(found.case, str(found.problem), failed=True))
    return Rounds({}, tuple(failed))


def _measure(
    candidates: Mapping[Case, Callable[[], object]], baseline: Case | None, warmup: int, repeats: int, seed: int,
    reported: bool, on_round: Callable[[int], None] | None,
) -> dict[Case, Measured]:  # fmt: skip
    named = {str(case): _guarded(case, call) for case, call in candidates.items()}
    if len(named) == 1:
        return {case: _alone(str(case), named[str(case)], warmup, repeats, reported, on_round) for case in candidates}
    compared = baseline in candidates
    found = compare(
        named, baseline=str(baseline) if compared else None, warmup=warmup, repeats=repeats, seed=seed,
        on_round=on_round, timing="reported" if reported else "here",
    )  # fmt: skip
    ratios = {each.name: each for each in found.ratios} if compared else {}
    return {case: Measured(found[str(case)], ratios.get(str(case))) for case in candidates}


def _alone(
    name: str, call: Callable[[], object], warmup: int, repeats: int, reported: bool,
    on_round: Callable[[int], None] | None,
) -> Measured:  # fmt: skip
    """One case and nothing to compare it with."""
    samples: list[float] = []
    for index in range(warmup + repeats):
        began = time.perf_counter_ns()
        told = call()
        took = (time.perf_counter_ns() - began) / 1e9
        if index >= warmup:
            samples.append(float(told) if reported and isinstance(told, int | float) else took)
            if on_round is not None:
                on_round(index - warmup + 1)
    return Measured(Series(name, tuple(samples)), None)


def join(first: Measured, more: Measured) -> Measured:
    """One case that ran in two groups: all its samples."""
    return Measured(Series(first.seconds.name, (*first.seconds.samples, *more.seconds.samples)), None)


def _guarded(case: Case, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        try:
            return call()
        except MotteError as problem:
            raise _Failed(case, problem) from problem

    return run
