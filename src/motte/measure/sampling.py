"""Reads what named processes use, and nothing else of the machine. Runs in the sampler's own process.

What crosses to and from that process are lines of JSON; :class:`ProcessSample` is one process at one moment.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from motte.errors import FormatError, MeasureError, ResourceError
from motte.limits import KIB, MAX_RECORD_TEXT_BYTES
from motte.measure.energy import Absent, EnergyMeter
from motte.measure.gpu import GpuMeter, GpuReading
from motte.measure.memory import proportional_bytes
from motte.strict_json import Fields

_MAX_COUNT: Final = (1 << 62) - 1
_CPU_CLOCK: Final = 2
"""CPUCLOCK_SCHED of the kernel's posix-timers.h: nanoseconds that the scheduler gave to all threads of a process."""
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_MAX_THREADS: Final = 256
"""Whose switches are counted one by one; each takes an open file."""
_FIGURES: Final = ("cpu_s", "rss_bytes", "peak_rss_bytes", "pss_bytes", "page_faults", "context_switches")
NOT_AT_MARK: Final = "read at marks only"
_BETWEEN: Final = dict.fromkeys(("peak_rss_bytes", "pss_bytes", "context_switches"), NOT_AT_MARK)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """One process at one moment, counted since its start. None: hidden from us, ``why`` says what the kernel said."""

    cpu_s: float | None
    rss_bytes: int | None
    peak_rss_bytes: int | None
    pss_bytes: int | None
    page_faults: int | None
    context_switches: int | None
    why: Mapping[str, str]


class WatchedProcess:
    """One process under test, through files of /proc that stay open.

    An open file of /proc belongs to the process and not to its number: a process that takes over the number later is
    never read. And it is cheap: opening the files anew, as ``psutil`` has to, takes a millisecond, which at 20 Hz alone
    would cost the measured work more than 1 %. For the same reason the high-water mark, which only rises, and the
    switches of every thread are read at marks only: the kernel writes a page of text for each of these.
    """

    def __init__(self, pid: int, *, proc: Path = Path("/proc")) -> None:
        """Raises ResourceError: there is no such process."""
        self.pid = pid
        self._place = proc / str(pid)
        self._threads: dict[str, tuple[int, int]] = {}
        self._open: tuple[int, int, int] | None = None
        try:
            os.kill(pid, 0)
        except ProcessLookupError as problem:
            raise ResourceError("there is no such process", where=f"pid {pid}") from problem
        except PermissionError:
            pass  # somebody else's, and there
        try:
            self._open = (_open(self._place / "stat"), _open(self._place / "statm"), _open(self._place / "status"))
        except OSError as problem:
            self._hidden = f"/proc hides this process from the sampler: {problem.strerror}"

    def close(self) -> None:
        """Give the open files back."""
        for handle in (*(self._open or ()), *(handle for handle, _ in self._threads.values() if handle >= 0)):
            os.close(handle)
        self._open, self._threads, self._hidden = None, {}, "not watched any more"

    def sample(self, *, mark: bool) -> ProcessSample | None:
        """Read it once; None when it has ended. ``mark``: also what takes long, proportional memory first of all."""
        if self._open is None:
            return ProcessSample(**dict.fromkeys(_FIGURES), why=dict.fromkeys(_FIGURES, self._hidden))
        stat, statm, status = self._open
        try:
            # The name, in parentheses, may hold spaces and parentheses of its own.
            words = _read(stat).rpartition(b")")[2].split()
            if words[0] in (b"Z", b"X"):
                return None
            faults = int(words[7]) + int(words[9])
            pages = int(_read(statm).split()[1])
            peak = _field(_read(status), b"VmHWM") if mark else None
            cpu_s = self._cpu_s(words)
        except ProcessLookupError:
            return None
        except (OSError, ValueError, IndexError) as problem:
            return ProcessSample(**dict.fromkeys(_FIGURES), why=dict.fromkeys(_FIGURES, f"/proc: {problem}"[:200]))
        resident = pages * _PAGE_BYTES
        if not mark:
            return ProcessSample(
                cpu_s=cpu_s,
                rss_bytes=resident,
                peak_rss_bytes=None,
                pss_bytes=None,
                page_faults=faults,
                context_switches=None,
                why=_BETWEEN,
            )
        why: dict[str, str] = {}
        share = proportional_bytes(self._place)
        if share is None:
            why["pss_bytes"] = "hidden: the process is not dumpable"
        if peak is None:
            why["peak_rss_bytes"] = "the kernel tells no high-water mark"
        return ProcessSample(
            cpu_s=cpu_s,
            rss_bytes=resident,
            peak_rss_bytes=None if peak is None else peak * KIB,
            pss_bytes=share,
            page_faults=faults,
            context_switches=self._switches(why),
            why=why,
        )

    def _cpu_s(self, words: list[bytes]) -> float:
        try:
            # /proc counts in ticks of 10 ms, a fifth of a sample at 20 Hz; this clock in nanoseconds.
            return time.clock_gettime((~self.pid << 3) | _CPU_CLOCK)
        except OSError:
            return (int(words[11]) + int(words[12])) / _TICKS

    def _switches(self, why: dict[str, str]) -> int | None:
        # The kernel tells them thread by thread, and forgets a thread that has ended: we do not.
        try:
            names = os.listdir(self._place / "task")
            if len(names) > _MAX_THREADS:
                why["context_switches"] = f"more than {_MAX_THREADS} threads"
                return None
            for name in names:
                if name not in self._threads:
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        self._threads[name] = (_open(self._place / "task" / name / "status"), 0)
            for name, (handle, _) in self._threads.items():
                if handle >= 0:
                    self._threads[name] = _counted(handle, self._threads[name])
        except (OSError, ValueError) as problem:
            why["context_switches"] = f"/proc: {problem}"[:200]
            return None
        return sum(count for _, count in self._threads.values())


def _counted(handle: int, before: tuple[int, int]) -> tuple[int, int]:
    """A thread's open file and its context switches; -1 and the last count when it has ended."""
    try:
        text = _read(handle)
    except ProcessLookupError:
        os.close(handle)
        return -1, before[1]
    return handle, (_field(text, b"\nvoluntary_ctxt_switches") or 0) + (
        _field(text, b"nonvoluntary_ctxt_switches") or 0
    )


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read(handle: int) -> bytes:
    return os.pread(handle, 16 * KIB, 0)


def _field(text: bytes, name: bytes) -> int | None:
    """The number behind ``name:`` in the text of a status file; None: there is no such line."""
    rest = text.partition(name + b":")[2].split(maxsplit=1)
    return int(rest[0]) if rest else None


class Reader:
    """All watched processes and, once for all of them, energy and GPUs."""

    def __init__(self, energy: EnergyMeter | Absent, gpu: GpuMeter | Absent) -> None:
        self.watched: dict[str, WatchedProcess] = {}
        self._energy = energy
        self._gpu = gpu

    def row(self, *, of: str | None = None) -> dict[str, Any]:
        """JSON values of one moment: of all processes, or of the case ``of`` alone, then with all that a mark reads."""
        time_ns = time.perf_counter_ns()
        chosen = {name: each for name, each in self.watched.items() if of is None or case_of(name) == of}
        processes: dict[str, Any] = {}
        for name, process in chosen.items():
            found = process.sample(mark=of is not None)
            processes[name] = None if found is None else {**{f: getattr(found, f) for f in _FIGURES}, "why": found.why}
        energy = self._energy if isinstance(self._energy, Absent) else self._energy.read_j()
        return {
            "time_ns": time_ns,
            "processes": processes,
            "energy_j": None if isinstance(energy, Absent) else energy,
            "energy_why": energy.why if isinstance(energy, Absent) else None,
            "gpu": self._gpus(chosen),
        }

    def _gpus(self, chosen: Mapping[str, WatchedProcess]) -> dict[str, Any]:
        """A GPU reading for each case, by its key."""
        groups: dict[str, list[int]] = {}
        for name, process in chosen.items():
            groups.setdefault(case_of(name), []).append(process.pid)
        if isinstance(self._gpu, Absent):
            found = dict.fromkeys(groups, GpuReading(None, None, None, self._gpu.why))
        else:
            found = self._gpu.read(groups)
        return {key: vars(reading) for key, reading in found.items()}


def case_of(name: str) -> str:
    """The key of the case to which a watched process belongs: what stands before the first slash of its name."""
    return name.partition("/")[0]


def read_process_sample(value: object, where: str, error: type[FormatError]) -> ProcessSample:
    """A sample out of the sampler's JSON values.

    Raises:
        error: malformed.
    """
    fields = Fields(value, where=where, error=error)
    counts = ("rss_bytes", "peak_rss_bytes", "pss_bytes", "page_faults", "context_switches")
    cpu_s = fields.any("cpu_s")
    found = {name: _count(fields.any(name), f"{where}.{name}", error) for name in counts}
    why = read_reasons(fields.any("why"), f"{where}.why", error)
    fields.done()
    if cpu_s is not None:
        cpu_s = Fields({"cpu_s": cpu_s}, where=where, error=error).number("cpu_s")
    return ProcessSample(cpu_s=cpu_s, **found, why=why)


def read_reasons(value: object, where: str, error: type[FormatError]) -> dict[str, str]:
    """A table name -> reason.

    Raises:
        error: malformed.
    """
    if not isinstance(value, dict):
        raise error("not a table of reasons", where=where)
    fields = Fields(value, where=where, error=error)
    return {name: fields.text(name, max_bytes=MAX_RECORD_TEXT_BYTES) for name in list(value)}


def _count(value: object, where: str, error: type[FormatError]) -> int | None:
    return (
        None
        if value is None
        else Fields({"count": value}, where=where, error=error).integer("count", low=0, high=_MAX_COUNT)
    )


def check_period(period_s: float) -> float:
    """A period between two samples, in seconds.

    Raises:
        MeasureError: not between 1 ms and a minute.
    """
    if not 0.001 <= period_s <= 60:
        raise MeasureError("out of range", where="period_s", expected="0.001 to 60", got=repr(period_s))
    return period_s
