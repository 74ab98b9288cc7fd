"""Floating-point operations of one node, by convention.

A multiply-add counts as 2. Convolutions, transposed ones and matrix products count their multiply-adds and no bias;
attention counts its two products. A view counts 0. Everything else counts one per element: of its outputs or of its
largest input, whichever is more (a pooling or a mean reads more than it writes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from motte.capture.graph import Arg, Node, Ref, WeightRef, references

Shape = tuple[int, ...]
ShapeOf = Callable[[str], Shape]


def flops_of(node: Node, values: Mapping[str, Shape], weights: Mapping[str, Shape], *, view: bool) -> int:
    """FLOPs of ``node``; ``values`` and ``weights`` give the concrete shapes of everything that it reads and makes."""
    if view:
        return 0

    def shape(arg: Arg) -> Shape:
        if isinstance(arg, Ref):
            return values[arg.name]
        if isinstance(arg, WeightRef):
            return weights[arg.name]
        return ()

    made = [values[value.name] for value in node.outputs if value is not None]
    family = node.op.split(".")[1] if "." in node.op else node.op
    counted = _FAMILIES.get(family)
    if counted is not None and made:
        return counted([shape(arg) for arg in node.args], made[0], node)
    read = max((prod(values[ref.name]) for ref in references(node) if isinstance(ref, Ref)), default=0)
    return max(sum(map(prod, made)), read)


def _convolution(args: list[Shape], out: Shape, node: Node) -> int:
    # Each output element is one dot product with a filter: (in / groups) * kernel long.
    if node.op == "aten.convolution.default" and len(node.args) > 6 and node.args[6] is True:
        return _transposed(args, out, node)
    return 2 * prod(out) * prod(args[1][1:])


def _transposed(args: list[Shape], out: Shape, node: Node) -> int:
    # Each input element is spread over (out / groups) * kernel output elements.
    return 2 * prod(args[0]) * prod(args[1][1:])


def _linear(args: list[Shape], out: Shape, node: Node) -> int:
    return 2 * prod(out) * args[1][-1]


def _product(args: list[Shape], out: Shape, node: Node) -> int:
    return 2 * prod(out) * args[0][-1]


def _added_product(args: list[Shape], out: Shape, node: Node) -> int:
    return 2 * prod(out) * args[1][-1]


def _attention(args: list[Shape], out: Shape, node: Node) -> int:
    # (L, E) x (E, S), then (L, S) x (S, Ev); ``out`` is (..., L, Ev) with the batch and the heads in front.
    query, key = args[0], args[1]
    scores = prod(out[:-1]) * key[-2]
    return 2 * scores * query[-1] + 2 * scores * out[-1]


_FAMILIES: Mapping[str, Callable[[list[Shape], Shape, Node], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot"), _product),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), _added_product),
    "scaled_dot_product_attention": _attention,
}
