"""Entry of the worker process: ``python -m motte.trusted --fd N --threads T --engine torch``.

Started only by :mod:`motte.enclave`, with one connected socket as file descriptor N and, with ``--accelerator-fd``, a
second one to an accelerator. The worker opens no address itself, and nothing that decides what leaves is an argument.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motte.accelerator.interface import Accelerator


def main() -> int:
    """Harden, load the engine, serve the link; the exit status is the worker's."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="motte.trusted")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--engine", choices=("torch",), required=True)
    parser.add_argument("--accelerator-fd", type=int)
    parser.add_argument("--accelerator-name", default="accelerator")
    parser.add_argument("--accelerator-timeout", type=float, default=60.0)
    options = parser.parse_args()
    # Read by OpenMP when torch is loaded: waiting threads must sleep, or two of them beside any busy process spin.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from motte.trusted.harden import harden

    hardening = harden()
    from motte.engines.select import make_engine

    engine = make_engine(options.engine, threads=options.threads)
    engine_ready = time.perf_counter()
    from motte.link.local import Link
    from motte.trusted.worker import Worker

    link = Link(socket.socket(fileno=options.fd), peer="client")
    hello = {
        "enclave": "process",
        "simulated": True,
        "pid": os.getpid(),
        "engine": engine.name,
        "engine_version": importlib.import_module("importlib.metadata").version(engine.name),
        "threads": options.threads,
        "dumpable": hardening.dumpable,
        "seconds": {"import_engine": engine_ready - began, "import_worker": time.perf_counter() - engine_ready},
    }
    accelerator = None
    if options.accelerator_fd is not None:
        accelerator = partial(
            _greet,
            options.accelerator_fd,
            name=options.accelerator_name,
            timeout_s=options.accelerator_timeout,
        )
    return Worker(link, engine, hello=hello, accelerator=accelerator).serve()


def _greet(fd: int, *, name: str, timeout_s: float) -> Accelerator:
    from motte.accelerator.client import AcceleratorClient
    from motte.link.address import DescriptorAddress, connect_socket
    from motte.link.wire import Deadline, SocketWire, Wire

    def dial(deadline: Deadline, again: bool) -> Wire:
        # Once only: a socket that was inherited cannot be connected again.
        sock = connect_socket(DescriptorAddress(fd), deadline, loopback_only=True, wait=again)
        return SocketWire(sock, peer=name)

    return AcceleratorClient(dial, name=name, timeout_s=timeout_s, retries=0)


if __name__ == "__main__":
    sys.exit(main())
