"""How much of an activation's energy left: by layer, from what really crossed.

Energy is the squared L2 norm (3LegRace, PoPETs 2022(4), section 3). Without noise the residual is the activation less a
projection of it, so ``energy`` is the share that left, 0 to 1, and so is ``aligned``. With clip and noise the energy of
what left says little: then ``aligned``, the squared cosine between what left and the activation, tells how much of the
activation shows in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from motte.audit.measures.figure import Figure
from motte.errors import MeasureError

if TYPE_CHECKING:
    from torch import Tensor

    from motte.audit.interface import View

_NOTE: Final = "squared norm of what left over that of the activation; above 1 where noise was added"
_ALIGNED: Final = "squared cosine between what left and the activation: 1 = all of it, up to its scale"


@dataclass(frozen=True, slots=True)
class Exposure:
    """Of one layer: shares of the activation's energy, over all samples."""

    layer: str
    energy: float
    aligned: float


def exposure(sent: Tensor, activation: Tensor, *, layer: str) -> Exposure:
    """Compare what left (N, ...) with the activation that it came from.

    Raises:
        MeasureError: other shapes: what left is not of these inputs.
    """
    if sent.shape != activation.shape:
        raise MeasureError(
            "what left is not of these inputs",
            where=layer,
            expected=str(tuple(activation.shape)),
            got=str(tuple(sent.shape)),
        )
    left, whole = sent.double().flatten(), activation.double().flatten()
    energy, all_of_it, both = float(left @ left), float(whole @ whole), float(left @ whole)
    if all_of_it == 0.0:
        return Exposure(layer, 0.0, 0.0)
    return Exposure(layer, energy / all_of_it, both**2 / (energy * all_of_it) if energy else 0.0)


def exposures(view: View, activations: Mapping[str, Tensor]) -> tuple[Exposure, ...]:
    """For every layer of an inference view, from the activations of the same inputs in the same order.

    Raises:
        MeasureError: what left is not of these inputs.
    """
    found = []
    for layer in view.layers:
        sent = view.batch(layer)
        if sent is not None and layer in activations:
            found.append(exposure(sent, activations[layer], layer=layer))
    return tuple(found)


def exposure_figures(view: View, activations: Mapping[str, Tensor]) -> tuple[Figure, ...]:
    """The same as figures of the audit: two for each layer."""
    return tuple(
        Figure(name=name, audited=view.audited, layer=each.layer, value=value, unit="share", note=note)
        for each in exposures(view, activations)
        for name, value, note in (
            ("exposed energy", each.energy, _NOTE),
            ("exposed energy, aligned", each.aligned, _ALIGNED),
        )
    )
