"""All figures of a results directory, in the order in which the page shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from motte.report import exposure_charts, memory_charts, time_charts, trace_charts
from motte.report.chart import Chart, NotDrawn
from motte.report.gathered import Gathered

_ALL: Final[tuple[Callable[[Gathered], Iterator[Chart | NotDrawn]], ...]] = (
    time_charts.native_against_inside,
    time_charts.by_parts,
    time_charts.segments,
    time_charts.enclave_kinds,
    memory_charts.peaks,
    memory_charts.parts_against_bound,
    exposure_charts.frontier,
    exposure_charts.layers,
    trace_charts.over_models,
    trace_charts.per_model,
    trace_charts.over_parts,
)


def charts(data: Gathered) -> tuple[Chart | NotDrawn, ...]:
    """Every figure, those of one group together; one for which the data are missing is there with its reason.

    Raises:
        MeasureError: the results would have one series drawn twice.
    """
    found = [each for build in _ALL for each in build(data)]
    groups = dict.fromkeys(each.group for each in found)
    return tuple(each for group in groups for each in found if each.group == group)
