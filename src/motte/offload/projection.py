"""Random projections of a linear operator to a few channels, and the operator on those few channels, quickly.

A convolution with two output channels wastes most of a convolution kernel (which works on blocks of 16). Here it is one
matrix product, (few * kernel) x channels by channels x positions, and one shifted addition per kernel offset: measured
on one core of a Xeon, float32, batch 4, 3x3, two channels, 64 at 112 px: 6 ms against 22; 256 at 28 px: 1.2 against
4.5.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from motte.linear import compute
from motte.linear.operation import LinearOperation

GRID: Final = 2.0**-23
"""Half the distance between neighbouring values of a random coefficient."""
SPREAD: Final = 3**-0.5
"""Standard deviation of a random coefficient."""
_WASTE: Final = 8
"""Positions computed per position used, from which the ordinary kernel is the faster one (large strides)."""
_BLOCK: Final = 1 << 18
"""Values that are squared at a time, 1 MiB in float32; up to four times as many where a sample is that large."""
_MOST_OFFSETS: Final = 128
"""Kernel offsets that are added one by one; larger kernels take the ordinary way."""
_FEW_PRODUCTS: Final = 1 << 20
"""Multiply-adds up to which the ordinary kernel is the faster one, since it is one call: 3x3, two channels, 16 at 28 px
120 us against 464, batch 8 500 against 588; 64 at 14 px, batch 32 (7 million) 1273 against 786."""


def draw(vectors: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Random coefficients (vectors, channels), independent and uniform on the odd multiples of ``GRID`` in (-1, 1).

    From the operating system's generator, never from torch's: whoever knew them before answering could choose an error
    that they do not see. Exact in float32, and never 0.
    """
    count = vectors * channels
    words = torch.frombuffer(bytearray(os.urandom(4 * count)), dtype=torch.int32) & ((1 << 23) - 1)
    return ((2 * words + 1).to(torch.float64) * GRID - 1).view(vectors, channels).to(dtype)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Extents of an operator's kernel; a linear layer is a convolution of extent 1 over its tokens."""

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @staticmethod
    def of(operation: LinearOperation) -> Geometry:
        """The operator's own."""
        if operation.family == "linear":
            return Geometry(1, (1,), (1,), (0,), (1,))
        return Geometry(operation.groups, operation.kernel, operation.stride, operation.padding, operation.dilation)

    @property
    def offsets(self) -> int:
        """Number of kernel offsets."""
        return math.prod(self.kernel)

    def pairs(
        self, small: Sequence[int], large: Sequence[int]
    ) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """For every kernel offset: its number, and the positions i of the ``small`` and i * stride + offset of the
        ``large`` map that meet. The large map is a convolution's input and a transposed convolution's output."""
        for number, taps in enumerate(itertools.product(*map(range, self.kernel))):
            inner, outer = [], []
            for axis, tap in enumerate(taps):
                step = self.stride[axis]
                shift = tap * self.dilation[axis] - self.padding[axis]
                first = max(0, -(shift // step))
                last = min(small[axis] - 1, (large[axis] - 1 - shift) // step)
                if last < first:
                    break
                inner.append(slice(first, last + 1))
                outer.append(slice(first * step + shift, last * step + shift + 1, step))
            else:
                yield number, tuple(inner), tuple(outer)


class Room:
    """One piece of memory that block after block is computed in: the system clears fresh memory page by page, which
    takes longer than the squares that are put there, and what was just used is in the cache. For one thread."""

    def __init__(self) -> None:
        self._flat: dict[torch.dtype, Tensor] = {}

    def of(self, like: Tensor, *shape: int) -> Tensor:
        """Contiguous, of ``shape`` or else that of ``like``, in its dtype; what was there before is overwritten."""
        wanted = shape or tuple(like.shape)
        count, flat = math.prod(wanted), self._flat.get(like.dtype)
        if flat is None or flat.numel() < count:
            flat = self._flat[like.dtype] = like.new_empty(count)
        return flat[:count].view(wanted)


def mix(coefficients: Tensor, maps: Tensor) -> Tensor:
    """Linear combinations of channels: (few, D) and (B, G, D, L) -> (B, G, few, L)."""
    batch, groups, channels, positions = maps.shape
    flat = maps.reshape(batch * groups, channels, positions)
    return torch.bmm(coefficients.expand(len(flat), -1, -1), flat).view(batch, groups, -1, positions)


def few_channels(
    geometry: Geometry,
    maps: Tensor,
    weight: Tensor,
    extents: Sequence[int],
    *,
    gathers: bool,
    room: Room | None = None,
) -> Tensor:
    """A (transposed) convolution with few output channels.

    Args:
        maps: (B, G * D, *spatial).
        weight: (G, few, D, offsets).
        extents: spatial extents of the result.
        gathers: a convolution, whose input is the large map; otherwise a transposed one, whose output is.
        room: to compute in.

    Returns:
        (B, G, few, positions).
    """
    groups, few, channels, offsets = weight.shape
    batch, spatial = maps.shape[0], tuple(maps.shape[2:])
    wasted = gathers and math.prod(spatial) > _WASTE * math.prod(extents)
    quick = offsets > 1 and batch * weight.numel() * math.prod(extents) <= _FEW_PRODUCTS
    if offsets > _MOST_OFFSETS or wasted or quick:
        return _ordinary(geometry, maps, weight, extents, gathers).reshape(batch, groups, few, -1)
    flat = maps.reshape(batch * groups, channels, -1)
    left = weight.permute(0, 3, 1, 2).reshape(groups, offsets * few, channels).repeat(batch, 1, 1)
    if offsets == 1 and spatial == tuple(extents):
        return torch.bmm(left, flat).view(batch, groups, few, -1)
    into = (room or Room()).of(flat, batch * groups, offsets * few, flat.shape[2])
    each = torch.bmm(left, flat, out=into).view(batch, groups, offsets, few, *spatial)
    total = maps.new_zeros(batch, groups, few, *extents)
    small, large = (extents, spatial) if gathers else (spatial, extents)
    for number, inner, outer in geometry.pairs(small, large):
        source, target = (outer, inner) if gathers else (inner, outer)
        _window(total, target).add_(_window(each[:, :, number], source))
    return total.view(batch, groups, few, -1)


def windows(geometry: Geometry, maps: Tensor, extents: Sequence[int]) -> Tensor:
    """What each kernel offset of a convolution meets: (B, C, *spatial) -> a view (B, C, *kernel, *extents).

    Of a padded copy where the operator pads. Copied from here in one go, columns are there in a third of the time that
    ``torch.nn.functional.unfold`` takes.
    """
    padded = []
    for axis, size in enumerate(maps.shape[2:]):
        reach = (extents[axis] - 1) * geometry.stride[axis] + (geometry.kernel[axis] - 1) * geometry.dilation[axis] + 1
        before = geometry.padding[axis]
        padded.append((before, max(0, reach - size - before)))
    if any(any(each) for each in padded):
        maps = functional.pad(maps, [amount for pair in reversed(padded) for amount in pair])
    space = maps.stride()[2:]
    taps = [step * wide for step, wide in zip(space, geometry.dilation, strict=True)]
    moves = [step * stride for step, stride in zip(space, geometry.stride, strict=True)]
    shape = (*maps.shape[:2], *geometry.kernel, *extents)
    return maps.as_strided(shape, (*maps.stride()[:2], *taps, *moves))


def spread_maps(
    geometry: Geometry, few: Tensor, spatial: Sequence[int], extents: Sequence[int], *, gathers: bool
) -> Tensor:
    """What a weight gradient multiplies: for every kernel offset ``few`` moved to where its partner's positions are.

    Args:
        few: (B, G, few, positions) over ``spatial``.
        extents: of the partner.
        gathers: whether ``few`` lies on the large map.

    Returns:
        (B, G, few * offsets, positions of the partner).
    """
    batch, groups, count, _ = few.shape
    if gathers:
        every = windows(geometry, few.reshape(batch, groups * count, *spatial), extents)
        return every.reshape(batch, groups, count * geometry.offsets, math.prod(extents))
    maps = few.view(batch, groups, count, *spatial)
    out = few.new_zeros(batch, groups, count, geometry.offsets, *extents)
    for number, inner, outer in geometry.pairs(spatial, extents):
        _window(out[:, :, :, number], outer).copy_(_window(maps, inner))
    return out.view(batch, groups, count * geometry.offsets, -1)


@dataclass(frozen=True, slots=True)
class ChannelWeights:
    """Weights of squares, one for each channel: ``rows`` (G, D), float64, divided by the largest, which is ``top``.

    ``quick``: whether float32 keeps them.
    """

    rows: Tensor
    top: Tensor
    quick: bool

    @staticmethod
    def of(weights: Tensor) -> ChannelWeights:
        """Of (G, D), at least 0."""
        rows = weights.double()
        top = rows.amax().clamp_min(torch.finfo(torch.float64).tiny) if rows.numel() else rows.new_ones(())
        rows = rows / top
        return ChannelWeights(rows, top, bool(((rows > 1e-15) | (rows == 0)).all()))


def energies(maps: Tensor, weights: ChannelWeights | None = None, room: Room | None = None) -> Tensor:
    """sum_d weights[g, d] * maps[b, g, d, l]^2: (B, G, D, L) -> (B, G, L), float64, for channels, samples and tokens of
    any scale: in float32 first, and in float64 where a result says that squares may have overflowed or vanished."""
    rows = None if weights is None else weights.rows
    if maps.dtype is not torch.float32 or not (weights is None or weights.quick):
        total = _squares(maps, rows, torch.float64, None)
    else:
        quick = _squares(maps, rows, torch.float32, room)
        total = quick.double()
        if quick.numel() and not _all_in_range(quick):
            # Positions where every channel is zero (after a ReLU) come here too: those alone once more.
            again = ~_in_range(quick)
            if 4 * int(again.sum()) > again.numel():
                total = _squares(maps, rows, torch.float64, None)
            else:
                sample, group, position = again.nonzero(as_tuple=True)
                squares = maps[sample, group, :, position].double().square_()
                total[again] = squares.sum(1) if rows is None else (squares * rows[group]).sum(1)
    return total if weights is None else total.mul_(weights.top)


def fourth_powers(maps: Tensor, room: Room | None = None) -> Tensor:
    """sum over samples and positions of maps^4: (B, G, D, L) -> (G, D), float64, for channels of any scale."""
    total, room = torch.zeros(maps.shape[1:3], dtype=torch.float64), room or Room()
    if maps.dtype is torch.float32:
        tokens = _by_tokens(maps)
        for _, _, channel, part in _blocks(maps):
            squares = torch.mul(part, part, out=room.of(part))
            if tokens:
                flat = squares.mul_(squares).flatten(0, 1)
                sums = torch.bmm(flat.new_ones(1, 1, flat.shape[1]).expand(len(flat), -1, -1), flat)
                total += sums.view(*part.shape[:2], -1).sum(0, dtype=torch.float64)
            else:
                norms: Tensor = torch.linalg.vector_norm(squares, dim=3)
                total[:, channel : channel + part.shape[2]] += norms.double().square_().sum(0)
    again = ~_in_range(total)
    if bool(again.any()):
        total[again] = maps.permute(1, 2, 0, 3)[again].double().square_().square_().sum((1, 2))
    return total


def _squares(maps: Tensor, rows: Tensor | None, dtype: torch.dtype, room: Room | None) -> Tensor:
    """:func:`energies` in ``dtype``."""
    batch, groups, channels, positions = maps.shape
    room, tokens = room or Room(), _by_tokens(maps)
    if maps.numel() <= _BLOCK and not tokens:
        # All in one block: the calls take longer than what they compute.
        squares = torch.mul(maps, maps, out=room.of(maps)) if maps.dtype is dtype else maps.to(dtype).square_()
        return squares.sum(2) if rows is None else torch.matmul(rows.to(dtype).unsqueeze(1), squares).squeeze(2)
    total = maps.new_zeros(batch, groups, positions, dtype=dtype)
    weights = maps.new_ones(groups, channels, dtype=dtype) if rows is None else rows.to(dtype)
    roots = None if rows is None else rows.sqrt().to(dtype).unsqueeze(1)
    for sample, position, channel, part in _blocks(maps):
        wide = part.to(dtype)
        if tokens:
            # Contiguous rows: twice as fast as squares and a matrix of one column.
            scaled = wide if roots is None else torch.mul(wide, roots, out=room.of(wide))
            norms: Tensor = torch.linalg.vector_norm(scaled, dim=3)
            sums = norms.square_()
        else:
            squares = torch.mul(wide, wide, out=room.of(wide)).flatten(0, 1)
            along = weights[:, channel : channel + part.shape[2]].repeat(len(part), 1).unsqueeze(1)
            sums = torch.bmm(along, squares).view(len(part), groups, -1)
        total[sample : sample + len(part), :, position : position + sums.shape[2]] += sums
    return total


def _by_tokens(maps: Tensor) -> bool:
    """Whether tokens lie one after the other, (B, G, L, D) in memory; maps lie channel after channel."""
    return maps.stride(3) > maps.stride(2)


def _blocks(maps: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """(B, G, D, L) in blocks: first sample, position and channel, and the block in the order of its memory,
    (b, G, d, L) or (b, G, l, D). Whole samples where they are small enough, since those are contiguous."""
    batch, groups, channels, positions = maps.shape
    tokens, one = _by_tokens(maps), groups * channels * positions
    samples = max(1, 2 * _BLOCK // max(one, 1))
    extent, across = (positions, groups * channels) if tokens else (channels, groups * positions)
    step = max(1, extent if one <= 4 * _BLOCK else _BLOCK // max(across, 1))
    for sample in range(0, batch, samples):
        for start in range(0, extent, step):
            part = maps[sample : sample + samples].narrow(3 if tokens else 2, start, min(step, extent - start))
            yield sample, start if tokens else 0, 0 if tokens else start, part.transpose(2, 3) if tokens else part


def _in_range(sums: Tensor) -> Tensor:
    """Whether sums of float32 squares or fourth powers are what they should be: what vanished below the smallest number
    is far less, and nothing overflowed."""
    return (sums > 1e-30) & (sums < 1e37)


def _all_in_range(sums: Tensor) -> bool:
    low, high = sums.aminmax()
    return float(low) > 1e-30 and float(high) < 1e37


def _window(maps: Tensor, positions: Sequence[slice]) -> Tensor:
    for axis, part in enumerate(positions, maps.ndim - len(positions)):
        maps = maps[(slice(None),) * axis + (part,)]
    return maps


def _ordinary(geometry: Geometry, maps: Tensor, weight: Tensor, extents: Sequence[int], gathers: bool) -> Tensor:
    groups, few, channels, _ = weight.shape
    kernel = weight.view(groups, few, channels, *geometry.kernel)
    none = (0,) * len(geometry.kernel)
    if gathers:
        family, extra, arranged = "conv", none, kernel.flatten(0, 1)
    else:
        reach = zip(maps.shape[2:], geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
        least = [(size - 1) * step - 2 * pad + wide * (taps - 1) + 1 for size, taps, step, pad, wide in reach]
        extra = tuple(want - have for want, have in zip(extents, least, strict=True))
        family, arranged = "conv_transpose", kernel.transpose(1, 2).flatten(0, 1)
    operation = LinearOperation(
        "conv" if family == "conv" else "conv_transpose",
        groups * channels,
        groups * few,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        extra,
        groups,
    )
    return compute.forward(operation, maps, arranged.contiguous())
