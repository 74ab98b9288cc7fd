"""The client's half of reaching an accelerator: it connects, or starts one, and hands the socket to the worker.

A worker opens no address itself: that is what works in an enclave too, and what keeps the address out of everything
that is trusted. The client sees nothing of what crosses there: it closes its copy of the socket once the worker has it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from motte.errors import InputError, PeerClosed
from motte.limits import GIB
from motte.link.address import DescriptorAddress, connect_socket, parse_address
from motte.link.wire import Deadline

LOCAL: Final = "local"
_EXIT_WAIT_S: Final = 5.0
_SHARED_MEMORY_BYTES: Final = GIB


@dataclass(slots=True)
class AcceleratorPeer:
    """A connected socket to an accelerator and, where it was started here, the process behind it."""

    name: str
    _socket: socket.socket
    _process: subprocess.Popen[bytes] | None = None

    def fileno(self) -> int:
        """The descriptor to hand to a worker."""
        return self._socket.fileno()

    def hand_over(self) -> None:
        """A worker holds the socket now: close our copy, so that each of the two sees when the other ends."""
        self._socket.close()

    def close(self) -> None:
        """Close our copy, and end the accelerator if it was started here. Safe to call again."""
        self._socket.close()
        process, self._process = self._process, None
        if process is None:
            return
        # It ends by itself when its link does; a stopped or busy one is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_EXIT_WAIT_S)
        if process.poll() is None:
            process.kill()
        process.wait()


def open_peer(address: str, *, timeout_s: float) -> AcceleratorPeer:
    """Connect to ``address``: ``unix:PATH``, ``tcp:HOST:PORT`` on this machine; or ``local[:DEVICE]`` to start one.

    Raises:
        InputError: not an address, or one that leads to another machine, which would be reached in the clear.
        PeerClosed, PeerStalled: nobody is there.
    """
    kind, _, device = address.partition(":")
    if kind == LOCAL:
        return _start(device or "cpu")
    target = parse_address(address)
    if isinstance(target, DescriptorAddress):
        raise InputError(
            "a worker gets its socket from us, not by number", expected="unix:PATH, tcp:HOST:PORT or local", got=address
        )
    found = connect_socket(target, Deadline(timeout_s), loopback_only=True, wait=False)
    return AcceleratorPeer(f"accelerator {target}", found)


def _start(device: str) -> AcceleratorPeer:
    ours, theirs = socket.socketpair()
    threads = len(os.sched_getaffinity(0))
    options = [f"--device={device}", f"--threads={threads}", f"--shared-memory={_SHARED_MEMORY_BYTES}"]
    # Settings of our own process are not the accelerator's; its waiting threads must sleep, beside a busy worker.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "motte.accelerator", f"--fd={theirs.fileno()}", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**inherited, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )
        except OSError as problem:
            ours.close()
            raise PeerClosed("the local accelerator did not start", got=str(problem)) from problem
    return AcceleratorPeer(f"local accelerator on {device}, pid {process.pid}", ours, process)
