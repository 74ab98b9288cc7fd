"""How much memory a process holds, from /proc/PID. Linux only; all sizes in bytes.

Which of the figures to quote: **peak_rss** for a bound (the kernel's own high-water mark, never missed between two
samples), **anonymous** for weights and activations (file mappings of shared libraries are not in it), **pss** when
several processes share pages, each of which it splits among its owners.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from motte.errors import ResourceError
from motte.limits import KIB

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One reading. ``pss_bytes`` is None where the kernel does not let this process read it, never 0.

    A trusted worker is non-dumpable: its PSS is readable by root alone, the rest by its owner.
    """

    rss_bytes: int
    peak_rss_bytes: int
    anonymous_bytes: int
    file_bytes: int
    shared_bytes: int
    swapped_bytes: int
    locked_bytes: int
    pss_bytes: int | None


_STATUS_FIELDS = {
    "rss_bytes": "VmRSS",
    "peak_rss_bytes": "VmHWM",
    "anonymous_bytes": "RssAnon",
    "file_bytes": "RssFile",
    "shared_bytes": "RssShmem",
    "swapped_bytes": "VmSwap",
    "locked_bytes": "VmLck",
}


def read_memory(pid: int | None = None, *, proc: Path = _PROC) -> Memory:
    """Read the memory of the process ``pid``, of this one when None.

    Raises:
        ResourceError: there is no such process, it has ended, or a field is missing.
    """
    place = proc / str(os.getpid() if pid is None else pid)
    try:
        status = _sizes((place / "status").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError) as problem:
        raise ResourceError(
            "the memory of this process cannot be read", where=str(place / "status"), got=str(problem)
        ) from problem
    missing = [field for field in _STATUS_FIELDS.values() if field not in status]
    if missing:
        # A zombie keeps its status file but has no memory left: that is no figure either.
        raise ResourceError(
            "the process has no memory of its own", where=str(place / "status"), got=f"no {', '.join(missing)}",
            hint="it has ended, or is a kernel thread",
        )  # fmt: skip
    return Memory(
        **{name: status[field] for name, field in _STATUS_FIELDS.items()}, pss_bytes=proportional_bytes(place)
    )


def peak_rss_bytes(pid: int | None = None) -> int:
    """The most that ``pid`` ever held resident, since its start or the last :func:`reset_peak`.

    Raises:
        ResourceError: as :func:`read_memory`.
    """
    return read_memory(pid).peak_rss_bytes


def reset_peak(pid: int | None = None, *, proc: Path = _PROC) -> None:
    """Set the high-water mark of ``pid`` back to what it holds now.

    Raises:
        ResourceError: the kernel does not let this process do so.
    """
    place = proc / str(os.getpid() if pid is None else pid) / "clear_refs"
    try:
        # Opened without O_CREAT: a wrong path must fail instead of writing a file.
        handle = os.open(place, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(handle, b"5")
        finally:
            os.close(handle)
    except OSError as problem:
        raise ResourceError("the peak of this process cannot be reset", where=str(place), got=str(problem)) from problem


def proportional_bytes(place: Path) -> int | None:
    """The proportional set size of the process whose folder in /proc is ``place``; None where it is hidden from us.

    The kernel walks all its page tables for it: milliseconds for a large process.
    """
    try:
        return _sizes((place / "smaps_rollup").read_text(encoding="utf-8", errors="replace")).get("Pss")
    except (OSError, ValueError):
        return None


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that new processes may take without swapping.

    Raises:
        ResourceError: the kernel does not say.
    """
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KIB
    except (OSError, ValueError) as problem:
        raise ResourceError("the free memory cannot be read", where=str(meminfo), got=str(problem)) from problem
    raise ResourceError("the free memory cannot be read", where=str(meminfo), expected="MemAvailable")


def _sizes(text: str) -> dict[str, int]:
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            found[name.strip()] = int(words[0]) * KIB
    return found
