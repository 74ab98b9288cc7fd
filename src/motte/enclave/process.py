"""The ``process`` kind: the worker as a separate process on this machine, with its own memory and thread count.

It is a *simulation* of an enclave: other users and crashes are kept out of its memory, the administrator is not. Every
start says so. Other kinds start the same worker in another way, and override what differs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from motte.enclave.host_service import HostService, Issue
from motte.engines.select import PRECISIONS
from motte.errors import (
    FrameError,
    LinkError,
    PeerClosed,
    PeerStalled,
    ResourceError,
    UnsupportedError,
    WorkerDied,
    WorkerStalled,
)
from motte.limits import MAX_BUNDLE_FRAME_BYTES
from motte.link.frames import PROTOCOL, Frame, Kind, WireTensor
from motte.link.local import Link, Recorder
from motte.strict_json import Fields
from motte.trusted.harden import Hardening
from motte.trusted.surroundings import KINDS

SIMULATED = "SIMULATED: no hardware protection"
_LOG = logging.getLogger("motte")
_EXIT_WAIT_S = 5.0
_STDERR_TAIL_BYTES = 2000
_PASSED_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
"""All that the worker sees of our environment: what Python needs to find itself, and nothing that tunes a library."""


@dataclass(frozen=True, slots=True)
class AcceleratorLink:
    """A connected socket to an accelerator, which a worker gets when it is started.

    ``name`` stands in errors; ``timeout_s`` bounds each wait of the worker for it. Whoever made ``fd`` closes it.
    """

    fd: int
    name: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says of itself before it has keys. **Unverified**: the ``process`` kind has no evidence."""

    public_key: bytes
    pid: int
    engine: str
    engine_version: str
    precision: str
    threads: int
    enclave: str
    simulated: bool
    hardening: Hardening
    seconds: Mapping[str, float]

    @staticmethod
    def read(meta: Mapping[str, Any]) -> Hello:
        """Raises: FrameError: a missing, unknown or ill-typed field, or another protocol."""
        fields = Fields(dict(meta), where="HELLO", error=FrameError)
        fields.integer("protocol", low=PROTOCOL, high=PROTOCOL)
        seconds = fields.fields("seconds")
        hello = Hello(
            public_key=fields.hexadecimal("public_key", length_bytes=32),
            pid=fields.integer("pid", low=1, high=1 << 31),
            engine=fields.text("engine", max_bytes=64),
            engine_version=fields.text("engine_version", max_bytes=64),
            precision=fields.choice("precision", PRECISIONS),
            threads=fields.integer("threads", low=1, high=4096),
            enclave=fields.choice("enclave", KINDS),
            simulated=fields.boolean("simulated"),
            hardening=Hardening.from_json(fields.any("hardening"), where="HELLO.hardening"),
            seconds={name: seconds.number(name) for name in ("import_engine", "import_worker")},
        )
        seconds.done()
        fields.done()
        return hello


class Started(Protocol):
    """What is needed of a started worker; :class:`subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """What names it in messages."""
        ...

    def poll(self) -> int | None:
        """Its exit status; None: it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""
        ...

    def kill(self) -> None:
        """End it."""
        ...


class WorkerProcess:
    """A started worker and our end of its link.

    Args:
        threads: compute threads of the worker; ours are not changed.
        engine: name of the engine that it loads, one of :data:`motte.engines.select.ENGINES`.
        precision: in which it computes, one of :data:`motte.engines.select.PRECISIONS`.
        start_timeout_s: time from spawn to its first frame.
        recorder: sees every frame, as the host could.
        accelerator: handed to the worker; it gets no other address, file or socket.

    Raises:
        UnsupportedError: not on Linux.
        WorkerDied, WorkerStalled: it did not come up.
    """

    kind = "process"
    _shares_kernel = True
    """Whether a descriptor of ours can be handed to it."""

    def __init__(
        self,
        *,
        threads: int,
        engine: str = "torch",
        precision: str = "f32",
        start_timeout_s: float = 120.0,
        recorder: Recorder | None = None,
        accelerator: AcceleratorLink | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise UnsupportedError("the trusted worker runs on Linux only", got=sys.platform)
        if self.kind == "process":
            _LOG.warning("%s (enclave kind: process)", SIMULATED)
        self._files: socket.socket | None = None
        # A memfd: what a dying worker wrote can be shown, nothing reaches a disk, and a full pipe cannot block it.
        self._stderr = os.memfd_create("motte-worker-stderr")
        stream = self._begin(threads, engine, precision, accelerator)
        self.link = Link(stream, peer=f"worker {self._process.pid}", recorder=recorder)
        self._ended: str | None = None
        try:
            frame = self.receive(timeout_s=start_timeout_s)
            if frame.kind is not Kind.HELLO:
                raise FrameError("frame in the wrong state", expected="HELLO", got=frame.kind.name)
            self.hello = Hello.read(frame.meta)
            self._check_kind()
        except BaseException:
            self.kill()
            raise

    def _begin(self, threads: int, engine: str, precision: str, accelerator: AcceleratorLink | None) -> socket.socket:
        """Have a worker: sets ``self._process``, and gives our end of its link. What fails here leaves nothing."""
        self._process: Started
        ours, theirs = socket.socketpair()
        far: socket.socket | None = None
        if self._shares_kernel:
            self._files, far = socket.socketpair()
        with theirs:
            options = ["--fd", str(theirs.fileno()), "--threads", str(threads), "--engine", engine]
            options += ["--precision", precision]
            passed = [theirs.fileno()]
            if far is not None:
                passed.append(far.fileno())
                options += ["--host-fd", str(far.fileno())]
            if accelerator is not None:
                passed.append(accelerator.fd)
                options += ["--accelerator-fd", str(accelerator.fd), "--accelerator-name", accelerator.name]
                options += ["--accelerator-timeout", str(accelerator.timeout_s)]
            try:
                self._process = self._spawn(theirs.fileno(), options, passed, threads)
            except BaseException as problem:
                ours.close()
                self._close_files()
                os.close(self._stderr)
                if isinstance(problem, OSError):
                    raise ResourceError("a worker cannot be started", got=str(problem)) from problem
                raise
            finally:
                if far is not None:
                    far.close()
        return ours

    def _spawn(self, link_fd: int, options: list[str], passed: list[int], threads: int) -> subprocess.Popen[bytes]:
        """Start it. Another way of starting a worker overrides this; what it prints goes to ``self._stderr``.

        Args:
            link_fd: the worker's end of the link, one of ``passed``, the descriptors that it inherits.
            options: arguments of :mod:`motte.trusted`.
        """
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "motte.trusted", *options],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            pass_fds=passed,
            env=worker_environment(threads),
            start_new_session=True,
        )

    def _check_kind(self) -> None:
        if self.hello.enclave != self.kind:
            raise FrameError("a worker of another kind", expected=self.kind, got=self.hello.enclave)
        if self.kind != "process" and self.hello.simulated:
            _LOG.warning("%s (enclave kind: %s)", SIMULATED, self.kind)

    def bundle_bytes(self, fd: int) -> int:
        """What OPEN says of the bundle ``fd``: 0 where its descriptor is handed over, else its size in bytes."""
        return 0 if self._files is not None else os.fstat(fd).st_size

    def give_bundle(self, fd: int, *, timeout_s: float) -> None:
        """Hand the bundle over, after OPEN; ``fd``, open for reading, stays ours to close. Once.

        Raises:
            WorkerDied, WorkerStalled: it takes nothing.
        """
        if self._files is None:
            self._send_bundle(fd, timeout_s)
            return
        try:
            socket.send_fds(self._files, [b"b"], [fd])
        except OSError as problem:
            raise self._failed(PeerClosed("the worker takes no bundle", got=str(problem)), timeout_s) from problem

    def serve_host(self, issue: Issue | None) -> HostService | None:
        """After the bundle was given: make evidence for the worker where it asks for any. None: nobody can, or need to.

        Stop what is returned when the worker is ready.
        """
        if self._files is None or issue is None:
            self._close_files()
            return None
        service, self._files = HostService(self._files, issue), None
        return service

    def _send_bundle(self, fd: int, timeout_s: float) -> None:
        size, done = os.fstat(fd).st_size, 0
        while done < size:
            data = os.pread(fd, min(MAX_BUNDLE_FRAME_BYTES, size - done), done)
            if not data:
                raise ResourceError("the bundle became shorter while it was sent", expected=str(size), got=str(done))
            self.send(Frame(Kind.BUNDLE, {}, [WireTensor("u8", (len(data),), data)]), timeout_s=timeout_s)
            done += len(data)

    def _close_files(self) -> None:
        if self._files is not None:
            self._files.close()
            self._files = None

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs, as far as we have been told."""
        return self._ended is None and self._process.poll() is None

    def send(self, frame: Frame, *, timeout_s: float) -> None:
        """Send one frame.

        Raises:
            WorkerDied: it ended. WorkerStalled: it took nothing within ``timeout_s``, and was killed.
        """
        try:
            self.link.send(frame, timeout_s=timeout_s)
        except LinkError as problem:
            raise self._failed(problem, timeout_s) from problem

    def receive(self, *, timeout_s: float) -> Frame:
        """Receive one frame.

        Raises:
            WorkerDied: it ended. WorkerStalled: it said nothing within ``timeout_s``, and was killed.
            FrameError: what it said is malformed; it was killed.
        """
        try:
            return self.link.receive(timeout_s=timeout_s)
        except LinkError as problem:
            raise self._failed(problem, timeout_s) from problem
        except BaseException:
            # Also Ctrl-C: a frame read half leaves the link useless, and a worker without a reader must not live on.
            self.kill()
            raise

    def kill(self) -> None:
        """End it at once (SIGKILL reaches a stopped process too) and close the link. Safe to call again."""
        self.link.close()
        self._close_files()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._end()

    def close(self) -> None:
        """Close the link, at which an idle worker wipes its weights and ends; kill it if it does not."""
        self.link.close()
        self._close_files()
        try:
            self._process.wait(timeout=_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._end()

    def _failed(self, problem: LinkError, timeout_s: float) -> WorkerDied | WorkerStalled:
        if isinstance(problem, PeerStalled):
            self.kill()
            return WorkerStalled(
                "the worker did not answer in time and was killed",
                where=f"pid {self._process.pid}",
                expected=f"within {timeout_s:g} s",
                hint="load the bundle again; allow more time (--timeout, timeout_s=) if the model is slow",
            )
        try:
            self._process.wait(timeout=_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        status = _status(self._process.wait())
        self.link.close()
        self._close_files()
        tail = self._end()
        return WorkerDied(
            "the worker ended" + (f"; its last words: {tail}" if tail else ""),
            where=f"pid {self._process.pid}",
            got=status,
            hint="load the bundle again; if it was killed for memory, use --mode streamed or a smaller batch",
        )

    def _end(self) -> str:
        if self._ended is None:
            size = os.fstat(self._stderr).st_size
            raw = os.pread(self._stderr, _STDERR_TAIL_BYTES, max(0, size - _STDERR_TAIL_BYTES))
            os.close(self._stderr)
            self._ended = raw.decode("utf-8", "replace").strip()
        return self._ended


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a worker with ``threads`` compute threads."""
    passed = {name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ}
    if "PYTHONPATH" in passed:
        # Relative entries mean the folder where we were started, whatever the current one is by now.
        passed["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry and "site-packages" not in entry)
    return {
        **passed,
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Read by onnxruntime when it is loaded, which otherwise keeps files of its own about its use.
        "ORT_DISABLE_TELEMETRY": "1",
        # Freed activations stay in the process: handing pages back and faulting them in again costs more than it saves.
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    }


def _status(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    return f"signal {-code} ({signal.Signals(-code).name})"
