"""Figures as data and as matplotlib draws them: nothing twice, legends that follow the data, units on every axis."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from motte.bench.results import Results
from motte.errors import MeasureError
from motte.report.chart import Axis, Chart, NotDrawn, Series, refuse_same_points
from motte.report.charts import charts
from motte.report.gathered import gather
from motte.report.palette import DARK, LIGHT, Theme, contrast
from motte.report.static_figures import draw, save
from motte.report.trace_charts import thinned

TIME, POWER = Axis("Time", "s"), Axis("Power", "W")


def line(name: str = "a", source: str = "s", values: tuple[float, ...] = (1.0, 2.0), place: int = 0) -> Series:
    x = tuple(float(at) for at in range(len(values)))
    return Series(name=name, source=source, kind="line", x=x, y=values, place=place)


def chart(*series: Series, x: Axis = TIME, y: Axis = POWER) -> Chart:
    return Chart(slug="one", title="One", group="Group", x=x, y=y, series=series)


def test_a_series_is_never_drawn_twice() -> None:
    with pytest.raises(MeasureError, match="one series is drawn twice"):
        chart(line("a", "same"), line("b", "same"))
    with pytest.raises(MeasureError, match="two series of one name"):
        chart(line("a", "one"), line("a", "other"))
    samples = tuple(float(value) for value in range(20))
    with pytest.raises(MeasureError, match="one series is drawn twice"):
        refuse_same_points([line("a", "one", samples), line("b", "other", samples)], "where")
    refuse_same_points([line("a", "one", samples), line("b", "other", (*samples[:-1], 7.0))], "where")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (0.0,)}, "lengths"),
        ({"x": (), "y": ()}, "without a figure"),
        ({"y": (1.0, float("nan"))}, "not finite"),
        ({"low": (0.5, 0.5)}, "two ends"),
        ({"low": (1.5, 0.5), "high": (2.0, 3.0)}, "off its value"),
    ],
)
def test_a_series_that_cannot_be_right_is_refused(changed: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        replace(line(), **changed)


def test_axes_and_reasons_are_never_left_out() -> None:
    with pytest.raises(MeasureError, match="in which unit"):
        Axis("Time", "")
    with pytest.raises(MeasureError, match="above zero"):
        chart(line(values=(0.0, 1.0)), y=Axis("Power", "W", log=True))
    with pytest.raises(MeasureError, match="says why"):
        NotDrawn(title="a", group="b", reason=" ")
    with pytest.raises(MeasureError, match="name for a file"):
        replace(chart(line()), slug="../one")


def test_every_figure_is_there_or_says_why(results: Results) -> None:
    found = charts(gather(results))
    slugs = [each.slug for each in found if isinstance(each, Chart)]
    assert len(slugs) == len(set(slugs))
    for slug in (
        "time-native-and-protected", "time-by-parts-resident", "time-by-parts-streamed", "segments", "time-by-enclave",
        "memory-by-enclave", "memory-native-and-protected", "resnet50-b1-torch-frontier", "all-models-cpu-native",
        "all-models-memory-inside", "vgg16-b1-torch-cpu", "vgg16-b1-torch-memory-by-parts-resident-process",
        "vgg16-resident-p4-b1-torch-gramine-sgx-parts", "resnet50-asymmetric-p1-b1-torch-process-rank8-layers",
    ):  # fmt: skip
        assert slug in slugs
    power = [each for each in found if isinstance(each, NotDrawn) and "Power" in each.title]
    assert power
    assert all("no energy counter" in each.reason for each in power)


def test_figures_without_their_data_are_not_drawn(made_up: ModuleType) -> None:
    alone = made_up.results(("alexnet",), modes=("native",), trace_points=0)
    found = charts(gather(alone))
    reasons = {each.title: each.reason for each in found if isinstance(each, NotDrawn)}
    assert reasons["Inference time by kind of enclave"] == "no kind of enclave was measured"
    assert reasons["Memory of each part against the bound"] == "no plan of several parts"
    assert "two schemes" in reasons["alexnet: latency against what is exposed"]
    assert reasons["alexnet: CPU use over time, without and with protection"] == "it was not traced"


def test_figures_show_what_was_measured(results: Results) -> None:
    found = {each.slug: each for each in charts(gather(results)) if isinstance(each, Chart)}
    by_case = {str(each.case): each for each in results.cases}
    parts = found["time-by-parts-resident"]
    one = next(each for each in parts.series if each.name == "vgg16, process")
    assert one.x == (1.0, 4.0)
    assert one.y == tuple(by_case[f"vgg16-resident-p{n}-b1-torch-process"].seconds.median for n in (1, 4))
    frontier = found["vgg16-b1-torch-frontier"]
    outside = next(each for each in frontier.series if each.name == "accelerator only")
    assert outside.x == (100.0,)
    assert outside.y == (by_case["vgg16-accelerator-p1-b1-torch-none"].seconds.median,)
    stack = found["segments"]
    assert stack.categories[0] == "resnet50: native"
    attest = next(each for each in stack.series if each.name == "attest")
    shown = dict(zip(attest.x, attest.y, strict=True))
    assert (
        shown["vgg16: trusted, resident, 4 parts, gramine-sgx"]
        == (by_case["vgg16-resident-p4-b1-torch-gramine-sgx"].segments["attest"])
    )
    memory = found["vgg16-b1-torch-memory"]
    native = next(each for each in memory.series if each.name == "native")
    trace = results.trace(by_case["vgg16-native-p1-b1-torch-none"].case)
    assert native.y == tuple(round((point.rss_bytes or 0) / 2**20, 3) for point in trace)


def test_legends_follow_the_data(results: Results) -> None:
    kinds = (
        "vgg16-b1-torch-cpu",
        "segments",
        "vgg16-resident-p4-b1-torch-gramine-sgx-parts",
        "memory-native-and-protected",
    )
    found = {each.slug: each for each in charts(gather(results)) if isinstance(each, Chart)}
    for one in (found[slug] for slug in kinds):
        figure = draw(one)
        axes, legend = figure.axes[0], figure.legends[0]
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts == [each.name for each in one.series]
        drawn = {each.get_label(): each for each in axes.lines if not each.get_label().startswith("_")}
        bars = {each.get_label(): each for each in axes.containers if each.get_label() in texts}
        assert set(drawn) | set(bars) == set(texts)
        for handle, series in zip(legend.legend_handles, one.series, strict=True):
            if series.kind == "bar":
                patches = bars[series.name].patches
                lengths = [each.get_width() if one.horizontal else each.get_height() for each in patches]
                assert np.allclose(lengths, series.y)
                assert handle.get_facecolor() == patches[0].get_facecolor()
            else:
                line_drawn = drawn[series.name]
                assert tuple(line_drawn.get_ydata()) == series.y
                assert handle.get_color() == line_drawn.get_color()
                assert handle.get_marker() == line_drawn.get_marker()
        shown = [tuple(each.get_ydata()) for each in drawn.values()]
        assert len(shown) == len(set(shown))
        assert axes.get_xlabel() == (one.y if one.horizontal else one.x).title
        assert axes.get_ylabel() == (one.x if one.horizontal else one.y).title
        assert one.y.unit is not None
        assert f"({one.y.unit})" in one.y.title


def test_files_are_written_whole_and_the_same_again(results: Results, tmp_path: Path) -> None:
    one = next(each for each in charts(gather(results)) if isinstance(each, Chart))
    png, svg = save(one, tmp_path)
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
    before = svg.read_bytes()
    assert ET.fromstring(before).tag.endswith("svg")
    assert save(one, tmp_path)[1].read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([png.name, svg.name])


def test_names_are_no_formulas_and_missing_letters_no_error(tmp_path: Path) -> None:
    one = replace(chart(line("$x^2$ 模型 <b>", "1"), line("b", "2", (3.0, 4.0), 1)), title="$\\frac{1}{2}$")
    figure = draw(one)
    assert figure.legends[0].get_texts()[0].get_text() == "$x^2$ 模型 <b>"
    assert save(one, tmp_path)[1].read_text().count("$x^2$ 模型 &lt;b&gt;") >= 1


def test_thinning_keeps_peaks_dips_and_ends() -> None:
    values = list(np.random.default_rng(1).normal(size=5000))
    values[1234], values[4321] = 99.0, -99.0
    kept = thinned(values, 300)
    assert len(kept) <= 300
    assert {0, 1234, 4321, 4999} <= set(kept)
    assert kept == sorted(set(kept))
    assert thinned(values[:300], 300) == list(range(300))


# --- colours -------------------------------------------------------------------------------------------------------
SIGHT = {  # Machado, Oliveira, Fernandes 2009, severity 1
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear.clip(0, 1)
    scaled = xyz / np.array([0.95047, 1.0, 1.08883])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_meets_wcag_aa(theme: Theme) -> None:
    assert contrast("#FFFFFF", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)  # the textbook's just too light grey
    for text in (theme.text, theme.quiet, theme.link, theme.good, theme.bad):
        for ground in (theme.background, theme.surface):
            assert contrast(text, ground) >= 4.5
    for text, ground in (
        (theme.banner_text, theme.banner),
        (theme.trusted_text, theme.trusted),
        (theme.outside_text, theme.outside),
    ):
        assert contrast(text, ground) >= 4.5
    for shape in (*theme.series, theme.line, theme.link):
        assert contrast(shape, theme.background) >= 3


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_differ_for_every_sight(theme: Theme, sight: str) -> None:
    seen = [lab(np.array(SIGHT[sight]) @ linear(colour)) for colour in theme.series]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 15


def test_sixty_four_series_look_different() -> None:
    marks = {(each.colour, each.shape) for each in (line(place=place) for place in range(64))}
    assert len(marks) == 64
