"""A folder of results: whole or not at all, read back strictly, one series under one case."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motte.bench import results as results_module
from motte.bench.results import (
    TRACED,
    Case,
    CaseResult,
    LayerTime,
    PlanDrawing,
    PlanPart,
    Results,
    TracePoint,
    read_results,
    state_run,
    write_results,
)
from motte.errors import InputError, MeasureError, MotteError, RecordError, ResourceError
from motte.measure.clock import Segment
from motte.measure.compare import Ratio, Series
from motte.measure.record import UNPROTECTED, Setting, state
from motte.measure.sampling import ProcessSample
from motte.measure.traces import SEGMENTS, Sample, Trace

NATIVE = Case(model="resnet20", mode="native", parts=1, batch=1, engine="torch", enclave="none")
SEALED = Case(model="resnet20", mode="resident", parts=4, batch=1, engine="torch", enclave="process")
OTHER = Case(model="vgg16", mode="native", parts=1, batch=1, engine="torch", enclave="none")


def a_result(case: Case, median: float) -> CaseResult:
    reasons = {"energy_j": "no RAPL", "power_w": "no RAPL", "accuracy": "no labels", "memory_bound_bytes": "none given"}
    native = case.mode == "native"
    return CaseResult(
        case=case,
        simulated=not native,
        threads=1,
        dtype="float32",
        seconds=Series(str(case), (median, median * 1.5, median / 2)),
        ratio=None if native else Ratio(str(case), str(NATIVE), 2.0, 1.5, 2.5, 0.95),
        segments={"steady": 1.5},
        peak_memory_bytes=9,
        mean_memory_bytes=8,
        weight_memory_bytes=7,
        memory_bound_bytes=None,
        cpu_percent=99.0,
        energy_j=None,
        power_w=None,
        accuracy=None,
        bytes_out=0,
        bytes_in=0,
        trusted_flops=5,
        outside_flops=0,
        exposed=0.0,
        missing={
            **reasons, **({"ratio": "it is the baseline"} if native else {}),
            **{name: "not run" for name in SEGMENTS if name != "steady"},
        },
    )  # fmt: skip


def a_trace(case: Case, *, shift: float) -> list[TracePoint]:
    reasons = {name: "not here" for name in TRACED if name not in ("rss_bytes", "cpu_percent")}
    figures: dict[str, Any] = dict.fromkeys(TRACED)
    return [
        TracePoint(
            case=case, time_s=index / 20, segment="steady", missing=reasons,
            **{**figures, "rss_bytes": 100 + index, "cpu_percent": 50.0 + shift},
        )
        for index in range(4)
    ]  # fmt: skip


def some_results() -> Results:
    part = PlanPart(
        first="conv1", last="fc", nodes=3, weight_bytes=4, activation_bytes=5, side="trusted", outside=("fc",)
    )
    record = state(
        series="bench", what="first byte sent until last received", value=0.2, unit="s",
        setting=Setting(threads=1, dtype="float32", device="cpu", engine="torch", enclave=UNPROTECTED),
    )  # fmt: skip
    return Results(
        cases=(a_result(NATIVE, 0.1), a_result(SEALED, 0.2), a_result(OTHER, 0.4)),
        traces=(*a_trace(NATIVE, shift=0), *a_trace(SEALED, shift=1), *a_trace(OTHER, shift=2)),
        layers=(
            LayerTime(
                case=SEALED, layer="conv1", direction="forward", trusted_s=0.1, transfer_s=0.2, accelerator_s=0.3,
                wait_s=0.4, bytes_out=5, bytes_in=6,
            ),
        ),
        plans={str(SEALED): PlanDrawing(objective="weights", parts=(part,), memory_bound_bytes=10)},
        records=(record,),
        audit={"format": "motte-audit/1", "findings": []},
        run=state_run({"models": ["resnet20"], "repeats": 3}, caveats=("a busy machine",)),
    )  # fmt: skip


RESULTS = some_results()


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    write_results(folder, RESULTS)
    assert read_results(folder) == RESULTS
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "audit.json", "layers.csv", f"plans/{SEALED}.json", "records.jsonl", "resnet20.csv", "run.json", "summary.csv",
        "vgg16.csv",
    ]  # fmt: skip
    assert RESULTS.simulated
    assert read_results(folder)[SEALED].seconds.median == 0.2
    assert len(RESULTS.trace(OTHER)) == 4


def test_bare_results_read_back(tmp_path: Path) -> None:
    bare = Results((), (), (), {}, (), None, RESULTS.run)
    write_results(tmp_path, bare)
    assert read_results(tmp_path) == bare
    assert not bare.simulated
    with pytest.raises(MeasureError, match="not measured"):
        bare[NATIVE]


def test_an_earlier_run_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_results(tmp_path, RESULTS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="lie there already"):
        write_results(tmp_path, RESULTS)
    cases = (a_result(OTHER, 0.4),)
    smaller = replace(RESULTS, cases=cases, traces=(), layers=(), plans={}, audit=None)
    write_results(tmp_path, smaller, overwrite=True)
    assert read_results(tmp_path) == replace(smaller, audit=RESULTS.audit), "an audit of the folder is not the bench's"
    assert not (tmp_path / "resnet20.csv").exists(), (
        "a table of a model that is not in it any more would be read as new"
    )
    assert not (tmp_path / "plans" / f"{SEALED}.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("flaw", ["full", "interrupt", "move"])
def test_a_write_that_fails_leaves_nothing_or_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flaw: str
) -> None:
    real: Callable[..., None] = os.fsync
    calls = [0]

    def fail(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt if flaw == "interrupt" else OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    earlier = tmp_path / "earlier"
    write_results(earlier, RESULTS)
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    if flaw == "move":
        monkeypatch.setattr(results_module.os, "replace", lambda *_: fail_at_once())
    else:
        monkeypatch.setattr(results_module.os, "fsync", fail)
    for folder, overwrite in ((tmp_path / "new", False), (earlier, True)):
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt if flaw == "interrupt" else ResourceError):
            write_results(folder, RESULTS, overwrite=overwrite)
    monkeypatch.undo()
    if flaw == "move":
        for folder in (tmp_path / "new", earlier):
            with pytest.raises(InputError, match="no results"):
                read_results(folder)
    else:
        assert not (tmp_path / "new").exists()
        assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.rglob(".results-*"))


def fail_at_once() -> None:
    raise OSError(errno.EIO, "Input/output error")


def damaged(folder: Path, name: str, change: Callable[[str], str | None]) -> None:
    path = folder / name
    text = change(path.read_text())
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


def in_run(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        value = json.loads(text)
        change(value)
        return json.dumps(value)

    return changed


def without_last_line(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", lambda text: text[:-1]),
        ("run.json", in_run(lambda v: v.update(format="motte-bench/2"))),
        ("run.json", in_run(lambda v: v.update(extra=1))),
        ("run.json", in_run(lambda v: v.pop("run"))),
        ("run.json", in_run(lambda v: v["run"].update(asked=[]))),
        ("run.json", in_run(lambda v: v["run"]["machine"].pop("kernel"))),
        ("run.json", in_run(lambda v: v["cases"].pop())),
        ("run.json", in_run(lambda v: v["cases"].append(v["cases"][0]))),
        ("run.json", in_run(lambda v: v["cases"][0].update(bytes_in=None))),
        ("run.json", in_run(lambda v: v["cases"][0].update(bytes_in=1.5))),
        ("run.json", in_run(lambda v: v["cases"][0].update(cpu_percent="99"))),
        ("run.json", in_run(lambda v: v["cases"][0].pop("missing"))),
        ("run.json", in_run(lambda v: v["cases"][0]["segments"].update(inference=1.0))),
        ("run.json", in_run(lambda v: v["cases"][0]["seconds"]["samples"].append(None))),
        ("run.json", in_run(lambda v: v["cases"][0]["seconds"]["samples"].append(0.9))),
        ("run.json", in_run(lambda v: v["cases"][1].update(simulated=False))),
        ("run.json", in_run(lambda v: v["tables"].update({"../x.csv": 0}))),
        ("run.json", in_run(lambda v: v.update(plans=["../run"]))),
        ("run.json", in_run(lambda v: v.update(plans=[]) or v.update(plans=["/etc/passwd"]))),
        ("records.jsonl", without_last_line),
        ("records.jsonl", lambda text: text + "{}\n"),
        ("records.jsonl", lambda text: None),
        ("summary.csv", without_last_line),
        ("summary.csv", lambda text: text.replace(",0.2,", ",0.1,", 1)),
        ("resnet20.csv", without_last_line),
        ("resnet20.csv", lambda text: text.replace("resident", "streamed")),
        ("resnet20.csv", lambda text: text.replace("resnet20", "vgg16")),
        ("vgg16.csv", lambda text: None),
        ("vgg16.csv", lambda text: text.replace(",0.05,", ",0.15,")),
        ("layers.csv", lambda text: text.replace("conv1", "")),
        (f"plans/{SEALED}.json", lambda text: None),
        (f"plans/{SEALED}.json", lambda text: text.replace('"trusted"', '"cloud"')),
        (f"plans/{SEALED}.json", lambda text: text.replace('"nodes":3', '"nodes":-3')),
        (f"plans/{SEALED}.json", lambda text: text.replace('"nodes":3', '"nodes":3,"nodes":3')),
        ("audit.json", lambda text: text.replace("motte-audit/1", "motte-audit/9")),
        ("audit.json", lambda text: "[]"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str, change: Callable[[str], str | None]) -> None:
    write_results(tmp_path, RESULTS)
    damaged(tmp_path, name, change)
    with pytest.raises((RecordError, ResourceError)):
        read_results(tmp_path)


def test_a_folder_without_results_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="no results"):
            read_results(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(MotteError):
        write_results(tmp_path / "file", RESULTS)


def test_one_series_never_stands_under_two_cases() -> None:
    # The earlier work drew one series twice, under two names. Two measurements never agree in every figure.
    twice = tuple(replace(point, case=SEALED) for point in RESULTS.trace(NATIVE))
    with pytest.raises(MeasureError, match="one series stands under two cases"):
        replace(RESULTS, traces=(*RESULTS.trace(NATIVE), *twice))


def test_results_that_contradict_themselves_cannot_be_made() -> None:
    stranger = replace(SEALED, parts=5)
    wrong: tuple[Callable[[], Results], ...] = (
        lambda: replace(RESULTS, cases=(*RESULTS.cases, a_result(SEALED, 0.3))),
        lambda: replace(RESULTS, cases=(*RESULTS.cases, a_result(replace(OTHER, model="VGG16"), 0.3))),
        lambda: replace(RESULTS, traces=(*RESULTS.traces, *a_trace(stranger, shift=9))),
        lambda: replace(RESULTS, traces=(*RESULTS.traces, RESULTS.traces[0])),
        lambda: replace(RESULTS, layers=RESULTS.layers * 2),
        lambda: replace(RESULTS, layers=(replace(RESULTS.layers[0], case=stranger),)),
        lambda: replace(RESULTS, plans={"../../x": RESULTS.plans[str(SEALED)]}),
    )
    for make in wrong:
        with pytest.raises(MeasureError):
            make()


def test_an_audit_is_one(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="not an audit"):
        write_results(tmp_path / "out", replace(RESULTS, audit={"format": "other"}))
    assert not (tmp_path / "out").exists()


def test_a_trace_becomes_the_rows_of_its_case(tmp_path: Path) -> None:
    def sample(at_ms: int, cpu_s: float, rss: int, mark: str = "") -> Sample:
        process = ProcessSample(
            cpu_s=cpu_s, rss_bytes=rss, peak_rss_bytes=rss, pss_bytes=rss if mark else None, page_faults=3,
            context_switches=4, why={} if mark else {"pss_bytes": "read at marks only"},
        )  # fmt: skip
        why = {"energy_j": "no RAPL", "gpu": "no GPU"}
        return Sample(time_ns=at_ms * 1_000_000, processes={"worker": process}, mark=mark, why=why)

    trace = Trace(
        (sample(0, 0.0, 100, "steady"), sample(50, 0.05, 200), sample(101, 0.1, 300, "steady")),
        (Segment("steady", "asked", "answered", 500_000, 100_500_000),),
    )
    points = tuple(
        TracePoint(case=NATIVE, time_s=row.time_s, segment=row.segment, missing=row.missing, **dict(row.figures))
        for row in trace.points()
    )
    assert [point.pss_bytes for point in points] == [100, None, 300]
    whole = replace(RESULTS, traces=points)
    write_results(tmp_path, whole)
    assert read_results(tmp_path).traces == points
