"""Loss curves: a bounded record of one while a run goes on, and several of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from motte.errors import FormatError

if TYPE_CHECKING:
    from rich.table import Table

MAX_POINTS: Final = 64
_BARS: Final = "▁▂▃▄▅▆▇█"
_ROWS: Final = 12


@dataclass(frozen=True, slots=True)
class Point:
    """Mean training loss of the steps up to and with ``step`` since the point before."""

    step: int
    loss: float


class Curve:
    """At most :data:`MAX_POINTS` means over equally many steps each; a longer run gets coarser ones, never more."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._window = 1
        self._sum, self._count, self._step = 0.0, 0, 0

    def add(self, step: int, loss: float) -> None:
        """The loss of one more step; steps come in order."""
        self._sum, self._count, self._step = self._sum + loss, self._count + 1, step
        if self._count < self._window:
            return
        self._points.append(Point(step, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self._points) == MAX_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [Point(second.step, (first.loss + second.loss) / 2) for first, second in pairs]
            self._window *= 2

    @property
    def points(self) -> tuple[Point, ...]:
        """In order; the last may stand for fewer steps than the others."""
        rest = [Point(self._step, self._sum / self._count)] if self._count else []
        return (*self._points, *rest)


def points_of(document: Mapping[str, Any]) -> tuple[Point, ...]:
    """The curve in the JSON document of ``motte train --json``; empty where it was not told.

    Raises:
        FormatError: not such a document.
    """
    try:
        return tuple(Point(int(each["step"]), float(each["loss"])) for each in document.get("curve", ()))
    except (TypeError, KeyError, ValueError) as problem:
        raise FormatError("not a curve of motte train", where="curve", got=str(problem)[:200]) from problem


def sparkline(losses: Sequence[float], *, low: float, high: float) -> str:
    """One character a loss: the higher the bar, the larger the loss between ``low`` and ``high``."""
    width = high - low
    levels = [0 if width <= 0 else round((loss - low) / width * (len(_BARS) - 1)) for loss in losses]
    return "".join(_BARS[min(max(level, 0), len(_BARS) - 1)] for level in levels)


def difference(first: Sequence[Point], second: Sequence[Point]) -> float:
    """The largest absolute difference of two curves at the steps that both have; NaN where they share none."""
    other = {point.step: point.loss for point in second}
    shared = [abs(point.loss - other[point.step]) for point in first if point.step in other]
    return max(shared, default=math.nan)


def curves_table(runs: Mapping[str, Sequence[Point]], *, rows: int = _ROWS) -> Table:
    """The curves of several runs side by side: a column a run, at most ``rows`` steps, the shapes at the foot.

    Every curve's shape is drawn to one scale, that of all runs together.
    """
    from rich.table import Table
    from rich.text import Text

    steps = sorted({point.step for points in runs.values() for point in points})
    chosen = _spread(steps, rows)
    table = Table(title="training loss", title_justify="left", show_footer=True)
    table.add_column("step", justify="right", footer="shape")
    losses = [point.loss for points in runs.values() for point in points]
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    for name, points in runs.items():
        shape = sparkline([point.loss for point in points], low=low, high=high)
        table.add_column(Text(name), justify="right", footer=shape)
    found = [{point.step: point.loss for point in points} for points in runs.values()]
    for step in chosen:
        table.add_row(str(step), *(f"{each[step]:.4f}" if step in each else "" for each in found))
    return table


def _spread(steps: Sequence[int], count: int) -> list[int]:
    if len(steps) <= count:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]
