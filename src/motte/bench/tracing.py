"""Traces of a bench: every case from its start through a steady stretch in which it alone works, sampled beside it.

The comparison itself is not sampled: it begins when the sampler has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, Self

from motte.bench.case import Case, TracePoint
from motte.errors import MotteError, ResourceError
from motte.measure.sampler import Recorder, Sampler
from motte.measure.traces import Told, Trace

STEADY_S: Final = 1.0
"""How long a case works alone: twenty samples."""
STEADY_LEAST: Final = 3
"""Runs of it, however long they take."""
FIGURES: Final = ("mean_memory_bytes", "cpu_percent", "energy_j", "power_w")


@dataclass(frozen=True)
class Traced:
    """A trace, and means over its steady stretch; None has its reason in ``missing``. ``energy_j``: of one run."""

    points: tuple[TracePoint, ...] = ()
    mean_memory_bytes: int | None = None
    cpu_percent: float | None = None
    energy_j: float | None = None
    power_w: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


def no_trace(why: str) -> Traced:
    """Nothing, for the reason ``why``."""
    return Traced(missing=dict.fromkeys(FIGURES, why))


NOT_TRACED: Final = no_trace("no trace was taken")


class Marks(Protocol):
    """Where a case says what it does now."""

    def watch(self, name: str, pid: int) -> None:
        """Sample the process ``pid`` from now on."""
        ...

    def tell(self, name: str, ask: Callable[[], Told]) -> None:
        """Ask the watched process ``name`` for its own figures at every mark."""
        ...

    def segment(self, name: str, *, since: str, until: str) -> AbstractContextManager[None]:
        """The block is a stretch of the segment ``name``."""
        ...

    def count(self, crossed: Callable[[], int]) -> None:
        """Ask ``crossed`` for the bytes over the link so far, often and from a thread."""
        ...


class NoMarks:
    """For a case that is not traced."""

    def watch(self, name: str, pid: int) -> None:
        """Nothing."""

    def tell(self, name: str, ask: Callable[[], Told]) -> None:
        """Nothing."""

    def segment(self, name: str, *, since: str, until: str) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def count(self, crossed: Callable[[], int]) -> None:
        """Nothing."""


class Tracer:
    """The traces of one group of cases; a context manager. Where no sampler can run, each trace says why.

    Args:
        wanted: False: nothing is traced.
        gpu: also ask the GPU.
    """

    def __init__(self, *, wanted: bool, gpu: bool = False) -> None:
        self._stack = ExitStack()
        self._sampler: Sampler | None = None
        self._why = "no trace was asked for"
        self._recorders: dict[Case, Recorder] = {}
        self._runs: dict[Case, int] = {}
        if wanted:
            try:
                self._sampler = self._stack.enter_context(Sampler(gpu=gpu))
            except ResourceError as problem:
                self._why = str(problem)[:300]

    def marks(self, case: Case) -> Marks:
        """Where ``case`` makes its marks."""
        if self._sampler is None:
            return NoMarks()
        recorder = self._sampler.recorder()
        self._recorders[case] = recorder
        return recorder

    def steady(self, case: Case, run: Callable[[], object]) -> None:
        """Have ``case`` work alone for a while."""
        recorder = self._recorders.get(case)
        if recorder is None:
            return
        with recorder.segment("steady", since="request sent", until="answers received"):
            until, runs = time.perf_counter() + STEADY_S, 0
            while runs < STEADY_LEAST or time.perf_counter() < until:
                run()
                runs += 1
        self._runs[case] = runs

    def finish(self) -> dict[Case, Traced]:
        """End the sampler; what it saw. Cases that never reached their steady stretch are not in it."""
        if self._sampler is None:
            return {}
        try:
            traces = self._sampler.finish()
        except MotteError as problem:
            self._why = str(problem)[:300]
            return {}
        return {
            case: _traced(case, traces[recorder], self._runs[case])
            for case, recorder in self._recorders.items()
            if case in self._runs
        }

    @property
    def why_not(self) -> Traced:
        """What stands for a case without a trace."""
        return no_trace(self._why)

    def close(self) -> None:
        """End the sampler, if it runs."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _traced(case: Case, trace: Trace, runs: int) -> Traced:
    seconds, joules = trace.seconds("steady"), trace.energy_j("steady")
    memory, busy = trace.mean_memory_bytes("steady"), trace.cpu_percent("steady")
    figures = {"mean_memory_bytes": memory, "cpu_percent": busy, "energy_j": joules, "power_w": joules}
    sources = {"mean_memory_bytes": "rss_bytes", "power_w": "energy_j"}
    missing = {name: trace.why(sources.get(name, name)) for name, value in figures.items() if value is None}
    return Traced(
        points=tuple(_points(case, trace)),
        mean_memory_bytes=memory,
        cpu_percent=busy,
        energy_j=None if joules is None else joules / runs,
        power_w=None if joules is None else joules / seconds,
        missing=missing,
    )


def _points(case: Case, trace: Trace) -> Iterator[TracePoint]:
    for point in trace.points():
        columns: dict[str, Any] = dict(point.figures)
        yield TracePoint(case=case, time_s=point.time_s, segment=point.segment, missing=dict(point.missing), **columns)
