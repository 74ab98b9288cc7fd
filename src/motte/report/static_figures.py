"""Figures as files, PNG and SVG, by matplotlib. No window, no global state; the same data give the same SVG."""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from motte.errors import ResourceError
from motte.report import words
from motte.report.chart import Chart, Series
from motte.report.palette import LIGHT
from motte.seal.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS: Final = "osDPX^v*"
_MARKS_A_LINE: Final = 8
_LEGEND_LETTERS: Final = 120
"""Letters of a legend that fit side by side below a figure."""
_WIDTH_IN, _HEIGHT_IN, _DPI = 9.0, 4.8, 110
_BAR_IN = 0.34
_STYLE: Final[dict[str, Any]] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # a name with two dollar signs is a name, not a formula
    "svg.fonttype": "none",
    "svg.hashsalt": "motte",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT.grid,
    "axes.edgecolor": LIGHT.line,
    "axes.labelcolor": LIGHT.text,
    "text.color": LIGHT.text,
    "xtick.color": LIGHT.text,
    "ytick.color": LIGHT.text,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titley": 1.02,  # a fixed place: looking for one costs as much as drawing the axes
    "path.simplify": True,
}


def save(chart: Chart, folder: Path) -> tuple[Path, Path]:
    """Draw ``chart`` into ``folder`` as ``SLUG.png`` and ``SLUG.svg``, each whole or not at all.

    Raises:
        ResourceError: matplotlib is not installed, or the folder cannot be written to.
    """
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the page shows it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure = draw(chart)
        # Laid out at most once, each format drawn by its own canvas: savefig would lay out and draw all four times.
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine("none")
        png, svg = io.BytesIO(), io.BytesIO()
        raster: Any = FigureCanvasAgg(figure)
        raster.print_png(png, metadata={"Software": None}, pil_kwargs={"compress_level": 6})
        vector: Any = FigureCanvasSVG(figure)
        vector.print_svg(svg, metadata={"Date": None, "Title": words.visible(chart.title)})
    paths = folder / f"{chart.slug}.png", folder / f"{chart.slug}.svg"
    for path, data in zip(paths, (png, svg), strict=True):
        _write(path, data.getbuffer())
    return paths


def draw(chart: Chart) -> Figure:
    """``chart`` as a figure of matplotlib, its canvas Agg.

    Raises:
        ResourceError: matplotlib is not installed.
    """
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(chart.categories) if chart.horizontal else 0
    height = max(2.6, min(40.0, 1.5 + rows * _BAR_IN)) if rows else _HEIGHT_IN
    figure = Figure(figsize=(_WIDTH_IN, height), dpi=_DPI, layout="constrained" if chart.categories else None)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(words.visible(chart.title), loc="left", fontsize=11, fontweight="bold")
    _label_axes(axes, chart)
    _draw_bars(axes, chart)
    for series in chart.series:
        if series.kind != "bar":
            _draw_one(axes, chart, series)
    _label_categories(axes, chart)
    if chart.categories:
        if len(chart.series) > 1:
            _legend(figure, axes, chart)
    else:
        _place_by_hand(figure, axes, chart)
    return figure


def _label_axes(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    across, up = (chart.y, chart.x) if chart.horizontal else (chart.x, chart.y)
    axes.set_xlabel(across.title)
    axes.set_ylabel(up.title)
    for axis, described in ((axes.xaxis, across), (axes.yaxis, up)):
        if described.log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())


def _places(chart: Chart, series: Series) -> list[float]:
    known = {name: index for index, name in enumerate(chart.categories)}
    return [float(known[value]) if isinstance(value, str) else float(value) for value in series.x]


def _draw_bars(axes: Axes, chart: Chart) -> None:
    bars = [each for each in chart.series if each.kind == "bar"]
    stacked = chart.bars == "stacked"
    width = 0.74 if stacked else 0.8 / max(1, len(bars))
    base: dict[float, float] = {}
    for index, series in enumerate(bars):
        middle = _places(chart, series)
        places = middle if stacked else [at + (index - (len(bars) - 1) / 2) * width for at in middle]
        starts = [base.get(at, 0.0) if stacked else 0.0 for at in middle]
        bar: Any = axes.barh if chart.horizontal else axes.bar
        start_name = "left" if chart.horizontal else "bottom"
        bar(places, series.y, width, label=series.name, color=_colour(series), **{start_name: starts})
        if series.low:
            _error_bars(axes, chart, series, places)
        for at, start, value in zip(middle, starts, series.y, strict=True):
            base[at] = start + value


def _error_bars(axes: Axes, chart: Chart, series: Series, places: list[float]) -> None:
    below = [value - low for value, low in zip(series.y, series.low, strict=True)]
    above = [high - value for value, high in zip(series.y, series.high, strict=True)]
    ends = [below, above]
    style: dict[str, Any] = {"fmt": "none", "ecolor": LIGHT.text, "elinewidth": 1, "capsize": 3, "label": "_nolegend_"}
    if chart.horizontal:
        axes.errorbar(series.y, places, xerr=ends, **style)
    else:
        axes.errorbar(places, series.y, yerr=ends, **style)


def _draw_one(axes: Axes, chart: Chart, series: Series) -> None:
    places, values = _places(chart, series), list(series.y)
    if chart.side_by_side:
        step = 0.7 / len(chart.series)
        places = [at + (chart.series.index(series) - (len(chart.series) - 1) / 2) * step for at in places]
    across, up = (values, places) if chart.horizontal else (places, values)
    line = series.kind == "line"
    axes.plot(
        across,
        up,
        label=series.name,
        color=_colour(series),
        linestyle="none" if not line else "--" if series.dashed else "-",
        marker="" if series.dashed else _MARKERS[series.shape],
        markevery=max(1, len(values) // _MARKS_A_LINE) if line else 1,
        markersize=5 if line else 7,
        linewidth=1.4,
    )
    if series.low:
        _error_bars(axes, chart, series, places)


def _label_categories(axes: Axes, chart: Chart) -> None:
    names = [words.visible(name) for name in chart.categories]
    if not names:
        if not chart.y.log:
            axes.set_ylim(bottom=0)
        return
    if chart.horizontal:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first one on top, as in the table
        axes.grid(visible=False, axis="y")
        if not chart.y.log:
            axes.set_xlim(left=0)
        return
    long = max(map(len, names)) * len(names) > 90
    axes.set_xticks(range(len(names)), names, rotation=35 if long else 0, ha="right" if long else "center")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(visible=False, axis="x")
    if not chart.y.log:
        axes.set_ylim(bottom=0)


def _place_by_hand(figure: Figure, axes: Axes, chart: Chart) -> None:
    # Where both axes bear numbers all sizes are known, and finding a layout would take a third of the drawing.
    names = [each.name for each in chart.series]
    columns = max(1, min(len(names), _LEGEND_LETTERS // (max(map(len, names)) + 6)))
    rows = math.ceil(len(names) / columns) if len(names) > 1 else 0
    figure.subplots_adjust(left=0.09, right=0.98, top=0.92, bottom=(0.55 + 0.21 * rows) / _HEIGHT_IN)
    if rows:
        _legend(figure, axes, chart, loc="lower center", columns=columns)


def _legend(figure: Figure, axes: Axes, chart: Chart, *, loc: Any = None, columns: int = 1) -> None:
    # By name, not by what matplotlib lists first: it puts lines before bars, whatever their order was.
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [each.name for each in chart.series]
    if loc is None:
        below = max(map(len, names)) * len(names) < 100
        loc, columns = ("outside lower center", len(names)) if below else ("outside right upper", 1)
    figure.legend(
        [handles[name] for name in names],
        [words.visible(name) for name in names],
        loc=loc,
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def _colour(series: Series) -> str:
    return LIGHT.series[series.colour]


def _write(path: Path, data: memoryview) -> None:
    with atomic_file(path, overwrite=True) as fd:
        while data:
            data = data[os.write(fd, data) :]


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as problem:
        raise ResourceError(
            "figures need matplotlib", got=str(problem), hint="pip install 'motte[report]', or --no-figures"
        ) from problem
    return matplotlib
