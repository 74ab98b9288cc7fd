"""What carries the frames of :mod:`motte.link.calls`: a stream socket of any kind, or our own process.

No wait is without a deadline, and a peer that does not read cannot block us from reading: while a frame is sent,
what arrives is taken in.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from motte.errors import FrameError, PeerClosed, PeerStalled
from motte.limits import MAX_CALL_META_BYTES
from motte.link.calls import HEADER, Call, HeadReader, Op

_SCRATCH_BYTES: Final = HEADER.size + MAX_CALL_META_BYTES
Buffer = bytes | bytearray | memoryview


class Deadline:
    """A point in time until which something may take; ``seconds`` None: no end."""

    __slots__ = ("at", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.at = None if seconds is None else time.monotonic() + seconds

    def left_ms(self) -> int | None:
        """Milliseconds that are left, rounded up, at least 0."""
        if self.at is None:
            return None
        return max(0, int((self.at - time.monotonic()) * 1000 + 0.999))

    @property
    def long_over(self) -> bool:
        """Whether twice the time is gone: from then on not even a peer that still trickles bytes is waited for."""
        return self.at is not None and time.monotonic() > self.at + (self.seconds or 0.0)

    def expected(self) -> str:
        """For an error: ``within 2 s``."""
        return f"within {self.seconds:g} s"


class Receiver(Protocol):
    """Who takes the frames that a :class:`FrameReader` puts together."""

    def begin(self, call: Call, head: bytes) -> Sequence[memoryview]:
        """A frame without its body arrived. Returns where the inline tensors go, in order, each of exactly its size."""
        ...

    def finish(self) -> None:
        """The body is complete too."""
        ...


class FrameReader:
    """Puts frames together from bytes in whatever pieces they come.

    Args:
        peer: what the other side is called in errors.
        allowed: kinds of frames that may come from it.
    """

    def __init__(self, receiver: Receiver, *, peer: str, allowed: frozenset[Op]) -> None:
        self.heads = HeadReader(peer=peer, allowed=allowed)
        self._receiver = receiver
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = self._end = 0
        self._bodies: deque[memoryview] = deque()
        self._in_body = False

    @property
    def between_frames(self) -> bool:
        """Whether nothing of a next frame has arrived."""
        return not self._in_body and self._start == self._end

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._in_body and self._start == self._end:
            return self._bodies[0]
        return self._scratch[self._end :] if self._end else self._scratch

    def advance(self, count: int) -> None:
        """``count`` bytes were put into :meth:`buffer`.

        Raises:
            FrameError: they are no frame; the reader is useless from then on. Also what the receiver raises.
        """
        if self._in_body and self._start == self._end:
            self._bodies[0] = self._bodies[0][count:]
        else:
            self._end += count
        while self._fill_body() if self._in_body else self._start < self._end and self._read_frame():
            pass
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            left = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(left)] = left
            self._start, self._end = 0, len(left)

    def _read_frame(self) -> bool:
        """The next head, and the body with it if all of it is here; whether the head was."""
        found = self.heads.read(self._scratch, self._start, self._end)
        if found is None:
            return False
        call, head, body_bytes = found
        start = self._start + len(head)
        end = start + body_bytes
        self._start = start
        bodies = self._receiver.begin(call, head)
        if end <= self._end and len(bodies) == 1 and len(bodies[0]) == body_bytes:
            # Most frames: one small tensor, which came along.
            if body_bytes:
                bodies[0][:] = self._scratch[start:end]
            self._start = end
            self._receiver.finish()
            return True
        if sum(map(len, bodies)) != body_bytes:
            raise RuntimeError("the receiver made room for another number of bytes")
        self._bodies.extend(bodies)
        self._in_body = True
        return True

    def _fill_body(self) -> bool:
        """As much of the body as is here; whether it is complete, and the frame with it."""
        while self._bodies:
            body = self._bodies[0]
            size = len(body)
            count = min(self._end - self._start, size)
            if count:
                body[:count] = self._scratch[self._start : self._start + count]
                self._start += count
            elif size:
                return False
            if count == size:
                self._bodies.popleft()
            else:
                self._bodies[0] = body[count:]
        self._in_body = False
        self._receiver.finish()
        return True


class Wire(Protocol):
    """Carries bytes in order. ``sent_bytes`` and ``received_bytes`` count them."""

    peer: str
    sent_bytes: int
    received_bytes: int

    def send(self, parts: Sequence[Buffer], deadline: Deadline, reader: FrameReader | None = None) -> None:
        """Send all parts; what arrives meanwhile goes to ``reader``.

        Raises:
            PeerClosed, PeerStalled; and what ``reader`` raises.
        """
        ...

    def fill(self, reader: FrameReader, deadline: Deadline) -> None:
        """Wait until something arrives and give it to ``reader``.

        Raises:
            PeerClosed, PeerStalled; and what ``reader`` raises.
        """
        ...

    def close(self) -> None:
        """End it. Safe to call again."""
        ...


class SocketWire:
    """A connected stream socket, plain or TLS, which it owns from now on. For one thread at each end of a direction.

    With ``take_descriptors`` the next bytes that arrive may bring file descriptors; they are in ``descriptors`` then.
    """

    def __init__(self, sock: socket.socket, *, peer: str) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0
        self.take_descriptors = False
        self.descriptors: list[int] = []
        self._socket = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._closed = False
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._readable, self._both = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._both.register(sock, select.POLLIN | select.POLLOUT)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    @property
    def is_local(self) -> bool:
        """Whether descriptors can be passed over it."""
        return self._socket.family == socket.AF_UNIX

    def send(self, parts: Sequence[Buffer], deadline: Deadline, reader: FrameReader | None = None) -> None:
        """See :class:`Wire`."""
        try:
            if not self._tls:
                # Nearly always the socket takes all of it.
                sent = self._send_some(parts)
                if sent == sum(map(len, parts)):
                    return
                parts = _after(parts, sent)
            left = _after(parts, 0)
            while left:
                sent = self._send_some(left)
                if not sent:
                    self._wait_to_send(deadline, reader)
                left = _after(left, sent)
        except OSError as problem:
            raise PeerClosed("the link was closed while sending", where=self.peer, got=str(problem)) from problem

    def send_with_descriptor(self, parts: Sequence[Buffer], fd: int) -> None:
        """Send a short frame and hand ``fd`` over with it; for a socket that was not used for sending yet."""
        data = b"".join(parts)
        try:
            sent = socket.send_fds(self._socket, [data], [fd])
        except OSError as problem:
            raise PeerClosed("the link was closed while sending", where=self.peer, got=str(problem)) from problem
        if sent != len(data):
            raise PeerStalled("the peer did not take the first frame", where=self.peer)
        self.sent_bytes += sent

    def fill(self, reader: FrameReader, deadline: Deadline) -> None:
        """See :class:`Wire`."""
        try:
            while not deadline.long_over:
                # TLS may have decrypted more than it gave out, which no poll sees.
                if self._tls and self._receive_some(reader):
                    return
                if not self._readable.poll(deadline.left_ms()):
                    break
                if not self._tls and self._receive_some(reader):
                    return
        except OSError as problem:
            raise PeerClosed("the link broke", where=self.peer, got=str(problem)) from problem
        raise PeerStalled("no answer in time", where=self.peer, expected=deadline.expected())

    def finish_sending(self, deadline: Deadline) -> None:
        """Tell the peer that nothing more comes, and read and forget what it still sends, until it closes."""
        forgotten = bytearray(1 << 16)
        try:
            self._socket.shutdown(socket.SHUT_WR)
            while not deadline.long_over and self._readable.poll(deadline.left_ms()):
                if not self._socket.recv_into(forgotten):
                    return
        except (OSError, ValueError):
            return

    def interrupt(self) -> None:
        """End what another thread waits for on this wire; that thread closes it."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """See :class:`Wire`."""
        if self._closed:
            return
        self._closed = True
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors = []
        self.interrupt()
        self._socket.close()

    def _send_some(self, parts: Sequence[Buffer]) -> int:
        try:
            sent = self._socket.send(parts[0]) if self._tls else self._socket.sendmsg(parts)
        except (BlockingIOError, InterruptedError, ssl.SSLWantWriteError):
            return 0
        self.sent_bytes += sent
        return sent

    def _wait_to_send(self, deadline: Deadline, reader: FrameReader | None) -> None:
        poll = self._writable if reader is None else self._both
        ready = poll.poll(deadline.left_ms())
        if not ready or deadline.long_over:
            raise PeerStalled("no progress while sending", where=self.peer, expected=deadline.expected())
        if reader is not None and ready[0][1] & ~select.POLLOUT:
            self._receive_some(reader)

    def _receive_some(self, reader: FrameReader) -> bool:
        """Read once; whether anything came."""
        buffer = reader.buffer()
        try:
            count = self._receive_with_descriptors(buffer) if self.take_descriptors else self._socket.recv_into(buffer)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        if not count:
            raise PeerClosed("the link was closed", where=self.peer)
        self.received_bytes += count
        reader.advance(count)
        return True

    def _receive_with_descriptors(self, buffer: memoryview) -> int:
        data, found, flags, _ = socket.recv_fds(self._socket, len(buffer), 1, socket.MSG_CMSG_CLOEXEC)
        self.descriptors.extend(found)
        if flags & socket.MSG_CTRUNC or len(self.descriptors) > 1:
            raise FrameError("more descriptors than one", where=self.peer)
        buffer[: len(data)] = data
        return len(data)


class MemoryWire:
    """One end of a link within our own process: what one end sends, the other end's reader gets at once.

    >>> ours, theirs = MemoryWire.pair("accelerator in this process", "client in this process")
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0
        self.take: Callable[[bytes], None] | None = None
        """Takes at once what arrives here; without it bytes wait for :meth:`fill`."""
        self._inbox: deque[bytes] = deque()
        self._other: MemoryWire | None = None

    @staticmethod
    def pair(first: str, second: str) -> tuple[MemoryWire, MemoryWire]:
        """Two connected ends, named after who is at the far side of each."""
        one, other = MemoryWire(first), MemoryWire(second)
        one._other, other._other = other, one
        return one, other

    def send(self, parts: Sequence[Buffer], deadline: Deadline, reader: FrameReader | None = None) -> None:
        """See :class:`Wire`."""
        data = b"".join(parts)
        if self._other is None:
            raise PeerClosed("the link was closed while sending", where=self.peer)
        self.sent_bytes += len(data)
        self._other._arrive(data)

    def fill(self, reader: FrameReader, deadline: Deadline) -> None:
        """See :class:`Wire`; there is nothing to wait for."""
        if not self._inbox:
            if self._other is None:
                raise PeerClosed("the link was closed", where=self.peer)
            raise PeerStalled("no answer in time", where=self.peer, expected="at once")
        data = self._inbox.popleft()
        self.received_bytes += len(data)
        feed(reader, data)

    def close(self) -> None:
        """See :class:`Wire`."""
        other, self._other = self._other, None
        if other is not None:
            other._other = None

    def _arrive(self, data: bytes) -> None:
        if self.take is None:
            self._inbox.append(data)
        else:
            self.received_bytes += len(data)
            self.take(data)


def _after(parts: Sequence[Buffer], count: int) -> list[memoryview]:
    """What is left of ``parts`` without their first ``count`` bytes."""
    left: list[memoryview] = []
    for part in parts:
        if count < len(part):
            left.append(memoryview(part)[count:])
        count = max(0, count - len(part))
    return left


def feed(reader: FrameReader, data: bytes) -> None:
    """Give ``data`` to ``reader``.

    Raises:
        What the reader raises.
    """
    left = memoryview(data)
    while left:
        buffer = reader.buffer()
        count = min(len(buffer), len(left))
        buffer[:count] = left[:count]
        left = left[count:]
        reader.advance(count)
