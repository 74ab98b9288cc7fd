"""Where each weight of a part lies in the part's bytes: what is sealed, and what the engine reads in place.

Weights stand in the order of their first use, each at a multiple of ``WEIGHT_ALIGNMENT_BYTES`` (64), zeros between.
That is a cache line and what torch's own allocator gives: vector code may take another path, and so give other bits,
on other alignments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from motte.capture.graph import Graph, read_weights
from motte.plan.streamed import aligned


@dataclass(frozen=True, slots=True)
class PartLayout:
    """``offsets``: start of each weight in bytes, in order; ``bytes``: size of the part's plaintext."""

    offsets: Mapping[str, int]
    bytes: int


def lay_out(graph: Graph) -> PartLayout:
    """The layout of the part ``graph``; a function of the graph alone, so both sides compute the same one."""
    offsets: dict[str, int] = {}
    end = 0
    for name in dict.fromkeys(name for node in graph.nodes for name in read_weights(node)):
        start = aligned(end)
        offsets[name] = start
        end = start + graph.weights[name].bytes
    return PartLayout(offsets, end)
