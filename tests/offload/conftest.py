"""Comparing a protected model with the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def accelerator() -> InProcessAccelerator:
    return InProcessAccelerator()


def _distance(got: Tensor, wanted: Tensor) -> float:
    """max |difference| over max |reference|."""
    if got.shape != wanted.shape:
        raise ValueError(f"{got.shape} is not {wanted.shape}")
    if not wanted.numel():
        return 0.0
    scale = wanted.abs().max().item()
    return (got - wanted).abs().max().item() / (scale or 1.0)


class OneLayer(nn.Module):
    """A model that is one layer, so that its input is chosen and its gradients are the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture(scope="session")
def distance() -> Callable[[Tensor, Tensor], float]:
    return _distance


@pytest.fixture(scope="session")
def one_layer() -> type[nn.Module]:
    return OneLayer
