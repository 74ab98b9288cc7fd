"""torchvision's ResNet and VGG with another beginning and another width: for small images and narrow test nets.

With ``width`` 1, three channels and the ``imagenet`` stem every parameter has the name and the shape that torchvision
gives it, so that published weights load. The ``small`` stem is the one in use for CIFAR: a 3x3 convolution of stride 1
and no pooling after it (ResNet); one linear layer behind global average pooling (VGG).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import nn

from motte.zoo import vision_ops

vision_ops.import_torchvision()  # declares what torchvision needs beside a CPU build of torch

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402
from torchvision.models.vgg import VGG, cfgs, make_layers  # noqa: E402

Stem = Literal["small", "imagenet"]
RESNETS: Final[Mapping[str, tuple[Any, tuple[int, int, int, int]]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Name -> block and blocks of each stage: table 1 of He et al., CVPR 2016."""
VGGS: Final[Mapping[str, str]] = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
"""Name -> column of table 1 of Simonyan and Zisserman, ICLR 2015."""
_HEAD: Final = 4096
_GRID: Final = 7


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, at least 1."""
    return max(1, round(channels * width))


class StemmedResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet, its channels times ``width``: (N, in_channels, H, W) -> (N, classes)."""

    def __init__(
        self, block: Any, blocks: Sequence[int], *, in_channels: int, classes: int, width: float, stem: Stem
    ) -> None:
        nn.Module.__init__(self)  # ResNet's own would build the wide net first, only to throw it away
        self._norm_layer = nn.BatchNorm2d
        self.inplanes = scaled(64, width)
        self.dilation, self.groups, self.base_width = 1, 1, 64
        large = stem == "imagenet"
        kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        self.conv1 = nn.Conv2d(in_channels, self.inplanes, kernel, stride=stride, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        self.layer1 = self._make_layer(block, scaled(64, width), blocks[0])
        self.layer2 = self._make_layer(block, scaled(128, width), blocks[1], stride=2)
        self.layer3 = self._make_layer(block, scaled(256, width), blocks[2], stride=2)
        self.layer4 = self._make_layer(block, scaled(512, width), blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(scaled(512, width) * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def vgg(name: str, *, batch_norm: bool, in_channels: int, classes: int, width: float, stem: Stem) -> nn.Module:
    """torchvision's VGG, its channels times ``width``: (N, in_channels, H, W) -> (N, classes)."""
    layout = [each if isinstance(each, str) else scaled(each, width) for each in cfgs[VGGS[name]]]
    features: nn.Sequential = make_layers(layout, batch_norm=batch_norm)
    features[0] = nn.Conv2d(in_channels, scaled(64, width), kernel_size=3, padding=1)
    with torch.device("meta"):  # its wide head is replaced, and would take half a gigabyte first
        model: nn.Module = VGG(nn.Sequential(), num_classes=classes, init_weights=False)
    model.features = features
    last = scaled(512, width)
    if stem == "small":
        for module in features:
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = True  # the same on 32 pixels; lets 28 go through all five
        model.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        model.classifier = nn.Linear(last, classes)
    else:
        hidden = scaled(_HEAD, width)
        model.classifier = nn.Sequential(
            nn.Linear(last * _GRID * _GRID, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )
    _initialise_vgg(model)
    return model


def _initialise_vgg(model: nn.Module) -> None:
    """As torchvision initialises it, in the same order."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
