"""Entry of a child accelerator: ``python -m motte.accelerator --fd=N --device=cpu --threads=1 --shared-memory=BYTES``.

Started by :mod:`motte.accelerator.process`, with one connected socket as file descriptor N. It ends with its link.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys


def main() -> int:
    """Serve the one socket until it closes."""
    parser = argparse.ArgumentParser(prog="motte.accelerator")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--shared-memory", type=int, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch

    from motte.accelerator.server import AcceleratorServer, Offer, calculator_for
    from motte.errors import MotteError
    from motte.link.wire import SocketWire

    torch.set_num_threads(options.threads)
    wire = SocketWire(socket.socket(fileno=options.fd), peer="client")
    try:
        make = calculator_for(options.device)
    except MotteError as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    AcceleratorServer(wire, make(), Offer(region_bytes=options.shared_memory, threads=options.threads)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
