"""All findings, in the order in which they are shown."""

from __future__ import annotations

from motte.doctor.compute import examine_compute
from motte.doctor.finding import Finding
from motte.doctor.hardware import examine_hardware
from motte.doctor.kernel import examine_kernel
from motte.doctor.system import System


def examine(system: System | None = None) -> list[Finding]:
    """Look at this machine, or at ``system``. Changes nothing; takes well under a second where no GPU driver is asked.

    Raises:
        ResourceError: /proc is not mounted.
    """
    looked_at = System() if system is None else system
    return [*examine_hardware(looked_at), *examine_kernel(looked_at), *examine_compute(looked_at)]
