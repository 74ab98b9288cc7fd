"""A figure as data, before anything draws it. The same description is drawn twice: by matplotlib and on the page.

What was wrong with a plot that others published is refused here: one series drawn twice, a legend that does not follow
the data (a name belongs to its series and to nothing else), an axis without a unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from motte.errors import MeasureError
from motte.report import words
from motte.report.palette import LIGHT, MARKERS

Kind = Literal["line", "bar", "point"]
Bars = Literal["side by side", "stacked"]
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,299}")
_NOT_UNITS: Final = ("", "?")
_MANY: Final = 16
Value = float | str


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis. ``unit``: ``s``, ``%``, ``B``, ``W``, ``1`` for a ratio; None: the axis bears words or whole counts."""

    label: str
    unit: str | None
    log: bool = False

    def __post_init__(self) -> None:
        if not self.label.strip() or self.unit in _NOT_UNITS:
            raise MeasureError("an axis says what it shows, and in which unit", got=f"{self.label!r} in {self.unit!r}")

    @property
    def title(self) -> str:
        """``Latency (s)``."""
        return self.label if self.unit in (None, "1") else f"{self.label} ({self.unit})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One series of a figure.

    ``name``: as the legend has it. ``source``: what the figures are, such as ``CASE:cpu_percent``. ``x``: numbers, or
    categories. ``low``, ``high``: the ends of the error bars, absolute, in the unit of y. ``texts``: shown with the
    points. ``place``: among all series that could be there; colour and shape follow from it. ``dashed``: a line that is
    a bound and no measurement.

    Raises:
        MeasureError: nothing to draw, lengths that differ, a figure that is not finite, error bars off their value.
    """

    name: str
    source: str
    kind: Kind
    x: tuple[Value, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
    place: int = 0
    dashed: bool = False

    def __post_init__(self) -> None:
        if not self.x:
            raise MeasureError("a series without a figure is not drawn", where=self.name)
        for other in (self.y, *(each for each in (self.low, self.high, self.texts) if each)):
            if len(other) != len(self.x):
                raise MeasureError("lengths of a series differ", where=self.name, got=f"{len(self.x)}, {len(other)}")
        if bool(self.low) != bool(self.high):
            raise MeasureError("an error bar has two ends", where=self.name)
        for value in (*self.x, *self.y, *self.low, *self.high):
            if not isinstance(value, str) and not math.isfinite(value):
                raise MeasureError("a figure that is not finite cannot be drawn", where=self.name, got=repr(value))
        for low, middle, high in zip(self.low, self.y, self.high, strict=False):
            if not low <= middle <= high:
                raise MeasureError("an error bar off its value", where=self.name, got=f"{low}, {middle}, {high}")

    @property
    def colour(self) -> int:
        """Place in the palette."""
        return self.place % len(LIGHT.series)

    @property
    def shape(self) -> int:
        """Place among the shapes of points. With the colour it tells 64 series apart: the shapes shift every round."""
        return (self.place + self.place // len(LIGHT.series)) % len(MARKERS)

    @property
    def points(self) -> tuple[object, ...]:
        """All that is drawn, to compare two series."""
        return (self.kind, self.x, self.y, self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure. The legend has the order of ``series``.

    ``slug``: name of its files. ``group``: heading under which it stands. ``horizontal``: x runs upwards and y to the
    right, for long categories. ``note``: what a reader has to know to read it. ``order``: of the categories, where it
    is not that in which the series name them.

    Raises:
        MeasureError: no series, a series or name twice, a slug that is no file name, no positive value on a log axis.
    """

    slug: str
    title: str
    group: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bars: Bars = "side by side"
    horizontal: bool = False
    note: str = ""
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.slug):
            raise MeasureError("not a name for a file", where="chart", got=repr(self.slug)[:80])
        if not self.series:
            raise MeasureError("a figure without a series is not drawn", where=self.slug)
        _refuse_repeated([each.source for each in self.series], "one series is drawn twice", self.slug)
        _refuse_repeated([each.name for each in self.series], "two series of one name", self.slug)
        for axis, name in ((self.x, "x"), (self.y, "y")):
            if axis.log and any(value <= 0 for each in self.series for value in getattr(each, name) if value != ""):
                raise MeasureError("a logarithmic axis shows values above zero", where=f"{self.slug}, {name}")

    @property
    def categories(self) -> tuple[str, ...]:
        """Words on the x axis, in order; empty where x is a number."""
        found = dict.fromkeys(value for each in self.series for value in each.x if isinstance(value, str))
        return tuple(dict.fromkeys([*(name for name in self.order if name in found), *found]))

    @property
    def side_by_side(self) -> bool:
        """Whether points of one category stand beside each other, so that none hides another."""
        return bool(self.categories) and all(each.kind == "point" for each in self.series)

    def describe(self) -> str:
        """The figure in words, for who cannot see it."""
        kinds = {"line": "Line chart", "bar": "Bar chart", "point": "Chart of points"}
        shown = [_describe_series(each, self.y) for each in self.series[:12]]
        if len(self.series) > 12:
            shown.append(f"and {len(self.series) - 12} more series")
        across = self.x.title if self.x.unit not in (None, "1") else self.x.label
        return f"{kinds[self.series[0].kind]} of {self.y.title} by {across}. {'; '.join(shown)}."


@dataclass(frozen=True, slots=True, kw_only=True)
class NotDrawn:
    """A figure for which the data are missing, and why."""

    title: str
    group: str
    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise MeasureError("a figure that is not drawn says why", where=self.title)


def _describe_series(series: Series, axis: Axis) -> str:
    low, high = words.span(series.y)
    if low == high:
        return f"{series.name}: {amount(low, axis.unit)}"
    return f"{series.name}: {amount(low, axis.unit)} to {amount(high, axis.unit)}"


def amount(value: float, unit: str | None) -> str:
    """A figure with its unit as people write it."""
    if unit == "s":
        return words.seconds(value)
    if unit == "B":
        return words.bytes_(value)
    return words.digits(value) + ("" if unit in (None, "1") else f" {unit}")


def _refuse_repeated(keys: Sequence[str], message: str, where: str) -> None:
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise MeasureError(message, where=where, got=key)


def refuse_same_points(series: Sequence[Series], where: str) -> None:
    """For measured samples: two measurements never agree in every one of many, one array under two names does.

    Raises:
        MeasureError: two series of at least 16 different points are the same.
    """
    seen: dict[tuple[object, ...], str] = {}
    for each in series:
        if len(each.y) >= _MANY and each.points in seen and len(set(each.y)) > 1:
            raise MeasureError("one series is drawn twice", where=where, got=f"{seen[each.points]} and {each.name}")
        seen[each.points] = each.name
