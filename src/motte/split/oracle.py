"""The proof that a plan changes nothing: parts(x) against model(x), on given inputs, with the same engine and threads.

Bit for bit: every value that crosses a cut and every output, with dtype, shape and strides. Where operations are tiled,
the chain of parts equals the whole *tiled* graph bit for bit, and its outputs the untiled ones to ``TILED_TOLERANCE``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motte.capture.binding import bind_dims
from motte.capture.graph import Graph, Weight
from motte.engines.interface import Array, Engine, Program
from motte.errors import GraphError, MismatchError
from motte.plan.plan import Plan
from motte.plan.tile import apply_tiles
from motte.split.chain import run_parts
from motte.split.split import Part, split

TILED_TOLERANCE = 1e-6
"""Largest |difference| over largest |reference| of an output of a tiled model."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPE_NAMES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was compared: ``values`` tensors bit for bit; outputs of a tiled model differ by ``tiled_difference``."""

    parts: int
    values: int
    tiled_difference: float


def check_parts(
    graph: Graph, plan: Plan, engine: Engine, weights: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> Agreement:
    """Compare the parts of ``plan`` with the whole captured ``graph``.

    Args:
        engine: whose arrays are torch tensors.
        weights: the captured tensors by name.
        inputs: in the graph's order.

    Raises:
        MismatchError: naming the first value, in order of definition, that differs.
        PlanError: the plan breaks a rule. InputError: the inputs do not fit the graph.
    """
    dims = bind_dims(graph, [(_DTYPE_NAMES.get(x.dtype, str(x.dtype)), tuple(x.shape)) for x in inputs])
    parts = split(graph, plan)
    tiled = apply_tiles(graph, plan.tiles)
    programs = [_Recording(engine.compile(part.graph), part) for part in parts]

    @contextmanager
    def held(index: int) -> Iterator[Mapping[str, Array]]:
        yield weights_of(parts[index].graph, weights)

    answers = run_parts(parts, programs, graph, list(inputs), held, dims)
    names = [name for part in parts for name in part.graph.outputs]
    labels = tuple(f"value{index}" for index in range(len(names) + len(tiled.outputs)))
    observed = replace(tiled, outputs=(*names, *tiled.outputs), output_names=labels)
    wanted = engine.compile(observed).run(list(inputs), weights_of(tiled, weights), dims)
    made = [(part.index + 1, name, value) for program, part in zip(programs, parts, strict=True)
            for name, value in zip(part.graph.outputs, program.made, strict=True)]  # fmt: skip
    for (index, name, value), reference in zip(made, wanted, strict=False):
        _same_bits(value, reference, f"value {name}, made by part {index} of {len(parts)}")
    for name, value, reference in zip(graph.output_names, answers, wanted[len(names) :], strict=True):
        _same_bits(value, reference, f"output {name}")
    difference = 0.0
    if plan.tiles:
        untiled = engine.compile(graph).run(list(inputs), dict(weights), dims)
        difference = max(
            _close(value, reference, f"output {name}")
            for name, value, reference in zip(graph.output_names, answers, untiled, strict=True)
        )
    return Agreement(len(parts), len(made) + len(answers), difference)


def weights_of(graph: Graph, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that ``graph`` (a part, or a tiled graph) reads; slices are copied out in their memory order.

    Raises:
        GraphError: a source that is missing.
    """
    return {name: _weight(weight, weights) for name, weight in graph.weights.items()}


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Largest |difference| over largest |reference|; NaN or infinite when they differ in what is not finite."""
    wide, other = value.to(torch.float64), reference.to(torch.float64)
    if wide.numel() == 0 or torch.equal(wide, other):
        return 0.0
    scale = float(other.abs().max())
    return float((wide - other).abs().max()) / scale if scale else float("inf")


class _Recording:
    """A program that keeps what it made."""

    def __init__(self, program: Program, part: Part) -> None:
        self._program = program
        self.part = part
        self.made: list[Array] = []

    def run(self, inputs: list[Array], weights: Mapping[str, Array], dims: Mapping[str, int]) -> list[Array]:
        """See :class:`motte.engines.interface.Program`."""
        found = self._program.run(inputs, weights, dims)
        self.made = list(found)
        return found


def _weight(weight: Weight, weights: Mapping[str, Tensor]) -> Tensor:
    cut = weight.slice
    source = weight.name if cut is None else cut.source
    if source not in weights:
        raise GraphError("a weight of the graph is missing", where=source)
    if cut is None:
        return weights[source]
    tensor = weights[source].detach().narrow(cut.axis, cut.start, cut.stop - cut.start)
    back = sorted(range(len(weight.order)), key=weight.order.__getitem__)
    return tensor.permute(weight.order).clone(memory_format=torch.contiguous_format).permute(back)


def _same_bits(value: Tensor, reference: Tensor, where: str) -> None:
    facts = [
        ("dtype", value.dtype, reference.dtype),
        ("shape", tuple(value.shape), tuple(reference.shape)),
        ("strides", value.stride(), reference.stride()),
    ]
    for what, got, expected in facts:
        if got != expected:
            raise MismatchError(
                f"the parts give another {what} than the whole", where=where, expected=str(expected), got=str(got)
            )
    # As integers: 0.0 and -0.0 differ, and a NaN equals itself.
    bits = _BITS[value.element_size()]
    if not torch.equal(value.view(bits), reference.view(bits)):
        count = int((value.view(bits) != reference.view(bits)).sum())
        size = f"{relative_difference(value, reference):.3g}"
        raise MismatchError(
            "the parts give other bits than the whole",
            where=where,
            got=f"{count} of {value.numel()} elements differ, by {size} of the largest",
            hint="run both with the same thread count; if the plan is tiled, try it without tiles",
        )


def _close(value: Tensor, reference: Tensor, where: str) -> float:
    same_type = value.dtype == reference.dtype and value.shape == reference.shape
    difference = relative_difference(value, reference) if same_type else float("inf")
    if not difference <= TILED_TOLERANCE:
        raise MismatchError(
            "the tiled parts are too far from the whole",
            where=where,
            expected=f"at most {TILED_TOLERANCE} of the largest element",
            got=f"{difference:.3g}" if same_type else f"{value.dtype} {tuple(value.shape)}",
            hint="raise the bound, so that less is tiled",
        )
    return difference


__all__ = ["TILED_TOLERANCE", "Agreement", "check_parts", "relative_difference", "weights_of"]
