"""Weight-delta at the sizes of the published layers: how well two successive weights give the principal part away.

    python benchmarks/bench_weight_delta.py [--outputs 512] [--channels 8] [--small]

A synthetic 3x3 layer with padding 1, one step of plain SGD in float32; the system is solved in float64. Above
batch * height * width > outputs * 9 it is underdetermined, and the solution of least norm has a relative error of about
the root of the share of directions that no equation sees. One core; the largest system takes about 1.3 GiB and minutes.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from motte.audit.attacks.weight_delta_system import solve_input
from motte.linear import compute
from motte.linear.operation import LinearOperation

SIZES = ((32, 7), (16, 14), (32, 14))
"""Batch, and height and width."""
SMALL = ((4, 7), (8, 7), (16, 7))
RANK = 2
RATE = 0.1


def main() -> None:
    """One row a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=512)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="64 outputs and small batches: seconds")
    options = parser.parse_args()
    outputs = 64 if options.small else options.outputs
    table = Table(
        "batch", "extent", "equations", "unknowns", "rank", "relative error", "least norm would give", "seconds"
    )
    for batch, side in SMALL if options.small else SIZES:
        table.add_row(*_row(batch, side, outputs, options.channels))
    Console().print(table)


def _row(batch: int, side: int, outputs: int, channels: int) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    operation = LinearOperation("conv", channels, outputs, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    main_part = (draw(batch, channels, RANK) @ draw(batch, RANK, side * side)).reshape(batch, channels, side, side)
    left, gradient = 0.3 * draw(*main_part.shape), draw(batch, outputs, side, side) / batch
    weight = draw(*operation.weight_shape) / math.sqrt(9 * channels)
    own = compute.weight_gradient(operation, left, gradient)
    after = weight - RATE * (compute.weight_gradient(operation, main_part, gradient) + own)
    began = time.perf_counter()
    found = solve_input(operation, gradient, main_part.shape, (weight.double() - after.double()) / RATE - own.double())
    seconds = time.perf_counter() - began
    error = float((found.x - main_part).norm() / main_part.norm())
    beyond = math.sqrt(max(0.0, 1 - found.size.equations / found.size.unknowns))
    size = found.size
    return (
        str(batch),
        f"{side} x {side}",
        str(size.equations),
        str(size.unknowns),
        str(found.rank),
        f"{error:.2g}",
        f"{beyond:.2f}",
        f"{seconds:.1f}",
    )


if __name__ == "__main__":
    main()
