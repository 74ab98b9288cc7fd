"""The published 12-part cuts of the eight classic models, as data.

Each entry lists the eleven module paths *after* which a cut falls, in the order in which the modules run, in the names
of torchvision's architectures. The parts that they make are contiguous; the last one holds the pooling, the flatten
and the classifier. The cuts come from earlier published measurements of these models in an SGX enclave; they hardly
lower the peak memory (one part holds up to 96 % of the weights), which is what the planner is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

PUBLISHED_PARTS: Final = 12


def _after(prefix: str, *indices: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{index}" for index in indices)


_RESNET_HEAD = ("maxpool", *_after("layer1", 0, 1, 2), *_after("layer2", 0, 1, 3))

PUBLISHED_CUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "alexnet": _after("features", 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12),
        "vgg16": (*_after("features", 5, 8, 11, 14, 17, 20, 23, 26, 29, 30), "avgpool"),
        "vgg19": _after("features", 3, 7, 11, 15, 19, 23, 27, 31, 32, 33, 36),
        "squeezenet1_0": _after("features", 0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12),
        "resnet50": (*_RESNET_HEAD, *_after("layer3", 1, 3, 5), "layer4.2"),
        "resnet101": (*_RESNET_HEAD, *_after("layer3", 7, 15, 22), "layer4.2"),
        "mobilenet_v3_large": _after("features", 0, 2, 3, 5, 6, 7, 8, 11, 14, 15, 16),
        "mobilenet_v3_small": _after("features", 0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12),
    }
)
"""Model name -> the modules after which the eleven cuts fall."""

CLASSICS: Final = tuple(PUBLISHED_CUTS)
"""The eight models, in the order in which tables show them."""
