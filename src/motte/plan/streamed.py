"""The rule that a streamed run keeps: how much weight memory a chain of parts needs. One place, for both sides.

The planner makes plans that keep the rule, the trusted worker refuses those that break it. Both call
:func:`streamed_need`, which knows nothing but two numbers a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motte.capture.graph import Graph, Node
from motte.plan.storage import Remade, reads, weight_views

WEIGHT_ALIGNMENT_BYTES = 64
"""Each weight of a part starts at a multiple of this: a cache line, and what torch's own allocator gives."""
ARENA_SLACK_BYTES = 4096
"""One page: two parts share one block from its two ends, and the upper one starts on a page."""

_PRODUCTS = """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear matmul mm bmm
    addmm baddbmm addbmm mv addmv einsum tensordot inner
"""
_RECURRENT = "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"


@dataclass(frozen=True, slots=True)
class PartNeed:
    """What one part needs of weight memory: its own laid-out bytes, and the engine's largest copy while it runs."""

    weight_bytes: int
    copy_bytes: int


def aligned(weight_bytes: int) -> int:
    """``weight_bytes`` rounded up to where the next weight may start."""
    return -(-weight_bytes // WEIGHT_ALIGNMENT_BYTES) * WEIGHT_ALIGNMENT_BYTES


def copy_bytes_of(node: Node, graph: Graph, views: Mapping[str, Remade]) -> int:
    """Bytes of weights that an engine may copy to run ``node``; 0 for an operation that copies none.

    oneDNN reorders the weight of a convolution or a matrix product into blocks of its own; the copy lives as long as
    the operation runs. A recurrent layer may pack all of its weights at once.
    """
    family = node.op.split(".")[1] if "." in node.op else node.op
    sizes = [graph.weights[name].bytes for name in reads(node, views)[1]]
    if family in _PRODUCTS.split():
        return max(sizes, default=0)
    return sum(sizes) if family in _RECURRENT.split() else 0


def copy_bytes(graph: Graph) -> int:
    """The largest engine copy among all nodes of ``graph`` (a part): one operation runs at a time."""
    views = weight_views(graph)
    return max((copy_bytes_of(node, graph, views) for node in graph.nodes), default=0)


def streamed_need(parts: Sequence[PartNeed]) -> int:
    """Bytes of weight memory of a streamed run.

    Parts run in a cycle: while part i runs, part i+1 is opened, and while the last one runs, the first one is, for the
    next call. So the need is the largest of (part i + part i+1 + the engine's copy while part i runs), plus one page.
    A single part is never opened ahead.
    """
    following = [*parts[1:], parts[0]] if len(parts) > 1 else [PartNeed(0, 0)]
    pairs = zip(parts, following, strict=False)
    return max((a.weight_bytes + b.weight_bytes + a.copy_bytes for a, b in pairs), default=0) + ARENA_SLACK_BYTES
