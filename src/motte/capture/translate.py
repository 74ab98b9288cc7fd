"""An exported program -> a graph: every value a tensor, every operation from the closed table, every name readable.

Export speaks in SymInts, getitems, placeholders for weights and devices; a graph knows none of them. What has no
meaning in a graph is refused here, with the operation and the line of the user's model.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from motte.capture import lines, naming, symbols, tensors
from motte.capture.graph import (
    Arg,
    Dim,
    DType,
    Graph,
    MemoryFormat,
    Node,
    Ref,
    Size,
    TensorType,
    Value,
    Weight,
    WeightRef,
    read_values,
    read_weights,
)
from motte.capture.ops import ABSENT, OPS
from motte.errors import CaptureError, GraphError

_WITHOUT_RESULT: Final = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)
"""Checks that export adds about element types and sizes; the graph states both as types and dimensions."""

_IDENTITIES: Final = frozenset(
    {"aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default", "aten.clone.default"}
)
"""Dropped where strides stay: nothing in a graph writes in place, so a copy is its original."""

_NEW: Final = {
    "aten.new_zeros.default": "aten.zeros.default",
    "aten.new_ones.default": "aten.ones.default",
    "aten.new_full.default": "aten.full.default",
}
"""These read only the element type of their first argument; without it that tensor need not stay alive."""

_HINTS: Final = (
    (
        r"\b(item|_local_scalar_dense|nonzero|masked_select|unique\w*|_assert_async)\b",
        "the result depends on values in a tensor; use where() or multiplication by a mask",
    ),
    (
        r"\b(rand\w*|normal\w*|bernoulli|multinomial|dropout|native_dropout|rrelu\w*)\b",
        "random operations cannot be captured; make the noise an input",
    ),
    (
        r"\b(cond|while_loop|scan|map_impl)\b",
        "data-dependent control flow cannot be captured; compute both branches and select with where()",
    ),
    (r"\bautocast\b", "switch autocast off, or convert the model with .half() or .bfloat16() first"),
)


@dataclass
class _Lists:
    """The results of an operation with several: the value behind each, made when it is first used."""

    name: str
    types: tuple[TensorType | None, ...]


@dataclass(frozen=True)
class _Unusable:
    """A number that no graph can hold (``why``); refused when something uses it."""

    why: str


_Known = Ref | WeightRef | Size | int | _Lists | _Unusable | None


@dataclass
class Translation:
    """The graph under construction, and what is known about every node of the exported program."""

    program: ExportedProgram
    weights: dict[str, torch.Tensor]
    symbols: Mapping[sympy.Symbol, str]
    aliases: Mapping[str, tuple[str, ...]]
    namer: naming.Namer
    known: dict[torch.fx.Node, _Known] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    stored: dict[tuple[object, ...], str] = field(default_factory=dict)
    records: dict[str, Weight] = field(default_factory=dict)


def translate(
    program: ExportedProgram,
    *,
    name: str,
    dims: tuple[Dim, ...],
    names: Mapping[sympy.Symbol, str],
    input_names: tuple[str, ...],
    aliases: Mapping[str, tuple[str, ...]],
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """Translate a decomposed program.

    Args:
        program: after ``run_decompositions({})``.
        name: of the graph.
        dims, names: the dynamic dimensions, and which one each symbol of export stands for.
        input_names: one for each leaf of the example inputs, in calling order.
        aliases: for each state_dict name, all names of the same tensor (itself included), in state_dict order.

    Returns:
        The graph and its weights; the weights share memory with the model where they are dense.

    Raises:
        CaptureError: something that a graph cannot hold.
    """
    work = Translation(program, {}, names, aliases, naming.Namer(_call_nodes(program)))
    inputs = _placeholders(work, input_names)
    for node in program.graph.nodes:
        if node.op == "call_function":
            work.known[node] = _call(work, node)
        elif node.op == "get_attr":
            # A nested graph, argument of a control-flow operator: refused under the operator's name.
            work.known[node] = _Unusable("a nested graph")
        elif node.op not in ("placeholder", "output"):
            raise CaptureError("not a plain operation", op=str(node.target), where=lines.of_node(node))
    outputs, output_names = _outputs(work)
    nodes = _live(work.nodes, outputs)
    used = {weight for node in nodes for weight in read_weights(node)}
    records = {weight: record for weight, record in work.records.items() if weight in used}
    graph = Graph(
        name=name,
        dims=dims,
        inputs=inputs,
        weights=records,
        nodes=nodes,
        outputs=outputs,
        output_names=output_names,
    )
    return graph, {weight: work.weights[weight] for weight in records}


def _call_nodes(program: ExportedProgram) -> list[tuple[str, str]]:
    return [
        (module_path(node), _short(node))
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    ]


def _short(node: torch.fx.Node) -> str:
    return str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def module_path(node: torch.fx.Node) -> str:
    """The path of the innermost nn.Module whose forward ran ``node``; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0]).split("@")[0]
    return "" if path.startswith("_empty_nn_module_stack") else path.removeprefix("L['self']").lstrip(".")


# --- inputs and weights ---------------------------------------------------------------------------------------------


def _placeholders(work: Translation, input_names: tuple[str, ...]) -> tuple[Value, ...]:
    inputs: list[Value] = []
    leaves = iter(input_names)
    by_name = {node.name: node for node in work.program.graph.nodes if node.op == "placeholder"}
    for spec in work.program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            label = next(leaves)
            if isinstance(spec.arg, ConstantArgument):
                continue
            node = by_name[spec.arg.name]
            inputs.append(Value(work.namer.reserve(label), _type(work, node.meta["val"], f"input {label}")))
            work.known[node] = Ref(inputs[-1].name)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            work.known[by_name[spec.arg.name]] = WeightRef(_store(work, str(spec.target)))
        else:
            raise CaptureError(
                "the model holds a custom object", got=str(spec.target), hint="only tensors can be captured as weights"
            )
    return tuple(inputs)


def _store(work: Translation, target: str) -> str:
    source = work.program.state_dict.get(target)
    tensor = work.program.constants[target] if source is None else source
    names = work.aliases.get(target, (target,))
    return store_weight(work, names[0], tensor, aliases=names[1:])


def store_weight(work: Translation, name: str, tensor: torch.Tensor, *, aliases: tuple[str, ...] = ()) -> str:
    """Record ``tensor`` once, whatever number of names it has; the name under which it is stored."""
    if not isinstance(tensor, torch.Tensor):
        raise CaptureError("the model holds a custom object", got=name, hint="only tensors can be captured as weights")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise CaptureError(
            "weight is not a dense CPU tensor",
            got=f"{name} on {tensor.device}, {tensor.layout}",
            hint="move the model first: model.cpu()",
        )
    key = tensors.identity(tensor)
    tensor = tensor.detach()
    if key in work.stored:
        return work.stored[key]
    order = tensors.memory_order(tensor)
    if order is None:
        tensor, order = tensor.contiguous(), tuple(range(tensor.dim()))
    try:
        dtype = tensors.dtype_name(tensor.dtype)
    except GraphError as problem:
        where = f"weight {name}"
        raise CaptureError(problem.message, where=where, expected=problem.expected, got=problem.got) from problem
    work.records[name] = Weight(name, dtype, tuple(tensor.shape), order, aliases)
    work.weights[name] = tensor
    work.stored[key] = name
    return name


def _type(work: Translation, value: Any, what: str) -> TensorType:
    if not isinstance(value, torch.Tensor):
        raise CaptureError("not a tensor", where=what, got=type(value).__name__)
    if value.layout is not torch.strided:
        raise CaptureError("not a dense tensor", where=what, got=str(value.layout))
    try:
        dtype = tensors.dtype_name(value.dtype)
    except GraphError as problem:
        raise CaptureError(problem.message, where=what, expected=problem.expected, got=problem.got) from problem
    return TensorType(dtype, tuple(symbols.extent(extent, work.symbols) for extent in value.shape))


# --- operations -----------------------------------------------------------------------------------------------------


def _call(work: Translation, node: torch.fx.Node) -> _Known:
    where = lines.of_node(node)
    name = str(node.target)
    result = node.meta.get("val")
    if node.target is operator.getitem:
        return _item(work, node)
    if name in _WITHOUT_RESULT:
        return None
    if isinstance(result, torch.SymInt | int) and not isinstance(result, bool):
        return _number(work, node, result)
    if isinstance(result, torch.SymFloat | torch.SymBool | float | bool) and name not in OPS:
        return _unusable_number(node, name)
    if not isinstance(node.target, torch._ops.OpOverload) or name not in OPS:
        raise _refused(name if isinstance(node.target, torch._ops.OpOverload) else _short(node), where)
    source = node.args[0] if node.args else None
    if name in _IDENTITIES and isinstance(source, torch.fx.Node) and _same_layout(node, source):
        return work.known[source]
    try:
        args = tuple(_argument(work, arg) for arg in node.args)
        kwargs = {key: _argument(work, arg) for key, arg in node.kwargs.items() if not _absent(key, arg)}
        return _append(work, node, name, args, kwargs)
    except CaptureError as problem:
        raise CaptureError(
            problem.message, op=name, where=where, expected=problem.expected, got=problem.got, hint=problem.hint
        ) from problem


def _append(work: Translation, node: torch.fx.Node, op: str, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> _Known:
    label = work.namer.node(module_path(node), _short(node))
    result = node.meta["val"]
    if op in _NEW:
        op, args = _NEW[op], args[1:]
        kwargs["dtype"] = DType(tensors.dtype_name(result.dtype))
    several = not isinstance(result, torch.Tensor)
    results = tuple(result) if several else (result,)
    types = tuple(None if item is None else _type(work, item, label) for item in results)
    outputs = tuple(
        None if type_ is None else Value(work.namer.output(label, index), type_) for index, type_ in enumerate(types)
    )
    line = lines.user_frame(node)
    source = f"{Path(line[0]).name}:{line[1]}" if line else ""
    work.nodes.append(Node(label, op, args, kwargs, outputs, module_path(node), source))
    if several:
        return _Lists(label, types)
    return Ref(label)


def _item(work: Translation, node: torch.fx.Node) -> _Known:
    source, index = node.args
    known = work.known[source] if isinstance(source, torch.fx.Node) else None
    if not isinstance(known, _Lists) or not isinstance(index, int):
        raise _refused("getitem", lines.of_node(node))
    position = index % len(known.types)
    return Ref(work.namer.output(known.name, position))


def _number(work: Translation, node: torch.fx.Node, value: int | torch.SymInt) -> _Known:
    try:
        return symbols.extent(value, work.symbols)
    except CaptureError as problem:
        # A size of an intermediate value is only named by sym_size; anything else reads the values of a tensor.
        if isinstance(node.target, torch._ops.OpOverload) and not str(node.target).startswith("aten.sym_"):
            raise _refused(str(node.target), lines.of_node(node)) from problem
        return _Unusable(problem.message)


def _unusable_number(node: torch.fx.Node, name: str) -> _Known:
    if name.startswith(("aten.item", "aten._local_scalar_dense")):
        raise _refused(name, lines.of_node(node))
    return _Unusable("a number computed from a dynamic size that is not an integer")


def _same_layout(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    if node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return False
    ours, theirs = node.meta["val"], source.meta["val"]
    return [str(stride) for stride in ours.stride()] == [str(stride) for stride in theirs.stride()]


def _absent(key: str, arg: object) -> bool:
    if key not in ABSENT:
        return False
    good = arg is None or arg is False or arg is torch.strided
    if not good and not (isinstance(arg, torch.device) and arg.type == "cpu"):
        hint = "move the model first: model.cpu()"
        raise CaptureError("only dense tensors on the CPU", got=f"{key}={arg}", hint=hint)
    return True


def _argument(work: Translation, arg: object) -> Arg:
    if isinstance(arg, torch.fx.Node):
        known = work.known[arg]
        if isinstance(known, _Unusable):
            raise CaptureError(known.why, got=arg.name, hint="capture with the dimension that it depends on static")
        if isinstance(known, _Lists) or known is None:
            raise CaptureError("an argument is a list of results", got=arg.name)
        return known
    if arg is None or isinstance(arg, bool | int | float | str):
        return arg
    if isinstance(arg, list | tuple):
        return tuple(_argument(work, item) for item in arg)
    if isinstance(arg, torch.dtype):
        return DType(tensors.dtype_name(arg)) if arg in tensors.DTYPE_NAMES else _no_argument(arg)
    if isinstance(arg, torch.memory_format):
        return MemoryFormat(tensors.MEMORY_FORMAT_NAMES[arg])
    return _no_argument(arg)


def _no_argument(arg: object) -> Arg:
    raise CaptureError("an argument that a graph cannot hold", got=f"{type(arg).__name__} {arg}"[:80])


def _refused(op: str, where: str | None) -> CaptureError:
    hint = next((text for pattern, text in _HINTS if re.search(pattern, op)), None)
    return CaptureError(
        "operation not allowed in a graph",
        op=op,
        got=op,
        where=where,
        hint=hint or "use operations of docs/spec/graph.md instead, or ask for this one to be added to the table",
    )


# --- outputs --------------------------------------------------------------------------------------------------------


def _outputs(work: Translation) -> tuple[tuple[str, ...], tuple[str, ...]]:
    output_node = next(node for node in work.program.graph.nodes if node.op == "output")
    by_name = {node.name: node for node in work.program.graph.nodes}
    names = naming.output_names(work.program.call_spec.out_spec)
    specs = work.program.graph_signature.output_specs
    found: list[tuple[str, str]] = []
    labels = iter(names)
    for spec in specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                "the model changes its own state or its inputs",
                got=str(spec.target or spec.arg.name),
                where=lines.of_node(by_name[spec.arg.name]) if spec.arg.name in by_name else None,
                hint="replace the in-place update by one that returns a new tensor (x = x + 1 instead of x.add_(1))",
            )
        label = next(labels)
        if isinstance(spec.arg, ConstantArgument) and spec.arg.value is None:
            continue
        node = by_name.get(spec.arg.name)
        known = work.known.get(node) if node is not None else None
        if isinstance(known, WeightRef) and node is not None:
            known = _copy_of(work, known, node.meta["val"])
        if not isinstance(known, Ref):
            raise CaptureError(
                "an output is not a tensor",
                got=label,
                where=lines.of_node(output_node),
                hint="return tensors only: in a tuple, a dict or a dataclass",
            )
        found.append((known.name, label))
    if not found:
        raise CaptureError("the model returns no tensor", hint="return a tensor, a tuple, a dict or a dataclass")
    return tuple(name for name, _ in found), tuple(label for _, label in found)


def _copy_of(work: Translation, weight: WeightRef, value: torch.Tensor) -> Ref:
    label = work.namer.node("", "clone")
    work.nodes.append(Node(label, "aten.clone.default", (weight,), {}, (Value(label, _type(work, value, label)),)))
    return Ref(label)


def _live(nodes: list[Node], outputs: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes that an output needs; of their results, those that somebody reads."""
    needed = set(outputs)
    kept: list[Node] = []
    for node in reversed(nodes):
        results = tuple(value if value is not None and value.name in needed else None for value in node.outputs)
        if any(value is not None for value in results):
            kept.append(replace(node, outputs=results))
            needed.update(read_values(node))
    return tuple(reversed(kept))
