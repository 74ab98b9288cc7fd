"""Whether one training step tells a layer's whole input: equations against unknowns, by shapes alone.

A weight gradient is linear in the layer's input. Whoever has a layer's weights before and after a step, its output
gradient and its own part of the weight gradient (an accelerator has them all) has, for each input channel, M * k^2
equations for the N * h * w values of that channel, with the same matrix for all of them; for tokens (N, T, D) of a
linear layer M equations for N * T unknowns. The residual's noise cancels, and so does the rank: what is found is all
that stayed inside. :mod:`motte.audit.attacks.weight_delta` solves it; docs/findings.md has what came of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from motte.linear.operation import LinearOperation


@dataclass(frozen=True, slots=True)
class SystemSize:
    """Rows and columns of one channel's system: determined where there are no more unknowns than equations."""

    equations: int
    unknowns: int

    @property
    def determined(self) -> bool:
        """Whether there can be a single solution."""
        return self.unknowns <= self.equations


def system_size(operation: LinearOperation, shape: Sequence[int]) -> SystemSize:
    """Of a layer given an input of ``shape``, (N, C, *spatial) or (N, *, C), per input channel."""
    if operation.family == "linear":
        return SystemSize(operation.out_channels, math.prod(shape[:-1]))
    per_group = operation.out_channels // operation.groups
    return SystemSize(per_group * math.prod(operation.kernel), shape[0] * math.prod(shape[2:]))


def determined_up_to(operation: LinearOperation, shape: Sequence[int]) -> int:
    """The most samples of a step at which the system of a layer given samples of ``shape`` (N, ...) is determined; 0:
    at none. Shapes that are not the last word (a step that adds up several batches has more unknowns) are the
    caller's business."""
    size = system_size(operation, (1, *shape[1:]))
    return size.equations // max(size.unknowns, 1)
