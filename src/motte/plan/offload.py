"""The offload section of a plan: which linear layers run split, and under which frozen settings. Plain data, no torch.

A plan stands left of :mod:`motte.offload` in the import order, so it holds words and numbers; what they mean, and the
way to and from ``motte.offload.settings.Asymmetric``, is in :mod:`motte.offload.placement`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

Side = Literal["inside", "split", "confidential-gpu"]
RankName = Literal["fixed", "schedule", "energy", "entropy"]
NoiseName = Literal["residual", "gradient", "update"]
SIDES: Final[tuple[str, ...]] = get_args(Side)
SCHEMES: Final = ("asymmetric", "trusted")
"""``trusted``: nothing may leave, so no setting of a scheme stands in the section."""
RANK_NUMBERS: Final = {"fixed": 1, "schedule": 3, "energy": 2, "entropy": 1}
"""Rank rules and how many numbers each has: the rank; start, factor, cap; share, cap; cap."""
NOISE_NAMES: Final[tuple[NoiseName, ...]] = get_args(NoiseName)
ADJACENCIES: Final = ("replace", "add-remove")
DECOMPOSITIONS: Final = ("als", "range-finder")
RESIDUAL_DTYPES: Final = ("same", "float32", "bfloat16")
INTEGRITIES: Final = ("freivalds", "off")
MAX_ITERATIONS: Final = 16
MAX_VECTORS: Final = 8
MAX_PLANNED_RANK: Final = 65_536
MAX_REASON_BYTES: Final = 200
MAX_GPU_REFERENCES: Final = 16
MAX_GPU_VALUES: Final = 64
"""Good values of one measurement."""


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One linear layer: ``name`` is the path of the module that holds its weight (``features.10``), ``side`` where it
    runs, ``reason`` one line of printable ASCII without repeated spaces. ``confidential-gpu`` is a GPU of the trusted
    side, which has to be proved before anything runs there (:mod:`motte.offload.confidential_gpu`)."""

    name: str
    side: Side
    reason: str


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """A rank rule and its numbers, in the order of :data:`RANK_NUMBERS`. Only the share of ``energy`` is a fraction."""

    rule: RankName
    numbers: tuple[int | float, ...]


@dataclass(frozen=True, slots=True)
class PlannedMechanism:
    """One kind of noisy release: per-sample clip (L2), and the noise's standard deviation over that clip."""

    name: NoiseName
    clip: float
    noise_multiplier: float


@dataclass(frozen=True, slots=True)
class PlannedNoise:
    """Adjacency and the mechanisms in the order of :data:`NOISE_NAMES`; ``residual`` is always there."""

    adjacency: str
    mechanisms: tuple[PlannedMechanism, ...]


@dataclass(frozen=True, slots=True)
class PlannedGpuReference:
    """Good measurements of a GPU with one driver and one firmware: each number (from 0, ascending) with its good values
    in hexadecimal, sorted. What they mean: :mod:`motte.attest.platforms.nvidia_reference`."""

    driver: str
    vbios: str
    measurements: tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """Everything that decides what leaves, and what runs on a confidential GPU, fixed at the owner's.

    ``layers`` stand in the order of registration of the model. The rank of a split layer counts the split ones among
    them: the first one that is split has position 0. A linear layer that is not listed stays inside.
    ``gpu_references``: one of them has to fit the GPU that layers are placed on; none where none is placed there.
    """

    rank: PlannedRank
    iterations: int
    decomposition: str
    residual_dtype: str
    noise: PlannedNoise | None
    integrity: str
    integrity_vectors: int
    layers: tuple[PlannedLayer, ...]
    scheme: str = "asymmetric"
    gpu_references: tuple[PlannedGpuReference, ...] = ()

    @property
    def split(self) -> tuple[str, ...]:
        """Names of the layers that run split, by position."""
        return tuple(layer.name for layer in self.layers if layer.side == "split")

    @property
    def confidential_gpu(self) -> tuple[str, ...]:
        """Names of the layers that run whole on a proved GPU of the trusted side."""
        return tuple(layer.name for layer in self.layers if layer.side == "confidential-gpu")

    @property
    def inside(self) -> tuple[str, ...]:
        """Names of the listed layers that stay inside."""
        return tuple(layer.name for layer in self.layers if layer.side == "inside")


def nothing_leaves(
    layers: tuple[PlannedLayer, ...], gpu_references: tuple[PlannedGpuReference, ...] = ()
) -> OffloadPlan:
    """A section of the scheme ``trusted``. Its other settings are read by nobody, and are always these."""
    return OffloadPlan(
        rank=PlannedRank("fixed", (0,)),
        iterations=1,
        decomposition="range-finder",
        residual_dtype="same",
        noise=None,
        integrity="off",
        integrity_vectors=1,
        layers=layers,
        scheme="trusted",
        gpu_references=gpu_references,
    )
