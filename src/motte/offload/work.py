"""How much of a model's arithmetic is left inside, what crosses, and the bound that this puts on any speed-up.

Counted in multiply-adds, from shapes alone, in two ways:

(a) as published (AsymML, section 3.4): low-rank products, and everything that stays inside, whole;
(b) with what (a) leaves out: decomposition, the weights that each sample needs for its principal channels, and the
    checks of integrity.

Element-wise work (noise, clipping, sums, norms, activations, pooling) is no multiply-add and is not counted. An
accelerator that takes no time at all, over a link that takes none, would leave ``1 / share inside`` as speed-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from motte.linear.operation import LinearOperation
from motte.offload.decompose import decompose_multiply_adds, entropy_multiply_adds
from motte.offload.integrity import (
    check_forward_multiply_adds,
    check_input_gradient_multiply_adds,
    check_weight_gradient_multiply_adds,
)
from motte.offload.layers import Inputs, LinearLayer, Trace, trace
from motte.offload.lowrank import forward_multiply_adds, weight_gradient_multiply_adds
from motte.offload.placement import Placement, most_rank, planned_rank
from motte.offload.settings import Asymmetric, Energy, Entropy

if TYPE_CHECKING:
    from motte.plan.offload import Side

Pass = Literal["forward", "backward", "training"]
"""``training`` is both passes of one step."""


@dataclass(frozen=True, slots=True)
class Inside:
    """Multiply-adds of one layer in one pass on the trusted side.

    Attributes:
        product: the low-rank product, or the whole one of a layer that stays inside. All that (a) counts.
        decomposition: of the activation, the residual formed.
        per_sample: each sample's own weights for its principal channels, W'[i, p] = sum over j of a[j, p] W[i, j], or
            what it takes in their place; backward the way back to the one weight, and the norms for its clip.
        integrity: checks of the accelerator's answers.
    """

    product: int = 0
    decomposition: int = 0
    per_sample: int = 0
    integrity: int = 0

    @property
    def total(self) -> int:
        """All of it: what (b) counts."""
        return self.product + self.decomposition + self.per_sample + self.integrity

    def __add__(self, other: Inside) -> Inside:
        return Inside(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Inside)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of tensors that cross for one layer in one training step; the first two also for inference."""

    forward_out: int = 0
    """The perturbed residual."""
    forward_in: int = 0
    """The product of it."""
    backward_out: int = 0
    """The output gradient."""
    backward_in: int = 0
    """The gradients to the input and to the weight."""
    weight_out: int = 0
    """The weight: once for inference, in training after every step that changed it."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Traffic)))


@dataclass(frozen=True, slots=True)
class WorkRow:
    """One layer. ``whole_*`` are its multiply-adds in the plain model, ``outside_*`` those of the accelerator.

    ``rank`` is None for a layer inside; ``rank_is_bound`` = the rule looks at the data, and this is the most it gives.
    """

    name: str
    side: Side
    reason: str
    rank: int | None
    rank_is_bound: bool
    whole_forward: int
    whole_backward: int
    forward: Inside
    backward: Inside
    outside_forward: int
    outside_backward: int
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class WorkTable:
    """All layers in order of registration, and the products elsewhere in the model, which stay inside whole."""

    rows: tuple[WorkRow, ...]
    elsewhere_forward: int
    elsewhere_backward: int
    batch: int

    def whole(self, which: Pass) -> int:
        """Multiply-adds of the plain model."""
        forward = self.elsewhere_forward + sum(row.whole_forward for row in self.rows)
        backward = self.elsewhere_backward + sum(row.whole_backward for row in self.rows)
        return {"forward": forward, "backward": backward, "training": forward + backward}[which]

    def inside(self, which: Pass) -> Inside:
        """What is left on the trusted side."""
        forward = sum((row.forward for row in self.rows), Inside(product=self.elsewhere_forward))
        backward = sum((row.backward for row in self.rows), Inside(product=self.elsewhere_backward))
        return {"forward": forward, "backward": backward, "training": forward + backward}[which]

    def share(self, which: Pass, *, published: bool) -> float:
        """The share of the plain model's multiply-adds that is left inside: count (a) if ``published``, else (b)."""
        whole, inside = self.whole(which), self.inside(which)
        return (inside.product if published else inside.total) / whole if whole else 1.0

    def bound(self, which: Pass, *, published: bool) -> float:
        """No speed-up over everything inside can be above this, whatever accelerator and link."""
        share = self.share(which, published=published)
        return 1.0 / share if share else math.inf

    @property
    def traffic(self) -> Traffic:
        """Bytes that cross in one step, all layers."""
        return sum((row.traffic for row in self.rows), Traffic())


def work(
    model: nn.Module | Trace,
    inputs: Inputs | None,
    scheme: Asymmetric,
    placement: Placement,
    *,
    keywords: Mapping[str, Tensor] | None = None,
) -> WorkTable:
    """Count the work of ``model`` for one batch.

    Args:
        model: or a trace of it, to which ``inputs`` is None.
        inputs: shape with the batch in front, or tensors; see :func:`motte.offload.layers.trace`.
        placement: of every linear layer of the model.

    Raises:
        UnsupportedError: the model does not run on shapes alone.
        SettingError: the placement does not have a layer of the model.
    """
    seen = model if isinstance(model, Trace) else trace(model, () if inputs is None else inputs, keywords)
    positions = {name: index for index, name in enumerate(placement.split)}
    rows = tuple(_row(layer, scheme, placement, positions) for layer in seen.layers)
    return WorkTable(rows, seen.elsewhere, 2 * seen.elsewhere, seen.batch)


def _row(layer: LinearLayer, scheme: Asymmetric, placement: Placement, positions: Mapping[str, int]) -> WorkRow:
    placed, operation = placement[layer.name], layer.operation
    whole = layer.multiply_adds
    passes = int(layer.input_gradient) + int(layer.weight_gradient)
    if placed.side != "split" or operation is None:
        inside = (Inside(product=whole), Inside(product=passes * whole))
        return WorkRow(
            layer.name, "inside", placed.reason, None, False, whole, passes * whole, *inside, 0, 0, Traffic()
        )
    forward, backward, traffic, rank = Inside(), Inside(), Traffic(), 0
    for shape in layer.shapes:
        rank = planned_rank(scheme.rank, positions[layer.name], most_rank(operation, shape))
        forward += _forward(operation, shape, rank, scheme)
        backward += _backward(operation, shape, rank, scheme, layer)
        traffic += _traffic(operation, shape, scheme, layer)
    traffic += Traffic(weight_out=math.prod(layer.weight) * layer.element_bytes)
    return WorkRow(
        name=layer.name,
        side="split",
        reason=placed.reason,
        rank=rank,
        rank_is_bound=isinstance(scheme.rank, Energy | Entropy),
        whole_forward=whole,
        whole_backward=passes * whole,
        forward=forward,
        backward=backward,
        outside_forward=whole,
        outside_backward=passes * whole,
        traffic=traffic,
    )


# --- one layer ------------------------------------------------------------------------------------------------------
def _forward(operation: LinearOperation, shape: Sequence[int], rank: int, scheme: Asymmetric) -> Inside:
    rows, cols = _matrix(operation, shape)
    one = decompose_multiply_adds(rows, cols, rank, scheme.iterations, scheme.decomposition)
    if isinstance(scheme.rank, Entropy):
        one += entropy_multiply_adds(rows, cols)
    product, vectors = _low_rank(operation, shape, rank), _vectors(scheme)
    return Inside(
        product=product,
        decomposition=shape[0] * one,
        per_sample=forward_multiply_adds(operation, shape, rank) - product,
        integrity=check_forward_multiply_adds(operation, shape, vectors) if vectors else 0,
    )


def _backward(
    operation: LinearOperation, shape: Sequence[int], rank: int, scheme: Asymmetric, layer: LinearLayer
) -> Inside:
    checks, vectors = 0, _vectors(scheme)
    if layer.input_gradient and vectors:
        checks += check_input_gradient_multiply_adds(operation, shape, vectors)
    if layer.weight_gradient and vectors:
        checks += check_weight_gradient_multiply_adds(operation, shape, vectors)
    product = whole = 0
    if layer.weight_gradient:
        clip = scheme.noise is not None and scheme.noise.update is not None
        product = _low_rank(operation, shape, rank)
        whole = weight_gradient_multiply_adds(operation, shape, rank, clip=clip)
    return Inside(product=product, per_sample=whole - product, integrity=checks)


def _traffic(operation: LinearOperation, shape: Sequence[int], scheme: Asymmetric, layer: LinearLayer) -> Traffic:
    wire = {"same": layer.element_bytes, "float32": 4, "bfloat16": 2}[scheme.residual_dtype]
    made = math.prod(operation.output_shape(shape))
    # bfloat16 is answered in float32.
    gradients = int(layer.input_gradient) * math.prod(shape) + int(layer.weight_gradient) * math.prod(layer.weight)
    return Traffic(
        forward_out=math.prod(shape) * wire,
        forward_in=made * max(wire, 4),
        backward_out=made * layer.element_bytes if gradients else 0,
        backward_in=gradients * max(layer.element_bytes, 4),
    )


def _vectors(scheme: Asymmetric) -> int:
    return 0 if scheme.integrity == "off" else scheme.integrity_vectors


def _matrix(operation: LinearOperation, shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of one sample's matrix."""
    if operation.family == "linear":
        return math.prod(shape[1:-1]), operation.in_channels
    return operation.in_channels, math.prod(shape[2:])


def _places(operation: LinearOperation, shape: Sequence[int]) -> int:
    """How often a sample meets every weight: output positions (input ones of a transposed convolution), tokens."""
    if operation.family == "linear":
        return math.prod(shape[1:-1])
    return math.prod(shape[2:] if operation.family == "conv_transpose" else operation.output_shape(shape)[2:])


def _low_rank(operation: LinearOperation, shape: Sequence[int], rank: int) -> int:
    """rank input channels to all output channels; the same for the gradient to the weight."""
    kernel = math.prod(operation.kernel)
    return shape[0] * rank * operation.out_channels * kernel * _places(operation, shape)
