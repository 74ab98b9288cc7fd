"""The attested channel: TLS 1.3 whose end proved, before a byte of payload, what it is and what it is committed to.

    client                                             worker
    ASK(mutual?, nonce)               ------------->                         docs/spec/attested_channel.md
                                      <-------------   ANSWER(nonce)         (mutual only)
    SHOW(certificate)                 ------------->                         (mutual only)
    <=================== TLS 1.3, the worker's certificate carries its evidence ===================>

Evidence is made for the nonce of this connection, so the nonce crosses first, in clear. The client verifies the
certificate that TLS used before it sends anything through it; a mutual server verified the client's before TLS began,
and lets only the holder of that key complete the handshake. Any relay in between carries ciphertext. The result serves
:class:`motte.link.local.Link` as its stream.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from motte.attest.ra_tls import Attester, issue_certificate
from motte.attest.report_data import NONCE_BYTES
from motte.errors import AttestationError, FrameError, LinkError, PeerClosed, PeerStalled
from motte.limits import MAX_CERTIFICATE_BYTES
from motte.link.standard_streams import ByteStream
from motte.seal.primitives import random_bytes

if TYPE_CHECKING:
    from motte.attest.ra_tls_verify import Demand
    from motte.attest.verify import Verdict
    from motte.link.tls_stream import TlsStream

DEFAULT_TIMEOUT_S: Final = 30.0
"""For a whole handshake: making a quote can take seconds."""
_HEADER: Final = struct.Struct(">4sBBI")
_MAGIC: Final = b"MOTA"
_VERSION: Final = 1
Clock = Callable[[], datetime]


class Step(IntEnum):
    """Frames before TLS."""

    ASK = 1
    ANSWER = 2
    SHOW = 3


_BODY_BYTES: Final = {
    Step.ASK: range(1 + NONCE_BYTES, 2 + NONCE_BYTES),
    Step.ANSWER: range(NONCE_BYTES, NONCE_BYTES + 1),
    Step.SHOW: range(1, MAX_CERTIFICATE_BYTES + 1),
}


def _utc_now() -> datetime:
    return datetime.now(UTC)


def attested_client(
    stream: ByteStream,
    demand: Demand,
    *,
    shown: Attester | None = None,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    peer: str = "worker",
    clock: Clock = _utc_now,
) -> tuple[TlsStream, Verdict]:
    """Open a channel over ``stream``, which it owns from now on, to a process that satisfies ``demand``.

    Args:
        shown: what we show of ourselves, for a server that demands it; None: we are nobody in particular.
        timeout_s: for all of it.
        peer: what the other side is called in errors.

    Returns:
        the stream to go on with, and the verdict on the other side; ``verdict.claims.binding.public_key`` is the key
        to which secrets can be sealed. **Whoever is handed that key in a frame compares.**

    Raises:
        EvidenceError, AttestationError: the other side is refused; nothing but the handshake was sent.
        FrameError, PeerClosed, PeerStalled, LinkError: the other side is none, ended or did not answer.
        Also what ``shown.issue`` raises. ``stream`` is closed then.
    """
    from motte.attest.ra_tls_verify import verify_peer_certificate
    from motte.link.tls_stream import TlsStream
    from motte.seal.tls import client_context

    nonce, issued_at = random_bytes(NONCE_BYTES), clock()
    with _opening(stream, peer, timeout_s) as deadline:
        frames = _Frames(stream, peer, deadline)
        frames.send(Step.ASK, bytes([shown is not None]) + nonce)
        identity = None
        if shown is not None:
            identity = issue_certificate(shown, frames.receive(Step.ANSWER), clock())
            frames.send(Step.SHOW, identity.der())
        channel = TlsStream(stream, client_context(identity), server=False)
        _handshake(channel, deadline)
        verdict = verify_peer_certificate(
            _peer_certificate(channel, peer), demand, clock(), nonce=nonce, issued_at=issued_at
        )
        return channel, verdict


def attested_server(
    stream: ByteStream,
    shown: Attester,
    *,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    peer: str = "client",
    clock: Clock = _utc_now,
) -> TlsStream:
    """The trusted end of a channel over ``stream``, which it owns from now on; the other side shows nothing of itself.

    Args:
        timeout_s: for all of it; None for a stream without time limits, such as standard input and output.
        clock: only dates the certificate; a host that lies about the time gets one that nobody takes.

    Raises:
        FrameError: not this protocol, or a client that wants to show evidence that nobody asked for.
        PeerClosed, PeerStalled, LinkError: the other side ended or did not answer, or refuses us.
        Also what ``shown.issue`` raises. ``stream`` is closed then.
    """
    from motte.link.tls_stream import TlsStream
    from motte.seal.tls import attested_server_context

    with _opening(stream, peer, timeout_s) as deadline:
        nonce = _asked(_Frames(stream, peer, deadline), peer, mutual=False)
        identity = issue_certificate(shown, nonce, clock())
        channel = TlsStream(stream, attested_server_context(identity), server=True)
        _handshake(channel, deadline)
        return channel


def attested_mutual_server(
    stream: ByteStream,
    shown: Attester,
    demand: Demand,
    *,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    peer: str = "peer",
    clock: Clock = _utc_now,
) -> tuple[TlsStream, Verdict]:
    """As :func:`attested_server`, and the other side, an :func:`attested_client`, must satisfy ``demand`` itself.

    Raises:
        EvidenceError, AttestationError: the other side is refused, before TLS begins.
        Others as :func:`attested_server`; FrameError also for a client that shows no evidence.
    """
    from motte.attest.ra_tls_verify import verify_peer_certificate
    from motte.link.tls_stream import TlsStream
    from motte.seal.tls import attested_server_context

    with _opening(stream, peer, timeout_s) as deadline:
        frames = _Frames(stream, peer, deadline)
        nonce = _asked(frames, peer, mutual=True)
        own_nonce, issued_at = random_bytes(NONCE_BYTES), clock()
        frames.send(Step.ANSWER, own_nonce)
        der = frames.receive(Step.SHOW)
        verdict = verify_peer_certificate(der, demand, clock(), nonce=own_nonce, issued_at=issued_at)
        identity = issue_certificate(shown, nonce, clock())
        channel = TlsStream(stream, attested_server_context(identity, client=der), server=True)
        _handshake(channel, deadline)
        if _peer_certificate(channel, peer) != der:
            raise AttestationError("TLS was made with another certificate than the verified one", check="X-9")
        return channel, verdict


class _Frames:
    """The frames before TLS, over a stream that carries TLS right behind them: not a byte more is read."""

    def __init__(self, stream: ByteStream, peer: str, deadline: float | None) -> None:
        self._stream, self._peer, self._deadline = stream, peer, deadline

    def send(self, step: Step, body: bytes) -> None:
        left = memoryview(_HEADER.pack(_MAGIC, _VERSION, step, len(body)) + body)
        while left:
            _arm(self._stream, self._deadline)
            left = left[self._stream.sendmsg([left]) :]

    def receive(self, step: Step) -> bytes:
        magic, version, kind, size = _HEADER.unpack(self._exactly(_HEADER.size))
        if magic != _MAGIC or version != _VERSION:
            got = f"{magic!r} {version}"
            raise FrameError("not an attested channel", where=self._peer, expected=f"{_MAGIC!r} {_VERSION}", got=got)
        if kind != step:
            raise FrameError("a step out of order", where=self._peer, expected=step.name, got=str(kind))
        if size not in _BODY_BYTES[step]:
            raise FrameError("a frame of a wrong size", where=self._peer, got=f"{step.name} of {size} bytes")
        return self._exactly(size)

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        done = 0
        while done < count:
            _arm(self._stream, self._deadline)
            got = self._stream.recv_into(memoryview(data)[done:])
            if not got:
                raise PeerClosed("closed before the channel stood", where=self._peer)
            done += got
        return bytes(data)


def _asked(frames: _Frames, peer: str, *, mutual: bool) -> bytes:
    """The client's nonce; both sides must want the same kind of channel, so that nobody talks one down."""
    body = frames.receive(Step.ASK)
    if body[0] != mutual:
        raise FrameError(
            "the two sides want different channels",
            where=peer,
            expected="evidence of the client too" if mutual else "no evidence of the client",
            got=str(body[0]),
        )
    return body[1:]


def _peer_certificate(channel: TlsStream, peer: str) -> bytes:
    der = channel.peer_certificate()
    if der is None:
        raise AttestationError("no certificate was shown", check="X-9", where=peer)
    return der


def _handshake(channel: TlsStream, deadline: float | None) -> None:
    channel.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
    channel.handshake()
    channel.settimeout(None)


def _arm(stream: ByteStream, deadline: float | None) -> None:
    if deadline is None:
        stream.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    stream.settimeout(left)


@contextlib.contextmanager
def _opening(stream: ByteStream, peer: str, timeout_s: float | None) -> Iterator[float | None]:
    """The time at which opening a channel must be done. Closes ``stream`` and names the fault where it fails."""
    try:
        yield None if timeout_s is None else time.monotonic() + timeout_s
    except TimeoutError as problem:
        stream.close()
        raise PeerStalled("no attested channel in time", where=peer, expected=f"within {timeout_s:g} s") from problem
    except ConnectionError as problem:
        stream.close()
        raise PeerClosed("closed before the channel stood", where=peer, got=str(problem)[:200]) from problem
    except OSError as problem:
        stream.close()
        hint = "the other side may have refused us; it knows why"
        raise LinkError("no TLS with the other side", where=peer, got=str(problem)[:200], hint=hint) from problem
    except BaseException:
        stream.close()
        raise
