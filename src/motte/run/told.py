"""What a worker tells its client, read strictly: the frames READY, ANSWER and ERROR as data classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from motte import errors
from motte.capture.graph import Dim, Size, TensorType, Value
from motte.errors import FrameError, MotteError, WorkerRefused
from motte.limits import MAX_ACCELERATOR_LAYERS, MAX_GRAPH_WEIGHTS, MAX_NAME_BYTES
from motte.link.frames import Frame, Kind, WireTensor
from motte.lower.lowered import EngineCheck
from motte.strict_json import Fields


@dataclass(frozen=True, slots=True)
class OnGpu:
    """Layers that run inside, whole, on a GPU that the worker proved to itself, as it tells it.

    ``device`` in torch's words; ``proved_at``: ISO 8601, by the worker's clock; ``guest``: whose evidence the GPU's is
    bound to (``snp``, ``tdx``); ``gpu``, ``gpu_driver`` and ``gpu_vbios``: product and versions, as in the verdict.
    """

    layers: tuple[str, ...]
    device: str
    simulated: bool
    proved_at: str
    guest: str
    gpu: str
    gpu_driver: str
    gpu_vbios: str


@dataclass(frozen=True, slots=True)
class Offload:
    """What the owner froze into a bundle with a scheme, as the worker tells it.

    ``accelerator`` is the name of the one in use; None: none was given, and everything runs inside. ``layers`` are
    those that may run split. ``noise``: whether what leaves is clipped and noised. ``gpu``: the layers that run on a
    confidential GPU; None: there are none.
    """

    accelerator: str | None
    layers: tuple[str, ...]
    noise: bool
    integrity: str
    gpu: OnGpu | None = None


@dataclass(frozen=True, slots=True)
class EngineUsed:
    """What computes in the worker, and why that one.

    ``joined``: all parts run as one program. ``checks``: the comparisons with the reference that the owner made for
    this engine and precision when the bundle was sealed; none for the torch engine, which is the reference.
    """

    name: str
    version: str
    precision: str
    joined: bool
    why: str
    checks: tuple[EngineCheck, ...]

    @property
    def difference(self) -> float | None:
        """The largest difference that the owner found; None: not compared."""
        return max((check.difference for check in self.checks), default=None)


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


def read_offload(told: object) -> Offload:
    """READY's word on the frozen scheme.

    Raises:
        FrameError: malformed.
    """
    fields = Fields(told, where="READY.offload", error=FrameError)
    name, gpu = fields.any("accelerator"), fields.any("gpu")
    found = Offload(
        accelerator=None if name is None else read_text(name, "READY.offload.accelerator"),
        layers=tuple(fields.items("layers", max_items=MAX_ACCELERATOR_LAYERS, read=read_text)),
        noise=fields.boolean("noise"),
        integrity=fields.text("integrity", max_bytes=64),
        gpu=None if gpu is None else _read_gpu(gpu),
    )
    fields.done()
    return found


def _read_gpu(told: object) -> OnGpu:
    fields = Fields(told, where="READY.offload.gpu", error=FrameError)
    words = ("device", "proved_at", "guest", "gpu", "gpu_driver", "gpu_vbios")
    found = OnGpu(
        layers=tuple(fields.items("layers", max_items=MAX_GRAPH_WEIGHTS, read=read_text)),
        simulated=fields.boolean("simulated"),
        **{word: fields.text(word, max_bytes=MAX_NAME_BYTES) for word in words},
    )
    fields.done()
    return found


def read_outside(told: object) -> Outside:
    """ANSWER's word on what left in one run.

    Raises:
        FrameError: malformed.
    """
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


def read_text(value: object, where: str) -> str:
    """A text of a list.

    Raises:
        FrameError: malformed.
    """
    if not isinstance(value, str):
        raise FrameError("not text", where=where)
    return value


def read_dim(value: object, where: str) -> Dim:
    """One dynamic dimension.

    Raises:
        FrameError: malformed.
    """
    fields = Fields(value, where=where, error=FrameError)
    found = Dim(
        fields.text("name", max_bytes=64),
        fields.integer("low", low=0, high=1 << 62),
        fields.integer("high", low=0, high=1 << 62),
    )
    fields.done()
    return found


def read_value(value: object, where: str) -> Value:
    """One input of the model.

    Raises:
        FrameError: malformed.
    """
    fields = Fields(value, where=where, error=FrameError)
    name, dtype = fields.text("name", max_bytes=512), fields.text("dtype", max_bytes=8)
    shape = fields.items("shape", max_items=16, read=lambda item, _: Size(item) if isinstance(item, str) else int(item))
    fields.done()
    return Value(name, TensorType(dtype, tuple(shape)))
