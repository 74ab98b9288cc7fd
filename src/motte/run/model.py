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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from motte.attest.configuration import RunConfiguration
from motte.capture.graph import Dim, Value
from motte.capture.signature import Signature, from_json
from motte.enclave.host_service import Issue
from motte.enclave.process import WorkerProcess
from motte.errors import FrameError, InputError, MotteError, SettingError, WorkerClosed
from motte.limits import MAX_LOWERED_CHECKS
from motte.link.frames import Frame, Kind, WireTensor
from motte.link.local import Recorder
from motte.lower.lowered import Lowered, read_check
from motte.measure.clock import Clock
from motte.measure.self_report import SelfReport
from motte.provision.address import BrokerAddress
from motte.provision.client import BrokerClient
from motte.provision.grant import make_grant, make_session_grant
from motte.run.accelerator import AcceleratorPeer
from motte.run.key_release import carry, check_broker
from motte.run.settings import AUTO, LoadSettings
from motte.run.starting import Started, start
from motte.run.tensors import from_wire, to_wire
from motte.run.told import (
    Answered,
    EngineUsed,
    Offload,
    read_dim,
    read_offload,
    read_outside,
    read_text,
    read_value,
    reported,
)
from motte.run.verified import Verifier, attested
from motte.seal.header import BundleHeader
from motte.seal.keys import RecipientPrivateKey, SignerPublicKey, load_public
from motte.seal.keys import load as load_key
from motte.seal.manifest import read_lowered
from motte.seal.reader import KeyEncryptionKey, SignedBundle, open_bundle, open_file
from motte.strict_json import Fields
from motte.trusted.execution import why_not_lowered

if TYPE_CHECKING:
    from motte.attest.ra_tls_verify import Demand
    from motte.attest.verify import Verdict
    from motte.trusted.harden import Hardening
    from motte.trusted.tcb import Tcb

_LOG = logging.getLogger("motte")


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
        why_engine: str = "asked for",
        verdict: Verdict | None = None,
    ) -> None:
        self._worker = worker
        self._accelerator = accelerator
        self._settings = settings
        self._turns = _Turns()
        self._closed = False
        self.clock = clock
        self.verdict = verdict
        """On the worker, by the policy that was given; None: nobody asked for its evidence."""
        fields = Fields(dict(ready), where="READY", error=FrameError)
        self.signature: Signature = from_json(fields.any("signature"))
        self.inputs: tuple[Value, ...] = tuple(fields.items("inputs", max_items=1024, read=read_value))
        self.output_names: tuple[str, ...] = tuple(fields.items("output_names", max_items=1024, read=read_text))
        self.dims: tuple[Dim, ...] = tuple(fields.items("dims", max_items=64, read=read_dim))
        self.plan_dims: Mapping[str, int] = fields.any("plan_dims")
        self.parts: Sequence[Mapping[str, int]] = fields.any("parts")
        self.worker_seconds: Mapping[str, float] = fields.any("seconds")
        self.memory: Mapping[str, Any] = fields.any("memory")
        told = fields.any("offload")
        self.offload: Offload | None = None if told is None else read_offload(told)
        self.engine = EngineUsed(
            name=worker.hello.engine,
            version=worker.hello.engine_version,
            precision=worker.hello.precision,
            joined=fields.boolean("joined"),
            why=why_engine,
            checks=tuple(fields.items("checks", max_items=MAX_LOWERED_CHECKS, read=read_check)),
        )
        fields.done()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._worker.pid

    @property
    def enclave(self) -> str:
        """Where the worker runs, as it says: one of :data:`motte.trusted.surroundings.KINDS`. **Unverified**."""
        return self._worker.hello.enclave

    @property
    def hardening(self) -> Hardening:
        """What holds for the worker, as it says. **Unverified**."""
        return self._worker.hello.hardening

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

    @property
    def crossed_bytes(self) -> int:
        """Bytes of frames that crossed between us and the worker so far, both ways; the bundle's file is not in it."""
        return self._worker.link.crossed_bytes

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
        return Answered(tuple(answer.tensors), seconds, peak, None if told is None else read_outside(told))

    def stats(self) -> Mapping[str, Any]:
        """What the worker holds now: weight arena, resident set and its peak, in bytes."""
        memory: Mapping[str, Any] = self._request(Frame(Kind.STATS)).meta["memory"]
        return memory

    def self_report(self) -> SelfReport:
        """What the worker says of itself as a process: times, faults, memory. It hides them from a sampler outside."""
        return SelfReport.from_json(self._request(Frame(Kind.STATS)).meta["self"])

    def tcb(self) -> Tcb:
        """The files that the worker has loaded by now: what of this machine's software has to be trusted."""
        from motte.trusted.tcb import Tcb

        return Tcb.from_json(self._request(Frame(Kind.TCB)).meta["tcb"])

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
    keys: RecipientPrivateKey | BrokerAddress | str | os.PathLike[str],
    signer: SignerPublicKey | str | os.PathLike[str],
    settings: LoadSettings | None = None,
    recorder: Recorder | None = None,
    worker: WorkerProcess | Started | None = None,
    issue: Issue | None = None,
    verifier: Verifier | None = None,
    **options: Any,
) -> Model:
    """Start a trusted worker, release the bundle's keys to it and open the model there.

    Args:
        path: the bundle.
        keys: a recipient's private key, or the file that holds it; or the address of the broker that releases the keys
            to the worker against evidence. The client holds none then.
        signer: the public key that must have signed the bundle, its text or its file. There is no default: anyone can
            seal to a public key.
        settings: a :class:`LoadSettings`; or give its fields as further keywords.
        recorder: sees every frame that crosses to and from the worker.
        issue: makes evidence of this machine for a worker that has none of its own (the ``process`` kind).
        verifier: demands evidence of the worker; before it satisfies the policy, nothing but the bundle is sent to it.
        worker: a started, empty one to use instead; it ends with this model, also when loading fails.

    Raises:
        SettingError: an unknown or contradictory setting.
        UnsupportedError: the bundle cannot run on the engine that was asked for; says why.
        BundleError, SignatureError, RollbackError, KeyAccessError, DecryptError: the bundle was refused; the error
            says which numbered check failed.
        ResourceError: the plan does not fit the stated memory.
        WorkerDied, WorkerStalled: the worker did not come up.
        LinkError: no accelerator at that address. SettingError: an accelerator for a bundle without a scheme.
    """
    try:
        chosen = _settings(settings, options)
        return _load(Path(path).resolve(), keys, signer, chosen, recorder, worker, issue, verifier)
    except BaseException:
        if worker is not None:
            worker.kill()
        raise


def _load(
    path: Path,
    keys: RecipientPrivateKey | BrokerAddress | str | os.PathLike[str],
    signer: SignerPublicKey | str | os.PathLike[str],
    chosen: LoadSettings,
    recorder: Recorder | None,
    started: WorkerProcess | Started | None,
    issue: Issue | None,
    verifier: Verifier | None,
) -> Model:
    private: RecipientPrivateKey | BrokerAddress
    if isinstance(keys, (RecipientPrivateKey, BrokerAddress)):
        private = keys
    else:
        private = load_key(Path(keys), RecipientPrivateKey)
    demanded = (
        signer
        if isinstance(signer, SignerPublicKey)
        else load_public(signer if isinstance(signer, str) else Path(signer), SignerPublicKey)
    )
    begun = Started(started) if isinstance(started, WorkerProcess) else started
    clock = Clock()
    with (
        clock.segment("read header", since="path given", until="key-encryption key unwrapped, engine chosen"),
        open_bundle(path, signer=demanded, min_release=chosen.min_release) as bundle,
    ):
        header = bundle.header
        kek: KeyEncryptionKey | None = None
        if isinstance(private, BrokerAddress):
            check_broker(header, private)
        else:
            kek = bundle.unwrap(private)
        engine, why = _engine(bundle, kek, chosen, begun)
    threads = chosen.threads or len(os.sched_getaffinity(0))
    if begun is not None:
        _check_started(begun, chosen)
    else:
        with clock.segment("start worker", since="process spawned", until="its first frame received"):
            begun = start(chosen, threads=threads, engine=engine, recorder=recorder)
    try:
        broker = private if isinstance(private, BrokerAddress) else None
        demand = None if verifier is None else verifier.demand(RunConfiguration.of(header).digest())
        opening = _Opening(path, header, kek, broker, demanded, issue, demand)
        ready, verdict = _open_in(begun.worker, opening, chosen, clock)
        return Model(begun.worker, ready.meta, chosen, clock, begun.accelerator, why, verdict)
    except BaseException:
        begun.kill()
        raise


@dataclass(frozen=True, slots=True)
class _Opening:
    """A bundle whose signature was checked, and where its keys come from: ``kek``, or ``broker``."""

    path: Path
    header: BundleHeader
    kek: KeyEncryptionKey | None
    broker: BrokerAddress | None
    signer: SignerPublicKey
    issue: Issue | None
    demand: Demand | None

    @property
    def words(self) -> dict[str, Any]:
        """What OPEN says of the way in which keys come."""
        return {
            "keys": "broker" if self.kek is None else "recipient",
            "channel": "plain" if self.demand is None else "attested",
        }


def _open_in(
    worker: WorkerProcess, opening: _Opening, chosen: LoadSettings, clock: Clock
) -> tuple[Frame, Verdict | None]:
    """Have ``worker`` open the bundle: its READY frame, and the verdict on it where one was demanded."""
    header, kek = opening.header, opening.kek
    with clock.segment("key release", since="worker's public key known", until="grant sealed"):
        public = worker.hello.public_key
        if kek is None:
            grant, session = make_session_grant(public, bundle_id=header.bundle_id, release=header.release)
        else:
            grant, session = make_grant(kek, public, bundle_id=header.bundle_id, release=header.release)
    with clock.segment("open and load", since="grant sent", until="worker ready"), ExitStack() as stack:
        offer_bundle(worker, opening.path, _open_meta(opening.signer, chosen, opening.words), chosen)
        service = worker.serve_host(opening.issue)
        if service is not None:
            stack.callback(service.stop)
        try:
            verdict = None if opening.demand is None else attested(worker, opening.demand, timeout_s=chosen.timeout_s)
            worker.send(Frame(Kind.GRANT, {"sealed": grant.hex()}), timeout_s=chosen.timeout_s)
            sending, receiving = session.client_ciphers()
            worker.link.secure(sending=sending, receiving=receiving, clear_error_first=True)
            broker = None
            if opening.broker is not None:
                broker = stack.enter_context(BrokerClient(opening.broker, timeout_s=chosen.timeout_s))
            ready = carry(worker, broker, timeout_s=chosen.timeout_s)
        except MotteError as problem:
            if service is not None and service.problem is not None:
                raise service.problem from problem
            raise
    if ready.kind is not Kind.READY:
        raise reported(ready)[0]
    return ready, verdict


def _engine(
    bundle: SignedBundle, kek: KeyEncryptionKey | None, settings: LoadSettings, started: Started | None
) -> tuple[str, str]:
    """Which engine the worker gets, and why."""
    if started is not None:
        return started.worker.hello.engine, "the worker was started with it"
    if settings.engine != AUTO:
        return settings.engine, "asked for"
    if settings.accelerator is not None:
        return "torch", "only it can run layers split"
    if kek is None:
        return "onnxruntime", "the bundle's keys go to the worker alone, so nobody here can look into it"
    lowered = read_lowered(bundle.unlock(kek).manifest())
    if not isinstance(lowered, Lowered):
        return "torch", why_not_lowered(lowered)
    if find_spec("onnxruntime") is None:
        return "torch", "onnxruntime is not installed"
    return "onnxruntime", "every part is lowered"


def _check_started(started: Started, settings: LoadSettings) -> None:
    """Refuse settings that a worker which runs already cannot follow.

    Raises:
        SettingError: another engine, precision, accelerator or number of threads than it was started with.
    """
    hello = started.worker.hello
    engine = hello.engine if settings.engine == AUTO else settings.engine
    wanted = {
        "engine": (engine, hello.engine),
        "precision": (settings.precision, hello.precision),
        "threads": (str(settings.threads or hello.threads), str(hello.threads)),
        "accelerator": (str(settings.accelerator), str(started.address)),
    }
    for name, (asked, has) in wanted.items():
        if asked != has:
            raise SettingError("the worker was started with another setting", where=name, expected=has, got=asked)


def _settings(settings: LoadSettings | None, options: Mapping[str, Any]) -> LoadSettings:
    if settings is not None and options:
        raise SettingError("give either settings or keywords", got=", ".join(options))
    unknown = sorted(set(options) - set(LoadSettings.__dataclass_fields__))
    if unknown:
        raise SettingError(
            "unknown setting", got=", ".join(unknown), expected=", ".join(LoadSettings.__dataclass_fields__)
        )
    return settings or LoadSettings(**options)


def offer_bundle(worker: WorkerProcess, path: Path, meta: dict[str, Any], settings: LoadSettings) -> None:
    """Send OPEN, and the bundle behind it in the way that this worker takes it.

    Raises:
        InputError: no such file. WorkerDied, WorkerStalled: as they say.
    """
    fd = open_file(path)
    try:
        opening = Frame(Kind.OPEN, {"bundle_bytes": worker.bundle_bytes(fd), **meta})
        worker.send(opening, timeout_s=settings.timeout_s)
        worker.give_bundle(fd, timeout_s=settings.timeout_s)
    finally:
        os.close(fd)


def _open_meta(signer: SignerPublicKey, settings: LoadSettings, words: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **words,
        "signer": str(signer),
        "min_release": settings.min_release,
        "mode": settings.mode,
        "precision": settings.precision,
        "weight_memory_bytes": settings.weight_memory_bytes,
        "open_threads": settings.threads or len(os.sched_getaffinity(0)),
        "stated_dims": dict(settings.dims or {}),
        "verify_digests": settings.verify_digests,
    }
