"""What a trusted worker loads, engine by engine: a worker of each is started, answers one image, and lists its files.

The model is the shipped one, sealed into a temporary folder for a key that is made for it; nothing remains.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from motte.capture.signature import Signature
from motte.enclave.process import WorkerProcess
from motte.engines.select import ENGINES
from motte.errors import SettingError, UnsupportedError
from motte.measure.memory import read_memory
from motte.run.model import Model, load
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.trusted.tcb import Tcb

KIND: Final = "process"
REFERENCE: Final = "torch"
"""The engine that needs nothing lowered."""
_PARTS: Final = 3
_THREADS: Final = 1
_ELF64: Final = b"\x7fELF\x02\x01"
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_ALLOCATED, _NO_BYTES = 2, 8
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WorkerTcb:
    """What the worker of one engine loaded to give one answer.

    ``strippable_bytes``: of the files' size, symbols and debug information, which no process ever maps. Resident sets
    in bytes: of the worker with its engine loaded and no bundle, and after its first answer.
    """

    engine: str
    engine_version: str
    threads: int
    simulated: bool
    answer: str
    tcb: Tcb
    strippable_bytes: int
    rss_after_import_bytes: int
    rss_after_answer_bytes: int

    def to_json(self) -> dict[str, Any]:
        """JSON values, every file among them."""
        return {
            "engine": self.engine,
            "engine_version": self.engine_version,
            "threads": self.threads,
            "enclave": KIND,
            "simulated": self.simulated,
            "answer": self.answer,
            "files": self.tcb.files,
            "bytes": self.tcb.bytes,
            "strippable_bytes": self.strippable_bytes,
            "rss_after_import_bytes": self.rss_after_import_bytes,
            "rss_after_answer_bytes": self.rss_after_answer_bytes,
            "packages": self.tcb.to_json()["packages"],
        }


def chosen_engines(asked: str | None) -> tuple[str, ...]:
    """The engine ``asked`` for, or all that are installed.

    Raises:
        SettingError: no such engine. UnsupportedError: it is not installed, or none is.
    """
    if asked is not None and asked not in ENGINES:
        raise SettingError("unknown engine", expected=", ".join(ENGINES), got=repr(asked))
    found = tuple(name for name in ENGINES if asked in (None, name) and find_spec(name) is not None)
    if not found:
        raise UnsupportedError(
            "this engine is not installed" if asked else "no engine is installed",
            got=asked,
            hint=f"pip install {asked or ENGINES[0]}",
        )
    return found


def measure_tcb(engines: Sequence[str], tell: Tell) -> Iterator[WorkerTcb]:
    """Start a worker of each engine, one after the other.

    Args:
        tell: is called with what is being done.

    Raises:
        UnsupportedError: torch, which captures the model, or a package that lowers it is missing. MotteError: the
            worker failed.
    """
    if find_spec("torch") is None:
        raise UnsupportedError("the shipped model is captured with torch, which is not installed", hint="install torch")
    with tempfile.TemporaryDirectory(prefix="motte-tcb-") as folder:
        tell("sealing the shipped model")
        bundle, recipient, signer = Path(folder) / "shipped.motte", RecipientPrivateKey.new(), SignerPrivateKey.new()
        seal_shipped(bundle, recipient, signer, lowered=any(engine != REFERENCE for engine in engines))
        for engine in engines:
            tell(f"{engine}: starting a worker and asking it")
            worker = WorkerProcess(threads=_THREADS, engine=engine)
            try:
                empty = read_memory(worker.pid).rss_bytes
            except BaseException:
                worker.kill()
                raise
            with load(bundle, keys=recipient, signer=signer.public, worker=worker) as model:
                yield ask_worker(model, empty)


def seal_shipped(
    path: Path, recipient: RecipientPrivateKey, signer: SignerPrivateKey, *, lowered: bool = True
) -> Signature:
    """Seal the shipped model in three parts, and their lowered forms if ``lowered``; nothing is compared."""
    from motte.plan.planner import plan_parts
    from motte.seal.manifest import Manifest
    from motte.seal.package import seal_model
    from motte.zoo.models import capture_built
    from motte.zoo.shipped_models import build
    from motte.zoo.weights import WeightsChoice

    built = build(WeightsChoice())
    captured = capture_built(built)
    plan = plan_parts(captured.graph, parts=_PARTS, objective="weights", dims={"batch": 1})
    forms = None
    if lowered:
        from motte.lower.lower import lower

        forms = lower(captured.graph, plan)
    manifest = Manifest(captured.graph, plan, built.signature, forms)
    seal_model(path, manifest, captured.weights, release=1, recipients=[recipient.public], signer=signer)
    return built.signature


def ask_worker(model: Model, empty_rss_bytes: int) -> WorkerTcb:
    """Let the worker answer one shipped image, then list its files; ``empty_rss_bytes``: before it had a bundle."""
    import numpy as np

    from motte.run.inputs import read_inputs
    from motte.run.tensors import from_wire, to_wire
    from motte.zoo.shipped_models import images

    (item,) = read_inputs([images()[-1].path], model.signature, model.inputs)
    answered = model.run([to_wire(item.arrays[0], where=item.name)])
    logits = from_wire(answered.outputs[0], like=item.arrays[0])
    labels = model.signature.labels or ()
    # Before the list: making and sending that takes memory of its own.
    after = int(model.stats()["rss_bytes"])
    tcb = model.tcb()
    return WorkerTcb(
        engine=model.engine.name,
        engine_version=model.engine.version,
        threads=_THREADS,
        simulated=model.simulated,
        answer=labels[int(np.argmax(logits))],
        tcb=tcb,
        strippable_bytes=sum(strippable_bytes(file.path) for package in tcb.packages for file in package.files),
        rss_after_import_bytes=empty_rss_bytes,
        rss_after_answer_bytes=after,
    )


def strippable_bytes(path: str) -> int:
    """Bytes of a 64-bit little-endian ELF file in sections that are never mapped: symbols and debug information.

    0 for every other file, and for one that cannot be read or is malformed. (System V ABI, "Sections".)
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if not head.startswith(_ELF64) or len(head) < 64:
                return 0
            (offset,) = struct.unpack_from("<Q", head, 40)
            size, count = struct.unpack_from("<HH", head, 58)
            if size != _SECTION.size:
                return 0
            file.seek(offset)
            table = file.read(size * count)
            total = os.fstat(file.fileno()).st_size
    except (OSError, OverflowError):
        return 0
    if len(table) < size * count:
        return 0
    lengths: list[int] = [
        section[5]
        for section in _SECTION.iter_unpack(table)
        if not section[2] & _ALLOCATED and section[1] != _NO_BYTES and section[4] + section[5] <= total
    ]
    return min(sum(lengths), total)
