"""Standard input and output as one stream, for a worker whose link comes that way: in Gramine they are two files.

Gramine hands on descriptors 0, 1 and 2 only, shows them as files even where they are sockets, and writes what goes to 2
to the place of 1. So the stream is taken away from all three at once: what prints after that goes nowhere, and cannot
come between two frames.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from typing import Protocol

from motte.errors import InputError

_MOST_PARTS = 1024


class ByteStream(Protocol):
    """What :class:`motte.link.local.Link` needs of a socket."""

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview], /) -> int:
        """Send some of ``buffers``; how many bytes."""
        ...

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive something; how many bytes, 0 at the end of the stream."""
        ...

    def settimeout(self, value: float | None, /) -> None:
        """How long each of the others may take."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class StandardStreams:
    """Reads what was standard input and writes what was standard output, which from now on are ``/dev/null``.

    No time limits: a worker waits for its client for as long as the link is open.
    """

    def __init__(self) -> None:
        self._in, self._out = os.dup(0), os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        try:
            for descriptor in (0, 1, 2):
                os.dup2(nowhere, descriptor)
        finally:
            os.close(nowhere)

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview], /) -> int:
        """Write some of ``buffers``; how many bytes."""
        return os.writev(self._out, buffers[:_MOST_PARTS])

    def recv_into(self, buffer: memoryview, /) -> int:
        """Read something; how many bytes, 0 at the end of the stream."""
        return os.readv(self._in, [buffer])

    def settimeout(self, value: float | None, /) -> None:
        """Nothing: None is all that can be asked for.

        Raises:
            ValueError: a time limit.
        """
        if value is not None:
            raise ValueError("standard streams have no time limits")

    def close(self) -> None:
        """Close both. Safe to call again."""
        for name in ("_in", "_out"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                setattr(self, name, -1)
                os.close(descriptor)


def inherited_stream(descriptor: int) -> ByteStream:
    """The stream that a worker was started with: the socket ``descriptor``, or for 0, where that is none, 0 and 1.

    Raises:
        InputError: not open, or no socket and not 0.
    """
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        if is_socket:
            return socket.socket(fileno=descriptor)
    except OSError as problem:
        raise InputError("not an open stream", where=f"descriptor {descriptor}", got=problem.strerror) from problem
    if descriptor != 0:
        raise InputError(
            "not a socket", where=f"descriptor {descriptor}", hint="only standard input may be another file"
        )
    return StandardStreams()
