"""Between a worker and a key broker: carries what they say to each other.

Nothing here is trusted: messages are signed by the broker and checked in the worker, evidence is checked by the broker.
"""

from __future__ import annotations

from typing import Final

from motte.attest.configuration import RunConfiguration
from motte.enclave.process import WorkerProcess
from motte.errors import FrameError, InputError
from motte.link.frames import Frame, Kind, WireTensor
from motte.provision.address import BrokerAddress
from motte.provision.client import BrokerClient
from motte.seal.header import BundleHeader

_MOST_STEPS: Final = 8


def carry(worker: WorkerProcess, broker: BrokerClient | None, *, timeout_s: float) -> Frame:
    """Carry messages until the worker says something else: READY or ERROR.

    Args:
        broker: None: the worker asks none; if it does, that is an error.

    Raises:
        BrokerRefused: the broker said no; its words. LinkError: no way to it.
        FrameError: the worker asks something else, or does not stop asking. WorkerDied, WorkerStalled.
    """
    for _ in range(_MOST_STEPS):
        frame = worker.receive(timeout_s=timeout_s)
        if frame.kind is not Kind.BROKER:
            return frame
        if len(frame.tensors) != 1:
            raise FrameError("not a message to carry", where=frame.kind.name)
        message = bytes(frame.tensors[0].data)
        answer = _asked(broker, frame, message)
        worker.send(Frame(frame.kind, {}, [WireTensor("u8", (len(answer),), answer)]), timeout_s=timeout_s)
    raise FrameError("the worker does not stop asking", expected=f"at most {_MOST_STEPS} messages")


def check_broker(header: BundleHeader, broker: BrokerAddress) -> None:
    """Refuse early what the worker would refuse: another broker than the owner signed. It may listen elsewhere.

    Raises:
        InputError: another key than the signed one, or the owner named no broker.
    """
    signed = RunConfiguration.of(header).broker_key()
    if signed != broker.key:
        raise InputError(
            "another broker than the one that the bundle's owner signed",
            where="--broker",
            expected=str(signed),
            got=str(broker.key),
        )


def _asked(broker: BrokerClient | None, frame: Frame, message: bytes) -> bytes:
    if broker is None:
        raise FrameError("the worker asks for a broker that nobody named", where="BROKER")
    steps = {"ask": broker.ask, "prove": broker.prove}
    step = frame.meta.get("step")
    if step not in steps:
        raise FrameError("not a step of a handshake", expected=" or ".join(steps), got=repr(step)[:80])
    return steps[step](message)
