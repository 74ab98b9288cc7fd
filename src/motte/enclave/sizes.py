"""How much memory and how many threads a worker needs inside, from its bundle's plan; and how long it takes to start.

Nothing is measured while an image is made: the same bundle gives the same manifest everywhere. Each line of a
derivation says where its number comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from motte.enclave.image import ImageRecord
from motte.errors import SettingError
from motte.limits import GIB, MIB
from motte.plan.costs import peak_activation_bytes
from motte.plan.streamed import PartNeed, copy_bytes, streamed_need
from motte.seal.manifest import Manifest, lay_out_parts

ENGINE_BYTES: Final = {"onnxruntime": 64 * MIB, "openvino": 128 * MIB, "torch": 256 * MIB}
"""Memory of the interpreter, its modules and the engine, no file behind it, after one answer of a small model: measured
as 42 MB for onnxruntime, and rounded up; a test compares the first with what a worker takes."""
ENGINE_THREADS: Final = {"onnxruntime": 0, "openvino": 8, "torch": 0}
"""Threads that an engine starts for itself whatever it is told: openvino was seen to have 7 with one compute thread."""
JOINING: Final = ("onnxruntime", "openvino")
"""Engines that may hold a copy of all weights, in a layout of their own, while the opened ones stay."""
GRAMINE_BYTES: Final = 64 * MIB
"""Gramine itself: its two libraries, its tables, and the manifest with what is read of it."""
MARGIN: Final = 0.25
STACK_BYTES: Final = 2 * MIB
"""Of each thread: Gramine's stacks do not grow."""
HELPER_THREADS: Final = 3
"""Of Gramine: for processes, for timers, and for handshakes on pipes."""
SMALLEST_BYTES: Final = 256 * MIB
LARGEST_BYTES: Final = 512 * GIB
_START_S: Final = 0.75
_MB_PER_S: Final = 30.0
_MB: Final = 1e6


@dataclass(frozen=True, slots=True)
class Line:
    """One term of a sum: how much (bytes or threads), of what, and why so much."""

    amount: int
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a manifest states, with its derivation.

    ``enclave_bytes`` is a power of two, at least the sum of ``memory`` and a margin; ``max_threads`` the sum of
    ``threads``.
    """

    memory: tuple[Line, ...]
    threads: tuple[Line, ...]
    enclave_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Sum of the lines, without the margin."""
        return sum(line.amount for line in self.memory)

    @property
    def max_threads(self) -> int:
        """Sum of the lines."""
        return sum(line.amount for line in self.threads)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "memory": [[line.amount, line.what, line.why] for line in self.memory],
            "threads": [[line.amount, line.what, line.why] for line in self.threads],
            "margin": MARGIN,
            "enclave_bytes": self.enclave_bytes,
            "max_threads": self.max_threads,
        }


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """What one bundle needs: numbers of bytes; ``name`` says of which, and at which dimensions."""

    name: str
    bundle_bytes: int
    weight_bytes: int
    copy_bytes: int
    activation_bytes: int
    dims: Mapping[str, int]

    @staticmethod
    def of(
        manifest: Manifest, *, bundle_bytes: int, engine: str, streamed: bool, dims: Mapping[str, int] | None = None
    ) -> ModelNeed:
        """From an opened manifest, at ``dims`` or those of its plan.

        Raises:
            PlanError: dimensions that the model does not have, or lacks.
        """
        at = {**dict(manifest.plan.dims), **(dims or {})}
        needs = [PartNeed(part.layout.bytes, copy_bytes(part.part.graph)) for part in lay_out_parts(manifest)]
        weights = streamed_need(needs) if streamed else sum(need.weight_bytes for need in needs)
        whole = engine in JOINING and not streamed
        return ModelNeed(
            name=manifest.graph.name,
            bundle_bytes=bundle_bytes,
            weight_bytes=weights,
            copy_bytes=weights if whole else max((need.copy_bytes for need in needs), default=0),
            activation_bytes=peak_activation_bytes(manifest.graph, manifest.plan, at),
            dims=at,
        )


def derive(record: ImageRecord, need: ModelNeed, *, threads: int, at_least_bytes: int = 0) -> Sizes:
    """Sizes of an enclave for one image and one model.

    Args:
        threads: compute threads of the engine, at least 1.
        at_least_bytes: a wish for a larger enclave, for other models with the same measurement.

    Raises:
        SettingError: more than an enclave can be.
    """
    at = ", ".join(f"{name} {value}" for name, value in sorted(need.dims.items())) or "fixed sizes"
    lines = (
        Line(1, "main thread", "the worker"),
        Line(threads - 1, "compute threads", f"{record.engine} with {threads}, the main thread among them"),
        Line(ENGINE_THREADS[record.engine], "the engine's own threads", "seen with one compute thread"),
        Line(threads, "opening threads", "decrypt chunks; one each"),
        Line(1, "streaming thread", "opens the next part"),
        Line(HELPER_THREADS, "Gramine's helpers", "processes, timers, handshakes"),
    )
    count = sum(line.amount for line in lines)
    memory = (
        Line(record.bytes, "files of the image", "every one may be mapped, and is copied in"),
        Line(ENGINE_BYTES[record.engine], "interpreter and engine", "measured with a small model, rounded up"),
        Line(need.bundle_bytes, "bundle", f"{need.name}, as it arrives over the link"),
        Line(need.weight_bytes, "opened weights", "the plan's arena"),
        Line(need.copy_bytes, "the engine's copies", "largest that it may make of the weights"),
        Line(2 * need.activation_bytes, "activations", f"twice the plan's peak at {at}: values and workspaces"),
        Line(count * STACK_BYTES, "stacks", f"{count} threads of {STACK_BYTES // MIB} MiB"),
        Line(GRAMINE_BYTES, "Gramine", "its own libraries and tables"),
    )
    wanted = max(int(sum(line.amount for line in memory) * (1 + MARGIN)), at_least_bytes, SMALLEST_BYTES)
    size = 1 << (wanted - 1).bit_length()
    if size > LARGEST_BYTES:
        raise SettingError("no enclave is that large", expected=f"at most {LARGEST_BYTES} bytes", got=str(wanted))
    return Sizes(memory, lines, size)


@dataclass(frozen=True, slots=True)
class Aim:
    """What an image of one engine is meant to stay within."""

    megabytes: float
    files: int

    def met_by(self, record: ImageRecord) -> bool:
        """Whether the whole image does, the C library included."""
        return record.bytes <= self.megabytes * _MB and len(record.files) <= self.files


def aim_of(engine: str, *, slim: bool) -> Aim | None:
    """The aim for an engine; None: there is none."""
    if engine == "onnxruntime":
        return Aim(75, 300) if slim else Aim(110, 300)
    return Aim(480, 2500) if engine == "torch" else None


def estimated_start_s(record: ImageRecord) -> float:
    """Seconds from spawn to first answer under Gramine, **estimated** by a rule of thumb: 0.75 s + MB / 30.

    Of what Gramine hashes here, without its own C library. The rule comes from measurements in gramine-direct with
    images of 70 to 164 MB, and says nothing about the speed of SGX itself.
    """
    return _START_S + sum(file.bytes for file in record.hashed()) / _MB / _MB_PER_S
