"""Tracing: a sampler process beside the processes under test, and the recorder that marks segments for one case.

    with Sampler() as sampler:
        case = sampler.recorder()
        case.watch("client", os.getpid())
        with case.segment("start", since="process spawned", until="its first frame received"):
            worker = start()
            case.watch("worker", worker.pid)
        ...
        trace = sampler.finish()[case]

Memory and processor time are sampled at 20 Hz; proportional memory, which costs the kernel a walk over all pages, at
the marks only, which lie outside of what is timed. Processes that hide tell their own figures: :meth:`Recorder.tell`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

from motte.errors import FormatError, MeasureError, ResourceError
from motte.limits import MAX_RECORD_BYTES
from motte.measure.clock import Segment
from motte.measure.gpu import GpuReading
from motte.measure.sampling import case_of, check_period, read_process_sample, read_reasons
from motte.measure.traces import Sample, Told, Trace, check_order
from motte.strict_json import Fields, canonical, parse

PERIOD_S: Final = 0.05
"""20 Hz."""
_TIMEOUT_S: Final = 60.0
_EXIT_WAIT_S: Final = 10.0


class Recorder:
    """Marks the segments of one case. Made by :meth:`Sampler.recorder`; for one thread."""

    def __init__(self, sampler: Sampler, key: str) -> None:
        self._sampler = sampler
        self.key = key
        self._tell: dict[str, Callable[[], Told]] = {}
        self._watched: list[str] = []
        self._open: str | None = None
        self._samples: list[Sample] = []
        self._stretches: list[Segment] = []
        self.meter: _LinkMeter | None = None

    def watch(self, name: str, pid: int) -> None:
        """Sample the process ``pid`` from now on, under ``name``. Within a segment, the first reading is part of it.

        Raises:
            MeasureError: the name is watched already. ResourceError: there is no such process.
        """
        if name in self._watched:
            raise MeasureError("watched already", got=name)
        row = self._sampler.command({"do": "watch", "name": f"{self.key}/{name}", "pid": pid})
        self._samples.append(read_sample(row, self.key))
        self._watched.append(name)

    def forget(self, name: str) -> None:
        """Sample it no more. What it used stays counted; a process that ends needs no such call."""
        self._sampler.command({"do": "forget", "name": f"{self.key}/{name}"})
        self._watched.remove(name)
        self._tell.pop(name, None)

    def tell(self, name: str, ask: Callable[[], Told]) -> None:
        """Ask the watched process ``name`` for its own figures at every mark from now on, outside of what is timed.

        Raises:
            MeasureError: nothing of this name is watched.
        """
        if name not in self._watched:
            raise MeasureError("nothing of this name is watched", got=name)
        self._tell[name] = ask

    def count(self, crossed: Callable[[], int]) -> None:
        """Have ``crossed`` say from now on how many bytes crossed the case's link since its start.

        It is called at 20 Hz from a thread, so let it be quick and safe to call at any time.

        Raises:
            MeasureError: they are counted already.
        """
        if self.meter is not None:
            raise MeasureError("the bytes of this link are counted already")
        self.meter = _LinkMeter(crossed, self._sampler.period_s)

    @contextmanager
    def segment(self, name: str, *, since: str, until: str) -> Iterator[None]:
        """Mark the block as a stretch of ``name`` (one of ``SEGMENTS``); ``since``, ``until``: from where to where.

        Marks lie outside of what is timed. A block that raises leaves no stretch.

        Raises:
            MeasureError: another one is open; unknown; or a later segment has begun already.
        """
        if self._open is not None:
            raise MeasureError("segments do not nest", expected=f"{self._open} to stop first", got=name)
        check_order([*(stretch.name for stretch in self._stretches), name])
        self._open = name
        try:
            before = self._mark(name)
            start_ns = time.perf_counter_ns()
            yield
            stop_ns = time.perf_counter_ns()
        finally:
            self._open = None
        stretch = Segment(name, since, until, start_ns, stop_ns)
        after = self._mark(name)
        self._samples += [before, after]
        self._stretches.append(stretch)

    def _mark(self, name: str) -> Sample:
        told = {process: ask() for process, ask in self._tell.items()}
        if self.meter is not None:
            self.meter.read()
        return read_sample(self._sampler.command({"do": "mark", "of": self.key}), self.key, mark=name, told=told)

    def trace(self, rows: list[Sample]) -> Trace:
        """Everything of this case: marks and what was sampled between them."""
        if self.meter is not None:
            self.meter.stop()
        samples = sorted([*rows, *self._samples], key=lambda sample: sample.time_ns)
        if self.meter is not None:
            samples = [self.meter.fill(sample) for sample in samples]
        return Trace(tuple(samples), tuple(self._stretches))


class Sampler:
    """The sampler process. Use it in a ``with`` block: it ends with the block, whatever happens in it.

    Args:
        period_s: between two samples.
        gpu: also ask NVML what the processes use of NVIDIA GPUs.

    Raises:
        MeasureError: a period out of range. ResourceError: it does not start, or ends early.
    """

    def __init__(self, *, period_s: float = PERIOD_S, gpu: bool = False) -> None:
        self.period_s = check_period(period_s)
        self._gpu = gpu
        self._recorders: list[Recorder] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._held = b""
        self._lines: deque[bytes] = deque()

    @property
    def pid(self) -> int:
        """Process id of the sampler."""
        return self._running().pid

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "motte.measure.sampling_process", repr(self.period_s)]
        # A session of its own: Ctrl-C ends us, and our end ends it; and what a library starts in it ends with it.
        self._process = subprocess.Popen(
            [*command, "gpu" if self._gpu else "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for recorder in self._recorders:
            if recorder.meter is not None:
                recorder.meter.stop()
        self._end()

    def recorder(self) -> Recorder:
        """A recorder for one case."""
        made = Recorder(self, str(len(self._recorders)))
        self._recorders.append(made)
        return made

    def command(self, value: Mapping[str, Any]) -> Any:
        """Have the sampler do one thing; what it answers.

        Raises:
            ResourceError: it ended, or refused: there is no such process.
        """
        process = self._running()
        try:
            if process.stdin is not None:
                process.stdin.write(canonical(dict(value)) + b"\n")
                process.stdin.flush()
        except OSError as problem:
            raise self._ended(problem.strerror) from problem
        return self._answer()

    def finish(self) -> dict[Recorder, Trace]:
        """Stop sampling; the trace of every recorder.

        Raises:
            ResourceError: the sampler ended early, or ran out of room. FormatError: it wrote nonsense.
        """
        told = self.command({"do": "stop"})
        fields = Fields(told, where="sampler")
        count, full = fields.integer("rows", low=0, high=1 << 40), fields.boolean("full")
        fields.done()
        values = [parse(self._line(), max_bytes=MAX_RECORD_BYTES, what="sample") for _ in range(count)]
        self._end()
        if full:
            raise ResourceError("the sampler ran out of room", hint="trace a shorter run, or sample less often")
        return {
            each: each.trace([read_sample(value, each.key) for value in values if _is_of(value, each.key)])
            for each in self._recorders
        }

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise MeasureError("the sampler does not run", hint="use it in a with block, and finish once")
        return self._process

    def _answer(self) -> Any:
        fields = Fields(parse(self._line(), max_bytes=MAX_RECORD_BYTES, what="sampler"), where="sampler")
        if fields.has("error"):
            raise ResourceError("the sampler cannot do that", got=fields.text("error", max_bytes=MAX_RECORD_BYTES))
        value = fields.any("ok")
        fields.done()
        return value

    def _line(self) -> bytes:
        process = self._running()
        if process.stdout is None:
            raise MeasureError("the sampler has no output")
        handle = process.stdout.fileno()
        while not self._lines:
            if not select.select([handle], [], [], _TIMEOUT_S)[0]:
                raise ResourceError("the sampler does not answer", expected=f"an answer within {_TIMEOUT_S:g} s")
            data = os.read(handle, 1 << 20)
            if not data:
                raise self._ended(None)
            *lines, self._held = (self._held + data).split(b"\n")
            self._lines += lines
        return self._lines.popleft()

    def _ended(self, why: str | None) -> ResourceError:
        self._end()
        return ResourceError("the sampler ended", got=why, hint="its own words, if any, are above")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _LinkMeter:
    """Reads a counter of our own process at the sampler's rate."""

    def __init__(self, count: Callable[[], int], period_s: float) -> None:
        self._count = count
        self._period_s = period_s
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._times: list[int] = []
        self._values: list[int] = []
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="motte link meter", daemon=True)
        self._thread.start()

    def read(self) -> None:
        """Read the counter now, and keep what it says."""
        with self._lock:
            value = self._count()
            self._values.append(value)
            self._times.append(time.perf_counter_ns())

    def fill(self, sample: Sample) -> Sample:
        """``sample`` with what the counter said last before it.

        Raises:
            MeasureError: the counter raised; what it said before must not pass for what it would say now.
        """
        if self._failed:
            raise MeasureError("the link's counter failed while it was read")
        place = bisect_right(self._times, sample.time_ns) - 1
        if place < 0:
            return sample
        return replace(sample, link_bytes=self._values[place])

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        self._failed = True  # until the loop has ended by being stopped
        while not self._stopped.wait(self._period_s):
            self.read()
        self._failed = False


def read_sample(value: object, key: str, *, mark: str = "", told: Mapping[str, Told] | None = None) -> Sample:
    """The sampler's JSON values as the sample of the case ``key``.

    Raises:
        FormatError: malformed.
    """
    fields = Fields(value, where="sample")
    why = fields.any("energy_why")
    gpus, processes = fields.any("gpu"), fields.any("processes")
    if not isinstance(gpus, dict) or not isinstance(processes, dict):
        raise FormatError("not a table", where="sample")
    energy = _number(fields.any("energy_j"))
    time_ns = fields.integer("time_ns", low=0, high=(1 << 53) - 1)
    fields.done()
    gpu = _read_gpu(gpus[key]) if key in gpus else GpuReading(None, None, None, "no process of this case was watched")
    reasons = {"energy_j": why, "gpu": gpu.why}
    return Sample(
        time_ns=time_ns,
        processes={
            name.partition("/")[2]: None if each is None else read_process_sample(each, "sample", FormatError)
            for name, each in processes.items()
            if case_of(name) == key
        },
        energy_j=energy,
        gpu_percent=gpu.percent,
        gpu_memory_bytes=gpu.memory_bytes,
        gpu_power_w=gpu.power_w,
        mark=mark,
        told=dict(told or {}),
        why=read_reasons({name: text for name, text in reasons.items() if text is not None}, "sample", FormatError),
    )


def _read_gpu(value: object) -> GpuReading:
    fields = Fields(value, where="sample.gpu")
    percent, memory, power, why = (fields.any(name) for name in ("percent", "memory_bytes", "power_w", "why"))
    fields.done()
    size = (
        None if memory is None else Fields({"bytes": memory}, where="sample.gpu").integer("bytes", low=0, high=1 << 50)
    )
    return GpuReading(_number(percent), size, _number(power), why)


def _number(value: object) -> float | None:
    return None if value is None else Fields({"number": value}, where="sample").number("number")


def _is_of(value: object, key: str) -> bool:
    return isinstance(value, dict) and any(case_of(name) == key for name in value.get("processes", ()))
