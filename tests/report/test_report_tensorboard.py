"""Event files of results and of records alone, read back by tensorboard itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from motte.bench.results import Results
from motte.errors import InputError
from motte.report.tensorboard import export

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (file,) = folder.iterdir()
    found: dict[str, list[tuple[int, float]]] = {}
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_every_figure_is_a_scalar(results: Results, folder: Path, tmp_path: Path) -> None:
    made = export(folder, tmp_path / "logs")
    assert set(made.runs) == {str(each.case) for each in results.cases} | {"records"}
    read = {run: scalars(tmp_path / "logs" / run) for run in made.runs}
    assert made.scalars == sum(len(values) for run in read.values() for values in run.values())
    one = next(each for each in results.cases if each.case.mode == "asymmetric")
    found = read[str(one.case)]
    assert [value for _, value in found["seconds"]] == pytest.approx(one.seconds.samples, rel=1e-6)
    assert found["summary/exposed"] == [(0, pytest.approx(0.13))]
    assert "summary/power_w" not in found
    trace = results.trace(one.case)
    assert found["trace/rss_bytes"] == [
        (round(point.time_s * 1000), pytest.approx(point.rss_bytes, rel=1e-6)) for point in trace
    ]
    ((tag, values),) = read["records"].items()
    assert "[s] batch=1 mode=resident model=resnet50 parts=12" in tag
    assert [value for _, value in values] == pytest.approx(results.records[0].samples, rel=1e-6)


def test_records_alone_are_enough_and_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="neither results nor records"):
        export(tmp_path / "in", tmp_path / "logs")
    (tmp_path / "in" / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes())
    assert export(tmp_path / "in", tmp_path / "logs").runs == ("records",)
    with pytest.raises(InputError, match="lies there already"):
        export(tmp_path / "in", tmp_path / "logs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "logs"]
