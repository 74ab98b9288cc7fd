"""Entry of the worker process: ``python -m motte.trusted --fd N --threads T --engine torch``.

Started only by :mod:`motte.enclave`, with one connected socket as file descriptor N.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
import time


def main() -> int:
    """Harden, load the engine, serve the link; the exit status is the worker's."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="motte.trusted")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--engine", choices=("torch",), required=True)
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
    return Worker(link, engine, hello=hello).serve()


if __name__ == "__main__":
    sys.exit(main())
