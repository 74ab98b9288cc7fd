"""The trusted worker: one link, one bundle, one life. It answers; nothing outside can make it do anything else.

States, in order, each entered once: hello -> open, the bundle, grant -> (keys from a broker) -> ready -> any number of
run, stats and tcb. Any error before ``ready``, and any failure of a key, a chunk or the link after it, ends the worker;
a refused input does not.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motte.capture.binding import bind_dims
from motte.capture.graph import Size, Value
from motte.capture.signature import to_json
from motte.engines.interface import Array, Engine
from motte.engines.select import PRECISIONS
from motte.errors import FrameError, InputError, MotteError, PeerClosed, ResourceError, SettingError, UnsupportedError
from motte.limits import MAX_NAME_BYTES, MAX_RELEASE, MAX_SENT_BUNDLE_BYTES, MAX_TENSOR_BYTES
from motte.link.frames import CHANNELS, Frame, Kind, WireTensor
from motte.link.local import Link
from motte.lower.lowered import EngineCheck, Lowered, check_json
from motte.measure.memory import Memory, read_memory
from motte.measure.self_report import report_self
from motte.offload.graph_layers import SplitNode, split_extra_bytes, split_nodes
from motte.offload.placement import from_plan
from motte.plan.costs import peak_activation_bytes
from motte.plan.streamed import PartNeed, copy_bytes, streamed_need
from motte.provision.grant import (
    GRANT_BYTES,
    KEY_BYTES,
    KEY_SOURCES,
    SESSION_GRANT_BYTES,
    open_grant,
    open_session_grant,
)
from motte.seal.header import BundleHeader
from motte.seal.keys import SignerPublicKey
from motte.seal.manifest import LaidOutPart, Manifest, check_sizes, lay_out_parts, loads
from motte.seal.primitives import x25519_public
from motte.seal.reader import KeyEncryptionKey, UnlockedBundle, open_bundle
from motte.seal.run_terms import TRUSTED, check_terms
from motte.strict_json import Fields
from motte.trusted.execution import Execution, prepare
from motte.trusted.secret_memory import SecretBytes
from motte.trusted.surroundings import issuer
from motte.trusted.weights import MODES, PartWeights, ResidentWeights, StreamedWeights

if TYPE_CHECKING:
    from motte.accelerator.interface import Accelerator
    from motte.trusted.confidential import OnGpu
    from motte.trusted.host_channel import HostChannel
    from motte.trusted.outside import Outside


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What the client asks for, read from an **unverified** OPEN frame.

    ``bundle_bytes`` 0: the bundle comes as a descriptor, else in BUNDLE frames. ``channel``: whether frames after the
    bundle go through TLS that ends here, with evidence. ``keys``: whether the grant holds the
    key-encryption key, or a broker releases data keys. ``weight_memory_bytes`` 0: no bound.
    """

    bundle_bytes: int
    channel: str
    keys: str
    signer: str
    min_release: int
    mode: str
    precision: str
    weight_memory_bytes: int
    open_threads: int
    stated_dims: Mapping[str, int]
    verify_digests: bool

    @staticmethod
    def read(meta: Mapping[str, Any]) -> OpenRequest:
        """Raises: FrameError: a missing, unknown or ill-typed field."""
        fields = Fields(dict(meta), where="OPEN", error=FrameError)
        dims = fields.any("stated_dims")
        if not isinstance(dims, dict) or not all(type(v) is int and 0 < v < 1 << 31 for v in dims.values()):
            raise FrameError("not a table of dimensions", where="OPEN.stated_dims")
        request = OpenRequest(
            bundle_bytes=fields.integer("bundle_bytes", low=0, high=MAX_SENT_BUNDLE_BYTES),
            channel=fields.choice("channel", CHANNELS),
            keys=fields.choice("keys", KEY_SOURCES),
            signer=fields.text("signer", max_bytes=MAX_NAME_BYTES),
            min_release=fields.integer("min_release", low=0, high=MAX_RELEASE),
            mode=fields.choice("mode", MODES),
            precision=fields.choice("precision", PRECISIONS),
            weight_memory_bytes=fields.integer("weight_memory_bytes", low=0, high=MAX_TENSOR_BYTES),
            open_threads=fields.integer("open_threads", low=1, high=256),
            stated_dims=dims,
            verify_digests=fields.boolean("verify_digests"),
        )
        fields.done()
        return request


@dataclass(slots=True)
class _Loaded:
    manifest: Manifest
    parts: tuple[LaidOutPart, ...]
    execution: Execution
    weights: PartWeights
    split: tuple[SplitNode, ...]
    outside: Outside | None
    on_gpu: OnGpu | None
    checks: tuple[EngineCheck, ...]
    stated_dims: Mapping[str, int] | None
    rss_before_open_bytes: int | None
    peaks: dict[tuple[tuple[str, int], ...], int]


class _RunFailed(Exception):
    """A run that had begun to use the accelerator failed: what it got is in ``problem``, and the worker ends."""

    def __init__(self, problem: MotteError) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Worker:
    """Serves one link until it ends.

    Args:
        kind: where it runs, as :func:`motte.trusted.surroundings.examine` says.
        host: by which the bundle's descriptor comes, and evidence; None: the bundle comes as bytes.
        accelerator: greets the accelerator whose link the worker was started with; None: it was started with none.
            Called once, after everything that decides what may leave was read and checked.
        gpu: it was started to use the confidential GPU of its VM, for bundles that place layers on one.
    """

    def __init__(
        self,
        link: Link,
        engine: Engine,
        *,
        kind: str,
        hello: Mapping[str, Any],
        precision: str = "f32",
        accelerator: Callable[[], Accelerator] | None = None,
        gpu: bool = False,
        host: HostChannel | None = None,
    ) -> None:
        self._kind = kind
        self._gpu = gpu
        self._host = host
        self._attest_s = 0.0
        self._link = link
        self._engine = engine
        self._hello = hello
        self._precision = precision
        self._accelerator = accelerator
        self._loaded: _Loaded | None = None

    def serve(self) -> int:
        """Run to the end of the link. Returns the exit status: 0 when the client closed it, 1 after a fatal error."""
        try:
            self._start()
            while True:
                self._answer(self._link.receive())
        except PeerClosed:
            return 0
        except _RunFailed as failure:
            self._report(failure.problem, fatal=True)
            return 1
        except MotteError as problem:
            self._report(problem, fatal=True)
            return 1
        finally:
            if self._loaded is not None:
                self._loaded.weights.close()
                if self._loaded.outside is not None:
                    self._loaded.outside.close()

    def _start(self) -> None:
        # A worker of a pool may wait for hours with this key: it never rests in ordinary memory.
        with SecretBytes.random(KEY_BYTES) as private:
            public = x25519_public(private.view)
            self._link.send(Frame(Kind.HELLO, {**self._hello, "public_key": public.hex()}))
            request = OpenRequest.read(self._expect(Kind.OPEN).meta)
            demanded = SignerPublicKey.parse(request.signer)
            fd = self._receive_bundle(request)
            marks = [time.perf_counter()]
            try:
                signed = open_bundle(fd, signer=demanded, min_release=request.min_release)
                if request.channel == "attested":
                    self._attest(signed.header, public)
                kek = self._open_grant(signed.header, request, private)
            except BaseException:
                os.close(fd)
                raise
        # From here on the descriptor is open for as long as the worker lives: streamed parts are read from it.
        if request.verify_digests:
            signed.verify_digests(threads=request.open_threads)
        if kek is not None:
            self._load(signed.unlock(kek), request, public, marks)
            return
        from motte.trusted.broker_keys import obtain

        start = time.perf_counter()
        data_keys = obtain(signed.header, self._link, issuer(self._kind, self._host))
        self._attest_s = time.perf_counter() - start
        marks[0] += self._attest_s
        self._load(signed.unlock_with(data_keys), request, public, marks)

    def _attest(self, header: BundleHeader, public: bytes) -> None:
        """Go on inside of TLS that ends here, with evidence in its certificate for our key and the owner's terms."""
        try:
            import motte.link.tls_stream  # noqa: F401
        except ImportError as problem:
            raise UnsupportedError(
                "this image has no TLS", got=str(problem), hint="build it without --slim, or let a broker give the keys"
            ) from problem
        from motte.attest.configuration import RunConfiguration
        from motte.attest.ra_tls import Attester
        from motte.link.attested import attested_server

        shown = Attester(issuer(self._kind, self._host), public, RunConfiguration.of(header).digest())
        # No time limit: a worker waits for its client for as long as the link is open.
        self._link.change_stream(lambda stream: attested_server(stream, shown, timeout_s=None))

    def _receive_bundle(self, request: OpenRequest) -> int:
        if request.bundle_bytes:
            from motte.trusted.bundle_arrival import receive_bytes

            return receive_bytes(self._link, request.bundle_bytes)
        if self._host is None:
            raise FrameError("this worker takes no descriptors", expected="OPEN.bundle_bytes above 0", got="0")
        return self._host.receive_descriptor()

    def _open_grant(self, header: BundleHeader, request: OpenRequest, private: SecretBytes) -> KeyEncryptionKey | None:
        """The key-encryption key, and the link secured; None: the grant holds session keys alone."""
        grant = Fields(dict(self._expect(Kind.GRANT).meta), where="GRANT", error=FrameError)
        with_kek = request.keys == "recipient"
        sealed = grant.hexadecimal("sealed", length_bytes=GRANT_BYTES if with_kek else SESSION_GRANT_BYTES)
        grant.done()
        kek: KeyEncryptionKey | None = None
        if with_kek:
            kek, session = open_grant(sealed, private.view, bundle_id=header.bundle_id, release=header.release)
        else:
            session = open_session_grant(sealed, private.view, bundle_id=header.bundle_id, release=header.release)
        sending, receiving = session.worker_ciphers()
        self._link.secure(sending=sending, receiving=receiving)
        return kek

    def _load(self, bundle: UnlockedBundle, request: OpenRequest, public: bytes, marks: list[float]) -> None:
        manifest = loads(bundle.manifest())
        checks = self._checks(manifest, request.precision)
        terms = bundle.signed.header.run
        check_terms(terms, manifest.plan.offload)
        if terms is not None and terms.peers and self._accelerator is not None:
            # Its address is the host's word, and it proves nothing of itself.
            raise SettingError(
                "this bundle names the accelerators that may be used, and a worker cannot tell which one it was given",
                expected=", ".join(terms.peers),
                hint="run it without an accelerator, or let its owner name none",
            )
        on_gpu = self._on_gpu(manifest, bundle.signed.header, public)
        split = self._split(manifest, bundle.signed.header.public_weights, on_gpu)
        parts = lay_out_parts(manifest, checked=True)
        check_sizes(parts, tuple(bundle.part_bytes(index) for index in range(bundle.parts)))
        streamed = request.mode == "streamed"
        dims = self._stated_dims(manifest, request) if streamed or request.stated_dims else None
        if request.weight_memory_bytes:
            _refuse_above(parts, request, streamed)
        found = _own_memory()
        before = None if found is None else found.rss_bytes
        marks.append(time.perf_counter())
        holder = StreamedWeights if streamed else ResidentWeights
        weights: PartWeights = holder(bundle, parts, self._engine, threads=request.open_threads)
        marks.append(time.perf_counter())
        try:
            outside = self._open_outside(manifest, split, on_gpu)
            runners = {**({} if outside is None else outside.runners), **({} if on_gpu is None else on_gpu.runners)}
            execution = prepare(manifest, parts, self._engine, weights, resident=not streamed, runners=runners)
            self._refuse_copies(request, weights, execution)
        except BaseException:
            weights.close()
            raise
        marks.append(time.perf_counter())
        if self._host is not None:
            self._host.close()
        self._loaded = _Loaded(manifest, parts, execution, weights, split, outside, on_gpu, checks, dims, before, {})
        self._link.send(Frame(Kind.READY, self._ready(marks)))

    def _refuse_copies(self, request: OpenRequest, weights: PartWeights, execution: Execution) -> None:
        """What an engine really copied can be known only now; a bound that it breaks ends the worker."""
        need = weights.arena_bytes + (execution.copy_bytes or 0)
        if execution.joined and request.weight_memory_bytes and need > request.weight_memory_bytes:
            raise ResourceError(
                "the engine's own copies do not fit the weight memory",
                expected=f"at most {request.weight_memory_bytes} bytes",
                got=f"{need} bytes (opened parts and what {self._engine.name} copied)",
                hint="run with --mode streamed, or with --engine torch",
            )

    def _checks(self, manifest: Manifest, precision: str) -> tuple[EngineCheck, ...]:
        """The comparisons with the reference that the owner made for this engine at this precision.

        Raises:
            SettingError: a precision for which there is none, or that this worker was not started with.
        """
        if precision != self._precision:
            raise SettingError("this worker was started for another precision", expected=self._precision, got=precision)
        lowered = manifest.lowered
        every = lowered.checks if isinstance(lowered, Lowered) else ()
        found = tuple(c for c in every if (c.engine, c.precision) == (self._engine.name, precision))
        if precision != "f32" and not found:
            raise SettingError(
                f"nobody measured what {precision} changes in this model's answers",
                where=manifest.graph.name,
                got=f"--precision {precision}",
                hint=f"let its owner seal it with --precision {precision}, or run it in f32",
            )
        return found

    def _on_gpu(self, manifest: Manifest, header: BundleHeader, public: bytes) -> OnGpu | None:
        """The GPU that layers are placed on, proved before any weight is opened; None: no layer is.

        Raises:
            UnsupportedError: a worker that was not started for it. AttestationError, BundleError: see
                :func:`motte.trusted.confidential.open_gpu`.
        """
        section = manifest.plan.offload
        if section is None or not section.confidential_gpu:
            return None
        if not self._gpu:
            problem = UnsupportedError(
                "layers of this bundle run on a confidential GPU, which this worker cannot have",
                where=", ".join(section.confidential_gpu)[:200],
                expected="kind vm, engine torch, started with --gpu nvidia",
                got=f"kind {self._kind}, engine {self._engine.name}, not started for a GPU",
                hint="run it with --enclave vm (docs/tee/nvidia.md), or let its owner seal it without --gpu-layers",
            )
            problem.check = "U-1"
            raise problem
        from motte.trusted.confidential import open_gpu

        return open_gpu(section, manifest.graph, header, public, issue=issuer(self._kind, self._host))

    def _split(self, manifest: Manifest, public: tuple[str, ...], on_gpu: OnGpu | None) -> tuple[SplitNode, ...]:
        """The nodes that may run split, by the frozen placement and the signed header; nothing is sent yet.

        Raises:
            BundleError: checks M-3 and M-4. SettingError: an accelerator for a bundle that sends nothing to one.
        """
        section = manifest.plan.offload
        if section is None or section.scheme == TRUSTED:
            if self._accelerator is not None:
                raise SettingError(
                    "this bundle lets nothing out to an accelerator",
                    where=manifest.graph.name,
                    hint="run it without one, or let its owner seal it with --scheme asymmetric",
                )
            return ()
        return split_nodes(manifest.graph, section, public, gpu=None if on_gpu is None else on_gpu.gpu)

    def _open_outside(self, manifest: Manifest, split: tuple[SplitNode, ...], on_gpu: OnGpu | None) -> Outside | None:
        section = manifest.plan.offload
        if section is None or self._accelerator is None:
            return None
        if self._engine.name != "torch":
            raise UnsupportedError(
                "only the torch engine can run layers split", got=self._engine.name, expected="torch"
            )
        from motte.trusted.outside import Outside

        scheme, _ = from_plan(section, gpu=None if on_gpu is None else on_gpu.gpu)
        with _one_run():
            return Outside(split, scheme, self._accelerator())

    def _stated_dims(self, manifest: Manifest, request: OpenRequest) -> dict[str, int]:
        unknown = set(request.stated_dims) - {dim.name for dim in manifest.graph.dims}
        if unknown:
            raise InputError(
                "the model has no such dimension",
                got=", ".join(sorted(unknown)),
                expected=", ".join(dim.name for dim in manifest.graph.dims) or "none",
            )
        return {**dict(manifest.plan.dims), **request.stated_dims}

    def _ready(self, marks: list[float]) -> dict[str, Any]:
        loaded = self._held()
        graph = loaded.manifest.graph
        return {
            "signature": to_json(loaded.manifest.signature),
            "inputs": [_value_json(value) for value in graph.inputs],
            "output_names": list(graph.output_names),
            "dims": [{"name": d.name, "low": d.low, "high": d.high} for d in graph.dims],
            "plan_dims": dict(loaded.manifest.plan.dims),
            "parts": [{"nodes": len(p.part.graph.nodes), "bytes": p.layout.bytes} for p in loaded.parts],
            "seconds": {
                "attest": self._attest_s,
                **dict(zip(("verify", "open", "load"), _differences(marks), strict=True)),
            },
            "memory": self._memory(),
            "offload": self._offload(),
            "joined": loaded.execution.joined,
            "checks": [check_json(check) for check in loaded.checks],
        }

    def _offload(self) -> dict[str, Any] | None:
        """What of the frozen scheme a client may want to show; None for a bundle without one."""
        loaded = self._held()
        section = loaded.manifest.plan.offload
        if section is None:
            return None
        return {
            "accelerator": None if loaded.outside is None else loaded.outside.name,
            "layers": [node.name for node in loaded.split],
            "noise": section.noise is not None,
            "integrity": section.integrity,
            "gpu": None if loaded.on_gpu is None else loaded.on_gpu.told(),
        }

    def _answer(self, frame: Frame) -> None:
        if frame.kind is Kind.STATS:
            self._link.send(Frame(Kind.ANSWER, {"memory": self._memory(), "self": report_self().to_json()}))
            return
        if frame.kind is Kind.TCB:
            from motte.trusted.tcb import loaded_files

            self._link.send(Frame(Kind.ANSWER, {"tcb": loaded_files().to_json()}))
            return
        if frame.kind is not Kind.RUN:
            raise FrameError("not a request", expected="RUN, STATS or TCB", got=frame.kind.name)
        try:
            answer = self._infer(frame)
        except InputError as problem:
            self._report(problem, fatal=False)
            return
        self._link.send(answer)

    def _infer(self, frame: Frame) -> Frame:
        loaded = self._held()
        fields = Fields(dict(frame.meta), where="RUN", error=FrameError)
        fields.done()
        start, waited = time.perf_counter(), loaded.weights.waited_s
        graph = loaded.manifest.graph
        dims = bind_dims(graph, [(tensor.dtype, tensor.shape) for tensor in frame.tensors])
        peak = self._activation_peak(dims)
        inputs: list[Array] = [self._engine.from_bytes(t.dtype, t.shape, memoryview(t.data)) for t in frame.tensors]
        books: dict[str, Any] | None = None
        try:
            if loaded.outside is None:
                outputs = loaded.execution.run(inputs, dims)
            else:
                with _one_run():
                    loaded.outside.begin_run()
                    outputs = loaded.execution.run(inputs, dims)
                    books = loaded.outside.end_run()
        except MemoryError as problem:
            raise ResourceError("out of memory", where=graph.name, hint="run a smaller batch") from problem
        tensors = [WireTensor(*self._engine.to_bytes(output)) for output in outputs]
        seconds = {"run": time.perf_counter() - start, "wait_for_weights": loaded.weights.waited_s - waited}
        return Frame(Kind.ANSWER, {"seconds": seconds, "activation_peak_bytes": peak, "outside": books}, tensors)

    def _activation_peak(self, dims: Mapping[str, int]) -> int:
        loaded = self._held()
        key = tuple(sorted(dims.items()))
        if key not in loaded.peaks:
            extra = 0 if loaded.outside is None else split_extra_bytes(loaded.manifest.graph, loaded.split, dims)
            loaded.peaks[key] = peak_activation_bytes(loaded.manifest.graph, loaded.manifest.plan, dims) + extra
        if loaded.stated_dims is not None:
            for name, stated in loaded.stated_dims.items():
                if dims[name] > stated:
                    raise InputError(
                        "larger than the size stated when the worker was started",
                        where=name,
                        expected=f"at most {stated}",
                        got=str(dims[name]),
                        hint=f"send fewer at once, or state a larger {name} (--batch, dims=) at the start",
                    )
        return loaded.peaks[key]

    def _memory(self) -> dict[str, Any]:
        # The worker's own books: it is not dumpable, and hides from an unprivileged sampler outside.
        loaded, memory = self._held(), _own_memory()
        return {
            "weight_arena_bytes": loaded.weights.arena_bytes,
            "weight_resident_bytes": loaded.weights.resident_bytes(),
            "engine_copy_bytes": loaded.execution.copy_bytes,
            "weights_locked": loaded.weights.locked,
            "weight_secret_bytes": loaded.weights.secret_bytes,
            "rss_before_open_bytes": loaded.rss_before_open_bytes,
            "rss_bytes": None if memory is None else memory.rss_bytes,
            "rss_peak_bytes": None if memory is None else memory.peak_rss_bytes,
        }

    def _held(self) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("not ready")
        return self._loaded

    def _expect(self, kind: Kind) -> Frame:
        frame = self._link.receive()
        if frame.kind is not kind:
            raise FrameError("frame in the wrong state", expected=kind.name, got=frame.kind.name)
        return frame

    def _report(self, problem: MotteError, *, fatal: bool) -> None:
        facts = {name: getattr(problem, name, None) for name in ("expected", "got", "where", "hint", "check")}
        meta = {"class": type(problem).__name__, "message": problem.message, "fatal": fatal, **facts}
        try:
            self._link.send(Frame(Kind.ERROR, meta))
        except MotteError:
            # The client has gone: there is nobody left to tell, and the exit status says the rest.
            os._exit(1)


@contextmanager
def _one_run() -> Iterator[None]:
    """A failure in here ends the worker, and is the run's: a link that closes is the accelerator's and not the
    client's, and no refusal is survived after something was sent."""
    try:
        yield
    except MotteError as problem:
        raise _RunFailed(problem) from problem


def _own_memory() -> Memory | None:
    """What this process holds; None where it cannot be told, as under Gramine, whose /proc has less in it."""
    try:
        return read_memory()
    except ResourceError:
        return None


def _refuse_above(parts: tuple[LaidOutPart, ...], request: OpenRequest, streamed: bool) -> None:
    needs = [part_need(part) for part in parts]
    need = streamed_need(needs) if streamed else sum(n.weight_bytes for n in needs) + max(n.copy_bytes for n in needs)
    if need > request.weight_memory_bytes:
        raise ResourceError(
            "the plan does not fit the weight memory",
            expected=f"at most {request.weight_memory_bytes} bytes",
            got=f"{need} bytes ({request.mode}: opened parts and the engine's copy)",
            hint="seal the model again with --weight-memory at this bound"
            + ("" if streamed else ", or run with --mode streamed"),
        )


def part_need(part: LaidOutPart) -> PartNeed:
    """What one part needs of weight memory while it runs."""
    return PartNeed(part.layout.bytes, copy_bytes(part.part.graph))


def _differences(marks: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(marks)]


def _value_json(value: Value) -> dict[str, Any]:
    shape = [extent.text if isinstance(extent, Size) else extent for extent in value.type.shape]
    return {"name": value.name, "dtype": value.type.dtype, "shape": shape}
