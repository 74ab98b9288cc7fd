"""Running a chain of parts: which value is held from where to where. Needs no torch; the trusted worker runs this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from motte.capture.graph import Graph
from motte.engines.interface import Array, Program
from motte.split.split import Part

WeightsOfPart = Callable[[int], AbstractContextManager[Mapping[str, Array]]]
"""Gives the weights of part ``index`` (from 0) for the length of a ``with`` block."""


def run_parts(
    parts: Sequence[Part],
    programs: Sequence[Program],
    graph: Graph,
    inputs: list[Array],
    weights: WeightsOfPart,
    dims: Mapping[str, int],
) -> list[Array]:
    """Run every part once, in order.

    Each value is held from the part that makes it to the last one that reads it, as it is: strides are kept, and
    nothing is copied.

    Args:
        parts, programs: of one plan, in order; ``programs[i]`` compiled from ``parts[i].graph``.
        graph: the captured graph, of which only the names of inputs and outputs are used.
        inputs: in the graph's order. The list is **emptied**, so that an input is dropped after its last use.
        weights: called once for each part, in order; what it gave is not used after its block ends.
        dims: the value of every named dynamic dimension.

    Returns:
        The model's outputs, in order.
    """
    last_reader = {value.name: part.index for part in parts for value in part.graph.inputs}
    returned = set(graph.outputs)
    names = [value.name for value in graph.inputs]
    live = {name: array for name, array in zip(names, inputs, strict=True) if name in last_reader or name in returned}
    inputs.clear()
    for part, program in zip(parts, programs, strict=True):
        given: list[Array] = []
        for value in part.graph.inputs:
            dropped = last_reader[value.name] == part.index and value.name not in returned
            given.append(live.pop(value.name) if dropped else live[value.name])
        with weights(part.index) as held:
            made = program.run(given, held, dims)
        live.update(zip(part.graph.outputs, made, strict=True))
        # Nothing of this part may live on in a local name while the next one runs.
        del held, made
    return [live[name] for name in graph.outputs]
