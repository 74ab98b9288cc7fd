"""Asks a worker everything that a client can ask, once each: what it loads for that is what an image must hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from motte.capture.signature import Signature
from motte.enclave.process import WorkerProcess
from motte.errors import InputError, MismatchError
from motte.link.frames import WireTensor
from motte.measure.memory import read_memory
from motte.run.model import Model, load
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.trusted.tcb import Tcb

MODES: Final = ("resident", "streamed")
_WEIGHT_MEMORY_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class TrialBundle:
    """The shipped model, sealed for keys that were made for it; ``image`` is what it is asked."""

    path: Path
    recipient: RecipientPrivateKey
    signer: SignerPrivateKey
    signature: Signature

    @staticmethod
    def seal(path: Path) -> TrialBundle:
        """Seal it into ``path``. Needs torch, which captures it."""
        from motte.doctor.tcb import seal_shipped

        recipient, signer = RecipientPrivateKey.new(), SignerPrivateKey.new()
        return TrialBundle(path, recipient, signer, seal_shipped(path, recipient, signer))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a worker said.

    ``answer``: bytes of its output. ``anonymous_bytes``: the largest memory of its own, no file behind it, and
    ``threads`` how many it had, both as the kernel says after the answers.
    """

    answer: bytes
    tcb: Tcb
    anonymous_bytes: int
    threads: int


def ask(bundle: TrialBundle, worker: WorkerProcess, mode: str) -> Asked:
    """Load the bundle in ``worker``, ask for an answer, refuse an input, and list its files. Ends with the model open.

    Raises:
        MismatchError: the worker took an input that it must refuse. WorkerDied and others: as of ``motte.load``.
    """
    bound = _WEIGHT_MEMORY_BYTES if mode == "streamed" else 0
    with load(
        bundle.path,
        keys=bundle.recipient,
        signer=bundle.signer.public,
        worker=worker,
        threads=1,
        mode=mode,
        weight_memory_bytes=bound,
    ) as model:
        return _ask(model)


def _ask(model: Model) -> Asked:
    import numpy as np

    from motte.run.inputs import read_inputs
    from motte.run.tensors import to_wire
    from motte.zoo.shipped_models import images

    (item,) = read_inputs([images()[-1].path], model.signature, model.inputs)
    answered = model.run([to_wire(item.arrays[0], where=item.name)])
    try:
        model.run([WireTensor("f64", (1,), np.zeros(1).tobytes())])
    except InputError:
        pass
    else:
        raise MismatchError("the worker took an input of another type and shape")
    model.stats()
    tcb = model.tcb()
    threads = int(_status(model.pid, "Threads"))
    answer = b"".join(bytes(output.data) for output in answered.outputs)
    return Asked(answer, tcb, read_memory(model.pid).anonymous_bytes, threads)


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))
