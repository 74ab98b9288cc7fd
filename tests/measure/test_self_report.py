"""What a process says of itself: right beside psutil, complete about what it cannot say, read strictly."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from motte.errors import FrameError, MeasureError
from motte.measure import self_report
from motte.measure.self_report import SelfReport, report_self

GOOD = report_self().to_json()


def test_it_agrees_with_psutil() -> None:
    began = time.process_time()
    while time.process_time() - began < 0.02:
        sum(range(1000))
    process = psutil.Process()
    before, psutil_switches = process.cpu_times(), sum(process.num_ctx_switches())
    found = report_self()
    after = process.cpu_times()
    assert found.missing == {}
    # psutil counts in ticks of 10 ms.
    assert before.user + before.system - 0.02 <= (found.cpu_s or 0) <= after.user + after.system + 0.02
    # psutil counts the switches of the first thread alone, we those of all.
    assert (found.context_switches or 0) >= psutil_switches
    assert abs((found.rss_bytes or 0) - process.memory_info().rss) < 8 << 20
    assert (found.peak_rss_bytes or 0) >= (found.rss_bytes or 0)
    assert 0 < (found.pss_bytes or 0) <= (found.rss_bytes or 0)


def test_touched_pages_are_faults() -> None:
    before = report_self().page_faults
    with mmap.mmap(-1, 4 << 20) as block:  # fresh from the kernel, unlike memory of the allocator
        block[0], block[-1] = 1, 1
        after = report_self().page_faults
    assert before is not None
    assert after is not None
    assert after > before


def test_json_round_trips() -> None:
    assert SelfReport.from_json(json.loads(json.dumps(GOOD))).to_json() == GOOD


def test_what_cannot_be_had_is_none_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> object:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(self_report.resource, "getrusage", refuse)
    monkeypatch.setattr(self_report.time, "process_time", refuse)
    found = report_self(proc=tmp_path)
    assert found.page_faults is None
    assert found.context_switches is None
    assert found.rss_bytes is None
    assert set(found.missing) == set(GOOD) - {"missing"}
    assert found.missing["minor_faults"] == "getrusage: Function not implemented"
    assert SelfReport.from_json(found.to_json()) == found


def test_a_none_without_a_reason_cannot_be_made() -> None:
    with pytest.raises(MeasureError):
        SelfReport(**{**GOOD, "pss_bytes": None})
    with pytest.raises(MeasureError):
        SelfReport(**{**GOOD, "missing": {"pss_bytes": "hidden"}})


@pytest.mark.parametrize(
    "flaw",
    [
        {"cpu_s": -1.0},
        {"cpu_s": "1"},
        {"minor_faults": 1.5},
        {"minor_faults": -1},
        {"rss_bytes": True},
        {"rss_bytes": 1 << 60},
        {"extra": 1},
        {"pss_bytes": None},
        {"missing": {"pss_bytes": "x"}},
        {"missing": {"other": "x"}},
        {"missing": None},
        {"missing": {"cpu_s": 5}, "cpu_s": None},
    ],
)
def test_malformed_is_refused(flaw: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        SelfReport.from_json({**GOOD, **flaw})


def test_a_missing_field_is_refused() -> None:
    for name in GOOD:
        with pytest.raises(FrameError):
            SelfReport.from_json({key: value for key, value in GOOD.items() if key != name})
    with pytest.raises(FrameError):
        SelfReport.from_json([])


def test_it_brings_neither_numpy_nor_psutil_into_a_worker() -> None:
    script = (
        "import sys, motte.measure.self_report as s; s.report_self()\n"
        "print(sorted({'numpy', 'torch', 'psutil', 'cryptography', 'subprocess', 'hashlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
