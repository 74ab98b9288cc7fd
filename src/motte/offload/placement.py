"""Which linear layers run split, and why; decided at the owner's, then frozen into the plan.

A placement is made here in one of three ways: everything that gains (:func:`place_all`), a list (:func:`place_listed`),
or from measured times under a budget of exposure (:func:`motte.offload.decide.place_auto`). Nothing here measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from motte.errors import SettingError
from motte.linear.operation import LinearOperation
from motte.offload.settings import (
    Adjacency,
    Asymmetric,
    Decomposition,
    Energy,
    Entropy,
    Fixed,
    Gaussian,
    Integrity,
    Mechanism,
    Rank,
    ResidualDtype,
    Schedule,
)
from motte.plan.offload import (
    MAX_REASON_BYTES,
    NOISE_NAMES,
    OffloadPlan,
    PlannedGpuReference,
    PlannedLayer,
    PlannedMechanism,
    PlannedNoise,
    PlannedRank,
    Side,
    nothing_leaves,
)

if TYPE_CHECKING:
    from motte.offload.confidential_gpu import ProvedGpu
    from motte.offload.layers import LinearLayer


@dataclass(frozen=True, slots=True)
class Placed:
    """One linear layer: the path of the module that holds its weight, the side, and one line of reason."""

    name: str
    side: Side
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Every linear layer of a model, in order of registration.

    Raises:
        SettingError: a layer stands twice.
    """

    layers: tuple[Placed, ...]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise SettingError("a layer is placed twice", got=next(name for name in names if names.count(name) > 1))

    def __getitem__(self, name: str) -> Placed:
        """The layer ``name``; a missing one is an error."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise SettingError("no such layer in the placement", got=name)

    @property
    def split(self) -> tuple[str, ...]:
        """Names of the layers that run split, in the order that gives each its position."""
        return tuple(layer.name for layer in self.layers if layer.side == "split")

    @property
    def inside(self) -> tuple[str, ...]:
        """Names of the layers that stay inside, on the CPU."""
        return tuple(layer.name for layer in self.layers if layer.side == "inside")

    @property
    def confidential_gpu(self) -> tuple[str, ...]:
        """Names of the layers that run whole on a proved GPU of the trusted side."""
        return tuple(layer.name for layer in self.layers if layer.side == "confidential-gpu")

    @property
    def trusted(self) -> tuple[str, ...]:
        """Names of the layers of which nothing leaves."""
        return tuple(layer.name for layer in self.layers if layer.side != "split")


# --- ranks ----------------------------------------------------------------------------------------------------------
def most_rank(operation: LinearOperation, shape: Sequence[int]) -> int:
    """The rank of one sample's matrix at most: channels by positions, or tokens by features."""
    if operation.family == "linear":
        return min(math.prod(shape[1:-1]), operation.in_channels)
    return min(operation.in_channels, math.prod(shape[2:]))


def planned_rank(rule: Rank, position: int, most: int) -> int:
    """The rank of the split layer at ``position``; for rules that look at the activation, the most that it can be."""
    match rule:
        case Fixed():
            return min(rule.rank, most)
        case Schedule():
            return min(rule.rank(position), most)
        case Energy() | Entropy():
            return min(rule.cap, most)


def low_rank_gains(operation: LinearOperation, shape: Sequence[int], rank: int) -> bool:
    """Whether ``rank`` principal channels are less than the whole, by the published count.

    A product needs the C/groups input channels of one group anyhow; at or above that many nothing is gained (depthwise:
    from rank 1 on). At the matrix's own rank nothing is left that could be computed outside.
    """
    return rank < min(operation.in_channels // operation.groups, most_rank(operation, shape))


# --- everything, or a list ------------------------------------------------------------------------------------------
def place_all(layers: Sequence[LinearLayer], scheme: Asymmetric) -> Placement:
    """Split every layer that can be, that gains by it, and that the scheme does not keep: what meets the raw input
    stays, and, where the scheme names no trusted layers, what runs last.

    Raises:
        SettingError: the scheme names a layer that is not there.
    """
    names = scheme.offloaded_layers
    return _place(layers, scheme, names, "placement all" if names is None else "listed")


def place_listed(layers: Sequence[LinearLayer], scheme: Asymmetric, names: Sequence[str]) -> Placement:
    """Split the layers ``names``; one that cannot be split, or gains nothing, stays inside with its reason.

    Raises:
        SettingError: a layer that is not there, or is trusted by the scheme.
    """
    return _place(layers, scheme, tuple(names), "listed")


def place_none(layers: Sequence[LinearLayer]) -> Placement:
    """Everything inside."""
    return Placement(tuple(Placed(layer.name, "inside", "placement none") for layer in layers))


def place_on_gpu(placement: Placement, names: Sequence[str]) -> Placement:
    """``placement`` with the layers ``names`` on the confidential GPU, whole. Whoever runs it has to prove that GPU.

    A layer that was split before leaves no more: of two sides it gets the trusted one.

    Raises:
        SettingError: a layer that is not there.
    """
    for name in names:
        placement[name]
    return Placement(
        tuple(
            Placed(each.name, "confidential-gpu", "named for the confidential GPU") if each.name in names else each
            for each in placement.layers
        )
    )


def _place(layers: Sequence[LinearLayer], scheme: Asymmetric, names: tuple[str, ...] | None, reason: str) -> Placement:
    _refuse_unknown(layers, names or (), "the placement")
    _refuse_unknown(layers, scheme.trusted_layers or (), "trusted_layers")
    both = set(names or ()) & set(scheme.trusted_layers or ())
    if both:
        raise SettingError("a layer is both trusted and offloaded", got=", ".join(sorted(both)))
    placed: list[Placed] = []
    position = 0
    for layer in layers:
        stays = _why_inside(layer, scheme, names, position)
        placed.append(Placed(layer.name, "inside" if stays else "split", stays or reason + _although(layer)))
        position += stays is None
    return Placement(tuple(placed))


def _why_inside(layer: LinearLayer, scheme: Asymmetric, names: tuple[str, ...] | None, position: int) -> str | None:
    operation = layer.operation
    if layer.must_stay is not None or operation is None:
        return layer.must_stay or "it has no split form"
    if scheme.trusted_layers is not None and layer.name in scheme.trusted_layers:
        return "named as trusted"
    if names is not None and layer.name not in names:
        return "not listed"
    if names is None and layer.meets_raw_input:
        return "it meets the raw input"
    if names is None and scheme.trusted_layers is None and layer.runs_last:
        return "the last layer: its output gradient would give the labels away"
    if scheme.noise is not None and not layer.per_sample:
        return "its first axis is not the batch, so nothing can be clipped per sample"
    for shape in layer.shapes:
        rank = planned_rank(scheme.rank, position, most_rank(operation, shape))
        if not low_rank_gains(operation, shape, rank):
            return f"rank {rank} gains nothing: {_of_what(operation, shape)}"
    return None


def _although(layer: LinearLayer) -> str:
    # Only a layer that somebody named gets here with either.
    if layer.meets_raw_input:
        return ", although it meets the raw input"
    return ", although its output gradient gives the labels away" if layer.runs_last else ""


def _of_what(operation: LinearOperation, shape: Sequence[int]) -> str:
    per_group = operation.in_channels // operation.groups
    places = math.prod(shape[1:-1]) if operation.family == "linear" else math.prod(shape[2:])
    kind = ("token", "feature") if operation.family == "linear" else ("position", "input channel a group")
    return f"{_count(places, kind[0])}, {_count(per_group, kind[1])}"


def _count(number: int, what: str) -> str:
    first, _, rest = what.partition(" a ")
    return f"{number} {first}{'s' * (number != 1)}" + (f" a {rest}" if rest else "")


def _refuse_unknown(layers: Sequence[LinearLayer], names: Sequence[str], where: str) -> None:
    known = [layer.name for layer in layers]
    for name in names:
        if name not in known:
            raise SettingError(
                "no such convolution or linear layer", where=where, got=name, expected=", ".join(known)[:400] or "none"
            )


# --- to and from the plan -------------------------------------------------------------------------------------------
def to_plan(
    scheme: Asymmetric | None, placement: Placement, *, gpu_references: Sequence[PlannedGpuReference] = ()
) -> OffloadPlan:
    """The offload section of a plan: every setting that decides what leaves, and the placement.

    Args:
        scheme: None: nothing may leave.
        gpu_references: which measurements of a confidential GPU are good; without one no worker takes a GPU.

    Raises:
        SettingError: the scheme itself lists layers, and not those of the placement; or layers are split without one.
    """
    layers = tuple(PlannedLayer(each.name, each.side, plain_reason(each.reason)) for each in placement.layers)
    if scheme is None:
        if placement.split:
            raise SettingError("layers are split without a scheme", got=", ".join(placement.split)[:200])
        return nothing_leaves(layers, tuple(gpu_references))
    _check_lists(scheme, placement)
    return OffloadPlan(
        rank=_planned_rank(scheme.rank),
        iterations=scheme.iterations,
        decomposition=scheme.decomposition,
        residual_dtype=scheme.residual_dtype,
        noise=_planned_noise(scheme.noise),
        integrity=scheme.integrity,
        integrity_vectors=scheme.integrity_vectors,
        layers=layers,
        gpu_references=tuple(gpu_references),
    )


def from_plan(section: OffloadPlan, *, gpu: ProvedGpu | None = None) -> tuple[Asymmetric, Placement]:
    """The settings and the placement that a section froze. The scheme lists both sides, so that nothing is left to a
    default: ``offloaded_layers`` those that run split, ``trusted_layers`` those of which nothing leaves.

    Args:
        gpu: what proves that a GPU counts as inside, for layers that are placed there.

    Raises:
        SettingError: a value that no setting has. AttestationError: such layers, and nothing proves it (U-1).
    """
    refuse_unproved(section, gpu)
    placement = Placement(tuple(Placed(each.name, each.side, each.reason) for each in section.layers))
    scheme = Asymmetric(
        noise=_noise(section.noise),
        rank=_rank(section.rank),
        iterations=section.iterations,
        decomposition=cast(Decomposition, section.decomposition),
        residual_dtype=cast(ResidualDtype, section.residual_dtype),
        trusted_layers=placement.trusted,
        offloaded_layers=placement.split,
        integrity=cast(Integrity, section.integrity),
        integrity_vectors=section.integrity_vectors,
    )
    return scheme, placement


def frozen_scheme(scheme: Asymmetric, placement: Placement) -> Asymmetric:
    """``scheme`` with the layers of ``placement``, as :func:`from_plan` would give it back.

    Raises:
        SettingError: the scheme itself lists layers, and not those of the placement.
    """
    _check_lists(scheme, placement)
    return replace(scheme, trusted_layers=placement.trusted, offloaded_layers=placement.split)


def refuse_unproved(section: OffloadPlan, gpu: ProvedGpu | None) -> None:
    """Return only if ``section`` places nothing on a confidential GPU, or ``gpu`` is one that was proved.

    Raises:
        AttestationError: it does, and nothing proves it (U-1).
    """
    if section.confidential_gpu:
        # Imported for such plans alone: a worker without a GPU loads no verifier.
        from motte.offload.confidential_gpu import require_proved

        require_proved(section.confidential_gpu, gpu, where="offload section")


def plain_reason(text: str) -> str:
    """``text`` as one line of printable ASCII, one space between words, within the bound of a plan's text."""
    words = "".join(char if " " < char <= "~" else " " if char.isspace() else "?" for char in text).split()
    return " ".join(words)[:MAX_REASON_BYTES].rstrip() or "unstated"


def _check_lists(scheme: Asymmetric, placement: Placement) -> None:
    if scheme.offloaded_layers is not None and set(scheme.offloaded_layers) != set(placement.split):
        raise SettingError(
            "the scheme lists other layers to offload than the placement",
            expected=", ".join(placement.split) or "none",
            got=", ".join(scheme.offloaded_layers) or "none",
        )
    both = set(scheme.trusted_layers or ()) & set(placement.split)
    if both:
        raise SettingError("a trusted layer is placed outside", got=", ".join(sorted(both)))


def _planned_rank(rank: Rank) -> PlannedRank:
    match rank:
        case Fixed():
            return PlannedRank("fixed", (rank.rank,))
        case Schedule():
            return PlannedRank("schedule", (rank.start, rank.factor, rank.cap))
        case Energy():
            return PlannedRank("energy", (float(rank.share), rank.cap))
        case Entropy():
            return PlannedRank("entropy", (rank.cap,))


def _rank(planned: PlannedRank) -> Rank:
    numbers = planned.numbers
    try:
        if planned.rule == "energy":
            share, cap = numbers
            return Energy(float(share), _whole(cap))
        whole = [_whole(each) for each in numbers]
        if planned.rule == "schedule":
            return Schedule(*whole)
        return Fixed(*whole) if planned.rule == "fixed" else Entropy(*whole)
    except (TypeError, ValueError) as problem:
        raise SettingError("not a rank rule with its numbers", got=repr(planned)) from problem


def _whole(number: int | float) -> int:
    if type(number) is not int:
        raise ValueError(number)
    return number


def _planned_noise(noise: Gaussian | None) -> PlannedNoise | None:
    if noise is None:
        return None
    given = {"residual": noise.residual, "gradient": noise.gradient, "update": noise.update}
    mechanisms = [(name, given[name]) for name in NOISE_NAMES]
    return PlannedNoise(
        noise.adjacency,
        tuple(
            PlannedMechanism(name, float(each.clip), float(each.noise_multiplier))
            for name, each in mechanisms
            if each is not None
        ),
    )


def _noise(planned: PlannedNoise | None) -> Gaussian | None:
    if planned is None:
        return None
    found = {each.name: Mechanism(each.clip, each.noise_multiplier) for each in planned.mechanisms}
    if "residual" not in found or len(found) != len(planned.mechanisms):
        raise SettingError("noise needs the residual's mechanism, and each once", got=repr(planned)[:200])
    return Gaussian(
        residual=found["residual"],
        gradient=found.get("gradient"),
        update=found.get("update"),
        adjacency=cast(Adjacency, planned.adjacency),
    )
