"""The spectrum of activations: SVD-channel entropy and ranks, by layer.

For one sample, an activation with c channels is a matrix c x hw with singular values s. Its SVD-channel entropy is
mu = -log2(sum of squares of s / sum(s)), and ceil(2 ** mu) principal channels are what AsymML keeps inside (arXiv
2110.01229, section 3.3). The rank that holds 90 % of the energy is counted beside it. Where both are low, little has to
stay inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from motte.audit.measures.figure import Figure

if TYPE_CHECKING:
    from torch import Tensor

ENERGY: Final = 0.9
"""The share of energy for which a rank is counted."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Of one layer, one value per sample.

    Attributes:
        entropy: bits.
        ranks: principal channels that hold :data:`ENERGY` of a sample's energy.
        channels: the most that a rank can be.
    """

    layer: str
    entropy: tuple[float, ...]
    ranks: tuple[int, ...]
    channels: int


def spectrum(activation: Tensor, *, layer: str, tokens: bool = False) -> Spectrum:
    """Of an activation (N, C, *spatial), or with ``tokens`` (N, T, C)."""
    matrix = activation.double()
    matrix = matrix.reshape(len(matrix), -1, matrix.shape[-1]) if tokens else matrix.flatten(2)
    values = torch.linalg.svdvals(matrix)
    total = values.sum(1, keepdim=True).clamp_min(1e-300)
    # A sample of zeros has no spectrum; as a matrix of rank 0 it needs no channel, and no bit tells its channels apart.
    squares = ((values / total) ** 2).sum(1)
    entropy = [-math.log2(each) if each > 0 else 0.0 for each in squares.tolist()]
    energy = values**2
    running = energy.cumsum(1) / energy.sum(1, keepdim=True).clamp_min(1e-300)
    ranks = torch.where(energy.sum(1) > 0, (running < ENERGY).sum(1) + 1, 0)
    return Spectrum(layer, tuple(entropy), tuple(int(each) for each in ranks), min(matrix.shape[1:]))


def spectrum_figures(activations: Mapping[str, Tensor], layers: tuple[str, ...]) -> tuple[Figure, ...]:
    """Mean entropy, and the quartiles of the rank, of each of ``layers`` that has more than one position."""
    figures: list[Figure] = []
    for layer in layers:
        activation = activations.get(layer)
        if activation is None or activation.dim() < 3:
            continue
        found = spectrum(activation, layer=layer, tokens=activation.dim() == 3)
        mean = sum(found.entropy) / len(found.entropy)
        ordered = sorted(found.ranks)
        quartiles = [ordered[round(share * (len(ordered) - 1))] for share in (0.0, 0.5, 1.0)]
        said = f"of at most {found.channels}; over {len(ordered)} samples {quartiles[0]} to {quartiles[2]}"
        figures += [
            Figure(
                name="SVD-channel entropy",
                audited=None,
                layer=layer,
                value=mean,
                unit="bit",
                note=f"2 to this power, {2**mean:.1f}, is the rank of AsymML's rule",
            ),
            Figure(
                name=f"rank of {ENERGY:.0%} of the energy, median",
                audited=None,
                layer=layer,
                value=float(quartiles[1]),
                unit="count",
                note=said,
            ),
        ]
    return tuple(figures)
