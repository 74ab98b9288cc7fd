"""Memory: of every case, and of each part of a plan against the bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from motte.bench.results import PlanDrawing
from motte.limits import MIB
from motte.report.chart import Axis, Chart, NotDrawn, Series
from motte.report.gathered import Gathered

GROUP = "Memory"


def peaks(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Peak memory of every case, one series a way of running."""
    title = "Peak memory, native and protected"
    series: list[Series] = []
    reasons: Counter[str] = Counter()
    for way in dict.fromkeys(data.way(each.case) for one in data.slices for each in one.results):
        found: list[tuple[str, float]] = []
        for one in data.slices:
            for each in one.results:
                if data.way(each.case) != way:
                    continue
                if each.peak_memory_bytes is None:
                    reasons[each.missing["peak_memory_bytes"]] += 1
                else:
                    found.append((one.title, each.peak_memory_bytes / MIB))
        if found:
            across, up = zip(*found, strict=True)
            place = len(series)
            series.append(
                Series(name=way, source=f"{way}:peak_memory_bytes", kind="point", x=across, y=up, place=place)
            )
    why = "; ".join(reason for reason, _ in reasons.most_common(3))
    if not series:
        yield NotDrawn(title=title, group=GROUP, reason=why)
        return
    note = f"Some cases are not in it: {why}." if why else ""
    yield Chart(
        slug="memory-native-and-protected", title=title, group=GROUP, x=Axis("Model", None),
        y=Axis("Peak memory", "MiB"), series=tuple(series), note=note,
    )  # fmt: skip


def parts_against_bound(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """Bytes of each part, stacked, with the bound as a line. Plans of a model that are the same are drawn once."""
    drawn = False
    for one in data.slices:
        seen: list[PlanDrawing] = []
        for each in one.results:
            plan = data.results.plans.get(str(each.case))
            if plan is None or len(plan.parts) < 2 or any(plan.parts == other.parts for other in seen):
                continue
            seen.append(plan)
            drawn = True
            title = f"{one.title}: memory of each of {len(plan.parts)} parts ({data.way(each.case)})"
            yield _parts(title, f"{each.case}-parts", plan, each.memory_bound_bytes)
    if not drawn:
        yield NotDrawn(title="Memory of each part against the bound", group=GROUP, reason="no plan of several parts")


def _parts(title: str, slug: str, plan: PlanDrawing, bound: int | None) -> Chart:
    names = tuple(str(number) for number in range(1, len(plan.parts) + 1))
    series = []
    for place, (name, sizes) in enumerate(
        (
            ("weights", [part.weight_bytes for part in plan.parts]),
            ("activations", [part.activation_bytes for part in plan.parts]),
        )
    ):
        values = tuple(size / MIB for size in sizes)
        series.append(Series(name=name, source=f"{slug}:{name}", kind="bar", x=names, y=values, place=place))
    limit = plan.memory_bound_bytes if plan.memory_bound_bytes is not None else bound
    note = f"The cuts were chosen by: {plan.objective}."
    if limit is None:
        note += " No bound was set."
    else:
        values = (limit / MIB,) * len(names)
        series.append(
            Series(name="bound", source=f"{slug}:bound", kind="line", x=names, y=values, place=4, dashed=True)
        )
    return Chart(
        slug=slug, title=title, group=GROUP, x=Axis("Part, in the order of the run", None),
        y=Axis("Memory", "MiB"), series=tuple(series), bars="stacked", note=note,
    )  # fmt: skip
