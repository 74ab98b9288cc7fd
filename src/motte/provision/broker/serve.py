"""A broker on a socket: TLS 1.3 with its own key, pinned by everybody who talks to it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

import uvicorn

from motte.errors import InputError, ResourceError
from motte.provision.address import BrokerAddress
from motte.provision.broker import log
from motte.provision.broker.app import make_app
from motte.provision.broker.state import Broker
from motte.seal.tls import parse_pin, server_context

DEFAULT_LISTEN: Final = "127.0.0.1:8443"
_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 30


def parse_listen(text: str) -> tuple[str, int]:
    """``HOST:PORT``; port 0 takes a free one. Raises: InputError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InputError(
            "not an address to listen at", expected="HOST:PORT, such as 127.0.0.1:8443", got=repr(text)[:100]
        )
    return host, int(port)


def serve(broker: Broker, listen: str, *, on_listening: Callable[[BrokerAddress], None]) -> None:
    """Serve until a signal ends it. The audit log is verified first: on a broken one nothing is built.

    Raises:
        TrustError: the audit log does not verify. ResourceError: the address cannot be had.
    """
    host, port = parse_listen(listen)
    with broker.store.read() as db:
        log.verify(db, broker.signer.public)
    with _listening(host, port) as sock:
        bound = sock.getsockname()[1]
        on_listening(BrokerAddress(host, bound, parse_pin(broker.tls.pin), broker.signer.public))
        config = uvicorn.Config(
            make_app(broker),
            ssl_context_factory=lambda config, default: server_context(broker.tls),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        uvicorn.Server(config).run(sockets=[sock])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: asyncio turns off Nagle's algorithm only where it sees it, and an answer would wait 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as problem:
        sock.close()
        raise ResourceError("cannot listen", where=f"{host}:{port}", got=problem.strerror or str(problem)) from problem
    return sock
