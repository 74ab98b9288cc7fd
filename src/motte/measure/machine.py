"""What this computer is, as far as /proc and /sys tell; read below ``root`` so that tests can show another machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from motte.errors import ResourceError
from motte.limits import KIB, MIB

_MAX_FILE_BYTES = 16 * MIB
_BLOCK_BYTES = 64 * KIB


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The facts that a timing depends on. None means that the machine does not tell.

    ``usable_cores`` is what the scheduler lets this process use, ``logical_cores`` what the machine shows.
    ``virtual``: the processor reports a hypervisor; False proves nothing.
    """

    cpu_model: str
    architecture: str
    logical_cores: int
    physical_cores: int | None
    usable_cores: int
    governor: str | None
    memory_bytes: int
    kernel: str
    virtual: bool


@dataclass(frozen=True)
class CpuInfo:
    """/proc/cpuinfo, summed up. ``flags`` are those that every listed processor has."""

    model: str
    logical_cores: int
    physical_cores: int | None
    flags: frozenset[str]


def read_text(root: Path, path: str) -> str | None:
    """The text of ``root``/``path``, stripped; None when it is absent or may not be read."""
    try:
        with (root / path.lstrip("/")).open("rb", buffering=0) as file:
            data = bytearray()
            # In small steps: a sysctl refuses a large buffer with ENOMEM, however little it has to say.
            while len(data) < _MAX_FILE_BYTES and (block := file.read(_BLOCK_BYTES)):
                data += block
    except OSError:
        return None
    return data.decode("utf-8", "replace").strip()


def cpu_info(root: Path = Path("/")) -> CpuInfo:
    """Read /proc/cpuinfo, as x86 and as ARM write it.

    Raises:
        ResourceError: it cannot be read or lists no processor.
    """
    text = read_text(root, "proc/cpuinfo")
    blocks = [] if text is None else [_pairs(block) for block in text.split("\n\n")]
    cores = [block for block in blocks if "processor" in block]
    if not cores:
        raise ResourceError("no processor is listed", where="/proc/cpuinfo", hint="mount /proc")
    first = cores[0]
    arm = f"ARM implementer {first.get('CPU implementer', '?')} part {first.get('CPU part', '?')}"
    placed = {(core.get("physical id"), core.get("core id")) for core in cores}
    known = all(None not in pair for pair in placed)
    return CpuInfo(
        model=first.get("model name") or (arm if "CPU part" in first else platform.machine()),
        logical_cores=len(cores),
        physical_cores=len(placed) if known else None,
        flags=frozenset.intersection(
            *(frozenset((core.get("flags") or core.get("Features") or "").split()) for core in cores)
        ),
    )


def memory_info(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes (``MemTotal``, ``MemAvailable``, ``SwapTotal``, ...).

    Raises:
        ResourceError: it cannot be read or has no total.
    """
    text = read_text(root, "proc/meminfo")
    found = {
        name: int(words[0]) * KIB
        for name, value in ({} if text is None else _pairs(text)).items()
        if (words := value.split()) and words[0].isdigit() and words[1:] == ["kB"]
    }
    if "MemTotal" not in found:
        raise ResourceError("the amount of memory is not readable", where="/proc/meminfo", hint="mount /proc")
    return found


def examine_machine(root: Path = Path("/")) -> Machine:
    """The machine that this process runs on.

    Raises:
        ResourceError: /proc is not readable.
    """
    cpu = cpu_info(root)
    return Machine(
        cpu_model=cpu.model,
        architecture=platform.machine(),
        logical_cores=cpu.logical_cores,
        physical_cores=cpu.physical_cores,
        usable_cores=len(os.sched_getaffinity(0)),
        governor=read_text(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        memory_bytes=memory_info(root)["MemTotal"],
        kernel=platform.release(),
        virtual="hypervisor" in cpu.flags,
    )


def _pairs(block: str) -> dict[str, str]:
    lines = (line.partition(":") for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in lines}
