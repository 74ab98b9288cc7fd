"""How one module's product is computed: split, or on one half of its input only (the research modes)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from motte.linear.operation import LinearOperation
from motte.offload.decompose import decompose, residual
from motte.offload.function import split_product
from motte.offload.noise import Noise
from motte.offload.settings import LowRank, Residual
from motte.offload.split_layer import DTYPES, SplitLayer

Inside = Callable[[Tensor, Tensor], Tensor]
"""The plain product of (x, weight), without bias."""


class Rule(Protocol):
    """Computes the products of one module."""

    def product(self, x: Tensor, weight: Tensor, inside: Inside) -> Tensor:
        """The product without bias; ``x`` has its batch dimension, ``inside`` is the plain way."""
        ...


class Guard:
    """Watches one forward pass of the root module: which storages are raw inputs, how many samples, what ran."""

    def __init__(self) -> None:
        self.batch: int | None = None
        self.last_ran: tuple[str, bool] | None = None
        self._raw: frozenset[int] = frozenset()

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """The root module was called with ``inputs``."""
        self._raw = frozenset(each.untyped_storage().data_ptr() for each in inputs)
        self.batch = inputs[0].shape[0] if inputs and inputs[0].dim() else None
        self.last_ran = None

    def ran(self, layer: str, *, split: bool) -> None:
        """A convolution, linear or embedding layer ran."""
        self.last_ran = (layer, split)

    def is_raw(self, x: Tensor) -> bool:
        """Whether ``x`` shares memory with an input of the root module, or no layer ran before it."""
        return self.last_ran is None or x.untyped_storage().data_ptr() in self._raw


@dataclass(slots=True)
class SplitRule:
    """The product runs split, where this call can be.

    ``may_see_raw`` = the user named the layer: then it is split even where it meets the model's raw input.
    ``inside_because`` says why the latest call stayed inside, None if it was split.
    """

    layer: SplitLayer
    guard: Guard
    may_see_raw: bool
    inside_because: str | None = None

    def product(self, x: Tensor, weight: Tensor, inside: Inside) -> Tensor:
        """See :class:`Rule`."""
        self.inside_because = self._reason(x)
        split = self.inside_because is None
        cautions = self.layer.session.cautions
        if split and cautions is not None and self.guard.is_raw(x):
            cautions.met_input(self.layer.name)
        self.guard.ran(self.layer.name, split=split)
        return split_product(self.layer, x.contiguous(), weight) if split else inside(x, weight)

    def _reason(self, x: Tensor) -> str | None:
        if x.dtype not in DTYPES:
            return f"{x.dtype} is not split"
        if x.device.type != "cpu":
            return "the tensor is not in trusted memory"
        if is_vector(self.layer.operation, x.shape):
            return "one vector per sample has nothing to decompose"
        if not self.may_see_raw and self.guard.is_raw(x):
            return "it meets the raw input"
        if self.layer.session.scheme.noise is not None and x.shape[0] != self.guard.batch:
            return "its dimension 0 is not the batch, so nothing can be clipped per sample"
        return None


class ResearchBooks:
    """The noise key and the step counter of a model in a research mode."""

    def __init__(self) -> None:
        self.noise = Noise.fresh()
        self.step = 0

    def begin_step(self) -> None:
        """A new forward pass of the root module begins."""
        self.step += 1


@dataclass(frozen=True, slots=True)
class HalfRule:
    """The product sees the principal part only, or the perturbed residual only; the gradient passes straight through
    the decomposition, as it does in the split product. Nothing leaves."""

    scheme: LowRank | Residual
    operation: LinearOperation
    name: str
    position: int
    books: ResearchBooks

    def product(self, x: Tensor, weight: Tensor, inside: Inside) -> Tensor:
        """See :class:`Rule`."""
        if x.shape[0] == 0 or is_vector(self.operation, x.shape):
            return inside(x, weight)
        with torch.no_grad():
            change = self._half(x) - x
        return inside(x + change, weight)

    def _half(self, x: Tensor) -> Tensor:
        scheme = self.scheme
        matrix = x.flatten(1, -2) if self.operation.family == "linear" else x.flatten(2)
        principal = decompose(
            matrix, scheme.rank, position=self.position, iterations=scheme.iterations, method=scheme.decomposition
        )
        if isinstance(scheme, LowRank):
            return (principal.left @ principal.right).reshape(x.shape)
        half = residual(matrix, principal)
        if scheme.noise is not None:
            half = self.books.noise.privatise(
                half, scheme.noise.residual, layer=self.name, kind="residual", step=self.books.step
            ).tensor
        return half.reshape(x.shape)


def is_vector(operation: LinearOperation, shape: Sequence[int]) -> bool:
    """Whether an input of ``shape`` is one vector per sample, which has nothing to decompose."""
    return math.prod(shape[1:-1] if operation.family == "linear" else shape[2:]) <= 1
