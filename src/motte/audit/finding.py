"""Figures of an audit: a result at one position, and the finding that holds three of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Literal

from motte.errors import SettingError

Suite = Literal["quick", "full"]
SUITES: Final[tuple[Suite, ...]] = ("quick", "full")
Phase = Literal["inference", "training"]


class Position(StrEnum):
    """Where an attacker stands: sees nothing, what the scheme lets leave, everything."""

    FLOOR = "floor"
    SCHEME = "scheme"
    CEILING = "ceiling"


class Knowledge(StrEnum):
    """What an attacker has. A finding lists all of it."""

    ARCHITECTURE = "architecture"
    """The shape of the model: modules, geometry, sizes."""
    WEIGHTS = "weights"
    """The weights that the scheme makes public: those of the layers that run outside."""
    ALL_WEIGHTS = "all weights"
    """Every weight, also of layers inside."""
    RECORDING = "recording"
    """Every tensor that crossed the link."""
    PUBLIC_DATA = "public data"
    """Data like the private one, none of it private."""
    PIPELINE = "pipeline"
    """Runs the victim's own pipeline on data of its choice, and sees what leaves: more than a host has."""
    QUERIES = "queries"
    """Asks the deployed model for answers to inputs of its choice."""
    LABELS = "labels"
    """Knows the label of each private record."""
    CANDIDATES = "candidates"
    """Has the very records of which it asks whether they were used."""
    ANSWERS = "answers"
    """Is the accelerator, and may answer what it likes."""


# --- figures --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Bracket:
    """One measured result at one position, with its confidence interval (95 % unless a note of the finding says else).

    Raises:
        SettingError: a value that is not finite, or an interval that does not hold the value.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, self.low, self.high))):
            raise SettingError("a measured result must be finite", got=f"{self.value}, {self.low} to {self.high}")
        if not self.low <= self.value <= self.high:
            raise SettingError(
                "a confidence interval must hold its value",
                expected=f"{self.low} to {self.high}",
                got=str(self.value),
            )

    def overlaps(self, other: Bracket) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True)
class Metric:
    """What a bracket measures.

    Args:
        name: ``psnr``, ``tpr at 1 % fpr``; unique within its attack.
        unit: ``dB``, ``share``, ``nat``.
        higher_is_worse: whether a higher value is worse for whoever is attacked.
    """

    name: str
    unit: str
    higher_is_worse: bool = True


@dataclass(frozen=True, slots=True)
class Budget:
    """What an attacker may spend at one position. An attack takes what it uses and says in a note what it spent.

    Args:
        seconds: of wall time; an attack that is out of it stops with the best it has.
        steps: of an optimisation.
        queries: to the deployed model.
        samples: private records that are attacked.
        public_samples: records of its own.
        repeats: restarts, shadow models.
    """

    seconds: float = 60.0
    steps: int = 200
    queries: int = 1000
    samples: int = 16
    public_samples: int = 512
    repeats: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise SettingError("not a number of seconds", where="budget", got=str(self.seconds))
        for name in ("steps", "queries", "samples", "public_samples", "repeats"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise SettingError("a budget is a number above 0", where=name, got=repr(getattr(self, name))[:80])

    def scaled(self, factor: float) -> Budget:
        """Steps, seconds and queries times ``factor``, at least 1 each; samples as they are."""
        if not (math.isfinite(factor) and factor > 0):
            raise SettingError("a budget is scaled by a number above 0", got=str(factor))
        return replace(
            self,
            seconds=self.seconds * factor,
            steps=max(1, round(self.steps * factor)),
            queries=max(1, round(self.queries * factor)),
        )


QUICK: Final = Budget()
FULL: Final = Budget(seconds=900.0, steps=2000, queries=20_000, samples=64, public_samples=8192, repeats=16)
BUDGETS: Final[Mapping[Suite, Budget]] = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One figure of one attack on one scheme, between its floor and its ceiling. Cannot be built without all three.

    Args:
        attack: name of the attack.
        audited: the scheme in words, ``asymmetric, noise none``.
        metric, unit, higher_is_worse: see :class:`Metric`.
        layer: the layer that was looked at; None: all of them, or none in particular.
        scheme, floor, ceiling: the results.
        notes: whole sentences that a reader of the figure must know.
    """

    attack: str
    audited: str
    metric: str
    unit: str
    higher_is_worse: bool
    layer: str | None
    scheme: Bracket
    floor: Bracket
    ceiling: Bracket
    knowledge: tuple[Knowledge, ...]
    budget: Budget
    seed: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("scheme", "floor", "ceiling"):
            if not isinstance(getattr(self, name), Bracket):
                raise SettingError(
                    "a finding needs all three brackets", where=f"{self.attack}, {name}", got=repr(getattr(self, name))
                )
        if not self.knowledge:
            raise SettingError("a finding says what the attacker has", where=self.attack)

    @property
    def powerful(self) -> bool:
        """Whether the attack tells its ceiling from its floor; if not, it says nothing of the scheme."""
        return not self.ceiling.overlaps(self.floor)

    @property
    def position_percent(self) -> float | None:
        """0 = floor, 100 = ceiling, not cut off; None where the attack is not :attr:`powerful`."""
        if not self.powerful:
            return None
        return 100.0 * (self.scheme.value - self.floor.value) / (self.ceiling.value - self.floor.value)

    @property
    def above_floor(self) -> bool:
        """Whether the scheme's interval lies on the ceiling's side of the floor's: something was learnt."""
        if self.ceiling.value >= self.floor.value:
            return self.scheme.low > self.floor.high
        return self.scheme.high < self.floor.low
