"""What the zoo hands to capture: a model in eval mode, an example call, its dynamic dimensions and its signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from motte.capture.graph import Dim
from motte.capture.signature import ImagePreprocessing, Signature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from motte.capture.export import Captured

DEFAULT_RANGE: Final = (1, 1024)
"""Range of a dynamic dimension for which nobody states one; capture narrows it to what the model allows."""
BATCH: Final = Dim("batch", *DEFAULT_RANGE)
"""The number of inputs that run together; every model of the zoo has it on axis 0."""
EXAMPLE_BATCH: Final = 2
"""Batch of the examples: torch.export takes an extent of 1 for a constant."""

Axes = Mapping[int, Dim]
"""Which axes of one input are dynamic, and the dimension of each."""


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model ready to be captured.

    ``example_args`` are positional, ``example_kwargs`` by name. ``dims`` maps the name of a parameter of ``forward``
    to its dynamic axes; an input without an entry keeps the shape of its example.
    """

    name: str
    model: nn.Module
    example_args: tuple[Tensor, ...]
    dims: Mapping[str, Axes]
    signature: Signature
    example_kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of parameters, each tied weight once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def capture_built(built: BuiltModel) -> Captured:
    """Capture a model of the zoo on its own example, with its dynamic dimensions.

    Raises:
        CaptureError: it cannot be captured; names the operation and the line of the model.
    """
    from motte.capture.export import capture

    dims = {dim.name: (dim.low, dim.high) for axes in built.dims.values() for dim in axes.values()}
    return capture(
        built.model,
        built.example_args,
        dict(built.example_kwargs),
        name=built.name,
        dims={name: {axis: dim.name for axis, dim in axes.items()} for name, axes in built.dims.items()},
        # A range that is given is never narrowed; only what somebody stated on purpose is.
        dim_ranges={name: limits for name, limits in dims.items() if limits != DEFAULT_RANGE},
    )


def image_example(preprocessing: ImagePreprocessing, seed: int = 0) -> Tensor:
    """Two normal noise images (2, C, crop, crop) f32, seeded: what a photo looks like after normalisation."""
    import torch

    channels = 1 if preprocessing.colour == "grey" else 3
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(EXAMPLE_BATCH, channels, preprocessing.crop, preprocessing.crop, generator=generator)
