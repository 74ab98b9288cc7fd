"""A lying accelerator: it computes honestly, and gives one product another value on its way back.

It is the real accelerator of :mod:`motte.accelerator.in_process`, real frames and all; only the numbers lie. What is
malformed, late or of another shape is no lie but a broken frame, and stands in the conformance list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import torch
from torch import Tensor

from motte.accelerator.in_process import InProcessAccelerator
from motte.errors import MeasureError
from motte.linear.operation import LinearOperation
from motte.offload.integrity import detectable, forward_tolerance

ABOVE: Final = 1.01
"""Of the magnitude that the check states, so that its bound holds."""
_ROUNDS: Final = 40


class Product(IntEnum):
    """What the accelerator is asked for, in the order of a training step of one layer."""

    OUTPUT = 0
    TO_INPUT = 1
    TO_WEIGHT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What the accelerator knows when it answers.

    Attributes:
        y: the honest product.
        x: what it was sent for the forward pass.
        weight, operation: of the layer.
        before: its honest answer of the same kind and shape one call ago; None: there was none.
        vectors: of the check, which it knows; 0: there is none.
        random: its own coins.
    """

    y: Tensor
    x: Tensor
    weight: Tensor
    operation: LinearOperation
    before: Tensor | None
    vectors: int
    random: torch.Generator


Lie = Callable[[Told], Tensor]


def one_element(told: Told) -> Tensor:
    """One value, somewhere, is off by a twentieth of the largest."""
    y = told.y.clone()
    place = int(torch.randint(y.numel(), (1,), generator=told.random))
    y.view(-1)[place] += 0.05 * y.abs().max()
    return y


def scaled(told: Told) -> Tensor:
    """Everything is 1 % too large."""
    return told.y * 1.01


def signs_flipped(told: Told) -> Tensor:
    """One value in a hundred has the other sign."""
    flip = torch.rand(told.y.shape, generator=told.random) < 0.01
    return torch.where(flip, -told.y, told.y)


def negated(told: Told) -> Tensor:
    """Everything has the other sign."""
    return -told.y


def stale(told: Told) -> Tensor:
    """What was right one call ago."""
    return told.y if told.before is None else told.before


def zeros(told: Told) -> Tensor:
    """No work at all."""
    return torch.zeros_like(told.y)


def channels_shifted(told: Told) -> Tensor:
    """Every channel holds its neighbour's values."""
    return told.y.roll(1, 1 if told.operation.family != "linear" or told.y.dim() < 2 else -1)


LIES: Final[Mapping[str, Lie]] = {
    "one wrong element": one_element,
    "scaled by 1.01": scaled,
    "one sign in a hundred flipped": signs_flipped,
    "negated": negated,
    "stale": stale,
    "zeros": zeros,
    "channels shifted": channels_shifted,
}


def at_the_stated_magnitude(told: Told) -> Tensor:
    """An error at one position, in a random direction over its channels, just above the norm that the check states.

    Raises:
        MeasureError: no such error was found.
    """
    channels = told.operation.out_channels // told.operation.groups
    direction = torch.randn(channels, generator=told.random, dtype=torch.float64)
    direction = (direction / direction.norm()).to(told.y.dtype)
    size = 0.0
    for _ in range(_ROUNDS):
        y = told.y.clone()
        _position(told.operation, y).add_(direction * size)
        limits = forward_tolerance(told.operation, told.x, told.weight, y, vectors=max(1, told.vectors))
        # The check's limit grows with the answer, and the largest of all positions stands above that of this one.
        wanted = ABOVE * float(detectable(limits, channels).max())
        if size >= wanted / ABOVE and size > 0:
            return y
        size = wanted
    raise MeasureError("no error of the stated magnitude was found", got=f"{size:.3g} after {_ROUNDS} rounds")


def _position(operation: LinearOperation, y: Tensor) -> Tensor:
    """A view of the channels of the first group at a position in the middle of the first sample."""
    channels = operation.out_channels // operation.groups
    if operation.family == "linear":
        rows = y.view(-1, y.shape[-1])
        return rows[len(rows) // 2][:channels]
    maps = y[0].flatten(1)
    return maps[:channels, maps.shape[1] // 2]


def added(error: Tensor) -> Lie:
    """The honest answer plus one error for all samples, of ``error``'s shape (M, *spatial), or (M) for tokens."""

    def lie(told: Told) -> Tensor:
        return told.y + error.to(told.y.dtype)

    return lie


def average_norm(y: Tensor) -> float:
    """Root mean square over samples of the L2 norm of (N, ...)."""
    return math.sqrt(float(y.double().square().sum()) / max(1, len(y)))


class Liar(InProcessAccelerator):
    """Honest, but for one product of one layer while :attr:`lie` is set.

    Args:
        layer: of which it lies.
        product: which of its answers.
        vectors: of the check that it faces; 0: none.
        seed: of its coins.
    """

    def __init__(self, layer: str, product: Product, *, vectors: int, seed: int) -> None:
        self.layer, self.product, self.vectors = layer, product, vectors
        self.lie: Lie | None = None
        self.told = 0
        self._random = torch.Generator().manual_seed(seed)
        self._given = 0
        self._sent: Tensor | None = None
        self._weight: Tensor | None = None
        self._operation: LinearOperation | None = None
        self._before: dict[tuple[int, ...], Tensor] = {}
        super().__init__()

    def register(self, layer: str, operation: LinearOperation) -> int:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        if layer == self.layer:
            self._operation = operation
        return super().register(layer, operation)

    def put_weight(self, layer: str, weight: Tensor) -> None:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        if layer == self.layer:
            self._weight = weight.detach().clone()
        super().put_weight(layer, weight)

    def forward(self, layer: str, x: Tensor, *, step: int, hold: bool) -> Any:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        if layer == self.layer:
            self._sent, self._given = x.detach().clone(), 0
        return super().forward(layer, x, step=step, hold=hold)

    def answer(self, layer: str, y: Tensor) -> Tensor:
        """The lie, where it is this layer's turn."""
        if layer != self.layer:
            return y
        given, self._given = self._given, self._given + 1
        if given != self.product:
            return y
        before = self._before.get(tuple(y.shape))
        self._before[tuple(y.shape)] = y.clone()
        if self.lie is None or self._sent is None or self._weight is None or self._operation is None:
            return y
        self.told += 1
        return self.lie(Told(y, self._sent, self._weight, self._operation, before, self.vectors, self._random))
