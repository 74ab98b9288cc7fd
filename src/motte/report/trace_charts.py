"""CPU, memory and power against time: per model native and inside, over all models, over numbers of parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from motte.bench.results import CaseResult, TracePoint
from motte.limits import MIB
from motte.report.chart import Axis, Chart, NotDrawn, Series, refuse_same_points
from motte.report.gathered import TRUSTED, Gathered, Slice

MAX_POINTS: Final = 400
"""Points of one drawn series. The whole trace is in the model's CSV."""
_TIME: Final = Axis("Time since the first mark", "s")


@dataclass(frozen=True, slots=True)
class Quantity:
    """One column of the traces as it is drawn: name, unit, the factor from what is stored."""

    slug: str
    column: str
    label: str
    unit: str
    factor: float
    read: Callable[[TracePoint], float | None]

    @property
    def axis(self) -> Axis:
        """The axis of its values."""
        return Axis(self.label, self.unit)


QUANTITIES: Final = (
    Quantity("cpu", "cpu_percent", "CPU use, 100 = one core", "%", 1.0, lambda point: point.cpu_percent),
    Quantity("memory", "rss_bytes", "Resident memory", "MiB", 1 / MIB, lambda point: point.rss_bytes),
    Quantity("power", "power_w", "Power", "W", 1.0, lambda point: point.power_w),
)


def per_model(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """CPU, memory and power against time of each model: native and one case of every other mode."""
    for one in data.slices:
        for quantity in QUANTITIES:
            title = f"{one.title}: {quantity.label.split(',')[0]} over time, without and with protection"
            cases = [(data.way(each.case), each) for each in one.chosen()]
            yield _chart(data, quantity, cases, slug=f"{one.slug}-{quantity.slug}", title=title, group=one.title)


def over_parts(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """The same figures overlaid over numbers of parts, for each model and trusted mode with at least two."""
    for one in data.slices:
        for key, members in _by_parts(one):
            for quantity in QUANTITIES:
                mode, enclave = key
                extra = f", {enclave}" if len(data.enclaves) > 1 else ""
                title = f"{one.title}: {quantity.label.split(',')[0]} over time by number of parts, {mode}{extra}"
                named = [(f"{each.case.parts} part{'s' * (each.case.parts > 1)}", each) for each in members]
                slug = f"{one.slug}-{quantity.slug}-by-parts-{mode}-{enclave}"
                yield _chart(data, quantity, named, slug=slug, title=title, group=one.title)


def over_models(data: Gathered) -> Iterator[Chart | NotDrawn]:
    """All models in one figure, native ones and those inside apart."""
    group = "All models over time"
    for inside in (False, True):
        words = "inside, whole or in the fewest parts" if inside else "native"
        found = [(one.title, one.trusted() if inside else one.native) for one in data.slices]
        members = [(title, each) for title, each in found if each is not None]
        for quantity in QUANTITIES:
            title = f"{quantity.label.split(',')[0]} over time of all models, {words}"
            slug = f"all-models-{quantity.slug}-{'inside' if inside else 'native'}"
            if len(members) < 2:
                yield NotDrawn(title=title, group=group, reason="needs two models that were measured so")
            else:
                yield _chart(data, quantity, members, slug=slug, title=title, group=group)


def _by_parts(one: Slice) -> Iterator[tuple[tuple[str, str], Sequence[CaseResult]]]:
    members: dict[tuple[str, str], list[CaseResult]] = {}
    for each in one.results:
        if each.case.mode in TRUSTED:
            members.setdefault((each.case.mode, each.case.enclave), []).append(each)
    for key, found in members.items():
        if len({each.case.parts for each in found}) > 1:
            yield key, found


def _chart(
    data: Gathered,
    quantity: Quantity,
    cases: Sequence[tuple[str, CaseResult]],
    *,
    slug: str,
    title: str,
    group: str,
) -> Chart | NotDrawn:
    series: list[Series] = []
    reasons: Counter[str] = Counter()
    absent: list[str] = []
    for index, (name, result) in enumerate(cases):
        points = data.trace(result.case)
        pairs = [(point, value) for point in points if (value := quantity.read(point)) is not None]
        if not pairs:
            absent.append(name)
            reasons.update(point.missing[quantity.column] for point in points)
            reasons.update(["it was not traced"] if not points else [])
            continue
        kept = thinned([value for _, value in pairs])
        series.append(
            Series(
                name=name,
                source=f"{result.case}:{quantity.column}",
                kind="line",
                x=tuple(round(pairs[at][0].time_s, 4) for at in kept),
                y=tuple(round(pairs[at][1] * quantity.factor, 3) for at in kept),
                texts=tuple(pairs[at][0].segment for at in kept),
                place=index,
            )
        )
    why = "; ".join(reason for reason, _ in reasons.most_common(2))
    if not series:
        return NotDrawn(title=title, group=group, reason=why or "no case was traced")
    refuse_same_points(series, slug)
    note = f"Not in it: {', '.join(absent)} ({why})." if absent else ""
    return Chart(slug=slug, title=title, group=group, x=_TIME, y=quantity.axis, series=tuple(series), note=note)


def thinned(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """Places of at most ``limit`` of ``values``, in order: the least and the most of each stretch, and both ends.

    Peaks and dips stay; what lies between two neighbours of a stretch goes.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    kept = {0, count - 1}
    stretches = (limit - 2) // 2
    for index in range(stretches):
        stretch = range(index * count // stretches, (index + 1) * count // stretches)
        kept.add(min(stretch, key=values.__getitem__))
        kept.add(max(stretch, key=values.__getitem__))
    return sorted(kept)
