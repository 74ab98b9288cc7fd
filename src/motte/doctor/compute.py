"""Processor features, engines, cores and memory: what decides how fast the trusted side is, not how safe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from motte.doctor import subjects
from motte.doctor.finding import Finding, State, Subject
from motte.doctor.system import System
from motte.errors import ResourceError
from motte.limits import GIB
from motte.measure.machine import memory_info

_FEATURES: Final = (
    (subjects.AES, ("aes",)),
    (subjects.VECTOR_AES, ("vaes", "vpclmulqdq")),
    (subjects.AVX512, ("avx512f",)),
    (subjects.AMX, ("amx_tile",)),
    (subjects.BFLOAT16, ("avx512_bf16",)),
)
"""Subject and the x86 flags that it needs, all of them."""
_ARM_FEATURES: Final = (
    (subjects.AES, ("aes", "pmull")),
    (subjects.BFLOAT16, ("bf16",)),
)
_FAMILIES: Final = {"avx512f": "avx512", "amx_tile": "amx_"}
"""Flags that stand for a family; the detail lists all of it (avx512_vnni, amx_bf16)."""
_ENGINES: Final = (
    (subjects.TORCH, ("torch",)),
    (subjects.ONNXRUNTIME, ("onnxruntime", "onnxruntime-gpu")),
    (subjects.OPENVINO, ("openvino",)),
)
_WANTED_MEMORY_BYTES: Final = 2 * GIB


def examine_compute(system: System) -> Iterator[Finding]:
    """Findings on processor, memory and engines, in the order in which they are shown."""
    yield _cores(system)
    yield _memory(system)
    flags = system.cpu().flags
    for subject, wanted in _ARM_FEATURES if system.architecture == "aarch64" else _FEATURES:
        yield _feature(subject, wanted, flags)
    for subject, distributions in _ENGINES:
        yield _engine(system, subject, distributions)
    yield _wait_policy(system)


def _cores(system: System) -> Finding:
    cpu = system.cpu()
    usable, quota = system.usable_cores(), _cpu_quota(system)
    detail = f"{cpu.model}: {cpu.logical_cores} logical processors"
    detail += "" if cpu.physical_cores is None else f" on {cpu.physical_cores} cores"
    detail += f", {usable} usable by this process"
    detail += "" if quota is None else f", at most {quota:.3g} at a time (control group)"
    several = usable > 1 and (quota is None or quota > 1)
    return subjects.CORES.found("present" if several else "absent", detail)


def _cpu_quota(system: System) -> float | None:
    """Processors that a control group allows, from its version 2 or 1 as mounted for this namespace."""
    words = (system.text("sys/fs/cgroup/cpu.max") or "").split()
    if not words:
        words = [system.text(f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    return None


def _memory(system: System) -> Finding:
    try:
        found = memory_info(system.root)
    except ResourceError:
        return subjects.MEMORY.found("unknown", "/proc/meminfo is not readable")
    detail = f"{found['MemTotal'] / GIB:.1f} GiB in all"
    available, limit = found.get("MemAvailable"), _memory_limit(system)
    detail += "" if available is None else f", {available / GIB:.1f} GiB available"
    detail += "" if limit is None else f", {limit / GIB:.1f} GiB allowed by the control group"
    bounds = [size for size in (available, limit) if size is not None]
    state: State = "unknown" if not bounds else "present" if min(bounds) >= _WANTED_MEMORY_BYTES else "absent"
    return subjects.MEMORY.found(state, detail)


def _memory_limit(system: System) -> int | None:
    text = system.text("sys/fs/cgroup/memory.max") or system.text("sys/fs/cgroup/memory/memory.limit_in_bytes") or ""
    # Version 1 says "no limit" with the largest multiple of a page below 2**63.
    return int(text) if text.isdecimal() and int(text) < 1 << 60 else None


def _feature(subject: Subject, wanted: tuple[str, ...], flags: frozenset[str]) -> Finding:
    if not flags:
        return subject.found("unknown", "/proc/cpuinfo lists no features")
    missing = [flag for flag in wanted if flag not in flags]
    if missing:
        return subject.found("absent", f"the processor does not list {', '.join(missing)}")
    family = _FAMILIES.get(wanted[0])
    shown = wanted if family is None else sorted(flag for flag in flags if flag.startswith(family))
    return subject.found("present", f"the processor lists {', '.join(shown)}")


def _engine(system: System, subject: Subject, distributions: tuple[str, ...]) -> Finding:
    found = [f"{name} {version}" for name in distributions if (version := system.version(name)) is not None]
    return subject.found("present" if found else "absent", ", ".join(found) or "not installed")


def _wait_policy(system: System) -> Finding:
    value = system.environment.get("OMP_WAIT_POLICY")
    if value is None:
        return subjects.WAIT_POLICY.found("absent", "not set")
    state: State = "present" if value.strip().upper() == "PASSIVE" else "absent"
    return subjects.WAIT_POLICY.found(state, f"set to {value[:40]!r}")
