"""What leaves when each of many public records is met by the weights of the beginning: groups, each in a first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from motte.audit.interface import Kind, PublicData, View

GROUP: Final = 64
"""Records of one step at most: all of a public set in one step took more memory than a machine has."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What left of ``layer`` for every record: ``values`` (N, ...). ``classes``: of the model."""

    layer: str
    values: Tensor
    classes: int


def seen_in_first_steps(
    public: PublicData, images: Tensor, labels: Tensor, which: Callable[[View], str | None], kind: Kind, *, seed: int
) -> Seen | None:
    """What left of one layer for ``images`` (N, C, H, W) with ``labels`` (N,), in training, never updated in between.

    Args:
        which: the layer, by the first group's view; None: there is none.
        kind: of a sighting, such as ``gradient``.

    Returns:
        None where nothing of it left.
    """
    count = max(1, -(-len(images) // GROUP))
    layer: str | None = None
    classes, found = 0, list[Tensor]()
    for part, wanted in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
        only = None if layer is None else (layer,)
        view = public.pipeline.observe(part, wanted, seed=seed, steps=1, layers=only, answers=False)
        layer = which(view) if layer is None else layer
        seen = None if layer is None else view.batch(layer, kind)
        if seen is None:
            return None
        classes = view.classes
        found.append(seen)
    return None if layer is None else Seen(layer, torch.cat(found), classes)
