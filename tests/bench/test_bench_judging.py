"""Judging what was measured: two runs against a bound, and which scheme to use. Nothing is measured here."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from motte.bench.advise import Bounds, advise
from motte.bench.case import Case, CaseResult
from motte.bench.facts import Books, Facts, result_of
from motte.bench.interleave import Measured, interleave
from motte.bench.outcome import outcome
from motte.bench.regress import compare_runs, median_ratio
from motte.bench.request import Refused, Request
from motte.bench.results import Results, write_results
from motte.errors import MotteError, SettingError
from motte.measure.compare import Ratio, Series


def case(mode: str, parts: int = 1) -> Case:
    enclave = "none" if mode in ("native", "accelerator") else "process"
    return Case(model="net", mode=mode, parts=parts, batch=1, engine="torch", enclave=enclave)


def result(
    mode: str, seconds: Sequence[float], *, parts: int = 1, exposed: float | None = 0.0, peak: int | None = 100
) -> CaseResult:
    ratio = None
    if mode != "native":
        ratio = Ratio("x", "native", seconds[0], seconds[0] * 0.9, seconds[0] * 1.1, 0.95)
    facts = Facts(
        otherwise="made up",
        simulated=mode in ("resident", "streamed", "asymmetric"),
        books=Books(peak_memory_bytes=peak, memory_bound_bytes=4096 if mode == "streamed" else None),
        exposed=exposed,
    )
    measured = Measured(Series(mode, tuple(seconds)), ratio)
    return result_of(case(mode, parts), facts, measured, threads=1, dtype="f32")


REQUEST = Request(verb="infer", models=("resnet20",), modes=("native", "resident"))


def results(cases: Sequence[CaseResult], refused: Sequence[Refused] = ()) -> Results:
    made = outcome(REQUEST, cases, refused).results
    assert made is not None
    return made


# --- two runs -------------------------------------------------------------------------------------------------------
def test_a_slower_case_fails_and_a_faster_one_passes() -> None:
    old = results([result("native", [1.0] * 5), result("resident", [1.0] * 5)])
    new = results([result("native", [0.5] * 5), result("resident", [1.2] * 5), result("streamed", [9.0] * 5, parts=2)])
    found = compare_runs(old, new, bound=1.1)
    assert [row.passed for row in found.rows] == [True, False]
    assert found.rows[1].ratio is not None
    assert found.rows[1].ratio.median == pytest.approx(1.2)
    assert not found.passed
    assert [each.mode for each in found.added] == ["streamed"]
    assert compare_runs(old, new, bound=1.3).passed
    # The ratios over native, 1.0 and 1.2 with a tenth to each side, overlap.
    assert (found.overlapping, found.overlap_of) == (1, 1)
    far = results([result("native", [1.0] * 5), result("resident", [1.3] * 5)])
    assert (compare_runs(old, far).overlapping, compare_runs(old, far).overlap_of) == (0, 1)


def test_a_missing_case_fails_with_its_reason() -> None:
    old = results([result("native", [1.0] * 5), result("resident", [1.0] * 5)])
    new = results([result("native", [1.0] * 5)], [Refused(case("resident"), "no room")])
    found = compare_runs(old, new)
    assert [row.passed for row in found.rows] == [True, False]
    assert found.rows[1].ratio is None
    assert found.rows[1].why == "no room"


def test_other_verbs_and_bounds_that_are_none_are_refused() -> None:
    old = results([result("native", [1.0] * 5)])
    other = outcome(Request(verb="open", models=("resnet20",)), [result("native", [1.0] * 5)], ()).results
    assert other is not None
    with pytest.raises(SettingError):
        compare_runs(old, other)
    for bound in (0.0, float("nan"), float("inf")):
        with pytest.raises(SettingError):
            compare_runs(old, old, bound=bound)


def test_the_interval_of_a_ratio_of_medians() -> None:
    found = median_ratio("x", [2.0, 2.2, 1.8, 2.1, 1.9], [1.0, 1.1, 0.9, 1.0, 1.0])
    assert found is not None
    assert found.low <= 2.0 <= found.high
    assert found.median == pytest.approx(2.0)
    assert found == median_ratio("x", [2.0, 2.2, 1.8, 2.1, 1.9], [1.0, 1.1, 0.9, 1.0, 1.0])
    assert median_ratio("x", [1.0] * 4, [1.0] * 5) is None


def test_compare_on_the_command_line(run_bench: Callable[..., Any], tmp_path: Path) -> None:
    write_results(tmp_path / "old", results([result("native", [1.0] * 5), result("resident", [1.0] * 5)]))
    write_results(tmp_path / "new", results([result("native", [1.0] * 5), result("resident", [1.5] * 5)]))
    folders = (tmp_path / "old", tmp_path / "new")
    failed = run_bench("bench", "infer", "--compare", *folders, "--json")
    assert failed.code == 1
    assert [row["passed"] for row in failed.json["cases"]] == [True, False]
    assert run_bench("bench", "infer", "--compare", *folders, "--bound", "1.6").code == 0
    assert run_bench("bench", "infer", "--compare", *folders, "--model", "resnet20").code == 2
    assert run_bench("bench", "infer", "--compare", *folders, "--out", tmp_path / "x").code == 2
    assert run_bench("bench", "infer", "--compare", tmp_path / "old", tmp_path / "nothing").code == 2


# --- which scheme ---------------------------------------------------------------------------------------------------
MEASURED = [
    result("native", [1.0] * 5, exposed=1.0),
    result("resident", [2.0] * 5, peak=900),
    result("streamed", [3.0] * 5, parts=4, peak=300),
    result("asymmetric", [1.5] * 5, exposed=0.2),
    result("accelerator", [0.5] * 5, exposed=1.0),
]


@pytest.mark.parametrize(
    ("bounds", "chosen"),
    [
        (Bounds(), "resident"),
        (Bounds(memory_bytes=500), "streamed"),
        (Bounds(exposed=0.2), "asymmetric"),
        (Bounds(exposed=0.19), "resident"),
        (Bounds(exposed=1.0), "accelerator"),
        (Bounds(memory_bytes=10), None),
    ],
)
def test_the_fastest_within_the_bounds(bounds: Bounds, chosen: str | None) -> None:
    found = advise(MEASURED, bounds, REQUEST)
    assert (None if found.chosen is None else found.chosen.case.mode) == chosen
    assert "native" not in {each.result.case.mode for each in found.judged}


def test_what_nobody_knows_is_never_chosen() -> None:
    unknown = [result("asymmetric", [0.1] * 5, exposed=None), result("resident", [2.0] * 5, peak=None)]
    assert advise(unknown, Bounds(exposed=1.0, memory_bytes=1000), REQUEST).chosen is None
    chosen = advise(unknown, Bounds(exposed=1.0), REQUEST).chosen
    assert chosen is not None
    assert chosen.case.mode == "resident"


def test_why_and_the_commands() -> None:
    found = advise(MEASURED, Bounds(memory_bytes=500), REQUEST)
    assert "streamed in 4 parts" in found.why[0]
    assert any("faster, but out: resident" in line and "900 bytes" in line for line in found.why)
    seal, run = (shlex.split(line) for line in found.commands)
    assert seal[:3] == ["motte", "seal", "resnet20-fashion-mnist"]
    assert seal[seal.index("--parts") + 1] == "4"
    assert run[run.index("--mode") + 1] == "streamed"
    assert run[run.index("--weight-memory") + 1] == "4096"
    split = shlex.split(advise(MEASURED, Bounds(exposed=0.5), REQUEST).commands[0])
    assert split[split.index("--scheme") + 1] == "asymmetric"
    assert advise(MEASURED, Bounds(exposed=1.0), REQUEST).commands == ()


def test_the_commands_are_real_ones() -> None:
    """Every option of a printed command is one of the verb's."""
    from motte.cli.run import run
    from motte.cli.seal import seal

    for bounds in (Bounds(memory_bytes=500), Bounds(exposed=0.5), Bounds()):
        for line, verb in zip(advise(MEASURED, bounds, REQUEST).commands, (seal, run), strict=True):
            app = typer.Typer()
            app.command()(verb)
            command = typer.main.get_command(app)
            command.make_context("motte", shlex.split(line)[2:])


@pytest.mark.parametrize("wrong", [{"exposed": 1.5}, {"exposed": float("nan")}, {"memory_bytes": 0}])
def test_bounds_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        Bounds(**wrong)  # type: ignore[arg-type]


# --- rounds ---------------------------------------------------------------------------------------------------------
def test_a_case_that_fails_is_taken_out_and_the_rest_measured_again() -> None:
    calls = {"native": 0, "resident": 0, "streamed": 0}

    def counted(name: str, fails_at: int) -> float:
        calls[name] += 1
        if calls[name] == fails_at:
            raise MotteError("the worker ended")
        return 2.0 if name == "streamed" else 1.0

    found = interleave(
        {
            case("native"): lambda: counted("native", 0),
            case("resident"): lambda: counted("resident", 3),
            case("streamed", 2): lambda: counted("streamed", 0),
        },
        baseline=case("native"),
        warmup=1,
        repeats=5,
        seed=0,
        reported=True,
    )
    assert [each.case.mode for each in found.failed] == ["resident"]
    assert found.failed[0].failed
    assert set(found.measured) == {case("native"), case("streamed", 2)}
    assert all(len(each.seconds.samples) == 5 for each in found.measured.values())
    ratio = found.measured[case("streamed", 2)].ratio
    assert ratio is not None
    assert ratio.median == 2.0
    assert found.measured[case("native")].ratio is None


def test_one_case_alone_has_samples_and_no_ratio() -> None:
    rounds: list[int] = []
    found = interleave(
        {case("resident"): lambda: 0.5}, baseline=None, warmup=1, repeats=5, seed=0, reported=True,
        on_round=rounds.append,
    )  # fmt: skip
    assert found.measured[case("resident")].seconds.samples == (0.5,) * 5
    assert found.measured[case("resident")].ratio is None
    assert rounds == [1, 2, 3, 4, 5]


def test_every_figure_that_is_there_is_a_record_and_no_other() -> None:
    made = results([result("native", [1.0] * 5), result("asymmetric", [2.0] * 5, exposed=None)])
    series = [(record.parameters["mode"], record.series) for record in made.records]
    assert len(set(series)) == len(series)
    assert ("native", "infer, latency") in series
    assert ("asymmetric", "infer, ratio") in series
    assert ("native", "infer, exposed") in series
    assert ("asymmetric", "infer, exposed") not in series
    assert ("native", "infer, ratio") not in series
