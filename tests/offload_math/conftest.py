"""Generated linear operators with inputs, weights and output gradients; one table for every test of this folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from motte.errors import SettingError
from motte.linear.operation import LinearOperation


@dataclass(frozen=True)
class Case:
    operation: LinearOperation
    shape: tuple[int, ...]
    seed: int

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight, output's gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (self.shape, self.operation.weight_shape, self.operation.output_shape(self.shape))
        x, weight, gradient = (torch.randn(each, generator=generator, dtype=torch.float64) for each in shapes)
        return x.to(dtype), weight.to(dtype), gradient.to(dtype)

    def matrices(self, x: Tensor) -> Tensor:
        """(N, rows, cols) as decompose takes it."""
        if self.operation.family == "linear":
            return x.reshape(self.shape[0], math.prod(self.shape[1:-1]), self.shape[-1])
        return x.reshape(*self.shape[:2], math.prod(self.shape[2:]))


def _cases(count: int, seed: int = 0, *, batches: tuple[int, ...] = (0, 1, 2, 3)) -> list[Case]:
    """``count`` operators: every family and number of dimensions, stride, padding, dilation, groups, odd channels."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    found: list[Case] = []
    while len(found) < count:
        batch = batches[len(found) % len(batches)]
        kind = len(found) % 7
        if kind == 6:
            operation = LinearOperation("linear", pick(1, 3, 31, 33), pick(1, 5, 32))
            shape: tuple[int, ...] = (batch, pick(1, 2, 9), operation.in_channels)
            if pick(0, 1):
                shape = (batch, 2, *shape[1:])
            found.append(Case(operation, shape, len(found)))
            continue
        dims = kind % 3 + 1
        groups = pick(1, 1, 2, 3)
        channels = (groups * pick(1, 2, 3, 11), groups * pick(1, 2, 5, 16))
        kernel = tuple(pick(1, 2, 3) for _ in range(dims))
        stride = tuple(pick(1, 1, 2, 3) for _ in range(dims))
        dilation = tuple(pick(1, 1, 2) for _ in range(dims))
        padding = tuple(pick(0, 1, 2) for _ in range(dims))
        transposed = kind >= 3
        extra = tuple(pick(0, each - 1) for each in stride) if transposed else (0,) * dims
        extents = tuple(pick(4, 5, 7) for _ in range(dims))
        try:
            operation = LinearOperation(
                "conv_transpose" if transposed else "conv", *channels, kernel, stride, padding, dilation, extra, groups
            )
            operation.output_shape((batch, channels[0], *extents))
        except SettingError:
            continue
        found.append(Case(operation, (batch, channels[0], *extents), len(found)))
    return found


@pytest.fixture(scope="session")
def cases() -> Callable[..., list[Case]]:
    """``cases(count, seed, batches=...)``: that many generated operators."""
    return _cases
