"""Figures for the page: the same charts as descriptions for plotly, with every array stored once.

Colours and arrays stand as ``{"series": 3}``, ``{"theme": "text"}`` and ``{"array": 17}``; the page's script puts the
colour of the theme in force, or the array, in their place.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Final

from motte.report import words
from motte.report.chart import Axis, Chart, Series, Value
from motte.report.palette import MARKERS

_HEIGHT_PX, _BAR_PX = 400, 30
_MARKS_A_LINE: Final = 8


class Arrays:
    """Arrays by number; one that several figures share is there once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Value, ...], int] = {}

    def __call__(self, values: Sequence[Value]) -> dict[str, int]:
        """A reference to ``values``."""
        key = tuple(values)
        return {"array": self._known.setdefault(key, len(self._known))}

    def stored(self) -> list[list[Value]]:
        """All of them, by number."""
        return [list(each) for each in self._known]


def figure(chart: Chart, arrays: Arrays) -> dict[str, Any]:
    """``chart`` as ``data`` and ``layout`` of plotly, its series in their order."""
    traces = [_trace(chart, each, arrays) for each in chart.series]
    across, up = _axis(chart.x), _axis(chart.y)
    if chart.categories:
        names = [_plain(name) for name in chart.categories]
        across |= {"type": "category", "categoryorder": "array", "categoryarray": names, "showgrid": False}
    if not chart.y.log:
        up["rangemode"] = "tozero"
    if chart.horizontal:
        across["autorange"] = "reversed"  # the first one on top, as in the table
        del across["title"]  # the words say themselves what they are, and leave no room
    names_height = 22 * len(chart.series) if len(chart.series) > 1 else 0
    layout = {
        "xaxis": up if chart.horizontal else across,
        "yaxis": across if chart.horizontal else up,
        "barmode": "stack" if chart.bars == "stacked" else "group",
        "height": (130 + names_height + _BAR_PX * len(chart.categories)) if chart.horizontal else _HEIGHT_PX,
        "showlegend": len(chart.series) > 1,
    }
    if chart.side_by_side:
        layout["scattermode"] = "group"
    return {"data": traces, "layout": layout}


def _trace(chart: Chart, series: Series, arrays: Arrays) -> dict[str, Any]:
    across = arrays([_plain(value) if isinstance(value, str) else value for value in series.x])
    up = arrays(series.y)
    colour = {"series": series.colour}
    trace: dict[str, Any] = {
        "name": _plain(series.name),
        "x": up if chart.horizontal else across,
        "y": across if chart.horizontal else up,
        "marker": {"color": colour},
        "hovertemplate": _hover(chart, series),
    }
    if series.kind == "bar":
        trace |= {"type": "bar", "orientation": "h" if chart.horizontal else "v"}
    else:
        point = series.kind == "point"
        trace |= {"type": "scatter", "mode": "markers" if point else "lines" if series.dashed else "lines+markers"}
        trace["marker"] |= {"symbol": MARKERS[series.shape], "size": 10 if point else 8}
        if not point:
            trace["line"] = {"color": colour, "dash": "dash" if series.dashed else "solid", "width": 1.6}
            trace["marker"]["maxdisplayed"] = 0 if len(series.x) <= 30 else _MARKS_A_LINE
    if series.texts:
        trace["text"] = arrays([_plain(text) for text in series.texts])
    if series.low:
        ends = {"type": "data", "symmetric": False, "color": {"theme": "quiet"}, "thickness": 1.2}
        ends["array"] = arrays([high - value for value, high in zip(series.y, series.high, strict=True)])
        ends["arrayminus"] = arrays([value - low for value, low in zip(series.y, series.low, strict=True)])
        trace["error_x" if chart.horizontal else "error_y"] = ends
    return trace


def _hover(chart: Chart, series: Series) -> str:
    across, up = ("y", "x") if chart.horizontal else ("x", "y")
    lines = [f"<b>{_template(series.name)}</b>"]
    shown = f"%{{{across}}}" if chart.categories else f"%{{{across}:.4~g}}"
    lines.append(f"{_template(chart.x.label)}: {shown}{_unit(chart.x)}")
    lines.append(f"{_template(chart.y.label)}: %{{{up}:.4~g}}{_unit(chart.y)}")
    if series.texts:
        lines.append("in: %{text}")
    return "<br>".join(lines) + "<extra></extra>"


def _axis(axis: Axis) -> dict[str, Any]:
    found: dict[str, Any] = {"title": {"text": _plain(axis.title)}, "automargin": True}
    if axis.log:
        # 1, 2 and 5 of every decade; a tick a decade would leave an axis of less than one without any.
        found |= {"type": "log", "dtick": "D2", "tickformat": ".3~g"}
    return found


def _unit(axis: Axis) -> str:
    return "" if axis.unit in (None, "1") else f" {_plain(axis.unit or '')}"


def _plain(text: str) -> str:
    """Plotly reads a little HTML, links included, in every text: this one is shown as it is."""
    return html.escape(words.visible(text), quote=False)


def _template(text: str) -> str:
    # A template replaces %{...}; a name that holds one must not be replaced.
    return _plain(text).replace("%{", "%&#123;")
