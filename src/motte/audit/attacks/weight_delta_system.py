"""The linear system that successive weights and output gradients give for a layer's input, and its solution.

A weight gradient is linear in the layer's input. For a convolution and one input channel j

    G[m, j, k] = sum over samples n and positions q of  g[n, m, place(q, k)] * x[n, j, q]

with the same matrix A[(m, k), (n, q)] = g[n, m, place(q, k)] for every j: M * k^2 equations for N * h * w unknowns.
For tokens x (N, T, D) of a linear layer the matrix is g itself: M equations for N * T unknowns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from motte.errors import ResourceError, UnsupportedError
from motte.linear.operation import LinearOperation
from motte.offload.weight_delta_bound import SystemSize, system_size

MAX_SYSTEM_VALUES: Final = 1 << 26
"""Values of one matrix that is built, 512 MiB in float64."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A layer's input as the update explains it.

    Attributes:
        x: of the input's shape, float64.
        rank: how many directions of the unknowns the system determines, the least over the groups.
        size: of the system.
        misfit: share of the update's energy that the solution does not explain: noise, where the system is determined.
    """

    x: Tensor
    rank: int
    size: SystemSize
    misfit: float


def solve_input(operation: LinearOperation, gradient: Tensor, shape: Sequence[int], update: Tensor) -> Solution:
    """The input of least norm whose weight gradient under ``gradient`` explains ``update`` best.

    Directions that noise hides are shrunk as in empirical Bayes: the noise is estimated from what an overdetermined
    system leaves unexplained, the size of the unknowns from what is above it. Without noise that is least squares.

    Args:
        gradient: (N, M, *spatial) or (N, *, M), of the layer's output.
        shape: of the layer's input, (N, C, *spatial) or (N, *, C).
        update: of the weight's shape: the weight gradient, or the part of it that is to be explained.

    Raises:
        UnsupportedError: a transposed convolution. ResourceError: the system is larger than
            :data:`MAX_SYSTEM_VALUES`.
    """
    size = system_size(operation, shape)
    if size.equations * size.unknowns > MAX_SYSTEM_VALUES:
        raise ResourceError(
            "the system is too large to be solved here",
            expected=f"at most {MAX_SYSTEM_VALUES} values",
            got=f"{size.equations} equations for {size.unknowns} unknowns",
            hint="a smaller batch, or a later layer",
        )
    if operation.family == "linear":
        flat = gradient.double().reshape(-1, operation.out_channels)
        found, rank, left = _least_squares(flat.T, update.double())
        return Solution(found.reshape(tuple(shape)), rank, size, left / _energy(update))
    if operation.family != "conv":
        raise UnsupportedError("no system for this operator", got=operation.family)
    inputs = operation.in_channels // operation.groups
    outputs = operation.out_channels // operation.groups
    parts, ranks, missed = [], [], 0.0
    for group in range(operation.groups):
        own = slice(group * outputs, (group + 1) * outputs)
        matrix = design_matrix(operation, gradient[:, own].double(), shape)
        wanted = update[own].double().transpose(0, 1).reshape(inputs, -1).T
        found, rank, left = _least_squares(matrix, wanted)
        parts.append(found.T.reshape(inputs, shape[0], *shape[2:]).transpose(0, 1))
        ranks.append(rank)
        missed += left
    return Solution(torch.cat(parts, 1), min(ranks), size, missed / _energy(update))


def design_matrix(operation: LinearOperation, gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """A (M * k^2, N * h * w) of a convolution, in ``gradient``'s dtype; M, the channels of ``gradient``, slowest.

    ``gradient`` (N, M, *output extents) may hold some of the output channels only.
    """
    spread = _dilated(gradient, operation.stride)
    edges: list[int] = []
    for axis in reversed(range(len(operation.kernel))):
        reach = operation.dilation[axis] * (operation.kernel[axis] - 1)
        before = reach - operation.padding[axis]
        after = shape[2 + axis] + operation.padding[axis] - spread.shape[2 + axis]
        edges += [before, after]
    padded = functional.pad(spread, edges)
    rows = []
    for offset in itertools.product(*map(range, operation.kernel)):
        # Position q of the input met kernel place k at output place q + padding - k * dilation.
        starts = [operation.dilation[axis] * (operation.kernel[axis] - 1 - place) for axis, place in enumerate(offset)]
        window = padded[
            (slice(None), slice(None), *(slice(at, at + shape[2 + axis]) for axis, at in enumerate(starts)))
        ]
        rows.append(window.transpose(0, 1).reshape(gradient.shape[1], -1))
    return torch.stack(rows, 1).reshape(gradient.shape[1] * len(rows), -1)


def _dilated(gradient: Tensor, stride: Sequence[int]) -> Tensor:
    """``gradient`` with stride - 1 zeros between its positions."""
    if all(step == 1 for step in stride):
        return gradient
    extents = [(size - 1) * step + 1 for size, step in zip(gradient.shape[2:], stride, strict=True)]
    spread = gradient.new_zeros(*gradient.shape[:2], *extents)
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = gradient
    return spread


def _least_squares(matrix: Tensor, wanted: Tensor) -> tuple[Tensor, int, float]:
    """Solution (unknowns, C), rank, and the energy that it leaves of ``wanted`` (equations, C). All float64."""
    equations, unknowns = matrix.shape
    tall = unknowns <= equations
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    values, vectors = torch.linalg.eigh(gram)
    # The Gram matrix squares the condition: what is below 1e-13 of its largest value is its own rounding.
    kept = values > 1e-13 * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    values, vectors = values[kept], vectors[:, kept]
    rank = len(values)
    seen = vectors.T @ (matrix.T @ wanted if tall else wanted)
    plain = seen / values.unsqueeze(1) if tall else seen / values.sqrt().unsqueeze(1)
    fitted = (plain * values.sqrt().unsqueeze(1)) if tall else seen
    left = max(float(wanted.square().sum() - fitted.square().sum()), 0.0)
    free = (equations - rank) * wanted.shape[1]
    noise = left / free if free > 0 else 0.0
    # In the basis of singular vectors ``plain`` has variance noise / value around the truth.
    size = max(float(plain.square().sum()) - noise * wanted.shape[1] * float((1 / values).sum()), 0.0)
    prior = size / max(rank * wanted.shape[1], 1)
    shrink = values * prior / (values * prior + noise) if noise > 0 else torch.ones_like(values)
    plain = plain * shrink.unsqueeze(1)
    found = vectors @ plain if tall else matrix.T @ (vectors @ (plain / values.sqrt().unsqueeze(1)))
    return found, rank, left


def _energy(update: Tensor) -> float:
    return max(float(update.double().square().sum()), torch.finfo(torch.float64).tiny)
