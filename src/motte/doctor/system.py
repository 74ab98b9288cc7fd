"""Where findings look. Tests hand in another machine: files below a root, answers, versions."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

from motte.doctor.probe import Answer, ask
from motte.measure.machine import CpuInfo, cpu_info, read_text

_COMMAND_TIMEOUT_S: Final = 20
_MAX_OUTPUT_BYTES: Final = 1 << 16


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _command_output(words: tuple[str, ...]) -> str | None:
    """What a command prints; None when it is not on the PATH, fails, or takes too long."""
    program = shutil.which(words[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *words[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout[:_MAX_OUTPUT_BYTES].decode("utf-8", "replace") if done.returncode == 0 else None


def _memlock_limit_bytes() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


@dataclass(frozen=True, kw_only=True)
class System:
    """This machine, unless told otherwise.

    Attributes:
        root: what /proc, /sys and /dev are read below.
        architecture: as ``uname -m`` says it.
        environment: environment variables.
        ask: tries a system call, see :func:`motte.doctor.probe.ask`.
        version: installed version of a distribution, None when it is not installed. Imports nothing.
        output: what a command prints, None when it cannot be had.
        memlock_limit_bytes: soft RLIMIT_MEMLOCK; returns None for no limit.
        usable_cores: what the scheduler lets this process use.
    """

    root: Path = Path("/")
    architecture: str = field(default_factory=platform.machine)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    ask: Callable[[str, str], Answer] = ask
    version: Callable[[str], str | None] = _installed_version
    output: Callable[[tuple[str, ...]], str | None] = _command_output
    memlock_limit_bytes: Callable[[], int | None] = _memlock_limit_bytes
    usable_cores: Callable[[], int] = lambda: len(os.sched_getaffinity(0))

    def text(self, path: str) -> str | None:
        """The text of a file, stripped; None when it is absent or not readable."""
        return read_text(self.root, path)

    def exists(self, path: str) -> bool:
        """Whether a file, folder or device node is there."""
        return (self.root / path).exists()

    def usable(self, path: str) -> bool:
        """Whether this user may read and write it (device nodes are opened for both)."""
        return os.access(self.root / path, os.R_OK | os.W_OK)

    def names(self, folder: str) -> list[str]:
        """The sorted names in a folder; none when it cannot be listed."""
        try:
            return sorted(os.listdir(self.root / folder))
        except OSError:
            return []

    def cpu(self) -> CpuInfo:
        """/proc/cpuinfo, summed up."""
        return cpu_info(self.root)
