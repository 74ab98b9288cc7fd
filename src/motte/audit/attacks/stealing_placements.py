"""What a thief starts with: which weights a placement of layers shows, as masks over the state of a model.

Partial shielding keeps some layers, or some weights, inside and lets the rest run, visibly, outside. Zhang, Gong, Cai,
Yuan, Liu, Zhang, Chen, "No Privacy Left Outside: On the (In-)Security of TEE-Shielded DNN Partition for On-Device ML"
(S&P 2024) compare such schemes by what a surrogate gains from the visible part; these are the kinds they judge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from motte.errors import SettingError
from motte.offload.modules import can_split
from motte.offload.protect import parametrised


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A partial-shielding scheme.

    Attributes:
        name: in words, ``first 2 inside``.
        visible: ``state_dict`` name -> mask (bool, the tensor's shape) of the numbers that lie outside. What is missing
            is inside.
    """

    name: str
    visible: Mapping[str, Tensor]

    def share(self, model: nn.Module) -> float:
        """Share of the parameters' numbers that is visible."""
        parameters = dict(model.named_parameters())
        seen = sum(int(mask.sum()) for name, mask in self.visible.items() if name in parameters)
        return seen / max(1, sum(each.numel() for each in parameters.values()))


def all_inside() -> Placement:
    """Nothing is visible: the thief has queries only."""
    return Placement("all inside", {})


def all_outside(model: nn.Module) -> Placement:
    """Everything is visible, buffers too."""
    return Placement("all outside", _whole(model, model.state_dict()))


def layers_outside(model: nn.Module, layers: Collection[str], name: str | None = None) -> Placement:
    """The layers named run outside: their weights are visible and nothing else; biases stay inside, as in offload.

    Raises:
        SettingError: no layer of the model with a weight has such a name.
    """
    known = parametrised(model)
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise SettingError("no such layer in the model", got=", ".join(unknown), expected=", ".join(known)[:400])
    weights = [f"{each}.weight" if each else "weight" for each in layers]
    state = model.state_dict()
    return Placement(
        name or f"{len(weights)} layers outside", _whole(model, [each for each in weights if each in state])
    )


def first_inside(model: nn.Module, count: int) -> Placement:
    """The first ``count`` layers with all that precedes the next one are inside; the rest of the model is visible.

    Raises:
        SettingError: not a number of layers of this model.
    """
    return _cut(model, count, first=True)


def last_inside(model: nn.Module, count: int) -> Placement:
    """The last ``count`` layers with all that follows them are inside; the rest of the model is visible.

    Raises:
        SettingError: not a number of layers of this model.
    """
    return _cut(model, count, first=False)


def largest_inside(model: nn.Module, share: float) -> Placement:
    """In every weight, the ``share`` of its numbers that are largest in magnitude is inside; all else is visible.

    Raises:
        SettingError: not a share.
    """
    if not 0.0 < share < 1.0:
        raise SettingError("not a share of weights", expected="above 0, below 1", got=repr(share))
    visible = _whole(model, model.state_dict())
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        hidden = max(1, round(share * parameter.numel()))
        order = parameter.detach().abs().flatten().argsort(descending=True)
        mask = torch.ones(parameter.numel(), dtype=torch.bool)
        mask[order[:hidden]] = False
        visible[name] = mask.view_as(parameter)
    return Placement(f"largest {100 * share:g} % of each weight inside", visible)


def linear_outside(model: nn.Module) -> Placement:
    """Every convolution and linear layer runs outside, as obfuscating schemes have it; norms and biases are inside."""
    layers = [name for name, module in parametrised(model).items() if can_split(module)]
    return layers_outside(model, layers, "every linear layer outside")


def usual_placements(model: nn.Module) -> tuple[Placement, ...]:
    """What the full suite judges: a third of the layers inside at either end, one at either end, the largest 10 % of
    weights inside, every linear layer outside."""
    count = len(parametrised(model))
    made: list[Placement] = []
    for inside in sorted({1, max(1, count // 3)}):
        if inside < count:
            made += [first_inside(model, inside), last_inside(model, inside)]
    return (*made, largest_inside(model, 0.1), linear_outside(model))


def _cut(model: nn.Module, count: int, *, first: bool) -> Placement:
    layers = list(parametrised(model))
    if not 1 <= count <= len(layers):
        raise SettingError("not a number of layers of this model", expected=f"1 to {len(layers)}", got=repr(count))
    inside = layers[:count] if first else layers[-count:]
    names = list(model.state_dict())
    # A norm belongs to the layer that it follows: ``state_dict`` has the order of registration, as ``layers`` has.
    starts = [_position(names, layer) for layer in layers]
    owned = [max((at for at, start in enumerate(starts) if start <= place), default=0) for place in range(len(names))]
    kept = set(range(count)) if first else set(range(len(layers) - count, len(layers)))
    visible = [name for name, owner in zip(names, owned, strict=True) if owner not in kept]
    return Placement(f"{'first' if first else 'last'} {len(inside)} inside", _whole(model, visible))


def _position(names: Sequence[str], layer: str) -> int:
    prefix = f"{layer}." if layer else ""
    return next(place for place, name in enumerate(names) if name.startswith(prefix))


def _whole(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: torch.ones(state[name].shape, dtype=torch.bool) for name in names}
