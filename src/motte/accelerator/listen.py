"""An accelerator that listens: clients come and go, each with a calculator of its own and a thread that serves it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from motte.accelerator.calculator import Calculator
from motte.accelerator.server import HELLO_S, AcceleratorServer, Offer
from motte.errors import InputError, TrustError
from motte.limits import GIB, MAX_ACCELERATOR_CLIENTS, MAX_REGION_BYTES, MAX_TOKEN_BYTES
from motte.link.address import Address, DescriptorAddress, TcpAddress, is_loopback, listening, resolve
from motte.link.region import Region
from motte.link.wire import SocketWire
from motte.seal.tls import TlsIdentity, pin_of_peer, pins_of, server_context

_LOOK_UP_S: Final = 0.5
"""How often the loop looks whether it should end."""
_MIN_TOKEN_CHARACTERS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """How an accelerator listens.

    Args:
        address: where; ``fd:N`` serves one inherited socket.
        region_bytes: new shared memory for each client that can be passed a descriptor; 0: none.
        region_path: instead, a file that the host made and sized, for one client at a time.
        identity: certificate and key for TLS; None: in the clear, on loopback and local sockets only.
        clients: certificates (PEM) of the only clients that are let in.
        token: what every client has to know.
        threads: compute threads, as told to clients.

    Raises:
        InputError: the network could get in unknown, or settings that contradict each other.
    """

    address: Address
    region_bytes: int = GIB
    region_path: Path | None = None
    identity: TlsIdentity | None = None
    clients: Sequence[bytes] = ()
    token: str | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.region_bytes <= MAX_REGION_BYTES:
            raise InputError("shared memory out of bounds", got=str(self.region_bytes))
        if self.token is not None and len(self.token) < _MIN_TOKEN_CHARACTERS:
            raise InputError("token too short", expected=f"at least {_MIN_TOKEN_CHARACTERS} characters")
        if not isinstance(self.address, TcpAddress):
            if self.identity is not None or self.clients:
                raise InputError("only TCP is served over TLS", where=str(self.address))
            return
        if self.clients and self.identity is None:
            raise InputError("certificates of clients need TLS", where=str(self.address))
        family, (numeric, _) = resolve(self.address, loopback_only=False)
        del family
        if is_loopback(numeric):
            return
        if self.identity is None:
            raise InputError(
                "beyond loopback an accelerator is served over TLS only",
                where=str(self.address),
                hint="give --tls, or listen on tcp:127.0.0.1:PORT",
            )
        if not self.clients and self.token is None:
            raise InputError(
                "beyond loopback only known clients are let in",
                where=str(self.address),
                hint="give --client-cert FILE or --token-file FILE",
            )


def read_token(path: Path) -> str:
    """The token in a file that its owner alone can read; white space at its ends does not count.

    Raises:
        InputError: unreadable, readable by others, or not text.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as problem:
        raise InputError("cannot read the token", where=str(path), got=problem.strerror) from problem
    if mode & 0o077:
        raise InputError(
            "others can read the token", where=str(path), expected="mode 0600", got=f"{mode:04o}",
            hint=f"chmod 600 {path}",
        )  # fmt: skip
    try:
        token = data.decode("ascii").strip()
    except UnicodeDecodeError as problem:
        raise InputError("a token is ASCII text", where=str(path)) from problem
    if len(data) > MAX_TOKEN_BYTES or len(token) < _MIN_TOKEN_CHARACTERS:
        expected = f"{_MIN_TOKEN_CHARACTERS} to {MAX_TOKEN_BYTES} characters"
        raise InputError("not a token", where=str(path), expected=expected, got=str(len(token)))
    return token


class Listener:
    """Accepts clients until it is stopped.

    Args:
        settings: how.
        make: a new calculator for each client.
        serve: makes the server of one client; a test may put a hostile one in.
    """

    def __init__(
        self,
        settings: ListenSettings,
        make: Callable[[], Calculator],
        *,
        serve: Callable[[SocketWire, Calculator, Offer], AcceleratorServer] = AcceleratorServer,
    ) -> None:
        self.settings = settings
        self.served = 0
        self._make = make
        self._serve = serve
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket | SocketWire] = set()
        self._threads: set[threading.Thread] = set()
        self._region_in_use = threading.Lock()

    @property
    def clients(self) -> int:
        """Connections at the moment."""
        return len(self._threads)

    def stop(self) -> None:
        """End the loop and every connection. From any thread, or a signal handler."""
        self._stop.set()

    def run(self, *, on_listening: Callable[[Address], None] = lambda address: None) -> None:
        """Serve until :meth:`stop`; an inherited socket, until it closes.

        Args:
            on_listening: called with the address, once clients can connect; port 0 is resolved in it.

        Raises:
            InputError, ResourceError: the address or the shared memory cannot be had.
        """
        settings = self.settings
        offer = Offer(
            region_bytes=0 if settings.region_path is not None else settings.region_bytes,
            region=None if settings.region_path is None else Region.open(settings.region_path),
            token=settings.token,
            threads=settings.threads,
        )
        try:
            if isinstance(settings.address, DescriptorAddress):
                on_listening(settings.address)
                sock = socket.socket(fileno=settings.address.fd)
                self._serve_one(sock, offer, "client over an inherited socket")
                return
            with listening(settings.address) as sock:
                where: Address = settings.address
                if isinstance(where, TcpAddress):
                    where = replace(where, port=sock.getsockname()[1])
                on_listening(where)
                self._accept(sock, offer)
        finally:
            self._end()
            if offer.region is not None:
                offer.region.close()

    def _accept(self, listener: socket.socket, offer: Offer) -> None:
        listener.setblocking(False)
        ready = select.poll()
        ready.register(listener, select.POLLIN)
        number = 0
        while not self._stop.is_set():
            if not ready.poll(int(_LOOK_UP_S * 1000)):
                continue
            try:
                sock, _ = listener.accept()
            except OSError:
                continue
            number += 1
            if len(self._threads) >= MAX_ACCELERATOR_CLIENTS:
                sock.close()
                continue
            peer = f"client {number}"
            thread = threading.Thread(target=self._serve_one, args=(sock, offer, peer), name=peer, daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _serve_one(self, sock: socket.socket, offer: Offer, peer: str) -> None:
        try:
            with self._known(sock):
                wire = self._welcome(sock, peer)
            if wire is None:
                return
            with self._known(wire), self._one_region(offer) as mine:
                self.served += 1
                self._serve(wire, self._make(), mine).serve()
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _welcome(self, sock: socket.socket, peer: str) -> SocketWire | None:
        """The connection, with TLS and a known key where the settings say so; None: not let in."""
        settings = self.settings
        if settings.identity is None:
            return SocketWire(sock, peer=peer)
        try:
            sock.settimeout(HELLO_S)
            secured = server_context(settings.identity, clients=settings.clients).wrap_socket(sock, server_side=True)
            if settings.clients:
                pin_of_peer(secured, demanded=pins_of(settings.clients), where=peer)
            return SocketWire(secured, peer=peer)
        except (OSError, TrustError, ssl.SSLError):
            # Whoever that was is no client of ours, and learns nothing but that.
            sock.close()
            return None

    @contextlib.contextmanager
    def _known(self, connection: socket.socket | SocketWire) -> Iterator[None]:
        """:meth:`_end` closes it meanwhile."""
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)

    @contextlib.contextmanager
    def _one_region(self, offer: Offer) -> Iterator[Offer]:
        """A region that was made before serves one client at a time; the others send everything inline."""
        if offer.region is None:
            yield offer
        elif self._region_in_use.acquire(blocking=False):
            try:
                yield offer
            finally:
                self._region_in_use.release()
        else:
            yield replace(offer, region=None)

    def _end(self) -> None:
        with self._lock:
            connections, threads = list(self._open), list(self._threads)
        for each in connections:
            if isinstance(each, socket.socket):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            else:
                each.interrupt()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=HELLO_S)
