"""Traces from planted samples: which row says what, what is counted from when, and what is missing and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motte.errors import MeasureError
from motte.measure.clock import Segment
from motte.measure.sampling import NOT_AT_MARK, ProcessSample
from motte.measure.self_report import report_self
from motte.measure.traces import NO_RATE, NOT_COUNTED, NOT_TOLD, SEGMENTS, TRACED, Sample, Told, Trace, check_order

MS = 1_000_000
HIDDEN = "hidden: the process is not dumpable"


def a_process(cpu_s: float | None, rss: int | None = 1000, **changes: Any) -> ProcessSample:
    figures: dict[str, Any] = {
        "cpu_s": cpu_s, "rss_bytes": rss, "peak_rss_bytes": rss, "pss_bytes": None, "page_faults": 10,
        "context_switches": 5, "why": {"pss_bytes": NOT_AT_MARK},
    }  # fmt: skip
    return ProcessSample(**{**figures, **changes})


def a_sample(at_ms: float, mark: str = "", **processes: ProcessSample | None) -> Sample:
    why = {"energy_j": "no RAPL here", "gpu": "not asked for"}
    return Sample(time_ns=round(at_ms * MS), processes=processes, mark=mark, why=why)


def a_stretch(name: str, start_ms: float, stop_ms: float) -> Segment:
    return Segment(name, "asked", "answered", round(start_ms * MS), round(stop_ms * MS))


def two_segments(*between: Sample) -> Trace:
    """``first`` from 100 to 200 ms, ``steady`` from 300 to 400 ms, the worker busy in the first half of the latter."""
    samples = (
        a_sample(99, "first", worker=a_process(1.0)),
        a_sample(201, "first", worker=a_process(1.1)),
        a_sample(299, "steady", worker=a_process(1.1)),
        a_sample(401, "steady", worker=a_process(1.15, rss=3000)),
    )
    ordered = sorted([*samples, *between], key=lambda sample: sample.time_ns)
    return Trace(tuple(ordered), (a_stretch("first", 100, 200), a_stretch("steady", 300, 400)))


def test_only_what_lies_in_a_segment_becomes_a_row() -> None:
    trace = two_segments(*(a_sample(at, worker=a_process(1.05)) for at in (50, 150, 250, 450)))
    assert [(round(point.time_s * 1000), point.segment) for point in trace.points()] == [
        (49, "first"), (100, "first"), (151, "first"), (249, "steady"), (351, "steady"),
    ]  # fmt: skip
    assert trace.segments() == {"first": 0.1, "steady": 0.1}


def test_processor_time_is_counted_from_mark_to_mark() -> None:
    trace = two_segments()
    assert trace.cpu_percent("first") == pytest.approx(100)
    assert trace.cpu_percent("steady") == pytest.approx(50)
    assert trace.mean_memory_bytes("steady") == 2000
    assert trace.peak_memory_bytes() == 3000
    with pytest.raises(MeasureError, match="no such segment"):
        trace.cpu_percent("open")


def test_stretches_of_one_segment_add_up_and_the_time_between_them_does_not() -> None:
    samples = tuple(
        a_sample(at, "steady", worker=a_process(cpu)) for at, cpu in ((9, 0.0), (21, 0.01), (899, 0.9), (911, 0.902))
    )
    trace = Trace(samples, (a_stretch("steady", 10, 20), a_stretch("steady", 900, 910)))
    assert trace.seconds("steady") == pytest.approx(0.02)
    assert trace.cpu_percent("steady") == pytest.approx(60)


def test_a_rate_needs_a_sample_before() -> None:
    rows = two_segments(a_sample(150, worker=a_process(1.05)), a_sample(151, worker=a_process(1.05))).points()
    assert rows[0].figures["cpu_percent"] is None
    assert rows[0].missing["cpu_percent"] == NO_RATE
    assert rows[1].figures["cpu_percent"] == pytest.approx(100 * 0.05 / 0.051)
    assert rows[2].figures["cpu_percent"] is None, "a millisecond is too short for a rate"


def test_processes_are_summed_and_one_that_ended_stays_counted() -> None:
    both = {"client": a_process(0.1, rss=10), "worker": a_process(1.0, rss=100)}
    later = {"client": a_process(0.2, rss=20, page_faults=13), "worker": a_process(1.1, rss=200, page_faults=17)}
    gone = {"client": a_process(0.3, rss=30, page_faults=14), "worker": None}
    samples = (
        a_sample(0, "steady", **both), a_sample(50, **later), a_sample(100, "steady", **gone),
        a_sample(150, "steady", client=None, worker=None),
    )  # fmt: skip
    rows = Trace(samples, (a_stretch("steady", 1, 99),)).points()
    assert [row.figures["rss_bytes"] for row in rows] == [110, 220, 30, None]
    assert [row.figures["page_faults"] for row in rows] == [0, 10, 11, 11]
    assert rows[1].figures["cpu_percent"] == pytest.approx(400)
    assert rows[3].missing["rss_bytes"] == "all processes have ended"
    assert Trace(samples, (a_stretch("steady", 1, 99),)).peak_memory_bytes() == 230


def test_a_process_started_within_a_segment_counts_from_its_first_sample() -> None:
    samples = (
        a_sample(0, "start", client=a_process(5.0)),
        a_sample(40, client=a_process(5.0), worker=a_process(0.5)),
        a_sample(101, "start", client=a_process(5.01), worker=a_process(0.54)),
    )
    assert Trace(samples, (a_stretch("start", 0.5, 100.5),)).cpu_percent("start") == pytest.approx(50)


def test_every_none_of_a_row_has_a_reason_and_nothing_else_has() -> None:
    trace = two_segments(a_sample(150, worker=a_process(None, rss=None, why={"cpu_s": HIDDEN, "rss_bytes": HIDDEN})))
    for row in trace.points():
        assert set(row.figures) == set(TRACED)
        assert set(row.missing) == {name for name, value in row.figures.items() if value is None}
    assert trace.points()[1].missing["rss_bytes"] == f"worker: {HIDDEN}"
    assert trace.points()[1].missing["cpu_percent"] == f"worker: {HIDDEN}"
    assert trace.why("energy_j") == trace.why("power_w") == "no RAPL here"
    assert trace.why("gpu_percent") == "not asked for"
    assert trace.why("pss_bytes") == NOT_AT_MARK
    assert (trace.why("link_bytes"), trace.why("model_bytes")) == (NOT_COUNTED, NOT_TOLD)
    assert trace.energy_j("steady") is None
    assert trace.mean_memory_bytes("first") is None, "a mean over the samples that happen to be there is no mean"


def test_what_is_hidden_is_filled_in_by_what_the_process_told() -> None:
    hidden = dict.fromkeys(("cpu_s", "rss_bytes", "peak_rss_bytes", "pss_bytes", "page_faults", "context_switches"))
    dark = ProcessSample(**hidden, why=dict.fromkeys(hidden, HIDDEN))
    report = replace(report_self(), cpu_s=2.0, rss_bytes=50, peak_rss_bytes=70, pss_bytes=40)
    later = replace(report, cpu_s=2.08, rss_bytes=60, peak_rss_bytes=90)
    samples = (
        replace(a_sample(0, "steady", worker=dark), told={"worker": Told(report, model_bytes=30)}),
        a_sample(50, worker=dark),
        replace(a_sample(101, "steady", worker=dark), told={"worker": Told(later, model_bytes=30)}),
    )
    trace = Trace(samples, (a_stretch("steady", 0.5, 100.5),))
    first, between, last = trace.points()
    assert (first.figures["rss_bytes"], first.figures["pss_bytes"], first.figures["model_bytes"]) == (50, 40, 30)
    assert last.figures["page_faults"] == 0
    assert between.figures["rss_bytes"] is None
    assert between.missing["rss_bytes"] == f"worker: {HIDDEN}"
    assert trace.cpu_percent("steady") == pytest.approx(80)
    assert trace.peak_memory_bytes() == 90
    # What the sampler sees itself it does not take from the process.
    seen = a_process(1.0, rss=1000, why={"pss_bytes": HIDDEN})
    row = Trace((replace(samples[0], processes={"worker": seen}), *samples[1:]), trace.stretches).points()[0]
    assert (row.figures["rss_bytes"], row.figures["pss_bytes"]) == (1000, 40)


def test_energy_and_link_count_from_the_start_of_the_case() -> None:
    samples = tuple(
        replace(sample, energy_j=joules, link_bytes=link, why={})
        for sample, joules, link in zip(
            two_segments().samples, (100.0, 102.0, 103.0, 108.0), (7, 9, 20, 50), strict=True
        )
    )
    trace = Trace(samples, two_segments().stretches)
    assert [row.figures["energy_j"] for row in trace.points()] == [0, 2, 3, 8]
    assert [row.figures["link_bytes"] for row in trace.points()] == [0, 2, 13, 43]
    assert trace.points()[1].figures["power_w"] == pytest.approx(2 / 0.102)
    assert "power_w" in trace.points()[0].missing
    assert trace.energy_j("first") == 2
    assert trace.energy_j("steady") == 5


def test_segments_come_in_their_order() -> None:
    check_order(SEGMENTS)
    check_order(["open", "first", "steady", "steady"])
    for wrong in (["first", "open"], ["steady", "first"], ["load", "open"], ["inference"]):
        with pytest.raises(MeasureError):
            check_order(wrong)
    # An inference that is timed from before the bundle was open, as the earlier work's was, cannot be stated.
    with pytest.raises(MeasureError, match="after a later one"):
        Trace((), (a_stretch("first", 0, 10), a_stretch("open", 10, 20)))
    with pytest.raises(MeasureError, match="overlap"):
        Trace((), (a_stretch("open", 0, 10), a_stretch("first", 5, 20)))
    with pytest.raises(MeasureError, match="out of order"):
        Trace((a_sample(5), a_sample(5)), ())


def test_a_segment_without_marks_has_no_figures() -> None:
    trace = Trace((a_sample(50, worker=a_process(1.0)),), (a_stretch("steady", 0, 100),))
    with pytest.raises(MeasureError, match="without its marks"):
        trace.cpu_percent("steady")
    assert trace.why("cpu_percent") == NO_RATE
    assert Trace((), ()).why("rss_bytes") == "no sample was taken"
    assert Trace((), ()).peak_memory_bytes() is None


def test_what_marks_alone_read_stands_until_the_next_and_outlives_its_process() -> None:
    between = {"context_switches": None, "peak_rss_bytes": None, "why": {"context_switches": NOT_AT_MARK}}
    samples = (
        a_sample(9, "first", worker=a_process(0.0), helper=a_process(0.0, context_switches=7)),
        a_sample(11, "first", worker=a_process(0.0), helper=a_process(0.0, context_switches=9)),
        a_sample(15, worker=a_process(0.1, **between), helper=a_process(0.1, rss=5000, **between)),
        a_sample(19, "first", worker=a_process(0.1, context_switches=6), helper=None),
    )
    trace = Trace(samples, (a_stretch("first", 10, 18),))
    points = trace.points()
    assert [point.figures["context_switches"] for point in points] == [0, 2, None, 3]
    assert points[2].missing["context_switches"] == NOT_AT_MARK
    assert trace.peak_memory_bytes() == 6000
