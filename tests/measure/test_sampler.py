"""The sampler beside real processes: it counts those that were named, nobody else, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from motte.errors import FormatError, MeasureError, ResourceError
from motte.measure.energy import Absent
from motte.measure.sampler import Sampler, read_sample
from motte.measure.sampling import Reader, WatchedProcess, case_of, read_process_sample
from motte.measure.sampling_process import Loop
from motte.measure.self_report import report_self
from motte.measure.traces import NOT_COUNTED, TRACED, Told
from motte.strict_json import canonical

BUSY = "while True: pass"
IDLE = "import sys; print('up', flush=True); sys.stdin.read()"
GROWING = (
    "import sys; print('up', flush=True); sys.stdin.readline(); x = bytearray(b'1') * (40 << 20)\n"
    "print('grown', flush=True); sys.stdin.read()"
)
NOWHERE = Absent("not here")


@contextmanager
def a_child(code: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_up(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline()


def wait_for_samples(pid: int) -> None:
    """Until the sampler has slept and woken a few times, however busy the machine is."""
    process = psutil.Process(pid)
    before = process.num_ctx_switches().voluntary
    while process.num_ctx_switches().voluntary < before + 6:
        time.sleep(0.02)


def test_a_case_from_start_to_stop() -> None:
    sent = [0]
    with Sampler(period_s=0.02) as sampler, a_child(BUSY) as other, a_child(GROWING) as child:
        wait_up(child)
        case, idle = sampler.recorder(), sampler.recorder()
        case.count(lambda: sent[0])
        with pytest.raises(MeasureError, match="counted already"):
            case.count(lambda: 0)
        case.watch("worker", child.pid)
        idle.watch("client", os.getpid())
        case.tell("worker", lambda: Told(report_self(), model_bytes=123))
        with case.segment("first", since="asked", until="answered"):
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
            wait_up(child)
            sent[0] = 1000
        with case.segment("steady", since="asked", until="answered"):
            wait_for_samples(sampler.pid)
        with idle.segment("steady", since="asked", until="answered"):
            pass
        assert other.poll() is None, "somebody else was busy all the time"
        traces = sampler.finish()
    trace = traces[case]
    rows = trace.points()
    assert {row.segment for row in rows} == {"first", "steady"}
    assert [row.segment for row in rows].count("steady") > 2, "two marks, and samples between them"
    # The 40 MiB that the worker took between two marks are there, in memory and in faults.
    assert rows[-1].figures["rss_bytes"] - rows[0].figures["rss_bytes"] > 39 << 20  # type: ignore[operator]
    assert (rows[-1].figures["page_faults"] or 0) > 0
    assert (trace.peak_memory_bytes() or 0) >= (rows[-1].figures["rss_bytes"] or 0)
    assert rows[-1].figures["pss_bytes"] is not None
    assert rows[-1].figures["model_bytes"] == 123
    assert (rows[0].figures["link_bytes"], rows[-1].figures["link_bytes"]) == (0, 1000)
    assert traces[idle].points()[0].missing["link_bytes"] == NOT_COUNTED
    assert "RAPL" in trace.why("energy_j") or trace.energy_j("steady") is not None
    # Of the machine, which another process kept busy, nothing is in it: our own waiting takes no processor.
    steady = trace.cpu_percent("steady")
    assert steady is not None
    assert steady < 50
    for row in rows:
        assert set(row.missing) == {name for name in TRACED if row.figures[name] is None}


def test_the_processor_clock_agrees_with_psutil() -> None:
    watched, process = WatchedProcess(os.getpid()), psutil.Process()
    began = time.process_time()
    while time.process_time() - began < 0.03:
        sum(range(1000))
    before = process.cpu_times()
    sample = watched.sample(mark=True)
    after = process.cpu_times()
    assert sample is not None
    assert before.user + before.system - 0.02 <= (sample.cpu_s or 0) <= after.user + after.system + 0.02
    assert (sample.context_switches or 0) >= 0
    assert sample.peak_rss_bytes is not None
    assert sample.why == {}
    assert read_process_sample({**vars_of(sample)}, "sample", FormatError) == sample


def vars_of(sample: object) -> dict[str, object]:
    return {name: getattr(sample, name) for name in sample.__dataclass_fields__}  # type: ignore[attr-defined]


def test_nothing_of_the_whole_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a figure of the whole machine")

    for name in ("cpu_percent", "cpu_times", "virtual_memory", "swap_memory", "net_io_counters", "cpu_stats", "pids"):
        monkeypatch.setattr(psutil, name, refuse)
    reader = Reader(NOWHERE, NOWHERE)
    with a_child(IDLE) as child, a_child(IDLE) as stranger:
        reader.watched["0/worker"] = WatchedProcess(child.pid)
        reader.watched["1/other"] = WatchedProcess(os.getpid())
        assert set(reader.row()["processes"]) == {"0/worker", "1/other"}
        row = reader.row(of="0")
        assert set(row["processes"]) == {"0/worker"}
        assert str(stranger.pid) not in str(row)
    assert reader.row()["processes"]["0/worker"] is None, "it has ended: no row of zeros"
    assert case_of("12/worker/x") == "12"


def test_a_hidden_process_is_no_row_of_zeros(tmp_path: Path) -> None:
    watched = WatchedProcess(os.getpid(), proc=tmp_path)
    sample = watched.sample(mark=True)
    assert sample is not None
    assert {getattr(sample, name) for name in sample.why} == {None}
    assert len(sample.why) == 6
    assert "hides" in sample.why["rss_bytes"]


def test_what_proc_says_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    def switches(thread: int, count: int) -> None:
        text = f"Name:\tvoluntary_ctxt_switches: 9\nvoluntary_ctxt_switches:\t{count}\nnonvoluntary_ctxt_switches:\t1\n"
        (place / "task" / str(thread)).mkdir(exist_ok=True, parents=True)
        (place / "task" / str(thread) / "status").write_text(text)

    place = tmp_path / str(os.getpid())
    switches(1, 10)
    switches(2, 20)
    (place / "stat").write_text("1 (a (b) c) S 1 1 1 0 -1 0 7 0 3 0 0 0 0 0 20 0")
    (place / "statm").write_text("100 3 2 1 0 1 0")
    (place / "status").write_text("Name:\tx\nVmHWM:\t  12 kB\n")
    watched = WatchedProcess(os.getpid(), proc=tmp_path)
    first = watched.sample(mark=True)
    assert first is not None
    assert (first.page_faults, first.peak_rss_bytes, first.context_switches) == (10, 12 * 1024, 32)
    assert first.rss_bytes == 3 * os.sysconf("SC_PAGE_SIZE")
    between = watched.sample(mark=False)
    assert between is not None
    assert (between.page_faults, between.rss_bytes) == (10, first.rss_bytes)
    assert set(between.why) == {"peak_rss_bytes", "pss_bytes", "context_switches"}
    assert {getattr(between, name) for name in between.why} == {None}
    switches(1, 11)
    (place / "status").write_text("Name:\tx\n")
    second = watched.sample(mark=True)
    assert second is not None
    assert second.context_switches == 33
    assert set(second.why) == {"peak_rss_bytes", "pss_bytes"}
    (place / "stat").write_text("1 (a) S")
    broken = watched.sample(mark=False)
    assert broken is not None
    assert broken.page_faults is None
    (place / "stat").write_text("1 (a) Z 1 1")
    assert watched.sample(mark=False) is None, "a zombie has ended"
    watched.close()
    closed = watched.sample(mark=False)
    assert closed is not None
    assert closed.why["cpu_s"] == "not watched any more"


def test_a_thread_that_ended_stays_counted() -> None:
    watched, go = WatchedProcess(os.getpid()), threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    before = watched.sample(mark=True)
    go.set()
    thread.join()
    wait_for(lambda: str(thread.native_id) not in os.listdir("/proc/self/task"))
    after = watched.sample(mark=True)
    assert before is not None
    assert after is not None
    assert (after.context_switches or 0) >= (before.context_switches or 0) > 0
    watched.close()


def wait_for(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def test_a_process_that_takes_over_the_number_is_not_read() -> None:
    with a_child(IDLE) as child:
        wait_up(child)
        watched = WatchedProcess(child.pid)
        assert watched.sample(mark=True) is not None
        child.kill()
        child.wait()
        assert watched.sample(mark=True) is None
        # Its files stay those of the process that ended, whoever gets the number now.
        assert watched.sample(mark=True) is None
        watched.close()


def test_samples_never_come_in_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [0], []
    monkeypatch.setattr("motte.measure.sampling_process.time.perf_counter_ns", lambda: now[0])
    reader = Reader(NOWHERE, NOWHERE)
    reader.watched["0/client"] = WatchedProcess(os.getpid())
    loop = Loop(reader, 0.05, sent.append)
    for at_ms in (10, 50, 51, 99, 420, 421, 449, 450):
        now[0] = at_ms * 1_000_000
        loop.sample_if_due()
    assert loop.obey(canonical({"do": "nonsense"}))
    assert loop.obey(canonical({"do": "forget", "name": "0/nobody"}))
    assert loop.obey(canonical({"do": "watch", "name": "0/nobody", "pid": 1 << 22}))
    assert ["error" in answer for answer in sent] == [True] * 3
    monkeypatch.setattr("motte.measure.sampling_process.write_line", lambda row: None)
    assert not loop.obey(canonical({"do": "stop"}))
    assert sent[-1]["ok"]["rows"] == 3, "at 50, at 420 once for all that was slept over, and at 450"


def test_misuse_is_refused() -> None:
    with pytest.raises(MeasureError):
        Sampler(period_s=0)
    with pytest.raises(MeasureError, match="does not run"):
        Sampler().finish()
    with Sampler() as sampler:
        case = sampler.recorder()
        with pytest.raises(ResourceError, match="cannot do that"):
            case.watch("gone", 1 << 22)
        case.watch("client", os.getpid())
        with pytest.raises(MeasureError, match="watched already"):
            case.watch("client", os.getpid())
        with pytest.raises(MeasureError, match="nothing of this name"):
            case.tell("worker", Told)
        with pytest.raises(ZeroDivisionError), case.segment("open", since="a", until="b"):
            raise ZeroDivisionError
        with case.segment("load", since="a", until="b"), pytest.raises(MeasureError, match="do not nest"):  # noqa: SIM117
            with case.segment("first", since="a", until="b"):
                raise AssertionError("it began")
        with pytest.raises(MeasureError, match="after a later one"), case.segment("open", since="a", until="b"):
            raise AssertionError("it began")
        case.forget("client")
        assert sampler.finish()[case].segments().keys() == {"load"}, "the time of a failure is not a figure"
        with pytest.raises(MeasureError, match="does not run"):
            case.watch("client", os.getpid())


def test_a_sampler_that_dies_is_an_error_and_not_an_empty_trace() -> None:
    with Sampler() as sampler:
        case = sampler.recorder()
        case.watch("client", os.getpid())
        os.kill(sampler.pid, signal.SIGKILL)
        with pytest.raises(ResourceError, match="ended"):
            sampler.finish()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_counter_that_fails_is_an_error_and_not_its_last_value() -> None:
    calls = []

    def count() -> int:
        calls.append(1)
        return 1 // (3 - min(3, len(calls)))

    with Sampler(period_s=0.005) as sampler:
        case = sampler.recorder()
        case.count(count)
        case.watch("client", os.getpid())
        while len(calls) < 3:
            time.sleep(0.01)
        with pytest.raises(MeasureError, match="counter failed"):
            sampler.finish()


def test_nothing_is_left_of_it() -> None:
    with Sampler() as sampler:
        pid = sampler.pid
    assert not psutil.pid_exists(pid)
    # Nor when its client is killed outright: its input ends, and so does it.
    script = (
        "import sys\nfrom motte.measure.sampler import Sampler\n"
        "with Sampler() as sampler:\n    print(sampler.pid, flush=True)\n    sys.stdin.read()\n"
    )
    with a_child(script) as client:
        assert client.stdout is not None
        orphan = psutil.Process(int(client.stdout.readline()))
        client.kill()
        assert psutil.wait_procs([orphan], timeout=60)[1] == []


def test_what_the_sampler_writes_is_read_strictly() -> None:
    reader = Reader(NOWHERE, NOWHERE)
    reader.watched["0/client"] = WatchedProcess(os.getpid())
    good = reader.row(of="0")
    sample = read_sample(good, "0")
    assert sample.why == {"energy_j": "not here", "gpu": "not here"}
    assert set(sample.processes) == {"client"}
    flaws = (
        {"extra": 1}, {"time_ns": -1}, {"time_ns": 1.5}, {"processes": []}, {"energy_j": "1"}, {"energy_j": True},
        {"gpu": None}, {"energy_why": 5}, {"processes": {"0/client": {**good["processes"]["0/client"], "x": 1}}},
        {"processes": {"0/client": {**good["processes"]["0/client"], "rss_bytes": -1}}},
        {"processes": {"0/client": {**good["processes"]["0/client"], "why": []}}},
    )  # fmt: skip
    for flaw in flaws:
        with pytest.raises(FormatError):
            read_sample({**good, **flaw}, "0")
