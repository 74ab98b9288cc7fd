"""Accelerators to test against: honest and hostile servers in a thread, each behind a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from motte.accelerator.calculator import Calculator
from motte.accelerator.client import AcceleratorClient
from motte.accelerator.server import AcceleratorServer, Offer
from motte.linear.operation import LinearOperation
from motte.link.wire import SocketWire

MIB = 1 << 20
CONV = LinearOperation("conv", 3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))


@dataclass
class Harness:
    """Starts a server thread for every connection that a client makes; the n-th connection gets the n-th server."""

    kinds: list[type[AcceleratorServer]]
    offer: Offer
    servers: list[AcceleratorServer] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def dial(self, deadline: Any, again: bool) -> SocketWire:
        ours, theirs = socket.socketpair()
        kind = self.kinds[min(len(self.servers), len(self.kinds) - 1)]
        server = kind(SocketWire(theirs, peer="client"), Calculator(), self.offer)
        thread = threading.Thread(target=server.serve, daemon=True)
        self.servers.append(server)
        self.threads.append(thread)
        thread.start()
        return SocketWire(ours, peer="peer")


@pytest.fixture
def against() -> Iterator[Callable[..., tuple[AcceleratorClient, Harness]]]:
    """``against(Server, ...)``: a client of a server of this class, the second class after a reconnect, and so on."""
    torch.set_num_threads(1)
    made: list[tuple[AcceleratorClient, Harness]] = []

    def start(*kinds: type[AcceleratorServer], region_bytes: int = 0, **options: Any) -> Any:
        harness = Harness(list(kinds), Offer(region_bytes=region_bytes))
        client = AcceleratorClient(harness.dial, name="peer", **{"timeout_s": 20.0, **options})
        made.append((client, harness))
        return client, harness

    yield start
    for client, harness in made:
        client.close()
        for thread in harness.threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "a server did not end with its client"
