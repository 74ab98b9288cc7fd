"""What a process that will hold secrets does to itself before it holds any. Needs no privilege.

It shuts out other users, accidents and, by what it cannot call any more, much of what a flaw in an engine could do.
It **does not** shut out the administrator, who can inject code (ptrace) or change the kernel.

Three moments, in this order: :func:`harden` at any time; :func:`before_threads` while the process has one thread, since
Landlock restricts no other; :func:`after_threads` before the first secret arrives, with the engine loaded. What the
kernel lacks is said in :attr:`Hardening.lacking`, and whoever needs it demands it.
"""

from __future__ import annotations

import resource
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from motte.errors import FrameError, ResourceError, SettingError
from motte.limits import MAX_NAME_BYTES
from motte.strict_json import Fields
from motte.trusted import landlock, seccomp
from motte.trusted.kernel import process_control
from motte.trusted.secret_memory import why_no_secret_memory

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_FILTERED: Final = 2

NOT_DUMPABLE: Final = "not dumpable"
NO_CORE_FILES: Final = "no core files"
NO_NEW_PRIVILEGES: Final = "no new privileges"
SECRET_MEMORY: Final = "secret memory"  # noqa: S105 - the name of a measure
LANDLOCK: Final = "Landlock"
SECCOMP: Final = "seccomp"
MEASURES: Final = (NOT_DUMPABLE, NO_CORE_FILES, NO_NEW_PRIVILEGES, SECRET_MEMORY, LANDLOCK, SECCOMP)
"""Names of the measures, as :func:`harden` and :meth:`Hardening.demand` take them."""
_NOT_YET: Final = "not asked for"


@dataclass(frozen=True, slots=True)
class Hardening:
    """What holds for this process, as the kernel says when asked again. A process says this of itself: **unverified**.

    Attributes:
        dumpable: True: other processes of the same user may trace it, and it may leave a core file.
        core_limit_bytes: largest core file.
        no_new_privileges: no program that it runs gains any.
        secret_memory: whether memfd_secret(2) gives memory; how much lies there, arenas and keys say themselves.
        landlock_abi: by which ABI of Landlock it is restricted; 0: not at all.
        seccomp_mode: 2: every thread is under a filter of system calls; 0: not every one.
        lacking: measure -> why it does not hold; what is not listed holds.
    """

    dumpable: bool
    core_limit_bytes: int
    no_new_privileges: bool
    secret_memory: bool
    landlock_abi: int = 0
    seccomp_mode: int = 0
    lacking: Mapping[str, str] = field(default_factory=dict)

    def demand(self, measures: Collection[str]) -> None:
        """Refuse to go on where one of ``measures`` does not hold.

        Raises:
            ResourceError: says which ones, and why. SettingError: no such measure.
        """
        if unknown := set(measures) - set(MEASURES):
            raise SettingError(
                "no such measure", got=", ".join(sorted(map(repr, unknown))), expected=", ".join(MEASURES)
            )
        if missing := [name for name in MEASURES if name in measures and name in self.lacking]:
            raise ResourceError(
                "this process is not hardened as demanded",
                expected=", ".join(missing),
                got="; ".join(f"{name}: {self.lacking[name]}" for name in missing),
                hint="see motte doctor, or demand less",
            )

    def lines(self) -> tuple[str, ...]:
        """One line for each measure that does not hold: ``not hardened: seccomp: why``."""
        return tuple(f"not hardened: {name}: {why}" for name, why in self.lacking.items())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "lacking": dict(self.lacking)}

    @staticmethod
    def from_json(value: object, *, where: str = "hardening") -> Hardening:
        """Read **unverified** JSON values.

        Raises:
            FrameError: a missing, unknown or ill-typed field, or a measure that is not known.
        """
        fields = Fields(value, where=where, error=FrameError)
        said = fields.any("lacking")
        known = isinstance(said, dict) and set(said) <= set(MEASURES)
        if not known or not all(isinstance(why, str) and len(why) <= MAX_NAME_BYTES for why in said.values()):
            raise FrameError("not a table of measures and reasons", where=f"{where}.lacking")
        found = Hardening(
            dumpable=fields.boolean("dumpable"),
            core_limit_bytes=fields.integer("core_limit_bytes", low=0, high=1 << 62),
            no_new_privileges=fields.boolean("no_new_privileges"),
            secret_memory=fields.boolean("secret_memory"),
            landlock_abi=fields.integer("landlock_abi", low=0, high=1 << 16),
            seccomp_mode=fields.integer("seccomp_mode", low=0, high=2),
            lacking=said,
        )
        fields.done()
        return found


def elsewhere(why: str) -> Hardening:
    """What holds where there is no Linux kernel of our own to ask: nothing that this module does, and ``why``."""
    return Hardening(True, 0, False, False, lacking=dict.fromkeys(MEASURES, why))


def harden(*, require: Collection[str] = ()) -> Hardening:
    """Make this process non-dumpable, without core files or new privileges, and see whether it can have secret memory.

    Not tied to its parent by ``PR_SET_PDEATHSIG``: that signal comes when the *thread* that started us ends. The end of
    the link is what ends a worker.

    Args:
        require: measures of :data:`MEASURES` without which nothing secret may be received.

    Raises:
        ResourceError: the kernel refused one of the first three, or lacks one that is required.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        process_control(_PR_SET_DUMPABLE, 0)
        process_control(_PR_SET_NO_NEW_PRIVS, 1)
        dumpable = bool(process_control(_PR_GET_DUMPABLE))
        unprivileged = bool(process_control(_PR_GET_NO_NEW_PRIVS))
    except OSError as problem:
        raise ResourceError("the kernel refused to harden the process", got=str(problem)) from problem
    core_bytes = resource.getrlimit(resource.RLIMIT_CORE)[1]
    why = why_no_secret_memory()
    reasons = {
        NOT_DUMPABLE: "the kernel says it still is" if dumpable else None,
        NO_CORE_FILES: f"the kernel still allows {core_bytes} bytes" if core_bytes else None,
        NO_NEW_PRIVILEGES: None if unprivileged else "the kernel says it still may",
        SECRET_MEMORY: why,
        LANDLOCK: _NOT_YET,
        SECCOMP: _NOT_YET,
    }
    lacking = {name: reason for name, reason in reasons.items() if reason is not None}
    found = Hardening(dumpable, core_bytes, unprivileged, why is None, lacking=lacking)
    found.demand(require)
    return found


def beside_driver() -> Hardening:
    """:func:`harden`, for a worker that drives a GPU: its driver's library opens devices, maps them and makes requests
    of them for as long as it computes, so neither Landlock nor the filter can come after it was loaded.

    Raises:
        ResourceError: as :func:`harden`.
    """
    found = harden()
    why = "it drives a GPU, whose driver opens devices and makes requests of them"
    return replace(found, lacking={**found.lacking, LANDLOCK: why, SECCOMP: why})


def before_threads(*, readable: Sequence[Path] = (), require: Collection[str] = ()) -> Hardening:
    """:func:`harden`, and give up all files but those that the interpreter still reads (Landlock), and ``readable``.

    Nothing can be written or made anywhere any more, no TCP port bound or connected to (ABI 4), no signal sent to a
    process outside (ABI 6). What is open already stays usable, and a descriptor that is handed over later is.

    Args:
        readable: further files, or folders with all below them. A file that is replaced later is another file.
        require: as of :func:`harden`; Landlock among them.

    Raises:
        ResourceError: as :func:`harden`; or another thread runs already.
    """
    found = harden(require=set(require) - {LANDLOCK, SECCOMP})
    try:
        version = landlock.restrict([*landlock.interpreter_paths(), *readable])
    except OSError as problem:
        found = replace(found, lacking={**found.lacking, LANDLOCK: landlock.why_not(problem)})
    else:
        found = replace(found, landlock_abi=version, lacking=_without(found.lacking, LANDLOCK))
    found.demand(set(require) - {SECCOMP})
    return found


def after_threads(found: Hardening, *, require: Collection[str] = ()) -> Hardening:
    """Put every thread of this process, and those that it will start, under the filter of :mod:`motte.trusted.seccomp`.

    Afterwards it can start threads, read files that Landlock leaves it and use what is open; it can open no socket, run
    nothing and open no file for writing.

    Args:
        found: what :func:`before_threads` said.
        require: as of :func:`harden`; seccomp among them.

    Raises:
        ResourceError: a required measure does not hold; or a thread stayed outside of the filter.
    """
    why = seccomp.unsupported()
    if why is None:
        try:
            seccomp.load()
        except OSError as problem:
            why = seccomp.why_not(problem)
    mode = seccomp.mode()
    if why is None and mode != _FILTERED:
        why = f"/proc says mode {mode} of a thread"
    lacking = _without(found.lacking, SECCOMP)
    found = replace(found, seccomp_mode=mode, lacking=lacking if why is None else {**lacking, SECCOMP: why})
    found.demand(require)
    return found


def _without(reasons: Mapping[str, str], name: str) -> dict[str, str]:
    return {each: why for each, why in reasons.items() if each != name}
