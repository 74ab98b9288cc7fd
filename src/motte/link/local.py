"""The link over a local socket: one object through which everything between the two sides crosses.

Both sides use the same class. Frames are numbered from 0 in each direction; from the moment when a session key is
installed every frame is sealed, with its header as associated data, and a clear frame is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from motte.errors import DecryptError, FrameError, PeerClosed, PeerStalled
from motte.link.frames import HEADER, Frame, FrameHeader, Kind, decode_header, decode_payload, encode_payload
from motte.link.standard_streams import ByteStream
from motte.seal.primitives import ChannelCipher

Direction = Literal["sent", "received"]
Recorder = Callable[[Direction, bytes], None]
"""Called with the exact bytes of every frame that crosses."""

_STEP_BYTES = 4 << 20
"""By how much the receiving buffer grows at a time."""
_ALIGNMENT = 16
"""Of what Python allocates, in bytes; no element of a tensor is larger."""


class Link:
    """One end of a connected byte stream.

    Args:
        stream: a connected socket, or what serves as one; the link owns it from now on.
        peer: what the other side is called in errors.
        recorder: sees every frame in both directions, as the host could.
    """

    def __init__(self, stream: ByteStream, *, peer: str, recorder: Recorder | None = None) -> None:
        self._socket = stream
        self._peer = peer
        self._recorder = recorder
        self._sent = 0
        self._received = 0
        self.crossed_bytes = 0
        """Bytes of frames so far, both ways; TLS around them is not counted."""
        self._seal: ChannelCipher | None = None
        self._open: ChannelCipher | None = None
        self._clear_error_allowed = False

    def secure(self, *, sending: ChannelCipher, receiving: ChannelCipher, clear_error_first: bool = False) -> None:
        """From now on seal what is sent and accept only sealed frames.

        Args:
            clear_error_first: the first frame may be an ERROR in clear. A worker that refuses a bundle has no session
                key yet. The host can forge that frame, and gains no more than by closing the link.

        Raises:
            RuntimeError: the link already is secured: a session is never re-keyed.
        """
        if self._seal is not None:
            raise RuntimeError("the link already has session keys")
        self._seal, self._open = sending, receiving
        self._clear_error_allowed = clear_error_first

    def send(self, frame: Frame, *, timeout_s: float | None = None) -> None:
        """Send one frame.

        Raises:
            PeerStalled: the peer did not take it within ``timeout_s``.
            PeerClosed: the peer closed the link.
        """
        plain, meta_bytes = encode_payload(frame)
        header = FrameHeader(frame.kind, self._seal is not None, self._sent, meta_bytes, len(plain) - meta_bytes)
        raw = header.encode()
        payload = plain if self._seal is None else self._seal.seal(memoryview(plain), raw)
        self._record("sent", raw, payload)
        size = len(raw) + len(payload)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        left = [memoryview(raw), memoryview(payload)]
        try:
            while left:
                self._arm(deadline)
                sent = self._socket.sendmsg(left)
                while left and sent >= len(left[0]):
                    sent -= len(left.pop(0))
                if left:
                    left[0] = left[0][sent:]
        except TimeoutError as problem:
            raise PeerStalled(
                "no progress while sending", where=self._peer, expected=f"within {timeout_s:g} s"
            ) from problem
        except OSError as problem:
            raise PeerClosed("the link was closed while sending", where=self._peer, got=str(problem)) from problem
        self._sent += 1
        self.crossed_bytes += size

    def receive(self, *, timeout_s: float | None = None) -> Frame:
        """Receive one frame: copied in, checked, then returned.

        Raises:
            PeerStalled: nothing complete within ``timeout_s``.
            PeerClosed: the peer closed the link.
            FrameError: malformed, out of sequence, clear where it must be sealed, or not authentic.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        raw = bytes(self._exactly(HEADER.size, deadline, timeout_s))
        header = decode_header(raw, peer=self._peer)
        if header.sequence != self._received:
            raise FrameError(
                "frame out of sequence", where=self._peer, expected=str(self._received), got=str(header.sequence)
            )
        refused = self._clear_error_allowed and header.kind is Kind.ERROR and not header.sealed
        if header.sealed != (self._open is not None) and not refused:
            raise FrameError(
                "frame in the wrong state", where=self._peer, expected="clear" if header.sealed else "sealed"
            )
        payload = self._exactly(header.payload_bytes, deadline, timeout_s)
        self._record("received", raw, payload)
        self.crossed_bytes += len(raw) + len(payload)
        view = memoryview(payload)
        if self._open is not None and not refused:
            self._clear_error_allowed = False
            # Tensors begin where the text ends; padding before it puts them where arrays can be read in place.
            before = -header.meta_bytes % _ALIGNMENT
            plain = bytearray(before + header.meta_bytes + header.body_bytes)
            opened = memoryview(plain)[before:]
            try:
                self._open.open_into(view, raw, opened)
            except DecryptError as problem:
                raise FrameError("frame is not authentic", where=self._peer, got=header.kind.name) from problem
            view = opened
        self._received += 1
        return decode_payload(header, bytes(view[: header.meta_bytes]), view[header.meta_bytes :], peer=self._peer)

    def change_stream(self, change: Callable[[ByteStream], ByteStream]) -> None:
        """Go on over another stream, such as TLS inside of this one. Numbers and session keys go on as they were.

        Args:
            change: gets the stream of now, between two frames, and gives the one to use; what it raises goes through.
        """
        self._socket = change(self._socket)

    def close(self) -> None:
        """Close the socket; the peer sees the end of the stream."""
        self._socket.close()

    def _exactly(self, count: int, deadline: float | None, timeout_s: float | None) -> bytearray:
        # Grows as bytes arrive, so that a header that promises a gigabyte costs its sender a gigabyte, not us.
        # Up to one step at once: zeros that are appended are written twice, 0.4 ms for an image.
        data = bytearray(min(count, _STEP_BYTES))
        done = 0
        try:
            while done < count:
                if done == len(data):
                    data += bytes(min(count - done, _STEP_BYTES))
                self._arm(deadline)
                with memoryview(data) as view:
                    got = self._socket.recv_into(view[done:])
                if not got:
                    raise PeerClosed("the link was closed", where=self._peer, expected=f"{count} bytes", got=f"{done}")
                done += got
        except TimeoutError as problem:
            raise PeerStalled("no answer in time", where=self._peer, expected=f"within {timeout_s:g} s") from problem
        except OSError as problem:
            raise PeerClosed("the link broke", where=self._peer, got=str(problem)) from problem
        return data

    def _arm(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _record(self, direction: Direction, header: bytes, payload: bytes | bytearray) -> None:
        if self._recorder is not None:
            self._recorder(direction, header + payload)
