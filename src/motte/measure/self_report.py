"""What a process says about itself, for one whose figures are hidden from a sampler beside it.

A hardened worker is not dumpable: its proportional memory is readable by root alone, and the memory of an enclave is in
no table of the host's kernel at all. So it counts itself and answers over its link. What it says is as trustworthy as
the process is. Small and quick to import: neither torch nor numpy, nothing but what every worker has loaded anyway.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from motte.errors import FormatError, FrameError, MeasureError, ResourceError
from motte.limits import MAX_NAME_BYTES
from motte.measure.memory import read_memory
from motte.strict_json import Fields

_MAX_COUNT: Final = (1 << 53) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfReport:
    """One process's own figures, counted since its start. None: not to be had, ``missing`` says why.

    Attributes:
        cpu_s: user and system time of all its threads, in seconds.
        minor_faults, major_faults: pages that were mapped without and with reading a disk.
        voluntary_switches, involuntary_switches: it waited; the scheduler took its core away.
        rss_bytes, peak_rss_bytes, pss_bytes, anonymous_bytes, locked_bytes: as :class:`motte.measure.memory.Memory`.
        missing: name -> why.
    """

    cpu_s: float | None
    minor_faults: int | None
    major_faults: int | None
    voluntary_switches: int | None
    involuntary_switches: int | None
    rss_bytes: int | None
    peak_rss_bytes: int | None
    pss_bytes: int | None
    anonymous_bytes: int | None
    locked_bytes: int | None
    missing: Mapping[str, str]

    def __post_init__(self) -> None:
        absent = {name for name in _FIGURES if getattr(self, name) is None}
        if absent != set(self.missing):
            raise MeasureError("a missing figure needs a reason, and only that", got=str(sorted(absent)))

    @property
    def page_faults(self) -> int | None:
        """Of both kinds."""
        return _sum(self.minor_faults, self.major_faults)

    @property
    def context_switches(self) -> int | None:
        """Of both kinds."""
        return _sum(self.voluntary_switches, self.involuntary_switches)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "missing": dict(self.missing)}

    @staticmethod
    def from_json(value: object, *, where: str = "self", error: type[FormatError] = FrameError) -> SelfReport:
        """Read **unverified** JSON values.

        Raises:
            error: a missing, unknown or ill-typed field, a negative figure, a None without a reason.
        """
        given = Fields(value, where=where, error=error)
        figures: dict[str, Any] = {name: _read(given, name, error) for name in _FIGURES}
        said = given.any("missing")
        good = isinstance(said, dict) and all(
            isinstance(why, str) and len(why) <= MAX_NAME_BYTES for why in said.values()
        )
        if not good or set(said) != {name for name, figure in figures.items() if figure is None}:
            raise error("not a table of what is missing and why", where=f"{where}.missing")
        given.done()
        return SelfReport(**figures, missing=said)


_FIGURES: Final = tuple(field.name for field in fields(SelfReport) if field.name != "missing")
_USAGE: Final = {
    "minor_faults": "ru_minflt",
    "major_faults": "ru_majflt",
    "voluntary_switches": "ru_nvcsw",
    "involuntary_switches": "ru_nivcsw",
}
_MEMORY: Final = ("rss_bytes", "peak_rss_bytes", "pss_bytes", "anonymous_bytes", "locked_bytes")


def report_self(*, proc: Path = Path("/proc")) -> SelfReport:
    """What this process can say of itself now. Never raises: what cannot be had is None, with its reason.

    Not for every request: finding the proportional memory walks all page tables, milliseconds for a large model.
    """
    figures: dict[str, Any] = dict.fromkeys(_FIGURES)
    missing: dict[str, str] = {}
    try:
        figures["cpu_s"] = time.process_time()
    except OSError as problem:
        missing["cpu_s"] = f"no CPU clock: {problem.strerror}"
    try:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        figures |= {name: getattr(usage, kernel_name) for name, kernel_name in _USAGE.items()}
    except OSError as problem:
        missing |= dict.fromkeys(_USAGE, f"getrusage: {problem.strerror}")
    try:
        memory = read_memory(proc=proc)
        figures |= {name: getattr(memory, name) for name in _MEMORY}
        if memory.pss_bytes is None:
            missing["pss_bytes"] = "the kernel does not let this process read it"
    except ResourceError as problem:
        missing |= dict.fromkeys(_MEMORY, (problem.got or problem.message)[: MAX_NAME_BYTES // 2])
    return SelfReport(**figures, missing=missing)


def _read(given: Fields, name: str, error: type[FormatError]) -> float | int | None:
    value = given.any(name)
    if value is None:
        return None
    inner = Fields({name: value}, where=given.where, error=error)
    if name != "cpu_s":
        return inner.integer(name, low=0, high=_MAX_COUNT)
    seconds = inner.number(name)
    if seconds < 0:
        raise error("a figure is negative", where=f"{given.where}.{name}", got=repr(seconds))
    return seconds


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
