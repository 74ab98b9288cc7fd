"""What a worker in a process asks of the machine that it shares: the bundle as a descriptor, and evidence.

Both are the host's to give or to refuse, and neither is believed: a bundle is verified here, evidence by whoever is
shown it. A socket of its own, so that a host that is not the client can serve it. Messages: from the host one byte with
one descriptor; then from the worker 64 bytes of report data, and from the host four bytes of length (big-endian) and
the evidence; length 0: it makes none.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

from motte.errors import FrameError, ResourceError
from motte.limits import MAX_EVIDENCE_BYTES

if TYPE_CHECKING:
    from motte.attest.evidence import Evidence

HAND_OVER_TIMEOUT_S: Final = 30.0
"""For a host that says that it hands over a descriptor, and does not."""
EVIDENCE_TIMEOUT_S: Final = 120.0
"""A TPM takes seconds."""
LENGTH_BYTES: Final = 4
_HINT: Final = "a worker in a process has no evidence of its own: --evidence tpm, or --evidence simulated"


class HostChannel:
    """The worker's end. Closed when the bundle is open: nothing is asked of the host afterwards."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def receive_descriptor(self) -> int:
        """The descriptor that the host hands over, open for reading; the caller's to close.

        Raises:
            FrameError: none came in time, or another number of them.
        """
        self._socket.settimeout(HAND_OVER_TIMEOUT_S)
        try:
            _, found, _, _ = socket.recv_fds(self._socket, 1, 2)
        except OSError as problem:
            raise FrameError("no bundle was handed over", where="OPEN", got=str(problem) or "nothing") from problem
        if len(found) != 1:
            for fd in found:
                os.close(fd)
            raise FrameError("no bundle was handed over", where="OPEN", got=f"{len(found)} descriptors")
        return found[0]

    def issue(self, report_data: bytes) -> Evidence:
        """Evidence of the machine over 64 bytes of report data; **unverified**, and not ours to verify.

        Raises:
            ResourceError: the host makes none. FrameError, EvidenceError: what it gave is none.
        """
        from motte.attest.evidence import Evidence

        self._socket.settimeout(EVIDENCE_TIMEOUT_S)
        try:
            self._socket.sendall(report_data)
            size = int.from_bytes(self._exactly(LENGTH_BYTES), "big")
            if size > MAX_EVIDENCE_BYTES:
                raise FrameError("the host's evidence is too large", expected=f"at most {MAX_EVIDENCE_BYTES} bytes")
            encoded = self._exactly(size)
        except OSError as problem:
            got = str(problem) or "nothing in time"
            raise ResourceError("the host makes no evidence of this machine", got=got, hint=_HINT) from problem
        if not encoded:
            raise ResourceError("the host makes no evidence of this machine", hint=_HINT)
        return Evidence.decode(encoded)

    def close(self) -> None:
        """Close it. Safe to call again."""
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._socket.recv(count - len(data))
            if not piece:
                raise ConnectionError("the host closed its channel")
            data += piece
        return bytes(data)
