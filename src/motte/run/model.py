"""``motte.load``: a sealed bundle as a callable, answered by a trusted worker.

The client holds a recipient key. It checks the bundle's signature, unwraps the key-encryption key and seals it to the
worker's own key (the *grant*). Parts are opened in the worker only.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from motte import errors
from motte.capture.graph import Dim, Size, TensorType, Value
from motte.capture.signature import Signature, from_json
from motte.enclave.process import AcceleratorLink, WorkerProcess
from motte.errors import FrameError, InputError, MotteError, SettingError, WorkerClosed, WorkerRefused
from motte.limits import MAX_ACCELERATOR_LAYERS
from motte.link.frames import Frame, Kind, WireTensor
from motte.link.local import Recorder
from motte.measure.clock import Clock
from motte.provision.grant import make_grant
from motte.run.accelerator import AcceleratorPeer, open_peer
from motte.run.tensors import from_wire, to_wire
from motte.seal.keys import RecipientPrivateKey, SignerPublicKey, load_public
from motte.seal.keys import load as load_key
from motte.seal.reader import open_bundle
from motte.strict_json import Fields
from motte.trusted.weights import MODES

_LOG = logging.getLogger("motte")
DEFAULT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How a bundle is opened and run; see :func:`load`.

    ``accelerator`` is an address: ``unix:PATH``, ``tcp:HOST:PORT``, or ``local`` for one started here. What may be sent
    there is not a setting: it stands in the bundle.
    """

    mode: str = "resident"
    weight_memory_bytes: int = 0
    threads: int = 0
    dims: Mapping[str, int] | None = None
    min_release: int = 0
    verify_digests: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError("unknown mode", expected=" or ".join(MODES), got=repr(self.mode))
        if self.mode == "streamed" and not self.weight_memory_bytes:
            raise SettingError(
                "streamed mode needs a bound", where="weight_memory", hint="give --weight-memory, such as 128MiB"
            )
        if self.weight_memory_bytes < 0 or self.threads < 0 or self.min_release < 0:
            raise SettingError("a setting is negative", got=str(self))
        if not self.timeout_s > 0:
            raise SettingError("the time limit must be positive", where="timeout_s", got=str(self.timeout_s))


@dataclass(frozen=True, slots=True)
class Offload:
    """What the owner froze into a bundle with a scheme, as the worker tells it.

    ``accelerator`` is the name of the one in use; None: none was given, and everything runs inside. ``layers`` are
    those that may run split. ``noise``: whether what leaves is clipped and noised.
    """

    accelerator: str | None
    layers: tuple[str, ...]
    noise: bool
    integrity: str


@dataclass(frozen=True, slots=True)
class Outside:
    """What crossed to the accelerator and back in one run: layers that were answered there, bytes of tensors (weights
    included in the run that first needs them), and seconds of the split layers by kind of work."""

    layers: int
    sent_bytes: int
    received_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: the output tensors, the worker's own times in seconds, the computed activation peak in bytes, and
    what left; None: everything ran inside."""

    outputs: tuple[WireTensor, ...]
    seconds: Mapping[str, float]
    activation_peak_bytes: int
    outside: Outside | None = None


class _Turns:
    """A lock that is taken in the order of asking, so that no thread's call is overtaken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        mine = threading.Event()
        with self._lock:
            self._waiting.append(mine)
            if self._waiting[0] is mine:
                mine.set()
        try:
            mine.wait()
            yield
        finally:
            with self._lock:
                first = self._waiting[0] is mine
                self._waiting.remove(mine)
                if first and self._waiting:
                    self._waiting[0].set()


class Model:
    """A loaded bundle. Call it with tensors; use it in a ``with`` block, or :meth:`close` it.

    Calls from several threads are served one after the other, in order. After a :class:`~motte.errors.WorkerDied` or
    :class:`~motte.errors.WorkerStalled` this handle is closed for good; load the bundle again.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        ready: Mapping[str, Any],
        settings: LoadSettings,
        clock: Clock,
        accelerator: AcceleratorPeer | None = None,
    ) -> None:
        self._worker = worker
        self._accelerator = accelerator
        self._settings = settings
        self._turns = _Turns()
        self._closed = False
        self.clock = clock
        fields = Fields(dict(ready), where="READY", error=FrameError)
        self.signature: Signature = from_json(fields.any("signature"))
        self.inputs: tuple[Value, ...] = tuple(fields.items("inputs", max_items=1024, read=_value))
        self.output_names: tuple[str, ...] = tuple(fields.items("output_names", max_items=1024, read=_text))
        self.dims: tuple[Dim, ...] = tuple(fields.items("dims", max_items=64, read=_dim))
        self.plan_dims: Mapping[str, int] = fields.any("plan_dims")
        self.parts: Sequence[Mapping[str, int]] = fields.any("parts")
        self.worker_seconds: Mapping[str, float] = fields.any("seconds")
        self.memory: Mapping[str, Any] = fields.any("memory")
        told = fields.any("offload")
        self.offload: Offload | None = None if told is None else _offload(told)
        fields.done()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._worker.pid

    @property
    def simulated(self) -> bool:
        """Whether the worker runs without hardware protection."""
        return self._worker.hello.simulated

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model on torch tensors or numpy arrays, in the model's order or by name.

        Returns:
            What was given decides: torch tensors for torch, numpy arrays for numpy. One output alone; several as a
            dictionary by name.

        Raises:
            InputError: another number, dtype or shape of inputs.
            WorkerDied, WorkerStalled: the worker ended, or did not answer within the time limit.
            TrustError, BundleError: a part did not authenticate; no output is released.
            IntegrityError: the accelerator lied; no output is released. LinkError, FrameError: the accelerator died,
            stalled, refused or answered nonsense. After each of these this handle is closed.
        """
        given = self._ordered(inputs, named)
        answered = self.run([to_wire(value, where=v.name) for v, value in zip(self.inputs, given, strict=True)])
        outputs = [from_wire(tensor, like=given[0] if given else None) for tensor in answered.outputs]
        if len(outputs) == 1:
            return outputs[0]
        return dict(zip(self.output_names, outputs, strict=True))

    def run(self, inputs: Sequence[WireTensor]) -> Answered:
        """Run on tensors in wire form; see :meth:`__call__` for what it raises."""
        answer = self._request(Frame(Kind.RUN, {}, inputs))
        fields = Fields(dict(answer.meta), where="ANSWER", error=FrameError)
        seconds = fields.any("seconds")
        peak = fields.integer("activation_peak_bytes", low=0, high=1 << 62)
        told = fields.any("outside")
        fields.done()
        if len(answer.tensors) != len(self.output_names):
            raise FrameError(
                "wrong number of outputs", expected=str(len(self.output_names)), got=str(len(answer.tensors))
            )
        return Answered(tuple(answer.tensors), seconds, peak, None if told is None else _outside(told))

    def stats(self) -> Mapping[str, Any]:
        """What the worker holds now: weight arena, resident set and its peak, in bytes."""
        memory: Mapping[str, Any] = self._request(Frame(Kind.STATS)).meta["memory"]
        return memory

    def close(self) -> None:
        """End the worker. Safe to call again."""
        with self._turns.turn():
            if not self._closed:
                self._closed = True
                self._worker.close()
                if self._accelerator is not None:
                    self._accelerator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, frame: Frame) -> Frame:
        with self._turns.turn():
            if self._closed:
                raise WorkerClosed("this model was closed, or its worker failed", hint="load the bundle again")
            try:
                self._worker.send(frame, timeout_s=self._settings.timeout_s)
                answer = self._worker.receive(timeout_s=self._settings.timeout_s)
                if answer.kind is Kind.ANSWER:
                    return answer
                problem, fatal = reported(answer)
            except BaseException:
                self._kill()
                raise
            if fatal:
                self._kill()
            raise problem

    def _kill(self) -> None:
        self._closed = True
        self._worker.kill()
        if self._accelerator is not None:
            self._accelerator.close()

    def _ordered(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        names = [value.name for value in self.inputs]
        unknown = [name for name in named if name not in names[len(inputs) :]]
        if unknown or len(inputs) + len(named) != len(names):
            raise InputError(
                "wrong inputs",
                where=self.signature.model,
                expected=", ".join(names),
                got=f"{len(inputs)} and {sorted(named)}",
            )
        return [*inputs, *(named[name] for name in names[len(inputs) :])]


def load(
    path: str | os.PathLike[str],
    *,
    keys: RecipientPrivateKey | str | os.PathLike[str],
    signer: SignerPublicKey | str | os.PathLike[str],
    settings: LoadSettings | None = None,
    recorder: Recorder | None = None,
    **options: Any,
) -> Model:
    """Start a trusted worker, release the bundle's keys to it and open the model there.

    Args:
        path: the bundle.
        keys: a recipient's private key, or the file that holds it.
        signer: the public key that must have signed the bundle, its text or its file. There is no default: anyone can
            seal to a public key.
        settings: a :class:`LoadSettings`; or give its fields as further keywords.
        recorder: sees every frame that crosses to and from the worker.

    Raises:
        SettingError: an unknown or contradictory setting.
        BundleError, SignatureError, RollbackError, KeyAccessError, DecryptError: the bundle was refused; the error
            says which numbered check failed.
        ResourceError: the plan does not fit the stated memory.
        WorkerDied, WorkerStalled: the worker did not come up.
        LinkError: no accelerator at that address. SettingError: an accelerator for a bundle without a scheme.
    """
    chosen = _settings(settings, options)
    private = keys if isinstance(keys, RecipientPrivateKey) else load_key(Path(keys), RecipientPrivateKey)
    demanded = (
        signer
        if isinstance(signer, SignerPublicKey)
        else load_public(signer if isinstance(signer, str) else Path(signer), SignerPublicKey)
    )
    clock = Clock()
    bundle_path = Path(path).resolve()
    with (
        clock.segment("read header", since="path given", until="signature verified, key-encryption key unwrapped"),
        open_bundle(bundle_path, signer=demanded, min_release=chosen.min_release) as bundle,
    ):
        header = bundle.header
        kek = bundle.unwrap(private)
    threads = chosen.threads or len(os.sched_getaffinity(0))
    peer = None if chosen.accelerator is None else open_peer(chosen.accelerator, timeout_s=chosen.timeout_s)
    try:
        with clock.segment("start worker", since="process spawned", until="its first frame received"):
            worker = WorkerProcess(threads=threads, recorder=recorder, accelerator=_handed_over(peer, chosen))
    except BaseException:
        if peer is not None:
            peer.close()
        raise
    try:
        if peer is not None:
            # The worker alone holds that end from here on: when it ends, the accelerator sees it.
            peer.hand_over()
        with clock.segment("key release", since="worker's public key known", until="grant sealed"):
            public = worker.hello.public_key
            grant, session = make_grant(kek, public, bundle_id=header.bundle_id, release=header.release)
        with clock.segment("open and load", since="grant sent", until="worker ready"):
            worker.send(Frame(Kind.OPEN, _open_meta(bundle_path, demanded, chosen)), timeout_s=chosen.timeout_s)
            worker.send(Frame(Kind.GRANT, {"sealed": grant.hex()}), timeout_s=chosen.timeout_s)
            sending, receiving = session.client_ciphers()
            worker.link.secure(sending=sending, receiving=receiving, clear_error_first=True)
            ready = worker.receive(timeout_s=chosen.timeout_s)
            if ready.kind is not Kind.READY:
                raise reported(ready)[0]
        return Model(worker, ready.meta, chosen, clock, peer)
    except BaseException:
        worker.kill()
        if peer is not None:
            peer.close()
        raise


def _settings(settings: LoadSettings | None, options: Mapping[str, Any]) -> LoadSettings:
    if settings is not None and options:
        raise SettingError("give either settings or keywords", got=", ".join(options))
    unknown = sorted(set(options) - set(LoadSettings.__dataclass_fields__))
    if unknown:
        raise SettingError(
            "unknown setting", got=", ".join(unknown), expected=", ".join(LoadSettings.__dataclass_fields__)
        )
    return settings or LoadSettings(**options)


def _handed_over(peer: AcceleratorPeer | None, settings: LoadSettings) -> AcceleratorLink | None:
    if peer is None:
        return None
    # A wait and one more try fit into our own time limit, so that the worker's error arrives, which says more.
    return AcceleratorLink(peer.fileno(), peer.name, settings.timeout_s / 3)


def _open_meta(path: Path, signer: SignerPublicKey, settings: LoadSettings) -> dict[str, Any]:
    return {
        "path": str(path),
        "signer": str(signer),
        "min_release": settings.min_release,
        "mode": settings.mode,
        "weight_memory_bytes": settings.weight_memory_bytes,
        "open_threads": settings.threads or len(os.sched_getaffinity(0)),
        "stated_dims": dict(settings.dims or {}),
        "verify_digests": settings.verify_digests,
    }


def reported(frame: Frame) -> tuple[MotteError, bool]:
    """The error that an ERROR frame carries, as its own class again, and whether the worker ended with it."""
    if frame.kind is not Kind.ERROR:
        raise FrameError("frame in the wrong state", expected="ANSWER or ERROR", got=frame.kind.name)
    fields = Fields(dict(frame.meta), where="ERROR", error=FrameError)
    name, message, fatal = (
        fields.text("class", max_bytes=64),
        fields.text("message", max_bytes=4096),
        fields.boolean("fatal"),
    )
    facts = {key: fields.any(key) for key in ("expected", "got", "where", "hint", "check")}
    fields.done()
    if any(value is not None and not isinstance(value, str) for value in facts.values()):
        raise FrameError("facts of an error are not text", where="ERROR")
    check = facts.pop("check")
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, MotteError)):
        return WorkerRefused(message, kind=name, **facts), fatal
    problem = kind(message, **facts)
    if check is not None:
        problem.check = check
    return problem, fatal


def _offload(told: object) -> Offload:
    fields = Fields(told, where="READY.offload", error=FrameError)
    name = fields.any("accelerator")
    found = Offload(
        accelerator=None if name is None else _text(name, "READY.offload.accelerator"),
        layers=tuple(fields.items("layers", max_items=MAX_ACCELERATOR_LAYERS, read=_text)),
        noise=fields.boolean("noise"),
        integrity=fields.text("integrity", max_bytes=64),
    )
    fields.done()
    return found


def _outside(told: object) -> Outside:
    fields = Fields(told, where="ANSWER.outside", error=FrameError)
    seconds = fields.fields("seconds")
    found = Outside(
        layers=fields.integer("layers", low=0, high=MAX_ACCELERATOR_LAYERS),
        sent_bytes=fields.integer("sent_bytes", low=0, high=1 << 62),
        received_bytes=fields.integer("received_bytes", low=0, high=1 << 62),
        seconds={name: seconds.number(name) for name in ("inside", "send", "wait")},
    )
    seconds.done()
    fields.done()
    return found


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise FrameError("not text", where=where)
    return value


def _dim(value: object, where: str) -> Dim:
    fields = Fields(value, where=where, error=FrameError)
    found = Dim(
        fields.text("name", max_bytes=64),
        fields.integer("low", low=0, high=1 << 62),
        fields.integer("high", low=0, high=1 << 62),
    )
    fields.done()
    return found


def _value(value: object, where: str) -> Value:
    fields = Fields(value, where=where, error=FrameError)
    name, dtype = fields.text("name", max_bytes=512), fields.text("dtype", max_bytes=8)
    shape = fields.items("shape", max_items=16, read=lambda item, _: Size(item) if isinstance(item, str) else int(item))
    fields.done()
    return Value(name, TensorType(dtype, tuple(shape)))
