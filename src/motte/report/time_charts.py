"""Latency: by number of parts with its spread, native against protected, by kind of enclave, and the segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from motte.bench.results import SEGMENTS, Case, CaseResult
from motte.limits import MIB
from motte.report import words
from motte.report.chart import Axis, Chart, NotDrawn, Series
from motte.report.gathered import TRUSTED, Gathered

GROUP = "Time"
_SPREAD = "Points are medians; bars reach from the lower to the upper quartile of the samples."


def by_parts(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Latency by number of parts, a series a model, for each trusted mode."""
    for mode in TRUSTED:
        title = f"Inference time by number of parts, {mode}"
        series: list[Series] = []
        for one in data.slices:
            for enclave in data.enclaves:
                members = [each for each in one.results if (each.case.mode, each.case.enclave) == (mode, enclave)]
                if len(members) > 1:
                    name = one.title + (f", {enclave}" if len(data.enclaves) > 1 else "")
                    series.append(_line(name, f"{one.slug}:{mode}:{enclave}:seconds", members, len(series)))
        if series:
            axes = Axis("Parts", None), Axis("Inference time", "s", log=len(series) > 1)
            yield Chart(
                slug=f"time-by-parts-{mode}", title=title, group=GROUP, x=axes[0], y=axes[1],
                series=tuple(series), note=_SPREAD,
            )  # fmt: skip
        else:
            yield NotDrawn(title=title, group=GROUP, reason=f"no model was measured in two numbers of parts, {mode}")


def _line(name: str, source: str, members: Sequence[CaseResult], place: int) -> Series:
    low, middle, high = quartiles(members)
    return Series(
        name=name, source=source, kind="line", x=tuple(float(each.case.parts) for each in members),
        y=middle, low=low, high=high, place=place,
    )  # fmt: skip


def quartiles(members: Sequence[CaseResult]) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Lower quartile, median and upper quartile of the latencies of each case, in seconds."""
    found = [np.percentile(each.seconds.samples, [25, 50, 75]) for each in members]
    low, middle, high = (tuple(float(each[place]) for each in found) for place in range(3))
    return low, middle, high


def native_against_inside(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Latency of every model, native and in every other way that was measured; logarithmic, since models differ."""
    ways = list(dict.fromkeys(data.way(each.case) for one in data.slices for each in one.results))
    title = "Inference time, native and protected"
    if len(ways) < 2:
        yield NotDrawn(title=title, group=GROUP, reason="only one way of running was measured")
        return
    series = []
    for place, way in enumerate(ways):
        members = [(one.title, each) for one in data.slices for each in one.results if data.way(each.case) == way]
        low, middle, high = quartiles([each for _, each in members])
        series.append(
            Series(
                name=way, source=f"{way}:seconds", kind="point", x=tuple(name for name, _ in members),
                y=middle, low=low, high=high, place=place,
            )
        )  # fmt: skip
    yield Chart(
        slug="time-native-and-protected", title=title, group=GROUP, x=Axis("Model", None),
        y=Axis("Inference time", "s", log=True), series=tuple(series), note=_SPREAD,
    )  # fmt: skip


def enclave_kinds(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Two kinds of enclave side by side, time and memory, for the cases that ran in both."""
    titles = ("Inference time by kind of enclave", "Peak memory by kind of enclave")
    kinds = data.enclaves
    if len(kinds) < 2:
        seen = f"only one kind of enclave was measured: {kinds[0]}" if kinds else "no kind of enclave was measured"
        yield from (NotDrawn(title=title, group=GROUP, reason=seen) for title in titles)
        return
    shared = _in_several(data)
    if not shared:
        reason = "no case ran in two kinds of enclave that were otherwise the same"
        yield from (NotDrawn(title=title, group=GROUP, reason=reason) for title in titles)
        return
    time, memory = [], []
    for place, kind in enumerate(kinds):
        members = [(name, found[kind]) for name, found in shared.items() if kind in found]
        if not members:
            continue
        low, middle, high = quartiles([each for _, each in members])
        names = tuple(name for name, _ in members)
        time.append(
            Series(name=kind, source=f"{kind}:seconds", kind="bar", x=names, y=middle, low=low, high=high, place=place)
        )
        held = [(name, each.peak_memory_bytes) for name, each in members]
        sizes = [(name, size / MIB) for name, size in held if size is not None]
        if sizes:
            memory.append(_bars(kind, f"{kind}:peak_memory_bytes", sizes, place))
    case = Axis("Case", None)
    yield Chart(
        slug="time-by-enclave", title=titles[0], group=GROUP, x=case, y=Axis("Inference time", "s"),
        series=tuple(time), horizontal=True, note=_SPREAD.replace("Points", "Bars").replace("; bars", "; lines"),
    )  # fmt: skip
    if memory:
        yield Chart(
            slug="memory-by-enclave", title=titles[1], group=GROUP, x=case, y=Axis("Peak memory", "MiB"),
            series=tuple(memory), horizontal=True,
        )  # fmt: skip
    else:
        yield NotDrawn(title=titles[1], group=GROUP, reason="the peak memory of none of these cases is known")


def _bars(name: str, source: str, values: Sequence[tuple[str, float]], place: int) -> Series:
    across, up = zip(*values, strict=True)
    return Series(name=name, source=source, kind="bar", x=across, y=up, place=place)


def _in_several(data: Gathered) -> dict[str, dict[str, CaseResult]]:
    found: dict[tuple[str, str, str, int], dict[str, CaseResult]] = {}
    names: dict[tuple[str, str, str, int], str] = {}
    for one in data.slices:
        for each in one.results:
            case: Case = each.case
            if case.enclave != "none":
                key = (one.slug, case.mode, case.scheme, case.parts)
                found.setdefault(key, {})[case.enclave] = each
                names[key] = f"{one.title}: {words.way(case)}"
    return {names[key]: members for key, members in found.items() if len(members) > 1}


def segments(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Where the time up to the first answer goes: one stacked bar a case. The steady state is in other figures."""
    title = "Where the start goes, from build to the first answer"
    rows = [
        (f"{one.title}: {data.way(each.case)}", each)
        for one in data.slices
        for each in one.results
        if any(name != "steady" for name in each.segments)
    ]
    if not rows:
        yield NotDrawn(title=title, group=GROUP, reason="no segment was measured")
        return
    series = []
    for place, segment in enumerate(name for name in SEGMENTS if name != "steady"):
        found = [(name, each.segments[segment]) for name, each in rows if segment in each.segments]
        if found:
            series.append(_bars(segment, f"segments:{segment}", found, place))
    absent = [name for name in SEGMENTS[:-1] if not any(name in each.segments for _, each in rows)]
    note = f"Not measured in any case: {', '.join(absent)}." if absent else ""
    yield Chart(
        slug="segments", title=title, group=GROUP, x=Axis("Case", None), y=Axis("Time", "s"),
        series=tuple(series), bars="stacked", horizontal=True, note=note, order=tuple(name for name, _ in rows),
    )  # fmt: skip
