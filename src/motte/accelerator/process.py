"""An accelerator as a child process of ours, over an inherited socket and shared memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final

from motte.accelerator.client import AcceleratorClient
from motte.errors import MotteError, PeerClosed, SettingError
from motte.limits import GIB
from motte.link.recording import Recorder
from motte.link.wire import Deadline, SocketWire, Wire

_START_S: Final = 120.0
"""For the child to load torch."""
_EXIT_WAIT_S: Final = 5.0
_STDERR_TAIL_BYTES: Final = 2000


class LocalAccelerator:
    """A child process and the link to it. A context manager.

    The child ends when the link closes: with :meth:`close`, and when this process dies in whatever way.

    Args:
        device: of the child: ``cpu`` or ``cuda:N``.
        threads: compute threads of the child; ours are not changed.
        recorder: sees every frame.
        timeout_s: for each answer.
        retries: how often in a row a child that died or stalled is replaced by a new one, with the identical bytes.
        shared_memory_bytes: of the region that both share; 0: everything through the socket.

    Raises:
        LinkError: the child did not come up; its last words are in the message.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        threads: int = 1,
        recorder: Recorder | None = None,
        timeout_s: float = 60.0,
        retries: int = 0,
        shared_memory_bytes: int = GIB,
    ) -> None:
        if threads < 1 or shared_memory_bytes < 0:
            raise SettingError("threads and shared memory out of bounds", got=f"{threads}, {shared_memory_bytes}")
        self._options = [f"--device={device}", f"--threads={threads}", f"--shared-memory={shared_memory_bytes}"]
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._words: int | None = None
        self.link: AcceleratorClient
        try:
            self.link = AcceleratorClient(
                self._start,
                name=f"local accelerator on {device}",
                timeout_s=timeout_s,
                retries=retries,
                recorder=recorder,
                start_timeout_s=max(timeout_s, _START_S),
            )
        except BaseException as problem:
            said = self._end(at_once=True)
            if isinstance(problem, PeerClosed) and said:
                raise PeerClosed(
                    f"the accelerator ended; its last words: {said}", where=problem.where, got=problem.got
                ) from problem
            raise

    @property
    def pid(self) -> int:
        """Process id of the child that serves now."""
        if self._process is None:
            raise MotteError("the accelerator has ended")
        return self._process.pid

    def close(self) -> None:
        """End link and child. Safe to call again."""
        self.link.close()
        self._end(at_once=False)

    def __enter__(self) -> LocalAccelerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, deadline: Deadline, again: bool) -> Wire:
        self._end(at_once=True)
        ours, theirs = socket.socketpair()
        # A memfd: what a dying child wrote can be shown, and a full pipe cannot block it.
        self._words = os.memfd_create("motte-accelerator-stderr")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "motte.accelerator", f"--fd={theirs.fileno()}", *self._options],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=(theirs.fileno(),),
                env=_environment(self._threads),
                # Ctrl-C in a terminal goes to the trusted side, which then closes the link in good order.
                start_new_session=True,
            )
        return SocketWire(ours, peer=f"local accelerator, pid {self._process.pid}")

    def _end(self, *, at_once: bool) -> str:
        """End the child; returns the last that it wrote."""
        process, self._process = self._process, None
        words, self._words = self._words, None
        if process is not None:
            try:
                if not at_once:
                    process.wait(timeout=_EXIT_WAIT_S)
            except subprocess.TimeoutExpired:
                pass
            if process.poll() is None:
                process.kill()
            process.wait()
        if words is None:
            return ""
        size = os.fstat(words).st_size
        raw = os.pread(words, _STDERR_TAIL_BYTES, max(0, size - _STDERR_TAIL_BYTES))
        os.close(words)
        return raw.decode("utf-8", "replace").strip()


def _environment(threads: int) -> dict[str, str]:
    # Nothing of ours is secret from the host on which the accelerator runs; but its settings are not ours.
    made = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))}
    if "PYTHONPATH" in made:
        # Relative entries mean the folder where we were started, whatever the current one is by now.
        made["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry and "site-packages" not in entry)
    # Waiting threads must sleep: they share the machine with the trusted process.
    return {**made, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
