"""A narrow net with a residual block and a planted canary: small, but with every feature that the worker meets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CANARY = b"CANARY-WEIGHT-7f3a91c2-do-not-leak-this-value-0001"
"""Appears as the bytes of one weight; nothing outside the worker may ever hold these bytes."""
CANARY_FLOATS = torch.frombuffer(bytearray((CANARY * 8)[:256]), dtype=torch.float32)


class Tiny(nn.Module):
    """(N, 3, 16, 16) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)
        self.register_buffer("planted", CANARY_FLOATS.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.block(x)
        x = torch.relu(self.down(x)).mean((2, 3))
        # Reads the canary without letting its wild values into the result.
        return self.head(x) + self.planted.clamp(0, 0).sum()


def tiny() -> Tiny:
    """The net with fixed random weights, in eval mode."""
    generator = torch.Generator().manual_seed(7)
    model = Tiny().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "1.weight" in name else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + shift)
    return model
