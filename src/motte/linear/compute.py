"""A linear operator and its two gradients, in torch, on any device: no state, no bias, no batch that is too small.

Forward, the gradient to the input and the gradient to the weight are all linear in each argument; that is what lets an
activation be split into a part inside and a part outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from motte.linear.operation import LinearOperation

_CONV: Final[dict[int, Callable[..., Tensor]]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE: Final[dict[int, Callable[..., Tensor]]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def forward(operation: LinearOperation, x: Tensor, weight: Tensor) -> Tensor:
    """The operator itself: ``x`` (N, C, *spatial) or (N, *, C), same dtype and device as ``weight``."""
    if operation.family == "linear":
        return functional.linear(x, weight)
    if x.shape[0] == 0:
        return x.new_zeros(operation.output_shape(x.shape))
    if operation.family == "conv":
        return _CONV[len(operation.kernel)](
            x, weight, None, operation.stride, operation.padding, operation.dilation, operation.groups
        )
    return _CONV_TRANSPOSE[len(operation.kernel)](
        x,
        weight,
        None,
        operation.stride,
        operation.padding,
        operation.output_padding,
        operation.groups,
        operation.dilation,
    )


def input_gradient(operation: LinearOperation, shape: Sequence[int], weight: Tensor, gradient: Tensor) -> Tensor:
    """Gradient to an input of ``shape`` from ``gradient``, which has the output's shape."""
    if operation.family == "linear":
        return functional.linear(gradient, weight.t())
    if gradient.shape[0] == 0:
        return gradient.new_zeros(tuple(shape))
    # The backward kernel reads only the shape of the input here.
    x = gradient.new_empty(1).expand(tuple(shape))
    return _backward(operation, gradient, x, weight, (True, False))[0]


def weight_gradient(operation: LinearOperation, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient to the weight, summed over the batch."""
    if operation.family == "linear":
        return gradient.reshape(-1, operation.out_channels).t() @ x.reshape(-1, operation.in_channels)
    if gradient.shape[0] == 0:
        return gradient.new_zeros(operation.weight_shape)
    weight = gradient.new_empty(1).expand(operation.weight_shape)
    return _backward(operation, gradient, x, weight, (False, True))[1]


def _backward(
    operation: LinearOperation, gradient: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    first, second, _ = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        operation.stride,
        operation.padding,
        operation.dilation,
        operation.family == "conv_transpose",
        operation.output_padding,
        operation.groups,
        [*mask, False],
    )
    return first, second
