"""Starting the trusted worker in the kind of enclave that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from motte.enclave.process import AcceleratorLink, WorkerProcess
from motte.errors import SettingError
from motte.link.local import Recorder
from motte.run.accelerator import AcceleratorPeer, open_peer
from motte.run.settings import AUTO, LoadSettings

if TYPE_CHECKING:
    from motte.enclave.gramine import Kind


@dataclass(frozen=True, slots=True)
class Started:
    """A started, empty worker, and the accelerator at the other end of its second link.

    ``address``: of that accelerator, as it was asked for.
    """

    worker: WorkerProcess
    accelerator: AcceleratorPeer | None = None
    address: str | None = None

    def kill(self) -> None:
        """End both at once. Safe to call again."""
        self.worker.kill()
        if self.accelerator is not None:
            self.accelerator.close()


def start(settings: LoadSettings, *, threads: int, engine: str, recorder: Recorder | None = None) -> Started:
    """A started, empty worker of ``settings.enclave``, with its accelerator where the settings name one.

    Raises:
        InputError: not an address. PeerClosed, PeerStalled: no accelerator there. Others as :func:`start_worker`.
    """
    if settings.accelerator is None:
        return Started(start_worker(settings, threads=threads, engine=engine, recorder=recorder))
    peer = open_peer(settings.accelerator, timeout_s=settings.timeout_s)
    # A wait and one more try fit into our own time limit, so that the worker's error arrives, which says more.
    link = AcceleratorLink(peer.fileno(), peer.name, settings.timeout_s / 3)
    try:
        worker = start_worker(settings, threads=threads, engine=engine, recorder=recorder, accelerator=link)
    except BaseException:
        peer.close()
        raise
    # The worker alone holds that end from here on: when it ends, the accelerator sees it.
    peer.hand_over()
    return Started(worker, peer, settings.accelerator)


def start_worker(
    settings: LoadSettings,
    *,
    threads: int,
    engine: str,
    recorder: Recorder | None = None,
    accelerator: AcceleratorLink | None = None,
) -> WorkerProcess:
    """A started, empty worker of ``settings.enclave``.

    Args:
        engine, threads: what to start it with; an image and a VM have their own, which the settings may only repeat.

    Raises:
        SettingError: the image was made for another engine, precision or number of threads than were asked for.
        UnsupportedError: Gramine is not installed here, or this machine lacks what the kind needs.
        InputError: no such image. LinkError: nobody listens at the VM's address.
        WorkerDied, WorkerStalled: it did not come up.
    """
    if settings.enclave == "process":
        return WorkerProcess(
            threads=threads, engine=engine, precision=settings.precision, recorder=recorder, accelerator=accelerator
        )
    worker = _elsewhere(settings, recorder)
    hello = worker.hello
    asked = {
        "engine": (settings.engine, (AUTO, hello.engine)),
        "precision": (settings.precision, (hello.precision,)),
        "threads": (settings.threads, (0, hello.threads)),
    }
    for name, (value, allowed) in asked.items():
        if value not in allowed:
            worker.kill()
            raise SettingError(
                "the image was made with another setting, which is part of what is measured",
                where=name,
                expected=str(allowed[-1]),
                got=str(value),
                hint="make another image with motte enclave build",
            )
    return worker


def _elsewhere(settings: LoadSettings, recorder: Recorder | None) -> WorkerProcess:
    if settings.image is not None:
        from motte.enclave.gramine import GramineWorker

        kind: Kind = "gramine-sgx" if settings.enclave == "gramine-sgx" else "gramine-direct"
        return GramineWorker(settings.image, kind=kind, recorder=recorder)
    from motte.enclave.vm_worker import VmWorker

    return VmWorker(settings.vm or "", start_timeout_s=settings.timeout_s, recorder=recorder)
