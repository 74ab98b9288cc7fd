"""The ``vm`` kind: a worker that waits in a confidential VM, reached over vsock; each connection is one worker's life.

Nothing here knows what runs at the other end: only evidence does (``motte run --broker``, or ``--verify``).
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from motte.enclave.process import AcceleratorLink, WorkerProcess
from motte.errors import InputError, LinkError
from motte.link.local import Recorder

_FORMS: Final = "vsock:CID:PORT or unix:PATH"
_MOST: Final = (1 << 32) - 1


class _Connection:
    """What :class:`subprocess.Popen` is for a process, for a worker that only its connection names: it ends with it."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._ended: int | None = None

    @property
    def pid(self) -> int:
        """Of a worker elsewhere, nothing of this machine."""
        return 0

    def poll(self) -> int | None:
        """0 once the connection was ended here."""
        return self._ended

    def wait(self, timeout: float | None = None) -> int:
        """End the connection: the worker ends when it sees that."""
        self.kill()
        return 0

    def kill(self) -> None:
        """End the connection."""
        self._ended = 0
        self._stream.close()


class VmWorker(WorkerProcess):
    """The worker that listens at ``address``: ``vsock:CID:PORT`` (``motte enclave build`` writes the units), or
    ``unix:PATH`` for hypervisors that offer vsock that way.

    Raises:
        InputError: not such an address. LinkError: nobody listens there.
        WorkerDied, WorkerStalled, FrameError: no worker of this version there.
    """

    kind = "vm"
    _shares_kernel = False

    def __init__(self, address: str, *, start_timeout_s: float = 120.0, recorder: Recorder | None = None) -> None:
        self._family, self._target = _parse(address)
        self._address, self._timeout_s = address, start_timeout_s
        super().__init__(threads=1, start_timeout_s=start_timeout_s, recorder=recorder)

    def _begin(
        self,
        threads: int,
        engine: str,
        precision: str,
        accelerator: AcceleratorLink | None,
    ) -> socket.socket:
        stream = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            stream.settimeout(self._timeout_s)
            stream.connect(self._target)
        except OSError as problem:
            stream.close()
            raise LinkError(
                "no worker listens there",
                where=self._address,
                got=str(problem),
                hint="start motte-worker.socket in the VM (see motte enclave build, folder vm)",
            ) from problem
        self._process = _Connection(stream)
        return stream


def _parse(address: str) -> tuple[socket.AddressFamily, str | tuple[int, int]]:
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest and "\0" not in rest:
        return socket.AF_UNIX, str(Path(rest))
    cid, _, port = rest.partition(":")
    if kind == "vsock" and all(each.isascii() and each.isdigit() and int(each) <= _MOST for each in (cid, port)):
        return socket.AF_VSOCK, (int(cid), int(port))
    raise InputError("not the address of a VM's worker", expected=_FORMS, got=repr(address)[:200])
