"""One linear operator without its weights and without a bias: what both sides must agree on before a tensor crosses.

The bias is no part of it. It is added inside, after the two halves were summed, and never leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from motte.errors import FrameError, SettingError
from motte.limits import MAX_KERNEL_EXTENT, MAX_OPERATION_CHANNELS
from motte.strict_json import Fields

Family = Literal["conv", "conv_transpose", "linear"]
FAMILIES: Final = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True, slots=True)
class LinearOperation:
    """Geometry of one linear operator.

    ``conv`` and ``conv_transpose`` act on (N, C, *spatial) with 1 to 3 spatial dimensions; their weights are
    (M, C/groups, *kernel) and (C, M/groups, *kernel), and the zero padding is the same at both ends of an axis.
    ``linear`` acts on (N, *, C) with weights (M, C); its tuples are empty and ``groups`` is 1.

    Raises:
        SettingError: values that no operator has.
    """

    family: Family
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        dims = len(self.kernel)
        lists = (self.kernel, self.stride, self.padding, self.dilation, self.output_padding)
        if self.family not in FAMILIES or any(len(each) != dims for each in lists):
            raise SettingError("not a linear operator", got=repr(self))
        if (dims == 0) != (self.family == "linear") or dims > 3 or (dims == 0 and self.groups != 1):
            raise SettingError("a convolution has 1 to 3 spatial dimensions, a linear layer none", got=repr(self))
        channels = (self.in_channels, self.out_channels)
        if not all(1 <= each <= MAX_OPERATION_CHANNELS for each in channels) or self.groups < 1:
            raise SettingError("channels out of bounds", expected=f"1 to {MAX_OPERATION_CHANNELS}", got=repr(self))
        if any(each % self.groups for each in channels):
            raise SettingError("channels are not a multiple of the groups", got=repr(self))
        ones = (*self.kernel, *self.stride, *self.dilation)
        zeros = (*self.padding, *self.output_padding)
        if not all(1 <= each <= MAX_KERNEL_EXTENT for each in ones) or not all(
            0 <= each <= MAX_KERNEL_EXTENT for each in zeros
        ):
            raise SettingError("geometry out of bounds", expected=f"at most {MAX_KERNEL_EXTENT}", got=repr(self))
        if self.family == "conv" and any(self.output_padding):
            raise SettingError("only a transposed convolution has output padding", got=repr(self))
        limit = (max(pair) for pair in zip(self.stride, self.dilation, strict=True))
        if any(extra >= bound for extra, bound in zip(self.output_padding, limit, strict=True)):
            raise SettingError("output padding must be below stride or dilation", got=repr(self))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight tensor, as the torch module of the same name holds it."""
        if self.family == "conv_transpose":
            return (self.in_channels, self.out_channels // self.groups, *self.kernel)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input of ``shape`` (with its batch dimension).

        Raises:
            SettingError: the operator does not take this shape.
        """
        if self.family == "linear":
            if len(shape) < 2 or shape[-1] != self.in_channels:
                raise SettingError(
                    "not an input of this operator", expected=f"(N, *, {self.in_channels})", got=str(shape)
                )
            return (*shape[:-1], self.out_channels)
        if len(shape) != 2 + len(self.kernel) or shape[1] != self.in_channels:
            expected = f"(N, {self.in_channels}) and {len(self.kernel)} extents"
            raise SettingError("not an input of this operator", expected=expected, got=str(tuple(shape)))
        spatial = tuple(self._extent(axis, size) for axis, size in enumerate(shape[2:]))
        if any(extent < 1 for extent in spatial):
            raise SettingError("the input is smaller than the kernel", expected=str(self.kernel), got=str(tuple(shape)))
        return (shape[0], self.out_channels, *spatial)

    def _extent(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        if self.family == "conv":
            return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1
        return (size - 1) * self.stride[axis] - 2 * self.padding[axis] + reach + self.output_padding[axis] + 1

    def multiply_adds(self, shape: Sequence[int]) -> int:
        """Multiply-adds of a forward pass over an input of ``shape``, padding counted; each gradient costs the same."""
        output = self.output_shape(shape)
        per_weight = math.prod(shape[2:]) if self.family == "conv_transpose" else math.prod(output[2:])
        if self.family == "linear":
            per_weight = math.prod(shape[1:-1])
        return shape[0] * per_weight * math.prod(self.weight_shape)

    def to_json(self) -> dict[str, Any]:
        """Plain values for :func:`motte.strict_json.canonical`."""
        lists = ("kernel", "stride", "padding", "dilation", "output_padding")
        numbers = ("in_channels", "out_channels", "groups")
        return {
            "family": self.family,
            **{name: getattr(self, name) for name in numbers},
            **{name: list(getattr(self, name)) for name in lists},
        }

    @staticmethod
    def read(value: object, where: str) -> LinearOperation:
        """From **unverified** JSON values.

        Raises:
            FrameError: a missing, unknown or ill-typed field, or an operator that cannot be.
        """
        fields = Fields(value, where=where, error=FrameError)

        def extents(name: str) -> tuple[int, ...]:
            return tuple(fields.items(name, max_items=3, read=_small))

        try:
            operation = LinearOperation(
                family=cast(Family, fields.choice("family", FAMILIES)),
                in_channels=fields.integer("in_channels", low=1, high=MAX_OPERATION_CHANNELS),
                out_channels=fields.integer("out_channels", low=1, high=MAX_OPERATION_CHANNELS),
                groups=fields.integer("groups", low=1, high=MAX_OPERATION_CHANNELS),
                kernel=extents("kernel"),
                stride=extents("stride"),
                padding=extents("padding"),
                dilation=extents("dilation"),
                output_padding=extents("output_padding"),
            )
        except SettingError as problem:
            raise FrameError(problem.message, where=where, got=problem.got, expected=problem.expected) from problem
        fields.done()
        return operation


def _small(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_KERNEL_EXTENT:
        raise FrameError("not an extent", where=where, got=repr(value)[:80])
    return value
