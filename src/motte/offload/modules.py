"""The split forms of torch's convolution and linear modules. They hold the same parameters under the same names.

A module becomes split by changing its class, so that its hooks, its mode and its parameters stay what they are. Only
exact types are split: a subclass may do in its ``forward`` what nobody here knows of.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.offload.rules import Rule


class SplitModule(nn.Module):
    """What all split modules share: a rule for the product, and the bias, which is added inside."""

    weight: Tensor
    bias: Tensor | None
    product_rule: Rule
    operation: LinearOperation

    def _product(self, x: Tensor, channel_axis: int) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        y = self.product_rule.product(x, weight, self._inside)
        if bias is None:
            return y
        return y + bias.reshape(-1, *[1] * (y.dim() - 1 - channel_axis))

    def _inside(self, x: Tensor, weight: Tensor) -> Tensor:
        return compute.forward(self.operation, x, weight)


class SplitConvolution(SplitModule):
    """Convolutions, plain and transposed. Padding that is not zeros, or uneven, is added inside before the product."""

    padded_inside: tuple[int, ...] | None
    """For ``torch.nn.functional.pad``; None where the operator itself pads."""
    pad_mode: str

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the plain module: (N, C, *spatial) or (C, *spatial)."""
        dims = len(self.operation.kernel)
        if output_size is not None or x.dim() not in (dims + 1, dims + 2):
            # An output size chosen at run time changes the operator, and a wrong shape deserves torch's own error.
            arguments = (x,) if output_size is None else (x, output_size)
            return cast(Tensor, super(SplitModule, self).forward(*arguments))
        if x.dim() == dims + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if self.padded_inside is not None:
            x = functional.pad(x, self.padded_inside, mode=self.pad_mode)
        return self._product(x, channel_axis=1)


class SplitConv1d(SplitConvolution, nn.Conv1d):
    """``torch.nn.Conv1d``, split."""


class SplitConv2d(SplitConvolution, nn.Conv2d):
    """``torch.nn.Conv2d``, split."""


class SplitConv3d(SplitConvolution, nn.Conv3d):
    """``torch.nn.Conv3d``, split."""


class SplitConvTranspose1d(SplitConvolution, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d``, split."""


class SplitConvTranspose2d(SplitConvolution, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``, split."""


class SplitConvTranspose3d(SplitConvolution, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d``, split."""


class SplitLinear(SplitModule, nn.Linear):  # type: ignore[misc]
    """``torch.nn.Linear``, split over tokens: (N, *, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module: (*, C)."""
        if x.dim() < 2:
            return functional.linear(x, self.weight, self.bias)
        return self._product(x, channel_axis=x.dim() - 1)


_SPLIT: Final[dict[type[nn.Module], type[SplitModule]]] = {
    nn.Conv1d: SplitConv1d,
    nn.Conv2d: SplitConv2d,
    nn.Conv3d: SplitConv3d,
    nn.ConvTranspose1d: SplitConvTranspose1d,
    nn.ConvTranspose2d: SplitConvTranspose2d,
    nn.ConvTranspose3d: SplitConvTranspose3d,
    nn.Linear: SplitLinear,
}


def can_split(module: nn.Module) -> bool:
    """Whether ``module`` is one of the exact types that have a split form."""
    return type(module) in _SPLIT


def operation_of(module: nn.Module) -> LinearOperation:
    """The operator of a module for which :func:`can_split` holds, as it runs after padding."""
    if isinstance(module, nn.Linear):
        return LinearOperation("linear", module.in_features, module.out_features)
    conv = cast(Any, module)
    inside = _padding_inside(conv)
    dims = len(conv.kernel_size)
    return LinearOperation(
        "conv_transpose" if conv.transposed else "conv",
        conv.in_channels,
        conv.out_channels,
        tuple(conv.kernel_size),
        tuple(conv.stride),
        (0,) * dims if inside is not None or conv.padding == "valid" else _even_padding(conv),
        tuple(conv.dilation),
        tuple(conv.output_padding),
        conv.groups,
    )


def make_split(module: nn.Module, operation: LinearOperation, rule: Rule) -> None:
    """Turn ``module`` into its split form, in place."""
    if not isinstance(module, nn.Linear):
        conv = cast(Any, module)
        conv.padded_inside = _padding_inside(conv)
        conv.pad_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    module.__class__ = _SPLIT[type(module)]
    split = cast(SplitModule, module)
    split.operation = operation
    split.product_rule = rule


def _even_padding(conv: Any) -> tuple[int, ...]:
    if conv.padding == "same":
        return tuple(int(amount) for amount in conv._reversed_padding_repeated_twice[::-2])
    return tuple(conv.padding)


def _padding_inside(conv: Any) -> tuple[int, ...] | None:
    both_ends = tuple(int(amount) for amount in conv._reversed_padding_repeated_twice)
    uneven = any(first != second for first, second in zip(both_ends[::2], both_ends[1::2], strict=True))
    if not any(both_ends) or (conv.padding_mode == "zeros" and not (conv.padding == "same" and uneven)):
        return None
    return both_ends
