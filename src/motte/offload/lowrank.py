"""Linear operators and their weight gradients on the principal part of an activation, without forming it.

A convolution of X_main = left @ right is a convolution of the R maps ``right`` with per-sample weights
W'_n[i, p] = sum_j left[n, j, p] W[i, j], j over the input channels of i's group: R input channels in place of C, and
no groups (AsymML, arXiv 2110.01229). A linear layer on tokens is left @ (right @ W^T).

Forming X_main and running the operator on it is the other way. The one with fewer multiply-adds is taken, so a
depthwise convolution, or one of many channels on few positions, is formed.

The R maps are few, so their columns (R * kernel by positions) are small: copied through a view in one go, a few samples
at a time in the same memory, and one batched matrix product beats a call of the operator for every sample. A transposed
convolution, and columns too many for the memory set below, take the calls. Measured on one busy core of a Xeon at
2.5 GHz without bfloat16 units, 3x3, forward / weight gradient in ms, W' included:

    channels, extent, rank, batch   float32 calls   columns     bfloat16 calls   columns
    64, 112, 8, 4                   22 / 14         11 / 16     30 / 25          25 / 27
    256, 28, 16, 4                  6.4 / 5.6       7.7 / 6.7   15 / 17          15 / 15
    512, 14, 16, 4                  9.8 / 7.5       9.1 / 6.8   21 / 23          20 / 20
    16, 28, 4, 128                  17 / 20         6.6 / 13    20 / 42          11 / 17

At 512 channels the weights W' take most of it, 6 of 9 ms: a matrix product of N * R columns, of which 64 are few. On
few positions multiply-adds say less than the clock (512 channels, 7 x 7, rank 32: 0.7 of the full operator and 1.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from motte.errors import InputError
from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.offload.arithmetic import as_written, computing_dtype
from motte.offload.decompose import Principal
from motte.offload.projection import Geometry, windows

_COLUMNS: Final = 1 << 18
"""Values of columns that are formed at a time: 1 MiB in float32."""
_MOST_COLUMNS: Final = 1 << 22
"""Values of one sample's columns from which the ordinary kernel, which forms none, is taken: 16 MiB in float32."""
_MOST_GRADIENT_COLUMNS: Final = 1 << 19
"""The same of a weight gradient, where columns beyond the cache were slower than the ordinary kernel (14 ms and 12)."""
_GRAM_SLACK: Final = 16
"""Bound on the rounding of a norm that is computed from Gram matrices, in units of eps of their absolute sum."""


@as_written
def forward(operation: LinearOperation, principal: Principal, shape: Sequence[int], weight: Tensor) -> Tensor:
    """The operator's output for X_main, in the factors' dtype (``weight`` is cast to it). No bias.

    Args:
        principal: of the activation with rows = channels and columns = positions (convolutions), or rows = tokens and
            columns = features (linear).
        shape: the activation's full shape, (N, C, *spatial) or (N, *, C).

    Raises:
        InputError: the factors are not those of an activation of this shape. SettingError: the operator does not take
        this shape.
    """
    _fits(operation, principal, shape)
    weight = weight.to(principal.left.dtype)
    output = operation.output_shape(shape)
    if principal.rank == 0 or shape[0] == 0:
        return weight.new_zeros(output)
    rank = principal.rank
    if _forward_formed(operation, shape, rank) < _forward_factored(operation, shape, rank):
        return compute.forward(operation, principal.restore().view(tuple(shape)), weight)
    if operation.family == "linear":
        return torch.bmm(principal.left, principal.right @ weight.t()).view(output)
    narrow = _narrow(operation, rank)
    weights = _sample_weights(operation, principal.left, weight)
    maps = principal.right.view(shape[0], rank, *shape[2:])
    y = weight.new_empty(output)
    if _by_columns(narrow, maps, _MOST_COLUMNS):
        for start, stop, columns in _columns(narrow, maps):
            rows = weights[start:stop].flatten(2)
            torch.bmm(rows, columns, out=y[start:stop].view(stop - start, operation.out_channels, -1))
        return y
    for sample in range(shape[0]):
        y[sample] = compute.forward(narrow, maps[sample : sample + 1], weights[sample])[0]
    return y


@as_written
def weight_gradient(
    operation: LinearOperation,
    principal: Principal,
    shape: Sequence[int],
    gradient: Tensor,
    *,
    clip: float | None = None,
) -> Tensor:
    """Gradient to the weight from X_main and the output's gradient, summed over the batch.

    With ``clip`` the gradient of every sample is scaled to L2 norm at most ``clip`` before it is summed. The norm that
    decides is an upper bound of the one in real arithmetic on what is summed (by ``_GRAM_SLACK`` roundings), so that a
    sensitivity holds.

    Args:
        gradient: (N, M, *spatial) or (N, *, M); cast to the factors' dtype.

    Returns:
        The weight's shape, float32 for bfloat16 factors: as an accelerator answers, and with ``clip`` it is also
        contracted and summed in float32, since a rounding of the sum would add to its sensitivity.

    Raises:
        InputError: shapes that do not belong together, or a clip that is not positive.
    """
    _fits(operation, principal, shape)
    if tuple(gradient.shape) != operation.output_shape(shape):
        expected = str(operation.output_shape(shape))
        raise InputError("gradient of another shape", expected=expected, got=str(tuple(gradient.shape)))
    if clip is not None and not 0 < clip < math.inf:
        raise InputError("a clip is a positive number", got=repr(clip))
    wide = computing_dtype(principal.left.dtype)
    if principal.rank == 0 or shape[0] == 0:
        return gradient.new_zeros(operation.weight_shape, dtype=wide)
    gradient, rank = gradient.to(principal.left.dtype), principal.rank
    formed = _gradient_formed(operation, shape, rank) < _gradient_factored(operation, shape, rank, clip is not None)
    if formed:
        whole = principal.restore().view(tuple(shape))
        if clip is None:
            return compute.weight_gradient(operation, whole, gradient).to(wide)
        return _formed_and_clipped(operation, whole.to(wide), gradient.to(wide), clip)
    outer, inner = _gradient_factors(operation, principal, shape, gradient)
    if clip is not None:
        outer, inner = outer.to(wide), inner.to(wide)
        inner = inner * _scales(outer, inner, clip).to(wide).view(-1, 1, 1, 1)
    return _contract(operation, outer, inner).to(wide)


def forward_multiply_adds(operation: LinearOperation, shape: Sequence[int], rank: int) -> int:
    """Multiply-adds of :func:`forward` for an activation of ``shape`` (with its batch), per-sample weights included."""
    return min(_forward_formed(operation, shape, rank), _forward_factored(operation, shape, rank))


def weight_gradient_multiply_adds(
    operation: LinearOperation, shape: Sequence[int], rank: int, *, clip: bool = False
) -> int:
    """Multiply-adds of :func:`weight_gradient` for an activation of ``shape``, norms for the clip included."""
    return min(_gradient_formed(operation, shape, rank), _gradient_factored(operation, shape, rank, clip))


# --- what each way costs --------------------------------------------------------------------------------------------
def _forward_formed(operation: LinearOperation, shape: Sequence[int], rank: int) -> int:
    return math.prod(shape) * rank + (operation.multiply_adds(shape) if rank else 0)


def _forward_factored(operation: LinearOperation, shape: Sequence[int], rank: int) -> int:
    if operation.family == "linear":
        inner = shape[0] * rank * operation.in_channels * operation.out_channels
        return inner + math.prod(shape[:-1]) * rank * operation.out_channels
    narrow = (shape[0], rank, *shape[2:])
    weights = shape[0] * rank * math.prod(operation.weight_shape)
    return weights + (_narrow(operation, rank).multiply_adds(narrow) if rank else 0)


_gradient_formed = _forward_formed


def _gradient_factored(operation: LinearOperation, shape: Sequence[int], rank: int, clip: bool) -> int:
    # The same products with the roles changed; Gram matrices of the two factors, (N, groups, R, R), for the norms.
    sizes = operation.in_channels + operation.out_channels * math.prod(operation.kernel)
    return _forward_factored(operation, shape, rank) + (shape[0] * rank * rank * sizes if clip else 0)


# --- the products ---------------------------------------------------------------------------------------------------
@lru_cache(maxsize=4096)
def _narrow(operation: LinearOperation, rank: int) -> LinearOperation:
    """The same geometry with ``rank`` input channels and no groups."""
    return LinearOperation(
        operation.family,
        rank,
        operation.out_channels,
        operation.kernel,
        operation.stride,
        operation.padding,
        operation.dilation,
        operation.output_padding,
    )


def _by_columns(narrow: LinearOperation, maps: Tensor, most: int) -> bool:
    return narrow.family == "conv" and _column_values(narrow, maps) <= most


def _column_values(narrow: LinearOperation, maps: Tensor) -> int:
    """Values of one sample's columns."""
    return maps.shape[1] * math.prod(narrow.kernel) * math.prod(narrow.output_shape(maps.shape)[2:])


def _columns(narrow: LinearOperation, maps: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first sample, the one after the last, (samples, R * kernel offsets, positions)); each time in the same memory,
    which stays in the cache, where fresh memory would be cleared page by page first."""
    geometry, extents = Geometry.of(narrow), narrow.output_shape(maps.shape)[2:]
    step = min(len(maps), max(1, _COLUMNS // max(_column_values(narrow, maps), 1)))
    room = maps.new_empty(step, maps.shape[1], *narrow.kernel, *extents)
    for start in range(0, len(maps), step):
        part = maps[start : start + step]
        columns = room[: len(part)].copy_(windows(geometry, part, extents))
        yield start, start + len(part), columns.view(len(part), -1, math.prod(extents))


def _sample_weights(operation: LinearOperation, left: Tensor, weight: Tensor) -> Tensor:
    """W'_n for every sample: (N, M, R, *kernel), or (N, R, M, *kernel) for a transposed convolution."""
    count, _, rank = left.shape
    groups, kernel = operation.groups, operation.kernel
    inputs, outputs = operation.in_channels // groups, operation.out_channels // groups
    # (groups, N * R, inputs) @ (groups, inputs, outputs * kernel): one product for the batch.
    rows = left.view(count, groups, inputs, rank).permute(1, 0, 3, 2).reshape(groups, count * rank, inputs)
    if operation.family == "conv_transpose":
        mixed = torch.bmm(rows, weight.reshape(groups, inputs, -1)).view(groups, count, rank, outputs, -1)
        return mixed.permute(1, 2, 0, 3, 4).reshape(count, rank, groups * outputs, *kernel)
    columns = weight.reshape(groups, outputs, inputs, -1).transpose(2, 3).reshape(groups, -1, inputs)
    mixed = torch.bmm(columns, rows.mT).view(groups, outputs, -1, count, rank)
    return mixed.permute(3, 0, 1, 4, 2).reshape(count, groups * outputs, rank, *kernel)


def _gradient_factors(
    operation: LinearOperation, principal: Principal, shape: Sequence[int], gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of every sample's weight gradient: (N, groups, inputs, R) and (N, groups, R, outputs * kernel).

    Their product over R is that sample's gradient, as (inputs, outputs * kernel) for each group.
    """
    count, rank, groups = shape[0], principal.rank, operation.groups
    if operation.family == "linear":
        rows = gradient.reshape(count, -1, operation.out_channels)
        return principal.right.mT.unsqueeze(1), torch.bmm(principal.left.mT, rows).unsqueeze(1)
    narrow = _narrow(operation, rank)
    maps = principal.right.view(count, rank, *shape[2:])
    # For each sample alone: over the batch the sum would be taken before left has entered.
    if _by_columns(narrow, maps, _MOST_GRADIENT_COLUMNS):
        pieces = [torch.bmm(gradient[n:m].flatten(2), columns.mT) for n, m, columns in _columns(narrow, maps)]
        each = torch.cat(pieces)
    else:
        pieces = [compute.weight_gradient(narrow, maps[n : n + 1], gradient[n : n + 1]) for n in range(count)]
        each = torch.stack(pieces)
    each = each.reshape(count, *narrow.weight_shape[:2], -1)
    if operation.family == "conv":
        each = each.transpose(1, 2)
    outputs = operation.out_channels // groups
    inner = each.reshape(count, rank, groups, -1).transpose(1, 2)
    outer = principal.left.view(count, groups, -1, rank)
    return outer, inner.reshape(count, groups, rank, outputs * math.prod(operation.kernel))


def _scales(outer: Tensor, inner: Tensor, clip: float) -> Tensor:
    """min(1, clip / norm) of every sample's gradient, (N,) float64, from Gram matrices.

    |A B|^2 = sum_pq (A^T A)[p, q] (B B^T)[p, q], for every group.
    """
    # To a scale of its own, so that no square overflows or vanishes.
    top = [each.abs().amax((1, 2, 3), keepdim=True) for each in (outer, inner)]
    safe = [torch.where(each > 0, each, 1) for each in top]
    a, b = outer / safe[0], inner / safe[1]
    products = (a.mT @ a).double() * (b @ b.mT).double()
    slack = _GRAM_SLACK * torch.finfo(outer.dtype).eps
    square = products.sum((1, 2, 3)).clamp_min(0) + slack * products.abs().sum((1, 2, 3))
    norm = square.sqrt() * (safe[0].double() * safe[1].double()).view(-1)
    return torch.where(norm > clip, clip / norm, 1.0)


def _contract(operation: LinearOperation, outer: Tensor, inner: Tensor) -> Tensor:
    """Sum over samples and rank, in the weight's shape: one product for the batch, no sample's gradient in full."""
    count, groups, inputs, rank = outer.shape
    left = outer.permute(1, 2, 0, 3).reshape(groups, inputs, count * rank)
    right = inner.transpose(0, 1).reshape(groups, count * rank, -1)
    total = torch.bmm(left, right)
    if operation.family == "conv_transpose":
        return total.view(operation.weight_shape)
    outputs = operation.out_channels // groups
    return total.view(groups, inputs, outputs, -1).transpose(1, 2).reshape(operation.weight_shape)


def _formed_and_clipped(operation: LinearOperation, x: Tensor, gradient: Tensor, clip: float) -> Tensor:
    total = x.new_zeros(operation.weight_shape)
    for sample in range(x.shape[0]):
        own = compute.weight_gradient(operation, x[sample : sample + 1], gradient[sample : sample + 1])
        norm = own.double().norm().item() * (1 + torch.finfo(x.dtype).eps)
        total.add_(own, alpha=clip / norm if norm > clip else 1.0)
    return total


def _fits(operation: LinearOperation, principal: Principal, shape: Sequence[int]) -> None:
    operation.output_shape(shape)
    linear = operation.family == "linear"
    rows = math.prod(shape[1:-1]) if linear else shape[1]
    cols = shape[-1] if linear else math.prod(shape[2:])
    left, right = tuple(principal.left.shape), tuple(principal.right.shape)
    if left[:2] != (shape[0], rows) or right[::2] != (shape[0], cols) or left[2] != right[1]:
        raise InputError(
            "factors of another activation", expected=f"{shape[0]} of {rows} x {cols}", got=f"{left} and {right}"
        )
