"""Clipping and Gaussian noise for what leaves: derived from a key, on a grid, fast.

**Derived.** The noise of a release is a function of the noise key and of (layer, kind, step, mechanism, shape, dtype,
the clean bytes after clipping). The same call gives the same bytes, so a retry or a resumed step sends what was sent
before, and averaging retries gains nothing. Any difference gives noise that is independent of all others, and then it
is another release and has to be counted (:attr:`Released.release_id`). The construction, with its sources, is in
:mod:`motte.seal.keystream`. Noise from a cipher instead of true randomness makes the guarantee computational:
Mironov, Pandey, Reingold, Vadhan, "Computational Differential Privacy" (CRYPTO 2009).

**On a grid.** Adding a floating-point Gaussian to a floating-point value leaks through the low bits: which sums can
come out depends on the value (Mironov, "On Significance of the Least Significant Bits For Differential Privacy",
CCS 2012). Here the clipped value is cut down to a multiple of a step, the noise is rounded to a multiple of the same
step, and both are added as exact integers. So which numbers can leave does not depend on the data, and the release is
what the ideal mechanism would give on the cut value, rounded to the grid: post-processing. Cutting towards zero makes
no norm larger. The step is a power of two that depends on the mechanism alone.

**What remains of floating point.** The Gaussian itself is computed in float32 (:mod:`motte.offload.gaussians`): it
ends at 9.35 sigma, which a true pair exceeds with probability 2^-63, and logarithm, sine and cosine are right to a few
units of 2^-24. The probability of a grid point is therefore only close to that of a rounded Gaussian; the sum of these
deviations over the millions of values of a release is not bounded here. The sum of an update is computed in floating
point before it comes here, with a rounding error that no clip bounds (Casacuberta, Shoemate, Vadhan, Wagaman,
"Widespread Underestimation of Sensitivity in Differentially Private Libraries", CCS 2022). An epsilon of this project
is that of the ideal mechanism.

**Reproducible** on one machine and build, for any number of threads. Another processor may round a logarithm
differently: some values of a retry then move by one step. That tells nothing about the data.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import torch
from torch import Tensor

from motte.errors import InputError, SettingError
from motte.limits import MAX_NAME_BYTES
from motte.offload.gaussians import CHUNK, REACH, SPREAD, Gaussians
from motte.offload.settings import Mechanism
from motte.seal.keystream import Keystream, SecretDigest, keyed_function, subkey
from motte.seal.primitives import KEY_BYTES, random_bytes

T = TypeVar("T")
R = TypeVar("R")
Kind = Literal["residual", "gradient", "update"]
KINDS: Final = ("residual", "gradient", "update")
DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16)

CLIP_MARGIN: Final = 2.0**-13
"""By which share samples are scaled below the clip: more than the error of a norm that was summed in float32 in blocks
of 1,024 (at most 1,024 additions of relative error 2^-24, halved by the root) and of the product that scales."""
MAX_STEP: Final = 1 << 62

_NORM_BLOCK: Final = 1024
_SMALLEST_FAST_CLIP: Final = 1e-9
"""Below it, squares that vanish in float32 could matter."""
_LARGEST: Final = 2.0**80
_SIGNIFICANT_BITS: Final = 24
_FINE_BITS: Final = 14
"""By which the second Gaussian of an update is finer than the first."""


@dataclass(frozen=True, slots=True)
class Released:
    """What may leave, as far as the mechanism goes.

    Args:
        tensor: clipped and noised, of the shape and dtype that was given.
        release_id: 16 bytes, the same exactly for a retry of the same release. Without the noise key they tell nothing
            else.
    """

    tensor: Tensor
    release_id: bytes


class Noise:
    """Clips and noises tensors under one secret key. Safe to call from several threads.

    Args:
        key: 32 secret bytes. Whoever has them can take the noise off everything that ever left under them: keep them
            in sealed checkpoints only.
        threads: that one call may use, 1 to 256. The result is the same for any number.

    Raises:
        InputError: not a key.
        SettingError: threads out of range.
    """

    def __init__(self, key: bytes, *, threads: int = 1) -> None:
        if type(threads) is not int or not 1 <= threads <= 256:
            raise SettingError("threads out of range", expected="1 to 256", got=repr(threads))
        self._key = bytes(key)
        self._threads = threads
        self._digest = SecretDigest(subkey(self._key, "digest"))
        self._stream_key = subkey(self._key, "keystream")
        self._id_key = subkey(self._key, "release id")

    @classmethod
    def fresh(cls, *, threads: int = 1) -> Noise:
        """With a new key from the operating system."""
        return cls(random_bytes(KEY_BYTES), threads=threads)

    @property
    def key(self) -> bytes:
        """The secret key, for a sealed checkpoint."""
        return self._key

    def __repr__(self) -> str:
        return f"Noise(key hidden, threads={self._threads})"

    @torch.no_grad()
    def privatise(
        self,
        x: Tensor,
        mechanism: Mechanism,
        *,
        layer: str,
        kind: Kind,
        step: int,
        per_sample: bool = True,
        overwrite: bool = False,
    ) -> Released:
        """Clip and noise ``x``.

        Args:
            x: (N, ...), **private**; float32, float64 or bfloat16, on the CPU; any strides, N = 0 too.
            mechanism: clip and noise.
            layer, kind, step: where and when it leaves; part of what the noise is derived from.
            per_sample: True: every sample (axis 0) is scaled to L2 norm at most ``mechanism.clip``, then noised with
                standard deviation ``mechanism.sigma``. False: ``x`` is one sum over samples that were clipped before
                (an update), and is only noised. Its sigma is larger than asked by the share by which the grid can
                raise the sensitivity, below noise multiplier * sqrt(values) * 2^-32.
            overwrite: the result may take the memory of ``x``, and does where x is contiguous float32 and
                ``per_sample``. ``x`` is then no longer what it was, after an error too.

        Returns:
            the noised values, on the grid, rounded to x's dtype.

        Raises:
            InputError: a NaN or an infinity, another dtype or device; the message holds nothing of the values.
            SettingError: a mechanism beyond what float32 holds; a name, kind or step out of bounds.
        """
        where = _checked(x, layer, kind, step)
        x = x.detach()
        if per_sample:
            clean = (x.reshape(x.shape[0], -1) if x.numel() else x.reshape(1, 0)).contiguous()
            grid = _Grid.for_samples(mechanism)
            scales = self._clip_factors(clean, mechanism.clip, where) / grid.step
            if overwrite and clean.dtype == torch.float32:
                work = clean.view(-1)
            else:
                work = torch.empty(clean.numel(), dtype=torch.float32, device="cpu")
        else:
            clean = x.reshape(1, -1).contiguous()
            grid = _Grid.for_sum(mechanism, values=x.numel())
            _refuse_unless(bool(torch.isfinite(clean).all()), where)
            scales = torch.full((1,), 1 / grid.step, dtype=torch.float64, device="cpu")
            work = torch.empty(clean.numel(), dtype=torch.float64, device="cpu")
        tags = self._quantise(clean, scales, work)
        named = _names_of(x, mechanism, layer, kind, step, per_sample)
        self._add_noise(work, grid, keyed_function(self._stream_key, *named, *tags))
        release_id = keyed_function(self._id_key, *named, *tags)[:16]
        return Released(work.to(x.dtype).reshape(x.shape), release_id)

    def _clip_factors(self, clean: Tensor, clip: float, where: str) -> Tensor:
        """By what each sample of ``clean`` (N, d) is multiplied to have norm at most ``clip``: (N,) float64, <= 1."""
        limit = clip * (1 - CLIP_MARGIN)
        if clean.dtype != torch.float64 and clip >= _SMALLEST_FAST_CLIP:
            squares = self._squares(clean, None)
            if bool(torch.isfinite(squares).all()):
                return torch.div(limit, squares.sqrt_()).clamp_(max=1.0)
        # Float64, squares beyond float32, or an input that is not finite.
        largest = clean.abs().amax(1).double() if clean.shape[1] else clean.new_zeros(len(clean)).double()
        _refuse_unless(bool(torch.isfinite(largest).all()), where)
        largest.clamp_(min=2.0**-1000)
        relative = self._squares(clean, largest).sqrt_()
        return torch.div(limit, relative).div_(largest).clamp_(max=1.0)

    def _squares(self, clean: Tensor, largest: Tensor | None) -> Tensor:
        """Sums of squares of each sample of ``clean`` (N, d), in an order that only the shape decides: (N,) float64.

        Args:
            largest: (N,) float64 by which the samples are divided first, in float64; None: as they are, in float32.
        """

        def one(at: _Block) -> Tensor:
            values = at.of(clean)
            return _sum_of_squares(values.float() if largest is None else values.double() / largest[at.rows, None])

        total = torch.zeros(len(clean), dtype=torch.float64, device="cpu")
        blocks = _blocks(clean.shape)
        for at, square in zip(blocks, self._each(one, blocks), strict=True):
            total[at.rows] += square
        return total

    def _quantise(self, clean: Tensor, scales: Tensor, work: Tensor) -> list[bytes]:
        """Write ``clean * scales``, cut towards zero to whole numbers, into ``work``; the tags of its blocks."""
        raw = work.view(torch.uint8).numpy().data
        size = work.element_size()
        wide = clean.dtype == torch.float64 or work.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        scales = scales.to(dtype)

        def one(at: _Block) -> bytes:
            values = at.of(clean).to(dtype)
            into = work[at.start : at.stop].view(values.shape)
            scaled = torch.empty_like(values) if dtype != work.dtype else into
            torch.mul(values, scales[at.rows, None], out=scaled).trunc_()
            if work.dtype == torch.float64:
                # An update is not bounded by a clip; beyond this, float64 has no room for the noise.
                scaled.clamp_(-(2.0**52), 2.0**52)
            if scaled is not into:
                into.copy_(scaled)
            return self._digest.tag(raw[at.start * size : at.stop * size])

        return self._each(one, _blocks(clean.shape))

    def _add_noise(self, work: Tensor, grid: _Grid, key: bytes) -> None:
        """Add noise to whole numbers of steps and scale them back, in place."""
        source = Gaussians(Keystream(key))

        def one(chunk: int) -> None:
            values = work[chunk * CHUNK : (chunk + 1) * CHUNK]
            if grid.fine_sigma is None:
                values.add_(source.draw(chunk, len(values), grid.sigma))
            else:
                values.add_(source.draw(2 * chunk, len(values), grid.sigma))
                values.add_(source.draw(2 * chunk + 1, len(values), grid.fine_sigma))
            values.mul_(grid.step)

        self._each(one, range(-(-work.numel() // CHUNK)))

    def _each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``work`` of every item, in order."""
        if self._threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(self._threads, len(items))) as pool:
            return list(pool.map(torch.no_grad()(work), items))


@dataclass(frozen=True, slots=True)
class _Grid:
    """What is released is a multiple of ``step``, a power of two; sigmas are in steps.

    ``fine_sigma``: of a second, finer Gaussian, where one alone would not reach every point of the grid: the sum of two
    independent Gaussians is one.
    """

    step: float
    sigma: float
    fine_sigma: float | None = None

    @classmethod
    def for_samples(cls, mechanism: Mechanism) -> _Grid:
        """Clipped values and noise together stay below 2^24 steps, the whole numbers that float32 adds exactly."""
        reach = (mechanism.clip + REACH * mechanism.sigma) * (1 + 2 * SPREAD * 2.0**-_SIGNIFICANT_BITS)
        step = _power_above(reach) * 2.0**-_SIGNIFICANT_BITS
        return cls(step, mechanism.sigma / step)

    @classmethod
    def for_sum(cls, mechanism: Mechanism, *, values: int) -> _Grid:
        """A finer grid, in float64: a sum is not bounded, so cutting it can move two neighbours apart by a step in
        every value. The noise is raised by what that adds to the sensitivity."""
        step = _power_above(2 * REACH * mechanism.sigma) * 2.0 ** -(_SIGNIFICANT_BITS + _FINE_BITS)
        sigma = mechanism.noise_multiplier * (mechanism.clip + step * math.sqrt(values)) / step
        fine = 2.0**-_FINE_BITS
        return cls(step, sigma * math.sqrt(1 - fine * fine), sigma * fine)


@dataclass(frozen=True, slots=True)
class _Block:
    """A part of a contiguous (N, d) tensor that is contiguous itself: whole rows, or a part of one."""

    rows: slice
    start: int
    stop: int

    def of(self, clean: Tensor) -> Tensor:
        """The block of the contiguous ``clean``: (rows, columns)."""
        # By its place, so that it has the same strides as the same part of a flat tensor over the same memory.
        return clean.view(-1)[self.start : self.stop].view(self.rows.stop - self.rows.start, -1)


def _blocks(shape: Sequence[int]) -> list[_Block]:
    """(N, d) in blocks of at most :data:`CHUNK` values."""
    count, width = shape
    if count * width == 0:
        return []
    if width <= CHUNK:
        rows = CHUNK // width
        spans = [slice(at, min(at + rows, count)) for at in range(0, count, rows)]
        return [_Block(span, span.start * width, span.stop * width) for span in spans]
    return [
        _Block(slice(row, row + 1), row * width + at, row * width + min(at + CHUNK, width))
        for row in range(count)
        for at in range(0, width, CHUNK)
    ]


def _sum_of_squares(values: Tensor) -> Tensor:
    """Of each row of ``values`` (rows, columns): (rows,) float64, from norms of short pieces in their own dtype."""
    rows, columns = values.shape
    whole = columns - columns % _NORM_BLOCK
    pieces = torch.linalg.vector_norm(values[:, :whole].reshape(rows, -1, _NORM_BLOCK), dim=2).double()
    rest = torch.linalg.vector_norm(values[:, whole:], dim=1).double()
    squares: Tensor = pieces.square_().sum(1).add_(rest.square_())
    return squares


def _power_above(value: float) -> float:
    """The smallest power of two that is above ``value``.

    Raises:
        SettingError: beyond what float32 multiplies exactly.
    """
    if not 1 / _LARGEST <= value <= _LARGEST:
        raise SettingError(
            "clip and noise together are out of range",
            expected=f"from {1 / _LARGEST:.0e} to {_LARGEST:.0e}",
            got=f"{value:.3g}",
        )
    return math.ldexp(1.0, math.frexp(value)[1])


def _checked(x: Tensor, layer: str, kind: str, step: int) -> str:
    """Refuse what cannot be released; returns where, for messages."""
    if kind not in KINDS:
        raise SettingError("unknown kind of release", expected=" or ".join(KINDS), got=repr(kind))
    if type(step) is not int or not 0 <= step < MAX_STEP:
        raise SettingError("step out of range", expected=f"0 to {MAX_STEP}", got=repr(step))
    if len(layer.encode()) > MAX_NAME_BYTES:
        raise SettingError("the layer's name is too long", expected=f"{MAX_NAME_BYTES} bytes", got=repr(layer[:80]))
    where = f"{kind} of {layer}, step {step}"
    if x.dtype not in DTYPES or x.device.type != "cpu" or x.dim() == 0:
        raise InputError(
            "noise is added on the CPU, to a tensor with a batch axis",
            expected="float32, float64 or bfloat16",
            got=f"{x.dtype} on {x.device}, {x.dim()} axes",
            where=where,
        )
    return where


def _refuse_unless(finite: bool, where: str) -> None:
    if not finite:
        hint = "the training diverged, or an input was not finite; nothing of this tensor has left"
        raise InputError("a value to be released is not finite", where=where, hint=hint)


def _names_of(x: Tensor, mechanism: Mechanism, layer: str, kind: str, step: int, per_sample: bool) -> tuple[bytes, ...]:
    """Everything but the values that the noise is derived from. The mechanism too: the same Gaussian scaled by two
    sigmas would give both away."""
    numbers = struct.pack(">ddQ?", mechanism.clip, mechanism.noise_multiplier, step, per_sample)
    shape = b"".join(size.to_bytes(8, "big") for size in x.shape)
    return layer.encode(), kind.encode(), numbers, str(x.dtype).encode(), shape
