"""Evaluate what depends on constants only, such as the shift masks of a Swin block, once at capture. Imports torch.

Only operations that give the same bits on every machine are evaluated (copies, comparisons, single IEEE additions and
multiplications: nothing transcendental, no sums), and nothing that reads a parameter: a result would be a second,
derived copy of the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from motte.capture import tensors
from motte.capture.graph import (
    DTYPE_BYTES,
    Arg,
    DType,
    Graph,
    MemoryFormat,
    Node,
    Ref,
    Size,
    Value,
    Weight,
    WeightRef,
    read_weights,
    references,
)

MAX_FOLDED_BYTES: Final = 4 << 20
"""Largest value that is evaluated; a larger one is computed when the graph runs."""

_EXACT_NAMES: Final = """
zeros.default ones.default full.default arange.default arange.start arange.start_step scalar_tensor.default
eye.default eye.m zeros_like.default ones_like.default full_like.default fill.Scalar fill.Tensor zero.default
view.default _unsafe_view.default permute.default transpose.int t.default expand.default squeeze.default squeeze.dim
squeeze.dims unsqueeze.default slice.Tensor select.int clone.default _to_copy.default cat.default stack.default
repeat.default flip.default roll.default tril.default triu.default index.Tensor index_select.default gather.default
masked_fill.Scalar masked_fill.Tensor where.self where.ScalarOther where.ScalarSelf where.Scalar
slice_scatter.default select_scatter.default scatter.src scatter.value add.Tensor sub.Tensor mul.Tensor neg.default
abs.default rsub.Scalar minimum.default maximum.default eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor
le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar ge.Tensor logical_and.default logical_or.default
logical_not.default bitwise_and.Tensor bitwise_or.Tensor bitwise_not.default __and__.Tensor __or__.Tensor
"""
_EXACT: Final = frozenset(f"aten.{name}" for name in _EXACT_NAMES.split())


def fold(
    graph: Graph, weights: Mapping[str, torch.Tensor], parameters: frozenset[str]
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """Replace constant values by weights.

    Args:
        graph, weights: as captured.
        parameters: names of the weights that are trained; nothing that reads one is evaluated.

    Returns:
        The graph without the evaluated nodes, and the weights that it still reads.
    """
    known: dict[str, torch.Tensor] = {}
    constants = {name: tensor for name, tensor in weights.items() if name not in parameters}
    kept: list[Node] = []
    for node in graph.nodes:
        result = _evaluate(node, known, constants)
        if result is None:
            kept.append(node)
        else:
            known[node.name] = result
    stored = {name: tensor for name, tensor in known.items() if name in graph.outputs}
    kept = [*(_kept_outputs(graph, stored)), *kept]
    return _rewrite(graph, kept, known, weights)


def _evaluate(
    node: Node, known: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    value = node.outputs[0] if len(node.outputs) == 1 else None
    if node.op not in _EXACT or value is None or not _small(value) or _rounds(node, value):
        return None

    def plain(arg: Arg) -> Any:
        match arg:
            case Ref(name):
                return known[name]
            case WeightRef(name):
                return constants[name]
            case DType() | MemoryFormat():
                return tensors.plain_argument(arg)
            case tuple():
                return [plain(item) for item in arg]
        return arg

    for ref in references(node):
        if ref.name not in (known if isinstance(ref, Ref) else constants):
            return None
    if any(_has_size(arg) for arg in (*node.args, *node.kwargs.values())):
        return None
    with torch.inference_mode():
        result = tensors.overload(node.op)(
            *(plain(arg) for arg in node.args), **{key: plain(arg) for key, arg in node.kwargs.items()}
        )
    return result if isinstance(result, torch.Tensor) else None


def _rounds(node: Node, value: Value) -> bool:
    # A scaled addition and a range of fractions may be fused into one rounding on some machines and not on others.
    fraction = value.type.dtype in ("f64", "f32", "f16", "bf16")
    return fraction and (node.op.startswith("aten.arange") or "alpha" in node.kwargs or node.op == "aten.rsub.Scalar")


def _small(value: Value) -> bool:
    count = DTYPE_BYTES[value.type.dtype]
    for extent in value.type.shape:
        if not isinstance(extent, int):
            return False
        count *= extent
    return count <= MAX_FOLDED_BYTES


def _has_size(arg: Arg) -> bool:
    return isinstance(arg, Size) or (isinstance(arg, tuple) and any(_has_size(item) for item in arg))


def _kept_outputs(graph: Graph, stored: Mapping[str, torch.Tensor]) -> list[Node]:
    """An output of the graph must be a value: a constant one stays a node, a copy of the constant."""
    by_name = {node.name: node for node in graph.nodes}
    return [
        replace(by_name[name], op="aten.clone.default", args=(Ref(name),), kwargs={}) for name in dict.fromkeys(stored)
    ]


def _rewrite(
    graph: Graph, kept: list[Node], known: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> tuple[Graph, dict[str, torch.Tensor]]:
    records, kept_weights = dict(graph.weights), dict(weights)
    by_content: dict[tuple[object, ...], str] = {}

    def constant(name: str) -> WeightRef:
        tensor = known[name]
        order = tensors.memory_order(tensor)
        if order is None:
            tensor, order = tensor.contiguous(), tuple(range(tensor.dim()))
        flat = tensors.flatten(tensor, order)
        content = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest() if flat.numel() else ""
        key = (content, tensor.dtype, tuple(tensor.shape), order)
        if key not in by_content:
            label = f"constant.{name}"
            while label in records:
                label += "_"
            by_content[key] = label
            records[label] = Weight(label, tensors.dtype_name(tensor.dtype), tuple(tensor.shape), order)
            kept_weights[label] = tensor.clone()
        return WeightRef(by_content[key])

    def change(arg: Arg) -> Arg:
        if isinstance(arg, Ref) and arg.name in known:
            return constant(arg.name)
        return tuple(change(item) for item in arg) if isinstance(arg, tuple) else arg

    nodes = tuple(
        replace(
            node,
            args=tuple(change(arg) for arg in node.args),
            kwargs={key: change(arg) for key, arg in node.kwargs.items()},
        )
        for node in kept
    )
    used = {weight for node in nodes for weight in read_weights(node)}
    records = {name: record for name, record in records.items() if name in used}
    return replace(graph, nodes=nodes, weights=records), {name: kept_weights[name] for name in records}
