"""A bound from Fisher information on how well an input can be estimated from noised residuals.

Fisher information leakage: Hannun, Guo, van der Maaten, "Measuring data leakage in machine-learning models with Fisher
information" (UAI 2021). Its diagonal form for inputs, dFIL = Tr(I(x)) / d, and the Cramér-Rao bound that follows, mean
squared error >= 1 / dFIL for every unbiased estimator: Maeng, Guo, Kariyappa, Suh, "Bounding the invertibility of
privacy-preserving instance encoding using Fisher information" (NeurIPS 2023).

For a release f(x) + N(0, sigma^2 I) the information is J^T J / sigma^2. f is what the scheme would send without noise:
every split layer's residual, clipped. Tr(J^T J) = E |J v|^2 over normal v (Hutchinson), by central differences.
An attacker who knows what images look like is biased, and is not bound by this.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Final

import torch

from motte.audit.measures.figure import Figure
from motte.offload.decompose import decompose, residual

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from motte.offload.settings import Asymmetric, Mechanism

PROBES: Final = 8
"""Random directions for each sample."""
_STEP: Final = 1e-5
_NOTE: Final = "no unbiased estimate of an input from the residuals of one inference is better; a biased one may be"


def clean_release(model: nn.Module, scheme: Asymmetric, outside: Sequence[str], images: Tensor) -> Mapping[str, Tensor]:
    """What would leave without noise: the residual of each layer of ``outside``, clipped by sample, (N, D) each.

    Args:
        outside: in the order in which they run.
    """
    from motte.audit.scene import activations

    found = activations(model, images)
    clip = math.inf if scheme.noise is None else scheme.noise.residual.clip
    released = {}
    for position, layer in enumerate(outside):
        x = found[layer]
        matrix = x.reshape(len(x), -1, x.shape[-1]) if x.dim() == 3 else x.flatten(2)
        principal = decompose(
            matrix, scheme.rank, position=position, iterations=scheme.iterations, method=scheme.decomposition
        )
        left = residual(matrix, principal).flatten(1)
        norms = left.norm(dim=1, keepdim=True)
        released[layer] = left * (clip / norms.clamp_min(1e-300)).clamp_max(1.0)
    return released


def traces(
    model: nn.Module,
    scheme: Asymmetric,
    outside: Sequence[str],
    pixels: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator,
    probes: int = PROBES,
) -> Tensor:
    """Tr(J^T J) of all releases with respect to the pixels, (N,) float64, estimated."""
    double = copy.deepcopy(model).double().eval()
    images = pixels.double()
    middle = images.new_tensor(mean).reshape(1, -1, 1, 1)
    spread = images.new_tensor(std).reshape(1, -1, 1, 1)

    def released(at: Tensor) -> Tensor:
        found = clean_release(double, scheme, outside, (at - middle) / spread)
        return torch.cat([found[layer] for layer in outside], 1)

    total = images.new_zeros(len(images))
    for _ in range(probes):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        change = (released(images + _STEP * direction) - released(images - _STEP * direction)) / (2 * _STEP)
        total += (change**2).sum(1)
    return total / probes


def fisher_figure(
    model: nn.Module,
    scheme: Asymmetric,
    outside: Sequence[str],
    pixels: Tensor,
    *,
    audited: str,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator,
) -> Figure:
    """The highest PSNR, in dB, that an unbiased estimate of the inputs can reach on average."""
    name = "Fisher-information bound on PSNR"
    mechanism: Mechanism | None = None if scheme.noise is None else scheme.noise.residual
    if mechanism is None or not outside:
        missing = "without noise the information is infinite, and bounds nothing" if outside else "nothing leaves"
        return Figure(name=name, audited=audited, layer=None, value=None, unit="dB", missing=missing)
    trace = traces(model, scheme, outside, pixels, mean=mean, std=std, generator=generator)
    dfil = trace / (mechanism.sigma**2 * pixels[0].numel())
    error = float((1.0 / dfil.clamp_min(1e-300)).mean())
    return Figure(
        name=name, audited=audited, layer=None, value=-10.0 * math.log10(max(error, 1e-300)), unit="dB", note=_NOTE
    )
