"""``connect("unix:/run/a.sock")``: an accelerator that somebody started."""

from __future__ import annotations

import socket
import ssl

from motte.accelerator.client import AcceleratorClient
from motte.errors import InputError, PeerClosed, PeerStalled
from motte.link.address import Address, DescriptorAddress, TcpAddress, connect_socket, parse_address
from motte.link.recording import Recorder
from motte.link.wire import Deadline, SocketWire, Wire
from motte.seal.tls import TlsIdentity, client_context, parse_pin, pin_of_peer


def connect(
    address: str,
    *,
    timeout_s: float = 60.0,
    retries: int = 1,
    pin: str | None = None,
    recorder: Recorder | None = None,
    retain: bool | None = None,
    shared_memory: str | None = "auto",
    token: str | None = None,
    identity: TlsIdentity | None = None,
) -> AcceleratorClient:
    """Connect to a running ``motte accelerator serve``.

    Args:
        address: ``unix:PATH``, ``tcp:HOST:PORT``, or ``fd:N``, an inherited socket.
        timeout_s: for a connection to be made, a frame to be taken, an answer to come.
        retries: how often in a row a lost or stalled connection is made again, and all that is needed sent once more
            with the identical bytes. Not for an inherited socket.
        pin: ``sha256:...`` of the server's public key: TLS 1.3 to exactly this server. Without it TCP is refused
            beyond the loopback addresses.
        recorder: sees every frame.
        retain: keep a copy of what a retry needs; None: as ``retries`` says.
        shared_memory: ``auto``; the path of a file that the host made, for a process that can be passed no descriptor
            (Gramine); or None, everything through the socket.
        token: what lets us in, if the server demands one.
        identity: our own certificate, if the server demands one.

    Raises:
        InputError: not an address, or one that would be reached in the clear.
        LinkError, FrameError: no accelerator answers there. TrustError: it is not the pinned one.
    """
    target = parse_address(address)
    if pin is not None and not isinstance(target, TcpAddress):
        raise InputError("only TCP is reached over TLS", where=address)
    if identity is not None and pin is None:
        raise InputError("a certificate of our own is used with a pin only", where=address)
    wanted = None if pin is None else parse_pin(pin)
    if isinstance(target, DescriptorAddress):
        retries = 0
    name = f"accelerator {target}"

    def dial(deadline: Deadline, again: bool) -> Wire:
        sock = connect_socket(target, deadline, loopback_only=wanted is None, wait=again)
        if wanted is not None:
            sock = _secured(sock, target, deadline, wanted, identity, name)
        return SocketWire(sock, peer=name)

    return AcceleratorClient(
        dial,
        name=name,
        timeout_s=timeout_s,
        retries=retries,
        retain=retain,
        recorder=recorder,
        shared_memory=shared_memory,
        token=token,
    )


def _secured(
    sock: socket.socket,
    address: Address,
    deadline: Deadline,
    pin: bytes,
    identity: TlsIdentity | None,
    name: str,
) -> ssl.SSLSocket:
    """TLS with the pinned server; nothing but the handshake was sent before the pin was compared."""
    left = deadline.left_ms()
    sock.settimeout(None if left is None else max(left, 1) / 1000)
    try:
        secured = client_context(identity).wrap_socket(sock)
    except TimeoutError as problem:
        sock.close()
        raise PeerStalled("no TLS handshake in time", where=name, expected=deadline.expected()) from problem
    except OSError as problem:
        sock.close()
        raise PeerClosed("the TLS handshake failed", where=name, got=str(problem)) from problem
    try:
        pin_of_peer(secured, demanded=[pin], where=name)
    except BaseException:
        secured.close()
        raise
    return secured
