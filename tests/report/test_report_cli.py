"""``motte report`` as a verb: what it prints, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import typer

from motte.bench.results import write_results
from motte.cli.report_page import report


@pytest.fixture
def place(made_up: ModuleType, tmp_path: Path) -> Path:
    write_results(tmp_path / "out", made_up.results(("alexnet",), parts=(1,), trace_points=5))
    return tmp_path / "out"


def run(*words: str) -> int:
    app = typer.Typer()
    app.command()(report)
    try:
        status = typer.main.get_command(app).main(list(words), "motte", standalone_mode=False)
    except typer.Exit as ended:
        return ended.exit_code
    return status if isinstance(status, int) else 0


def test_it_writes_the_page_and_says_what_it_could_not_draw(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(place), "--no-figures", "--json") == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["page_bytes"] == (place / "report.html").stat().st_size
    assert document["figures"] == []
    assert document["simulated"] is True
    assert "times as long as native ones" in document["answer"]
    assert any("no energy counter" in each["reason"] for each in document["not_drawn"])
    assert "warning: SIMULATED" in shown.err
    assert "not drawn: " in shown.err
    assert run(str(place), "--no-figures", "--quiet") == 2
    assert "exists already" in capsys.readouterr().err
    assert run(str(place), "--no-figures", "--overwrite", "--quiet") == 0
    shown = capsys.readouterr()
    assert "report.html (" in shown.out
    assert "SIMULATED" in shown.err
    assert "not drawn" not in shown.err


def test_figures_lie_beside_the_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    shutil.rmtree(place / "plans")  # still named in run.json: the folder is broken
    assert run(str(place), "--quiet") == 1
    assert not (place / "figures").exists()
    capsys.readouterr()


def test_event_files_are_written_instead(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert run(str(place), "--tensorboard", str(tmp_path / "logs"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert "records" in document["runs"]
    assert document["scalars"] > 50
    assert not (place / "report.html").exists()
    assert run(str(place), "--tensorboard", str(tmp_path / "logs")) == 2
    assert run(str(place), "--tensorboard", str(tmp_path / "more"), "--overwrite") == 2
    assert not (tmp_path / "more").exists()
    assert run(str(tmp_path / "nowhere")) == 2
