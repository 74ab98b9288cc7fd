"""Records: one line of JSON per figure, with everything that is needed to judge it. Format: docs/spec/records.md.

A figure without its unit, its threads or its revision is a rumour. :func:`state` gathers all of it, and
:mod:`motte.measure.record_file` writes and reads the lines.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from motte.errors import MeasureError
from motte.limits import MAX_RECORD_ENTRIES, MAX_RECORD_SAMPLES, MAX_RECORD_TEXT_BYTES
from motte.measure.clock import Segments
from motte.measure.machine import Machine, examine_machine
from motte.measure.provenance import Revision, command_line, package_versions, revision

FORMAT: Final = "motte-record/2"
READ_FORMATS: Final = ("motte-record/1", FORMAT)
"""What the reader takes; the first has no digests."""
UNITS: Final = ("s", "B", "B/s", "1", "%", "count", "FLOP", "FLOP/s", "1/s", "W", "J")
"""Base units only: no ms beside s, no MiB beside B. ``1`` is a ratio."""
STATISTICS: Final = ("single", "median", "minimum", "maximum")
ENCLAVE_KINDS: Final = ("none", "process", "gramine-direct", "gramine-sgx", "vm", "sgx", "tdx", "sev-snp")
"""``none``: outside of any trusted process, such as the unprotected baseline. ``process`` to ``vm``: as the command
line names them; the last three: of evidence whose way of starting is not known."""
ALWAYS_SIMULATED: Final = ("process", "gramine-direct")
"""Kinds without hardware protection, whatever machine they run on."""

Parameter = str | int | float | bool
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_STATISTIC: Final[Mapping[str, Callable[[Sequence[float]], float]]] = {
    "median": statistics.median,
    "minimum": min,
    "maximum": max,
}


@dataclass(frozen=True)
class Enclave:
    """Where the trusted side ran. ``simulated``: without hardware protection; :data:`ALWAYS_SIMULATED` kinds are."""

    kind: str
    simulated: bool

    def __post_init__(self) -> None:
        if self.kind not in ENCLAVE_KINDS:
            raise MeasureError("unknown enclave kind", expected=" or ".join(ENCLAVE_KINDS), got=repr(self.kind))
        if self.kind in ALWAYS_SIMULATED and not self.simulated:
            raise MeasureError(
                "this kind is always simulated", where=self.kind, expected="simulated", got="not simulated"
            )
        if self.kind == "none" and self.simulated:
            raise MeasureError("nothing trusted ran, so nothing was simulated", where="enclave kind none")

    def __str__(self) -> str:
        return f"{self.kind} (SIMULATED: no hardware protection)" if self.simulated else self.kind


UNPROTECTED: Final = Enclave("none", simulated=False)
PROCESS: Final = Enclave("process", simulated=True)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the measured work ran on. ``dtype``, ``engine``: "none" where no tensor takes part (reading a file)."""

    threads: int
    dtype: str
    device: str
    engine: str
    enclave: Enclave

    def __post_init__(self) -> None:
        if type(self.threads) is not int or self.threads < 1:
            raise MeasureError("not a number of threads", expected="at least 1", got=repr(self.threads))
        for name in ("dtype", "device", "engine"):
            check_text(getattr(self, name), f"setting.{name}")


@dataclass(frozen=True)
class Interval:
    """A confidence interval in the unit of the figure."""

    low: float
    high: float
    confidence: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise MeasureError("not an interval", where="interval", got=f"{self.low} to {self.high}")
        if not 0 < self.confidence < 1:
            raise MeasureError("out of range", where="interval.confidence", got=repr(self.confidence))


@dataclass(frozen=True, kw_only=True)
class Digests:
    """SHA-256 of what was measured, in lower-case hexadecimal. None: there is none, or it is not known.

    ``model``: of the captured graph's text, the one that a plan names. ``bundle``: of the whole bundle file.
    """

    model: str | None = None
    bundle: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "bundle"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and _DIGEST.fullmatch(value)):
                raise MeasureError("not a SHA-256", where=f"digests.{name}", expected="64 hex digits", got=repr(value))


NO_DIGESTS: Final = Digests()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One figure. Build it with :func:`state`; the numbered rules of docs/spec/records.md hold for every instance.

    ``what`` says from where to where; ``parameters`` hold what the figure depends on beside the setting (model, batch,
    parts); ``samples`` are in ``unit`` and in the order of measurement.
    """

    time: str
    series: str
    what: str
    value: float
    unit: str
    statistic: str
    samples: tuple[float, ...]
    interval: Interval | None
    parameters: Mapping[str, Parameter]
    segments: Segments
    setting: Setting
    machine: Machine
    packages: Mapping[str, str]
    revision: Revision | None
    command: tuple[str, ...]
    digests: Digests = NO_DIGESTS
    format: str = field(default=FORMAT, init=False)

    def __post_init__(self) -> None:
        for name in ("series", "what"):
            check_text(getattr(self, name), name)
        for name in ("cpu_model", "architecture", "kernel"):
            check_text(getattr(self.machine, name), f"machine.{name}")
        _check_time(self.time)
        if self.unit not in UNITS:
            raise MeasureError("unknown unit", where="unit", expected=" or ".join(UNITS), got=repr(self.unit))
        check_number(self.value, "value")
        _check_statistic(self.value, self.statistic, self.samples)
        for key, value in self.parameters.items():
            check_text(key, "parameters")
            _check_parameter(value, f"parameters.{key}")
        for key, version in self.packages.items():
            check_text(key, "packages")
            check_text(version, f"packages.{key}")
        for count, name in ((len(self.parameters), "parameters"), (len(self.packages), "packages")):
            _check_count(count, name)
        if not self.command:
            raise MeasureError("a figure without its command cannot be repeated", where="command")
        _check_count(len(self.command), "command")
        if self.revision is not None and not _COMMIT.fullmatch(self.revision.commit):
            raise MeasureError("not a commit", where="revision.commit", got=repr(self.revision.commit))


def state(
    *,
    series: str,
    what: str,
    value: float,
    unit: str,
    setting: Setting,
    statistic: str = "single",
    samples: Sequence[float] = (),
    interval: Interval | None = None,
    parameters: Mapping[str, Parameter] | None = None,
    segments: Segments | None = None,
    digests: Digests = NO_DIGESTS,
) -> Record:
    """State one figure, together with the machine, versions, revision, command and time of this process.

    Raises:
        MeasureError: the value is missing or not finite, or contradicts its samples; a text is empty; an unknown unit.
        ResourceError: the machine's facts are not readable.
    """
    return Record(
        time=datetime.now(UTC).strftime(_TIME),
        series=series,
        what=what,
        value=check_number(value, "value"),
        unit=unit,
        statistic=statistic,
        samples=tuple(check_number(sample, "samples") for sample in samples),
        interval=interval,
        parameters=dict(parameters or {}),
        segments=segments or Segments(()),
        setting=setting,
        machine=examine_machine(),
        packages=package_versions(),
        revision=revision(),
        command=command_line(),
        digests=digests,
    )


def check_text(value: object, where: str) -> str:
    """``value``, when it is a text that is not empty and in bounds.

    Raises:
        MeasureError: it is not.
    """
    if not isinstance(value, str) or not value.strip():
        raise MeasureError("a text is missing", where=where, got=repr(value)[:80])
    if len(value.encode("utf-8", "surrogatepass")) > MAX_RECORD_TEXT_BYTES:
        raise MeasureError("a text is too long", where=where, expected=f"at most {MAX_RECORD_TEXT_BYTES} bytes")
    return value


def check_number(value: object, where: str) -> float:
    """``value`` as a float, when it is a finite number; None, NaN and True are missing values, not zeros.

    Raises:
        MeasureError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MeasureError("the value is missing or not finite", where=where, got=repr(value)[:80])
    return float(value)


def _check_parameter(value: object, where: str) -> None:
    if isinstance(value, str):
        check_text(value, where)
    elif not isinstance(value, bool):
        check_number(value, where)


def _check_count(count: int, where: str) -> None:
    if count > MAX_RECORD_ENTRIES:
        raise MeasureError("too many entries", where=where, expected=f"at most {MAX_RECORD_ENTRIES}", got=str(count))


def _check_time(text: str) -> None:
    try:
        datetime.strptime(text, _TIME)
    except (TypeError, ValueError) as problem:
        raise MeasureError(
            "not a time", where="time", expected="2031-12-31T23:59:59Z", got=repr(text)[:80]
        ) from problem


def _check_statistic(value: float, statistic: str, samples: tuple[float, ...]) -> None:
    if statistic not in STATISTICS:
        raise MeasureError(
            "unknown statistic", where="statistic", expected=" or ".join(STATISTICS), got=repr(statistic)
        )
    if len(samples) > MAX_RECORD_SAMPLES:
        raise MeasureError("too many samples", expected=f"at most {MAX_RECORD_SAMPLES}", got=str(len(samples)))
    if statistic == "single":
        if samples:
            raise MeasureError("a single value has no samples", where="samples", got=f"{len(samples)} samples")
        return
    if not samples:
        raise MeasureError("a statistic needs its samples", where="samples", got=f"a {statistic} of none")
    of_samples = _STATISTIC[statistic](samples)
    if not math.isclose(value, of_samples, rel_tol=1e-9, abs_tol=1e-300):
        raise MeasureError(
            "the value is not that of its samples", expected=f"{statistic} {of_samples!r}", got=repr(value)
        )
