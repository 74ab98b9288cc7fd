"""What the kernel gives a process to protect itself with: against other users and accidents, never against root."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from motte.doctor import subjects
from motte.doctor.finding import Finding, State
from motte.doctor.probe import Answer
from motte.doctor.system import System
from motte.limits import MIB

_WANTED_MEMLOCK_BYTES: Final = 64 * MIB
_CAP_IPC_LOCK: Final = 14
_PTRACE_SCOPES: Final = {
    "1": "only a parent may trace",
    "2": "only an administrator may trace",
    "3": "nobody may trace",
}
_SECCOMP_MODES: Final = {"0": "no filter on this process", "1": "strict mode", "2": "a filter is on this process"}


def examine_kernel(system: System) -> Iterator[Finding]:
    """Findings on the memory, leftovers and sandboxing of a process, in the order in which they are shown."""
    yield _memfd_secret(system)
    yield _locked_memory(system)
    yield _swap_off(system)
    yield _core_pattern(system)
    yield _ptrace(system)
    yield _seccomp(system)
    yield _landlock(system)


def _refusal(answer: Answer) -> tuple[State, str]:
    """State and words for an answer that is not a success."""
    if answer.killed:
        return "absent", f"trying it was answered with {answer.text}: a sandbox forbids it"
    if answer.text == "ENOSYS":
        return "absent", "this kernel does not have it, or has it switched off (ENOSYS)"
    if answer.text in ("EPERM", "EACCES"):
        return "absent", f"forbidden here, by a sandbox or the administrator ({answer.text})"
    if answer.text == "unnumbered":
        return "unknown", "its number is not known for this architecture"
    if answer.text == "failed":
        return "unknown", "the attempt itself failed"
    return "absent", f"it answered {answer.text}"


def _memfd_secret(system: System) -> Finding:
    answer = system.ask("memfd_secret", system.architecture)
    if answer.text == "ok":
        return subjects.MEMFD_SECRET.found("present", "memfd_secret(2) gave a page that was written and read back")
    if answer.text.startswith("page "):
        detail = f"memfd_secret(2) gives no page ({answer.text[5:]}): see the limit on locked memory"
        return subjects.MEMFD_SECRET.found("absent", detail)
    return subjects.MEMFD_SECRET.found(*_refusal(answer))


def _locked_memory(system: System) -> Finding:
    limit = system.memlock_limit_bytes()
    detail = "RLIMIT_MEMLOCK: " + ("no limit" if limit is None else f"{limit / MIB:.3g} MiB")
    lifted = _has_capability(system.text("proc/self/status") or "", _CAP_IPC_LOCK)
    if lifted and limit is not None:
        detail += ", lifted by CAP_IPC_LOCK"
    enough = lifted or limit is None or limit >= _WANTED_MEMLOCK_BYTES
    return subjects.LOCKED_MEMORY.found("present" if enough else "absent", detail)


def _swap_off(system: System) -> Finding:
    text = system.text("proc/swaps")
    if text is None:
        return subjects.SWAP_OFF.found("unknown", "/proc/swaps is not readable")
    areas = [line.split()[0] for line in text.splitlines()[1:] if line.split()]
    if areas:
        return subjects.SWAP_OFF.found("absent", f"swap on {', '.join(areas)}")
    return subjects.SWAP_OFF.found("present", "no swap area")


def _core_pattern(system: System) -> Finding:
    pattern = system.text("proc/sys/kernel/core_pattern")
    if pattern is None:
        return subjects.CORE_PATTERN.found("unknown", "kernel.core_pattern is not readable")
    state: State = "absent" if pattern.startswith("|") else "present"
    return subjects.CORE_PATTERN.found(state, f"kernel.core_pattern is {pattern[:120]!r}")


def _ptrace(system: System) -> Finding:
    scope = system.text("proc/sys/kernel/yama/ptrace_scope")
    if scope is None:
        return subjects.PTRACE.found("absent", "this kernel has no Yama")
    words = _PTRACE_SCOPES.get(scope)
    if words is None:
        return subjects.PTRACE.found("absent", f"kernel.yama.ptrace_scope is {scope[:20]}")
    return subjects.PTRACE.found("present", f"kernel.yama.ptrace_scope is {scope}: {words}")


def _seccomp(system: System) -> Finding:
    answer = system.ask("seccomp", system.architecture)
    if answer.text == "EINVAL":
        return subjects.SECCOMP.found("absent", "this kernel was built without it (EINVAL)")
    if answer.killed or answer.text not in _SECCOMP_MODES:
        return subjects.SECCOMP.found(*_refusal(answer))
    actions = system.text("proc/sys/kernel/seccomp/actions_avail")
    detail = _SECCOMP_MODES[answer.text] + ("" if actions is None else f"; actions: {actions[:120]}")
    # PR_GET_SECCOMP answers 0 on a kernel that has strict mode only; the list of actions shows that filters exist.
    return subjects.SECCOMP.found("unknown" if actions is None else "present", detail)


def _landlock(system: System) -> Finding:
    answer = system.ask("landlock", system.architecture)
    if answer.text.isdecimal():
        return subjects.LANDLOCK.found("present", f"Landlock ABI {answer.text}")
    if answer.text == "EOPNOTSUPP":
        return subjects.LANDLOCK.found("absent", "built into this kernel, but not switched on at boot (EOPNOTSUPP)")
    return subjects.LANDLOCK.found(*_refusal(answer))


def _has_capability(status: str, number: int) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]{1,32})$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> number & 1)
