"""Entry of the worker: ``python -m motte.trusted --fd N --threads T --engine NAME``.

Started only by :mod:`motte.enclave`, with one connected stream as file descriptor N; with ``--host-fd`` a socket by
which the bundle's descriptor comes, and with ``--accelerator-fd`` one to an accelerator. The worker opens no address
itself, and nothing that decides what leaves is an argument.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from motte.engines.select import ENGINES, PRECISIONS
from motte.errors import SettingError
from motte.trusted.surroundings import TOLD

if TYPE_CHECKING:
    from motte.accelerator.interface import Accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The arguments, each a name and a value. Not argparse: it would load a dozen modules into every worker."""

    fd: int
    threads: int
    engine: str
    precision: str = "f32"
    enclave: str = "process"
    gpu: str = "none"
    host_fd: int | None = None
    accelerator_fd: int | None = None
    accelerator_name: str = "accelerator"
    accelerator_timeout: float = 60.0

    @staticmethod
    def read(words: Sequence[str]) -> _Options:
        """Raises: SettingError: an unknown, repeated, missing or ill-typed argument."""
        readers: Mapping[str, Callable[[str], Any]] = {
            "--fd": int,
            "--threads": int,
            "--engine": str,
            "--precision": str,
            "--enclave": str,
            "--gpu": str,
            "--host-fd": int,
            "--accelerator-fd": int,
            "--accelerator-name": str,
            "--accelerator-timeout": float,
        }
        found: dict[str, Any] = {}
        for name, value in zip_longest(words[::2], words[1::2]):
            field = name.removeprefix("--").replace("-", "_")
            if name not in readers or value is None or field in found:
                raise SettingError("not an argument of a worker, or given twice", got=name)
            try:
                found[field] = readers[name](value)
            except ValueError as problem:
                raise SettingError("not a value of this argument", where=name, got=value) from problem
        choices = (("engine", ENGINES), ("precision", PRECISIONS), ("enclave", TOLD), ("gpu", ("none", "nvidia")))
        for field, allowed in choices:
            if found.get(field, allowed[0]) not in allowed:
                raise SettingError(f"unknown {field}", expected=", ".join(allowed), got=found[field])
        missing = sorted({"fd", "threads", "engine"} - set(found))
        if missing:
            raise SettingError("an argument of the worker is missing", expected=", ".join(missing))
        if found.get("gpu", "none") != "none" and (found["engine"], found.get("enclave")) != ("torch", "vm"):
            raise SettingError("only torch in a confidential VM uses a GPU", where="gpu", got=found["engine"])
        return _Options(**found)


def main() -> int:
    """Harden, load the engine, serve the link; the exit status is the worker's."""
    began = time.perf_counter()
    options = _Options.read(sys.argv[1:])
    # Read by OpenMP when torch is loaded: waiting threads must sleep, or two of them beside any busy process spin.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from motte.link.standard_streams import inherited_stream
    from motte.trusted import harden
    from motte.trusted.surroundings import examine

    # First of all: what an engine prints while it is loaded must not come between two frames.
    stream = inherited_stream(options.fd)
    if options.enclave == "vm":
        # Whoever makes evidence must write to configfs: another process, so that this one need not.
        from motte.trusted import guest_reports

        guest_reports.start()
    if options.gpu != "none":
        hardening = harden.beside_driver()
    elif options.enclave != "gramine":
        hardening = harden.before_threads()
    else:
        hardening = harden.elsewhere("Gramine: the enclave is the boundary, and its manifest says what may be called")
    if options.enclave != "process":
        from motte.trusted.surroundings import load_for_image

        load_for_image(options.enclave)
    from motte.engines.select import make_engine

    engine = make_engine(options.engine, threads=options.threads, precision=options.precision)
    engine_ready = time.perf_counter()
    from motte.link.frames import PROTOCOL
    from motte.link.local import Link
    from motte.trusted.host_channel import HostChannel
    from motte.trusted.worker import Worker

    if options.enclave != "gramine" and options.gpu == "none":
        hardening = harden.after_threads(hardening)
    kind, simulated = examine(options.enclave)
    hello = {
        "protocol": PROTOCOL,
        "enclave": kind,
        "simulated": simulated,
        "pid": os.getpid(),
        "engine": engine.name,
        "engine_version": str(sys.modules[engine.name].__version__).partition("-")[0],
        "precision": options.precision,
        "threads": options.threads,
        "hardening": hardening.to_json(),
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
    return Worker(
        Link(stream, peer="client"),
        engine,
        kind=kind,
        hello=hello,
        precision=options.precision,
        accelerator=accelerator,
        gpu=options.gpu != "none",
        host=None if options.host_fd is None else HostChannel(socket.socket(fileno=options.host_fd)),
    ).serve()


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
