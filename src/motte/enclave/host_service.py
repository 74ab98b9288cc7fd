"""The host's side of :mod:`motte.trusted.host_channel`: makes evidence of this machine for a worker in a process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from motte.attest.evidence import REPORT_DATA_BYTES, Evidence
from motte.errors import MotteError
from motte.trusted.host_channel import LENGTH_BYTES

Issue = Callable[[bytes], Evidence]
"""Makes evidence of this machine over 64 bytes of report data."""


class HostService:
    """Answers one worker, on a thread of its own, until the socket is closed.

    Attributes:
        problem: why no evidence could be made, once that happened: it says more than what the worker can say.
    """

    def __init__(self, sock: socket.socket, issue: Issue) -> None:
        self._socket, self._issue = sock, issue
        self.problem: MotteError | None = None
        self._thread = threading.Thread(target=self._serve, name="motte-host-service", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the socket and wait for the thread. Safe to call again."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        try:
            while report_data := self._socket.recv(REPORT_DATA_BYTES, socket.MSG_WAITALL):
                encoded = b""
                if len(report_data) == REPORT_DATA_BYTES:
                    encoded = self._made(report_data)
                self._socket.sendall(len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded)
        except OSError:
            # The worker, or we, closed it.
            return

    def _made(self, report_data: bytes) -> bytes:
        try:
            return self._issue(report_data).encode()
        except MotteError as problem:
            self.problem = problem
            return b""
