"""What leaves and what that buys: per-layer times of an asymmetric step, and latency against what is exposed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from motte.bench.results import Case, LayerTime
from motte.report.chart import Axis, Chart, NotDrawn, Series
from motte.report.gathered import Gathered, Slice

GROUP = "What leaves, and what it buys"
_LAYER_NOTE = (
    "Bars add up to the layer's time on the trusted side. The points are what the accelerator says that it computed, "
    "unverified and within the wait."
)


def layers(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Where the time of each split layer goes, in the order in which the layers ran, for each asymmetric case."""
    by_case: dict[Case, list[LayerTime]] = {}
    for row in data.results.layers:
        by_case.setdefault(row.case, []).append(row)
    if not by_case:
        yield NotDrawn(title="Time of each layer of an asymmetric step", group=GROUP, reason="no layer ran split")
    for case, rows in by_case.items():
        both = len({row.direction for row in rows}) > 1
        names = tuple(f"{row.layer} ({row.direction})" if both else row.layer for row in rows)
        pieces = (
            ("trusted arithmetic", [row.trusted_s for row in rows]),
            ("transfer", [row.transfer_s for row in rows]),
            ("wait", [row.wait_s for row in rows]),
        )
        series = [
            Series(name=name, source=f"{case}:{name}", kind="bar", x=names, y=tuple(values), place=place)
            for place, (name, values) in enumerate(pieces)
        ]
        told = tuple(row.accelerator_s for row in rows)
        series.append(
            Series(
                name="accelerator's own account", source=f"{case}:accelerator", kind="point", x=names, y=told,
                place=4,
            )
        )  # fmt: skip
        yield Chart(
            slug=f"{case}-layers", title=f"{case.model}: time of each layer of an asymmetric step ({data.way(case)})",
            group=GROUP, x=Axis("Layer", None), y=Axis("Time", "s"), series=tuple(series), bars="stacked",
            horizontal=True, note=_LAYER_NOTE,
        )  # fmt: skip


def frontier(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Latency against the share of the activations' energy that left: one point a scheme, a figure a model."""
    for one in data.slices:
        yield _frontier(data, one)


def _frontier(data: Gathered, one: Slice) -> Chart | NotDrawn:
    title = f"{one.title}: latency against what is exposed"
    found = [(each, each.exposed) for each in one.chosen()]
    known = [(each, share) for each, share in found if share is not None]
    reasons = Counter(each.missing["exposed"] for each, share in found if share is None)
    why = "; ".join(reason for reason, _ in reasons.most_common(3))
    if len({share for _, share in known}) < 2:
        reason = "it needs two schemes that expose different shares"
        return NotDrawn(title=title, group=GROUP, reason=f"{reason} ({why})" if why else reason)
    series = tuple(
        Series(
            name=data.way(each.case), source=f"{each.case}:exposed", kind="point", x=(round(100 * share, 4),),
            y=(each.seconds.median,), place=place,
        )
        for place, (each, share) in enumerate(known)
    )  # fmt: skip
    absent = [data.way(each.case) for each, share in found if share is None]
    note = "Lower and further to the left is better."
    if absent:
        note += f" Not in it: {', '.join(absent)} ({why})."
    return Chart(
        slug=f"{one.slug}-frontier", title=title, group=GROUP,
        x=Axis("Share of the activations' energy that left", "%"), y=Axis("Median latency", "s"),
        series=series, note=note,
    )  # fmt: skip
