"""Data keys from a broker, for a worker that reaches nobody itself: its client carries the messages.

What they are worth is decided here, by :class:`motte.provision.handshake.Handshake` and the key of the broker that the
bundle's owner signed. The client can delay, drop or alter; it learns nothing, and gains no keys.
"""

from __future__ import annotations

from motte.attest.configuration import RunConfiguration
from motte.errors import FrameError
from motte.link.frames import Frame, Kind, WireTensor
from motte.link.local import Link
from motte.provision.handshake import Enclave, Handshake, Issue
from motte.seal.header import BundleHeader


def obtain(header: BundleHeader, link: Link, issue: Issue) -> tuple[bytes, ...]:
    """The data keys of the bundle with this **verified** header, released by its broker against our evidence.

    Args:
        link: to the client, secured.
        issue: makes our evidence.

    Raises:
        InputError: the owner named no broker. HandshakeError, RollbackError: an answer is refused (H-1 to H-8).
        FrameError: the client answers something else. ResourceError: no evidence can be made here.
    """
    configuration = RunConfiguration.of(header)
    handshake = Handshake(configuration.broker_key(), header, Enclave(issue, b"", configuration.digest()))
    challenge = _asked(link, Kind.BROKER, {"step": "ask"}, handshake.ask())
    release, _ = handshake.finish(_asked(link, Kind.BROKER, {"step": "prove"}, handshake.prove(challenge)))
    return release.data_keys


def _asked(link: Link, kind: Kind, meta: dict[str, str], message: bytes) -> bytes:
    """The **unverified** bytes by which the client answers ours, in a frame of the same kind."""
    link.send(Frame(kind, meta, [_as_tensor(message)]))
    answer = link.receive()
    if answer.kind is not kind or answer.meta or len(answer.tensors) != 1:
        raise FrameError("frame in the wrong state", expected=kind.name, got=answer.kind.name)
    return bytes(answer.tensors[0].data)


def _as_tensor(message: bytes) -> WireTensor:
    return WireTensor("u8", (len(message),), message)
