"""TLS inside of a byte stream: what a link uses as its socket, while somebody else relays the real one.

TLS ends here, in this process, over memory buffers: the stream below carries only TLS records, whoever holds it. Loaded
on demand, since Python's ``ssl`` brings a second OpenSSL into the process.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from motte.link.standard_streams import ByteStream

_Result = TypeVar("_Result")
_RECEIVE_BYTES: Final = 1 << 17
_SEND_BYTES: Final = 1 << 20
"""Plaintext that one call to :meth:`TlsStream.sendmsg` takes at most."""
_CLOSE_S: Final = 1.0
"""How long the peer is given to take our farewell."""


class TlsStream:
    """One end of TLS over ``below``, which it owns. A :class:`motte.link.standard_streams.ByteStream` itself.

    Receiving and sending may happen in two threads, each in one. Every error of the stream below and of TLS is an
    ``OSError``; an end of the stream below without TLS's own farewell is one too, since the host can cut it off
    anywhere. After any failure but a time limit while receiving the stream is of no more use, and says so.
    """

    def __init__(self, below: ByteStream, context: ssl.SSLContext, *, server: bool) -> None:
        self._below = below
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        # OpenSSL's connection is for one thread at a time, and Python releases its lock around some calls.
        self._lock = threading.Lock()
        self._timeout_s: float | None = None
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._broken = False
        self._closed = False

    def handshake(self) -> None:
        """Make the handshake, as long as the time limit allows.

        Raises:
            OSError: the other side does not complete it, or the stream below broke.
        """
        deadline = self._deadline()
        while True:
            try:
                self._locked(self._tls.do_handshake)
            except ssl.SSLWantReadError:
                self._flush(deadline)
                self._fetch(deadline)
            except ssl.SSLError:
                # An alert tells the other side why; that it cannot be sent is no second error.
                with contextlib.suppress(OSError):
                    self._flush(deadline)
                raise
            else:
                self._flush(deadline)
                return

    def peer_certificate(self) -> bytes | None:
        """The certificate (DER) that the peer showed in the handshake; **unverified**, but it holds the key."""
        return self._tls.getpeercert(binary_form=True)

    @property
    def version(self) -> str | None:
        """``TLSv1.3`` after the handshake."""
        return self._tls.version()

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview], /) -> int:
        """Send some of ``buffers``; how many bytes.

        Raises:
            OSError: as the class says.
        """
        deadline, taken = self._deadline(), 0
        for buffer in buffers:
            piece = memoryview(buffer)[: _SEND_BYTES - taken]
            if len(piece):
                taken += self._locked(partial(self._tls.write, piece))
            if taken >= _SEND_BYTES:
                break
        self._flush(deadline)
        return taken

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive something; how many bytes, 0 after the peer's farewell.

        Raises:
            OSError: as the class says.
        """
        if not len(buffer):
            return 0
        deadline = self._deadline()
        while True:
            try:
                return int(self._locked(partial(self._tls.read, len(buffer), buffer)))  # bytes only without a buffer
            except ssl.SSLWantReadError:
                # What a peer's key update makes us answer waits for our next message.
                self._fetch(deadline)
            except ssl.SSLZeroReturnError:
                return 0

    def settimeout(self, value: float | None, /) -> None:
        """How long each of the others may take, in seconds; None: for as long as it takes."""
        self._timeout_s = value

    def close(self) -> None:
        """Say farewell, as far as the peer takes it, and close the stream below. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream below knows no time limits
            self._below.settimeout(_CLOSE_S)
            with contextlib.suppress(ssl.SSLWantReadError):
                self._locked(self._tls.unwrap)
            self._flush(time.monotonic() + _CLOSE_S)
        self._broken = True
        self._below.close()

    # --- below ----------------------------------------------------------------------------------------------------
    def _locked(self, call: Callable[[], _Result]) -> _Result:
        if self._broken:
            raise OSError("this TLS connection failed or was closed before")
        with self._lock:
            return call()

    def _deadline(self) -> float | None:
        return None if self._timeout_s is None else time.monotonic() + self._timeout_s

    def _arm(self, deadline: float | None) -> None:
        if deadline is None:
            self._below.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._below.settimeout(left)

    def _flush(self, deadline: float | None) -> None:
        with self._lock:
            left = memoryview(self._outgoing.read())
        try:
            while left:
                self._arm(deadline)
                left = left[self._below.sendmsg([left]) :]
        except BaseException:
            # Part of a record may be on its way: nothing can be sent behind it.
            self._broken = True
            raise

    def _fetch(self, deadline: float | None) -> None:
        self._arm(deadline)
        count = self._below.recv_into(self._buffer)
        with self._lock:
            if count:
                self._incoming.write(self._buffer[:count])
            else:
                self._incoming.write_eof()
