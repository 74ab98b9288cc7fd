"""Inputs to compare engines on: the example's kind of values, seeded, at other sizes of the dynamic dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from motte.capture.graph import Graph
from motte.capture.sizes import shape_of


def other_sizes(graph: Graph, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes to try beside ``sizes``: every dimension at its least, since 1 is where a translation goes wrong, and every
    one larger by 1, since a fixed size hides behind the example's. ``sizes`` itself where nothing may vary."""
    least = {dim.name: dim.low for dim in graph.dims}
    larger = {dim.name: min(sizes[dim.name] + 1, dim.high) for dim in graph.dims}
    found = [other for other in (least, larger) if other != sizes]
    return found or [dict(sizes)]


def random_inputs(graph: Graph, inputs: Sequence[Tensor], sizes: Mapping[str, int], *, seed: int) -> list[Tensor]:
    """Inputs of ``graph`` at other sizes.

    Args:
        inputs: the example, in the graph's order, at its own sizes.
        sizes: of the dynamic dimensions.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        _like(example, shape_of(value.type, sizes), generator)
        for value, example in zip(graph.inputs, inputs, strict=True)
    ]


def _like(example: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    flat = example.detach().reshape(-1)
    if not flat.numel():
        return torch.zeros(shape, dtype=example.dtype)
    if example.is_floating_point():
        wide = flat.to(torch.float64)
        wide = wide[wide.isfinite()]
        if not wide.numel():
            return _repeated(example, shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        # Within the example's range, so that what is never negative stays so.
        found = (noise * wide.std(correction=0) + wide.mean()).clamp(wide.min(), wide.max())
        return found.to(example.dtype)
    if example.dtype is torch.bool or bool(((flat == 0) | (flat == 1)).all()):
        return _repeated(example, shape)
    # Only values that the example has: an index stays one that the model knows.
    return flat[torch.randint(flat.numel(), shape, generator=generator)]


def _repeated(example: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask keeps its pattern, cut or repeated to the other shape."""
    for axis, extent in enumerate(shape):
        example = example.index_select(axis, torch.arange(extent) % max(1, example.shape[axis]))
    return example
