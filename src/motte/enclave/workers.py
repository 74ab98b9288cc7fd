"""Workers that are started to make an image: one whose opened files are noted, one that has nothing but the image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from motte.enclave.image_files import INTERPRETER, MODULES, module_folders
from motte.enclave.process import WorkerProcess, worker_environment
from motte.enclave.start import START_NAME
from motte.trusted.surroundings import Told

PYTHON_FLAGS: Final = ("-I", "-S", "-B", "-X", "utf8")
"""No variables, no user's or site's modules, no bytecode written, no locale: what starts is what the image says."""
_HERE: Final = Path(__file__).parent
_KEPT: Final = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "ORT_DISABLE_TELEMETRY", "MALLOC_TRIM_THRESHOLD_",
                "MALLOC_MMAP_THRESHOLD_")  # fmt: skip


def image_environment(threads: int) -> dict[str, str]:
    """All environment variables of a worker in an image: those of any worker that tune, and no locale."""
    every = worker_environment(threads)
    return {**{name: every[name] for name in _KEPT}, "LC_ALL": "C"}


def image_arguments(
    *, threads: int, engine: str, precision: str, enclave: Told = "gramine", link_fd: int = 0
) -> tuple[str, ...]:
    """The whole command line of a worker in an image, its interpreter first."""
    options: tuple[str, ...] = ("--fd", str(link_fd), "--threads", str(threads), "--engine", engine)
    options += ("--precision", precision, "--enclave", enclave)
    return (f"/{INTERPRETER}", *PYTHON_FLAGS, f"/{MODULES}/{START_NAME}", *options)


class TracedWorker(WorkerProcess):
    """A worker as in an image for Gramine, with the files of this machine; notes what Python opens in it."""

    kind = "gramine-direct"
    _shares_kernel = False

    def opened(self) -> tuple[str, ...]:
        """Paths that were opened, each once, sorted; also after :meth:`close`. Once only."""
        with open(self._opened, "rb") as file:
            file.seek(0)
            return tuple(sorted({os.fsdecode(path) for path in file.read().split(b"\0") if path}))

    def _spawn(self, link_fd: int, options: list[str], passed: list[int], threads: int) -> subprocess.Popen[bytes]:
        self._opened = os.memfd_create("motte-opened-files")
        words = [sys.executable, *PYTHON_FLAGS, str(_HERE / "traced.py"), str(self._opened)]
        return subprocess.Popen(
            [*words, os.pathsep.join(module_folders()), *options, "--enclave", "gramine"],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            pass_fds=[*passed, self._opened],
            env=image_environment(threads),
            start_new_session=True,
        )


class BareWorker(WorkerProcess):
    """A worker as under Gramine, whose file system holds an image, the files ``visible``, what the kernel gives, and
    nothing else.

    Args:
        root: the image's folder.
        visible: files that it may read besides, at their own paths.
        (others): as of :class:`motte.enclave.process.WorkerProcess`.

    Raises:
        WorkerDied: it did not come up, or this machine lets nobody make namespaces; its last words say which.
    """

    kind = "gramine-direct"
    _shares_kernel = False

    def __init__(self, root: Path, visible: tuple[Path, ...], *, threads: int, engine: str, precision: str) -> None:
        self._root, self._visible, self._precision = root, visible, precision
        self._engine = engine
        self._place = tempfile.mkdtemp(prefix="motte-bare-")
        try:
            super().__init__(threads=threads, engine=engine, precision=precision)
        finally:
            # What the worker sees is mounted there in its own namespace alone; here it stays an empty folder.
            shutil.rmtree(self._place, ignore_errors=True)

    def _spawn(self, link_fd: int, options: list[str], passed: list[int], threads: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-I", "-S", "-B", str(_HERE / "bare.py"), self._place, str(self._root)]
        words += [str(path) for path in self._visible]
        command = image_arguments(threads=threads, engine=self._engine, precision=self._precision, link_fd=link_fd)
        return subprocess.Popen(
            [*words, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            pass_fds=passed,
            env=image_environment(threads),
            start_new_session=True,
        )
