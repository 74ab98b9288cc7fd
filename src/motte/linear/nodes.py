"""Which nodes of a captured graph are a linear operator with a stored weight, and which operator each one is.

Exactly what is recognised here can run outside; every other node stays inside, and the reason is a sentence. Needs no
torch: the planning half and the trusted half both ask it, and get the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from motte.capture.graph import Graph, Node, Ref, TensorType, Value, Weight, WeightRef
from motte.capture.ops import OPS
from motte.errors import SettingError
from motte.linear.operation import LinearOperation

_DEFAULTS: Final[Mapping[str, Any]] = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "output_padding": 0,
    "groups": 1,
    "transposed": False,
}
"""What a schema gives for a parameter that a node leaves out; ``padding`` of the text forms is ``"valid"``."""
_CONV: Final = {f"aten.conv{dims}d.{form}": dims for dims in (1, 2, 3) for form in ("default", "padding")}
_TRANSPOSE: Final = {
    "aten.conv_transpose1d.default": 1,
    "aten.conv_transpose2d.input": 2,
    "aten.conv_transpose3d.input": 3,
}
_DTYPES: Final = ("f32", "f64", "bf16")
_PRODUCTS: Final = """
    mm addmm matmul bmm baddbmm addbmm mv addmv inner tensordot einsum bilinear embedding lstm gru rnn_tanh rnn_relu
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
"""
"""Operations that multiply by a stored weight, or look one up, and stay inside whole."""


@dataclass(frozen=True, slots=True)
class LinearNode:
    """A node that is ``operation`` applied to one activation and one stored weight, plus a bias.

    Attributes:
        input: the activation that it reads.
        pad: zeros to put around the input first, as (before, after) for each spatial axis: ``same`` padding that
            differs at the two ends. Empty: none.
    """

    node: str
    weight: str
    input: str
    operation: LinearOperation
    pad: tuple[tuple[int, int], ...] = ()


def weighted_products(graph: Graph) -> Iterator[tuple[Node, LinearNode | str]]:
    """Every node that multiplies by a stored weight, in graph order, with its operator or the reason why it has to
    stay inside."""
    values = graph.values()
    for node in graph.nodes:
        if _is_product(node):
            yield node, _recognise(graph, node, values)


def _is_product(node: Node) -> bool:
    family = node.op.split(".")[1] if node.op.count(".") else node.op
    if node.op == "aten.linear.default" or family.startswith("conv"):
        return True
    return family in _PRODUCTS.split() and any(
        isinstance(arg, WeightRef) for arg in (*node.args, *node.kwargs.values())
    )


def _recognise(graph: Graph, node: Node, values: Mapping[str, Value]) -> LinearNode | str:
    transposed, dims = node.op in _TRANSPOSE, _CONV.get(node.op) or _TRANSPOSE.get(node.op)
    if dims is None and node.op not in ("aten.convolution.default", "aten.linear.default"):
        return f"{node.op} is no convolution and no linear layer"
    given = _arguments(node)
    source, weight, bias = given["input"], given["weight"], given["bias"]
    if not isinstance(source, Ref):
        return "its input is stored, not computed"
    if not isinstance(weight, WeightRef) or not isinstance(bias, WeightRef | None):
        return "its weight or bias is computed, not stored"
    stored = graph.weights[weight.name]
    type_ = values[source.name].type
    refused = _refusal(graph, stored, type_, node)
    if refused is not None:
        return refused
    if node.op == "aten.linear.default":
        return _linear(node, stored, source, type_)
    if given["transposed"] is True:
        transposed = True
    elif given["transposed"] is not False:
        return "its arguments are no constants"
    return _convolution(node, stored, source, type_, given, dims or len(stored.shape) - 2, transposed=transposed)


def _arguments(node: Node) -> dict[str, Any]:
    parameters = OPS[node.op].parameters
    given = {parameter.name: arg for parameter, arg in zip(parameters, node.args, strict=False)}
    valid = {"padding": "valid"} if node.op.endswith(".padding") else {}
    return {**_DEFAULTS, **valid, **given, **node.kwargs}


def _refusal(graph: Graph, stored: Weight, type_: TensorType, node: Node) -> str | None:
    if stored.slice is not None:
        return "it is a tile of a layer that the plan cuts up"
    if stored.dtype not in _DTYPES or type_.dtype != stored.dtype:
        return f"its element types are {type_.dtype} and {stored.dtype}; only f32, f64 and bf16 can be split"
    result = node.outputs[0] if len(node.outputs) == 1 else None
    if result is None or result.type.dtype != stored.dtype:
        return "its result is not used, or has another element type"
    batch = graph.inputs[0].type.shape[:1] if graph.inputs else ()
    if not type_.shape or type_.shape[:1] != batch:
        return "the first axis of its input is not the batch, so that what leaves could not be clipped for each sample"
    return None


def _linear(node: Node, stored: Weight, source: Ref, type_: TensorType) -> LinearNode | str:
    if len(type_.shape) < 3:
        return "a linear layer on one vector for each sample has nothing to decompose"
    if all(extent == 1 for extent in type_.shape[1:-1]):
        return "a linear layer on one vector for each sample has nothing to decompose"
    if len(stored.shape) != 2:
        return "its weight is no matrix"
    return _made(node, stored, source, family="linear", in_channels=stored.shape[1], out_channels=stored.shape[0])


def _convolution(
    node: Node, stored: Weight, source: Ref, type_: TensorType, given: Mapping[str, Any], dims: int, *, transposed: bool
) -> LinearNode | str:
    if len(type_.shape) != dims + 2 or len(stored.shape) != dims + 2 or not 1 <= dims <= 3:
        return "its input has no batch axis, or another number of axes than its weight"
    if all(extent == 1 for extent in type_.shape[2:]):
        return "a convolution over one position for each sample has nothing to decompose"
    kernel = stored.shape[2:]
    padding = given["padding"]
    pad: tuple[tuple[int, int], ...] = ()
    stride, dilation, extra = (_extents(given[name], dims) for name in ("stride", "dilation", "output_padding"))
    groups = given["groups"]
    if stride is None or dilation is None or extra is None or type(groups) is not int:
        return "its arguments are no constants"
    if isinstance(padding, str):
        both = _named_padding(padding, kernel, dilation)
        if both is None:
            return f"unknown padding {padding!r}"
        even = all(before == after for before, after in both)
        padding, pad = ([before for before, _ in both], ()) if even else (0, both)
    sides = _extents(padding, dims)
    if sides is None:
        return "its arguments are no constants"
    if transposed:
        channels = (stored.shape[0], stored.shape[1] * groups)
    else:
        channels = (stored.shape[1] * groups, stored.shape[0])
    return _made(
        node,
        stored,
        source,
        pad,
        family="conv_transpose" if transposed else "conv",
        in_channels=channels[0],
        out_channels=channels[1],
        kernel=kernel,
        stride=stride,
        padding=sides,
        dilation=dilation,
        # aten.convolution carries zeros here for an ordinary convolution; anything else would be refused below.
        output_padding=extra,
        groups=groups,
    )


def _made(
    node: Node, stored: Weight, source: Ref, pad: tuple[tuple[int, int], ...] = (), **geometry: Any
) -> LinearNode | str:
    try:
        operation = LinearOperation(**geometry)
    except SettingError as problem:
        return f"{problem.message}"
    if operation.weight_shape != stored.shape:
        return "its weight has another shape than its arguments say"
    return LinearNode(node.name, stored.name, source.name, operation, pad)


def _extents(arg: object, dims: int) -> tuple[int, ...] | None:
    """One whole number for each spatial axis; None where a size is dynamic."""
    found = (arg,) * dims if type(arg) is int else arg
    if not isinstance(found, tuple | list) or not all(type(each) is int for each in found):
        return None
    whole = tuple(found)
    return whole * dims if len(whole) == 1 else whole if len(whole) == dims else None


def _named_padding(name: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    if name == "valid":
        return tuple((0, 0) for _ in kernel)
    if name != "same":
        return None
    totals = [extent * (size - 1) for extent, size in zip(dilation, kernel, strict=True)]
    # Where the total is odd torch puts the odd one behind.
    return tuple((total // 2, total - total // 2) for total in totals)


__all__ = ["LinearNode", "weighted_products"]
