"""Energy of the processor packages and their memory, where this machine tells it (RAPL), through ``zeus``.

Optional: ``pip install zeus`` (it brings no torch). RAPL counts a whole package, so that everything that ran on the
machine is in the figure: compare cases of one quiet, interleaved run, and never a process with a machine.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol

_RAPL: Final = ("/sys/class/powercap/intel-rapl", "/zeus_sys/class/powercap/intel-rapl")
"""Where zeus looks, itself and in a container; of AMD's processors too."""


@dataclass(frozen=True)
class Absent:
    """There is no such meter here, and why."""

    why: str


class Zone(Protocol):
    """One package as ``zeus.device.cpu`` gives it."""

    def get_total_energy_consumption(self) -> Any:
        """Counters since the machine's start: ``cpu_mj``, and ``dram_mj`` or None, in millijoules."""


class EnergyMeter:
    """Reads the counters of ``zones`` together."""

    def __init__(self, zones: Sequence[Zone]) -> None:
        self._zones = zones
        self._last: float | None = None

    def read_j(self) -> float | Absent:
        """Joules on a counter that only grows; where it starts means nothing."""
        try:
            read = [zone.get_total_energy_consumption() for zone in self._zones]
        except (OSError, ValueError) as problem:
            return Absent(f"RAPL cannot be read: {problem}")
        total: float = sum(each.cpu_mj + (each.dram_mj or 0.0) for each in read) / 1000
        if self._last is not None and total < self._last:
            # zeus notices an overflow of the counter up to a second late; until then there is no figure.
            return Absent("the counter has just overflowed")
        self._last = total
        return total


def find_energy_meter() -> EnergyMeter | Absent:
    """The meter of this machine.

    Starts one small child process a zone when first read (zeus watches the counters overflow); they end with us.
    """
    if not any(map(os.path.isdir, _RAPL)):
        return Absent("this machine shows no RAPL counters (/sys/class/powercap/intel-rapl)")
    if find_spec("zeus") is None:
        return Absent("zeus is not installed (pip install zeus)")
    try:
        with _quiet():
            found = import_module("zeus.device.cpu").get_cpus()
            zones = list(found.cpus)
    except Exception as problem:  # noqa: BLE001 - zeus roots its errors in Exception alone
        return Absent(f"no RAPL: {problem}")
    return meter_of(zones)


def meter_of(zones: Sequence[Any]) -> EnergyMeter | Absent:
    """The meter of those of zeus's ``zones`` that are packages: ``psys`` holds them all a second time."""
    named = [(zone, getattr(getattr(zone, "rapl_file", None), "name", None)) for zone in zones]
    packages = [zone for zone, name in named if name is not None and name.startswith("package")]
    if not packages and len(zones) == 1 and named[0][1] is None:
        packages = list(zones)  # read through zeusd, which gives no names
    return EnergyMeter(packages) if packages else Absent("RAPL shows no processor package")


@contextlib.contextmanager
def _quiet() -> Any:
    # A library that zeus loads prints to the standard output when it finds no card of its kind.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
    sys.stdout.flush()
