"""Two ends of an attested channel over a socket pair, each in a thread of its own, with simulated evidence."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.platforms import simulated
from motte.attest.policy import AllOf, Fresh, InsecureAllowSimulated, Measurement, NotDebug
from motte.attest.ra_tls import Attester
from motte.attest.ra_tls_verify import Demand
from motte.seal.primitives import new_ed25519, new_x25519

if "attest_makers" not in sys.modules:
    _package = ModuleType("attest_makers")
    _package.__path__ = [str(Path(__file__).parents[1] / "attest")]
    sys.modules["attest_makers"] = _package


class Trusted:
    """What a genuine process shows, and what its peers demand of one."""

    configuration = b"c" * 32
    measurement = b"m" * 32

    def __init__(self) -> None:
        self.signing, public = new_ed25519()
        self.private, self.public_key = new_x25519()
        self.anchors = Anchors(simulated_signers=(public,))
        conditions = (Measurement(frozenset({self.measurement.hex()})), NotDebug(), Fresh(60.0))
        self.policy = AllOf(InsecureAllowSimulated(), *conditions)
        self.strict = AllOf(*conditions)
        self.demand = Demand(self.policy, self.configuration, self.anchors)
        self.shown = self.attester()

    def issue(self, report_data: bytes, **changes: Any) -> Evidence:
        return simulated.issue(report_data, **{"private": self.signing, "measurement": self.measurement, **changes})

    def attester(self, *, configuration: bytes = configuration, **changes: Any) -> Attester:
        return Attester(lambda report_data: self.issue(report_data, **changes), self.public_key, configuration)

    @staticmethod
    def now() -> datetime:
        return datetime.now(UTC)


@pytest.fixture(scope="session")
def trusted() -> Trusted:
    return Trusted()


End = Callable[[socket.socket], Any]


class Meeting:
    """Runs both ends; ``left`` and ``right`` are what they gave or raised."""

    def __init__(self, left: End, right: End, sockets: tuple[socket.socket, socket.socket]) -> None:
        self.left = self.right = None
        threads = [
            threading.Thread(target=self._run, args=(name, end, sock), daemon=True)
            for name, end, sock in zip(("left", "right"), (left, right), sockets, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def _run(self, name: str, end: End, sock: socket.socket) -> None:
        try:
            setattr(self, name, end(sock))
        except BaseException as problem:
            setattr(self, name, problem)


Meet = Callable[..., Meeting]


@pytest.fixture
def meet() -> Iterator[Meet]:
    """Let a client (left) and a server (right) meet over a socket pair, or over given sockets."""
    with contextlib.ExitStack() as stack:

        def run(left: End, right: End, sockets: tuple[socket.socket, socket.socket] | None = None) -> Meeting:
            pair = socket.socketpair() if sockets is None else sockets
            for sock in pair:
                stack.callback(sock.close)
                sock.settimeout(30)
            met = Meeting(left, right, pair)
            for result in (met.left, met.right):
                for each in result if isinstance(result, tuple) else (result,):
                    if hasattr(each, "close"):
                        stack.callback(each.close)
            return met

        yield run
