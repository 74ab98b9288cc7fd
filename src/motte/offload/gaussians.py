"""Gaussian values in whole numbers, from a keystream: Box and Muller's transform, vectorised, a chunk at a time.

A pair of values takes 14 bytes: 64 bits for the radius, 32 for the angle, 8 for the uniform part of each value. The
radius is ``sqrt(-2 ln u)`` with ``u`` a multiple of 2^-63 rounded to float32, which is dense where it is small, so the
tail is as fine as float32 and ends at sqrt(2 * 63 * ln 2) = 9.35; a true Gaussian pair lies beyond it with probability
2^-63. (With the customary 32 bits it would end at 6.66, which a single step of VGG-16 with its 3 * 10^8 pairs exceeds
every fourteenth time.)

Float32 has few bits left below one where a value of 20 bits stands before the point, and rounding halves to even
then makes even numbers about 15 % more likely than odd ones: a secret whole number plus such noise shows its lowest
bit. So a number that is uniform on 256 values is added to each rounded Gaussian: every residue modulo 256 is then
equally likely, exactly. It adds 256^2 / 12 to the variance, and, being independent of everything, is post-processing
of the Gaussian mechanism.

Every operation works on at most :data:`CHUNK` / 2 values in place, in buffers that a core's own cache holds.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from motte.seal.keystream import Keystream

CHUNK: Final = 65_536
"""Values of one slot."""
REACH: Final = 9.5
"""No Gaussian is further from zero, in standard deviations: 9.35, and room for rounding."""
SPREAD: Final = 256
"""How many values the uniform part has; it is at most half of this from zero."""
TRUNCATION: Final = 2.0**-63
"""Probability that a true Gaussian pair lies beyond what is drawn here."""

_PAIRS: Final = CHUNK // 2
_PAIR_BYTES: Final = 14
_SLOT_BYTES: Final = _PAIRS * _PAIR_BYTES


@dataclass(frozen=True, slots=True)
class _Scratch:
    """The buffers of one thread for ``pairs`` pairs: views of the same memory, made once."""

    raw: memoryview  # 14 bytes a pair
    long_bits: Tensor  # (pairs,) int64
    bits: Tensor  # (pairs,) int32
    first_low: Tensor  # (pairs,) int8
    second_low: Tensor  # (pairs,) int8
    radius: Tensor  # (pairs,) float32
    cosine: Tensor  # (pairs,) float32, the first half of ``values``
    sine: Tensor  # (pairs,) float32, the second half
    values: Tensor  # (2 * pairs,) float32

    @classmethod
    def of(cls, pairs: int) -> _Scratch:
        raw = bytearray(pairs * _PAIR_BYTES)
        values = torch.empty(2 * pairs, dtype=torch.float32, device="cpu")
        return cls(
            memoryview(raw),
            torch.frombuffer(raw, dtype=torch.int64, count=pairs),
            torch.frombuffer(raw, dtype=torch.int32, count=pairs, offset=8 * pairs),
            torch.frombuffer(raw, dtype=torch.int8, count=pairs, offset=12 * pairs),
            torch.frombuffer(raw, dtype=torch.int8, count=pairs, offset=13 * pairs),
            torch.empty(pairs, dtype=torch.float32, device="cpu"),
            values[:pairs],
            values[pairs:],
            values,
        )


class Gaussians:
    """Independent Gaussian whole numbers, addressed by slots of :data:`CHUNK`. Safe to call from several threads.

    Args:
        stream: the keystream, used for nothing else.
    """

    def __init__(self, stream: Keystream) -> None:
        self._stream = stream
        self._local = threading.local()

    def draw(self, slot: int, count: int, sigma: float) -> Tensor:
        """``count`` (at most :data:`CHUNK`) values of ``slot``, of standard deviation ``sigma``, plus a uniform part.

        Values of one slot belong together: another ``count`` gives other values, not a part of the same.

        Returns:
            (count,) float32, whole numbers, in a buffer that the next call of this thread overwrites.

        Raises:
            InputError: the keystream is used up.
        """
        work = self._scratch((count + 1) // 2)
        self._stream.fill(work.raw, offset=slot * _SLOT_BYTES)
        # |k| of a signed 64-bit number is uniform on 1 .. 2^63 - 1 but for the two ends.
        radius = work.radius.copy_(work.long_bits).abs_().clamp_min_(1.0).mul_(2.0**-63)
        radius.log_().mul_(-2 * sigma * sigma).sqrt_()
        work.sine.copy_(work.bits).mul_(math.pi * 2.0**-31)
        torch.cos(work.sine, out=work.cosine).mul_(radius).round_()
        work.sine.sin_().mul_(radius).round_()
        work.cosine.add_(radius.copy_(work.first_low))
        work.sine.add_(radius.copy_(work.second_low))
        return work.values[:count]

    def _scratch(self, pairs: int) -> _Scratch:
        found: _Scratch | None = getattr(self._local, "scratch", None)
        if found is None or len(found.radius) != pairs:
            found = self._local.scratch = _Scratch.of(pairs)
        return found
