"""Gates: named bounds on figures. Missing data fails a gate and never passes it; so does a gate with nothing to check.

>>> gate = Gate((Bound("streamed is at most 1.5 times resident", high=1.5),))
>>> gate.require({"streamed is at most 1.5 times resident": 1.2})[0].passed
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from motte.errors import GateError, SettingError
from motte.measure.compare import Ratio

Judged = Literal["median", "whole", "any"]
"""What of a ratio's interval has to lie within the bound: its median; all of it, so that the bound is shown to hold; or
any of it, so that the bound fails only when it is shown to be broken."""
JUDGED: Final[tuple[str, ...]] = get_args(Judged)


@dataclass(frozen=True)
class Bound:
    """What a figure has to lie within, both ends included. ``name`` names the figure and is what a failure prints.

    Raises:
        SettingError: no name, no end, an end that is not finite, or ends in the wrong order.
    """

    name: str
    low: float | None = None
    high: float | None = None
    judged: Judged = "median"

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.high) if end is not None]
        if not self.name.strip() or not ends:
            raise SettingError("a bound needs a name and an end", where=self.name)
        if not all(map(math.isfinite, ends)) or ends != sorted(ends):
            raise SettingError("not a bound", where=self.name, got=str(self))
        if self.judged not in JUDGED:
            raise SettingError("unknown value", where=self.name, expected=" or ".join(JUDGED), got=self.judged)

    def __str__(self) -> str:
        return " and ".join(
            f"{word} {end:g}" for word, end in (("at least", self.low), ("at most", self.high)) if end is not None
        )

    def check(self, figure: object, *, why_missing: str | None = None) -> Outcome:
        """Compare ``figure``, a number or a :class:`~motte.measure.compare.Ratio`.

        None, NaN, an infinity, a bool and everything else that is no number fails.
        """
        if isinstance(figure, Ratio):
            return self._ratio(figure)
        if isinstance(figure, bool) or not isinstance(figure, int | float) or not math.isfinite(figure):
            said = "no figure" if figure is None else f"not a figure: {figure!r}"
            return Outcome(self, False, said if why_missing is None else f"{said}: {why_missing}")
        if self.judged != "median":
            return Outcome(self, False, f"{figure:g} without an interval, of which {self.judged} is judged")
        return Outcome(self, self._holds(figure, figure), f"{figure:g}")

    def _ratio(self, ratio: Ratio) -> Outcome:
        numbers = (ratio.low, ratio.median, ratio.high)
        if not all(map(math.isfinite, numbers)) or list(numbers) != sorted(numbers):
            return Outcome(self, False, f"not a figure: {ratio}")
        said = f"{ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g}) of {ratio.name} over {ratio.baseline}"
        match self.judged:
            case "median":
                return Outcome(self, self._holds(ratio.median, ratio.median), said)
            case "whole":
                return Outcome(self, self._holds(ratio.low, ratio.high), said)
            case _:
                return Outcome(self, self._holds(ratio.high, ratio.low), said)

    def _holds(self, least: float, most: float) -> bool:
        """Whether ``least`` is above the lower end and ``most`` below the upper one."""
        return (self.low is None or least >= self.low) and (self.high is None or most <= self.high)


@dataclass(frozen=True)
class Outcome:
    """What became of one bound; ``got`` is the figure as text, or why there is none."""

    bound: Bound
    passed: bool
    got: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}: {self.bound.name}: {self.got}, expected {self.bound}"


@dataclass(frozen=True)
class Gate:
    """Bounds that all have to hold.

    Raises:
        SettingError: there are none, which would be a gate that cannot fail, or two have one name.
    """

    bounds: tuple[Bound, ...]

    def __post_init__(self) -> None:
        names = [bound.name for bound in self.bounds]
        if not names or len(set(names)) != len(names):
            raise SettingError("a gate needs bounds of different names", got=", ".join(names) or "none")

    def check(
        self, figures: Mapping[str, Ratio | float | None], *, missing: Mapping[str, str] | None = None
    ) -> tuple[Outcome, ...]:
        """Every bound against the figure of its name; one that is absent fails, ``missing`` may say why it is.

        Raises:
            SettingError: a figure that no bound is named after, which may be a misspelt one.
        """
        known = {bound.name for bound in self.bounds}
        if strangers := sorted(set(figures) - known):
            raise SettingError("no bound has this name", got=", ".join(strangers), expected=", ".join(sorted(known)))
        reasons = missing or {}
        return tuple(b.check(figures.get(b.name), why_missing=reasons.get(b.name)) for b in self.bounds)

    def require(
        self, figures: Mapping[str, Ratio | float | None], *, missing: Mapping[str, str] | None = None
    ) -> tuple[Outcome, ...]:
        """As :meth:`check`.

        Raises:
            GateError: a bound does not hold or has no figure; names every such one. SettingError: as :meth:`check`.
        """
        outcomes = self.check(figures, missing=missing)
        if failed := [outcome for outcome in outcomes if not outcome.passed]:
            raise GateError(
                f"{len(failed)} of {len(outcomes)} bounds do not hold",
                where="; ".join(outcome.bound.name for outcome in failed),
                expected="; ".join(str(outcome.bound) for outcome in failed),
                got="; ".join(outcome.got for outcome in failed),
            )
        return outcomes
