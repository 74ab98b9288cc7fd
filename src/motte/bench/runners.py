"""One running case: started, asked again and again, and its books read. A file for all modes, so that they stay alike.

``native`` and ``accelerator`` run in a peer process without protection; ``resident``, ``streamed`` and ``asymmetric``
in a trusted worker that opened a sealed bundle.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from motte.bench.bundles import SealedModel, weights_choice
from motte.bench.case import Case
from motte.bench.facts import Books
from motte.bench.peer import Peer, PeerSpec
from motte.bench.request import Request
from motte.bench.subject import Subject
from motte.bench.tracing import Marks
from motte.link.local import Link
from motte.measure.traces import Told
from motte.run.model import Model, load
from motte.run.settings import LoadSettings
from motte.run.starting import start
from motte.run.tensors import from_wire, to_wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from motte.link.frames import WireTensor
    from motte.run.told import Answered

    Arrays = Mapping[str, NDArray[Any]]

TIMEOUT_S: Final = 600.0
NOT_SEALED: Final = "nothing is sealed: it runs unprotected"
NO_EVIDENCE: Final = "this kind of enclave has no evidence"
SIGNED_WHILE_BUILT: Final = "the signature is made while the bundle is written, and is part of build"
_ATTESTS: Final = ("attest",)


class Runner(Protocol):
    """A started case. ``segments``: seconds before the steady phase; ``missing``: segments that it does not have."""

    case: Case
    simulated: bool
    segments: dict[str, float]
    missing: dict[str, str]

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes under test."""
        ...

    def run(self) -> None:
        """Answer the bench's input once."""
        ...

    def answer(self, inputs: Arrays) -> Sequence[NDArray[Any]]:
        """The outputs for other inputs, by name, at the same sizes."""
        ...

    def books(self) -> Books:
        """What it holds and has sent by now."""
        ...

    def close(self) -> None:
        """End its processes. Safe to call again."""
        ...


class PeerRunner:
    """A native or accelerator case."""

    simulated = False

    def __init__(self, case: Case, request: Request, model: str, subject: Subject, marks: Marks) -> None:
        self.case = case
        self.segments: dict[str, float] = {}
        self.missing = dict.fromkeys(("sign", "open"), NOT_SEALED) | {"attest": "nothing is attested"}
        self._weight_bytes = subject.weight_bytes
        self._outside = outside = case.mode == "accelerator"
        self._crossed = self._each = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._peer: Peer | None = None
        try:
            exported: Path | None = None
            if case.engine != "torch":
                self._folder = tempfile.TemporaryDirectory(prefix="motte-native-")
                exported = Path(self._folder.name)
                with (
                    marks.segment("build", since="process spawned", until="model exported"),
                    Peer(self._spec(request, model, subject, "export", exported)) as exporting,
                ):
                    self.segments["build"] = exporting.load_s
            else:
                self.missing["build"] = "nothing is built: the eager module runs as it is"
            if outside:
                marks.count(lambda: self._crossed)
            self._peer = Peer(self._spec(request, model, subject, "infer", exported), marks)
            self.segments |= {"start": self._peer.start_s, "load": self._peer.load_s}
            with marks.segment("first", since="request sent", until="answer received"):
                self.segments["first"] = self._peer.timed_run()
                if outside:
                    books = self._peer.books()
                    self._crossed = self._each = int(books["input_bytes"]) + int(books["output_bytes"])
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """See :class:`Runner`."""
        return (self._running.pid,)

    def run(self) -> None:
        """See :class:`Runner`."""
        self._running.run()
        self._crossed += self._each

    def answer(self, inputs: Arrays) -> Sequence[NDArray[Any]]:
        """See :class:`Runner`."""
        return self._running.answer(inputs)

    def books(self) -> Books:
        """See :class:`Runner`."""
        missing = {"memory_bound_bytes": "nothing bounds it"}
        crossed: Mapping[str, Any] = {}
        if self._outside:
            crossed = self._running.books()
        else:
            missing |= dict.fromkeys(("bytes_out", "bytes_in"), "there is no trusted side to leave")
        return Books(
            peak_memory_bytes=self._running.memory()["rss_peak_bytes"],
            weight_memory_bytes=self._weight_bytes,
            bytes_out=crossed.get("input_bytes"),
            bytes_in=crossed.get("output_bytes"),
            missing=missing,
        )

    def close(self) -> None:
        """See :class:`Runner`."""
        if self._peer is not None:
            self._peer.close()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def _running(self) -> Peer:
        if self._peer is None:
            raise RuntimeError("the peer is not started")
        return self._peer

    def _spec(self, request: Request, model: str, subject: Subject, job: str, folder: Path | None) -> PeerSpec:
        outside = self.case.mode == "accelerator"
        return PeerSpec(
            job=job,
            model=model,
            weights=weights_choice(request),
            input_shape=request.input_shape,
            engine=self.case.engine,
            inputs=subject.inputs,
            seed=request.seed,
            threads=request.threads,
            device=request.device if outside else "cpu",
            outside=outside,
            folder=folder,
        )


class SealedRunner:
    """A resident, streamed or asymmetric case: a bundle in a worker of its own."""

    def __init__(
        self, case: Case, request: Request, sealed: SealedModel, subject: Subject, inputs: Arrays, marks: Marks
    ) -> None:
        self.case = case
        self.missing = {"sign": SIGNED_WHILE_BUILT}
        self._wire = [to_wire(inputs[spec.name], where=spec.name) for spec in subject.inputs]
        self._names = [spec.name for spec in subject.inputs]
        self._bound = sealed.streamed_need_bytes() if case.mode == "streamed" else None
        self._start_s = 0.0
        self._link: Link | None = None
        self._beside = self._asked = 0
        marks.count(self._crossed)
        self._model = self._load(sealed, _settings(case, request, self._bound, subject), marks)
        try:
            self.simulated = self._model.simulated
            if case.enclave != "vm":
                marks.tell("worker", self._told)
            self.segments = self._before_first(sealed)
            with marks.segment("first", since="request sent", until="answer received"):
                began = time.perf_counter()
                self.run()
                self.segments["first"] = time.perf_counter() - began
        except BaseException:
            self._model.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """See :class:`Runner`."""
        return (self._model.pid,)

    def run(self) -> None:
        """See :class:`Runner`."""
        self._latest: Answered = self._model.run(self._wire)
        if self._latest.outside is not None:
            self._beside += self._latest.outside.sent_bytes + self._latest.outside.received_bytes

    def answer(self, inputs: Arrays) -> Sequence[NDArray[Any]]:
        """See :class:`Runner`."""
        wire: list[WireTensor] = [to_wire(inputs[name], where=name) for name in self._names]
        return [from_wire(each, like=None) for each in self._model.run(wire).outputs]

    def books(self) -> Books:
        """See :class:`Runner`."""
        stats = self._model.stats()
        outside = self._latest.outside
        missing = {} if self._bound is not None else {"memory_bound_bytes": "only a streamed run has a bound"}
        return Books(
            peak_memory_bytes=stats["rss_peak_bytes"],
            weight_memory_bytes=stats["weight_arena_bytes"],
            memory_bound_bytes=self._bound,
            bytes_out=0 if outside is None else outside.sent_bytes,
            bytes_in=0 if outside is None else outside.received_bytes,
            missing=missing,
        )

    def close(self) -> None:
        """See :class:`Runner`."""
        self._model.close()

    def _told(self) -> Told:
        before = self._model.crossed_bytes
        told = Told(model_bytes=int(self._model.stats()["weight_resident_bytes"]))
        # The bench's own questions are nothing that the case sends.
        self._asked += self._model.crossed_bytes - before
        return told

    def _crossed(self) -> int:
        return 0 if self._link is None else self._link.crossed_bytes - self._asked + self._beside

    def _load(self, sealed: SealedModel, settings: LoadSettings, marks: Marks) -> Model:
        with marks.segment("start", since="process spawned", until="its first frame received"):
            began = time.perf_counter()
            started = start(settings, threads=settings.threads, engine=settings.engine)
            self._start_s = time.perf_counter() - began
            self._link = started.worker.link
            try:
                if self.case.enclave != "vm":  # whose processes are another kernel's
                    marks.watch("worker", started.worker.pid)
            except BaseException:
                started.kill()
                raise
        try:
            with marks.segment("open", since="bundle given", until="worker ready"):
                return load(sealed.path, keys=sealed.key, signer=sealed.signer, settings=settings, worker=started)
        except BaseException:
            started.kill()
            raise

    def _before_first(self, sealed: SealedModel) -> dict[str, float]:
        spans = {each.name: each.seconds for each in self._model.clock.segments().items}
        found: dict[str, float] = {}
        if sealed.build_s is None:
            self.missing["build"] = "the bundle was there already, and nobody noted how long it took"
        else:
            found["build"] = sealed.build_s
        found["start"] = self._start_s
        attest = [spans.pop(name) for name in _ATTESTS if name in spans]
        if attest:
            found["attest"] = sum(attest)
        else:
            self.missing["attest"] = NO_EVIDENCE
        found["load"] = self._model.worker_seconds["load"]
        # Reading the header, unwrapping and granting the keys, opening every part: all that is neither start nor load.
        found["open"] = max(0.0, sum(spans.values()) - found["load"])
        return found


def _settings(case: Case, request: Request, bound: int | None, subject: Subject) -> LoadSettings:
    streamed = case.mode == "streamed"
    return LoadSettings(
        mode="streamed" if streamed else "resident",
        weight_memory_bytes=bound or 0,
        threads=request.threads,
        dims=dict(subject.dims) if streamed else None,
        timeout_s=TIMEOUT_S,
        accelerator=_accelerator(request) if case.mode == "asymmetric" else None,
        engine=case.engine,
        enclave=case.enclave,
        image=request.image if case.enclave.startswith("gramine") else None,
        vm=request.vm if case.enclave == "vm" else None,
    )


def _accelerator(request: Request) -> str:
    if request.accelerator != "local":
        return request.accelerator
    return "local" if request.device == "cpu" else f"local:{request.device}"
