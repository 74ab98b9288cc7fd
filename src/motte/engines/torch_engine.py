"""Runs graphs with torch: a flat list of prepared calls, each tensor dropped after its last use. Imports torch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from motte.capture import tensors
from motte.capture.graph import (
    Arg,
    DType,
    Graph,
    MemoryFormat,
    Node,
    Ref,
    Size,
    TensorType,
    WeightRef,
    references,
)
from motte.capture.ops import OPS
from motte.capture.sizes import evaluate, shape_of
from motte.engines.checks import check_arrays, check_outputs, check_sizes, check_weights, read_sizes, used_weights
from motte.engines.interface import NodeRunner, OnnxProgram
from motte.engines.reuse import INPLACE, reusable
from motte.errors import GraphError, InputError

Call = Callable[..., Any]

_FAST: Final[Mapping[str, Call]] = {
    # The same operators through torch's generated bindings, which parse arguments 1 to 3 us faster than torch.ops.
    "aten.conv2d.default": torch.conv2d,
    "aten.linear.default": torch.nn.functional.linear,
    "aten.relu.default": torch.relu,
    "aten.add.Tensor": torch.add,
    "aten.mul.Tensor": torch.mul,
    "aten.matmul.default": torch.matmul,
    "aten.layer_norm.default": torch.layer_norm,
    "aten.view.default": torch.Tensor.view,
    "aten.transpose.int": torch.transpose,
    "aten.permute.default": torch.permute,
}
_MAX_PREPARED: Final = 16
"""Sets of dimensions for which a program keeps its evaluated sizes."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One prepared call: ``args`` with holes, and what fills them.

    ``holes`` are (position, slot); ``lists`` are (position, items, holes) for list arguments that hold tensors.
    ``result`` is a slot, or for several results their slots (-1: not kept). ``drops`` are the slots read for the last
    time here.
    """

    call: Call
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    holes: tuple[tuple[int, int], ...]
    lists: tuple[tuple[int, tuple[Any, ...], tuple[tuple[int, int], ...]], ...]
    result: int | tuple[int, ...]
    drops: tuple[int, ...]
    name: str


@dataclass(frozen=True, slots=True)
class _Prepared:
    steps: tuple[_Step, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


class TorchProgram:
    """A compiled graph (see :class:`motte.engines.interface.Program`). Safe to call from several threads."""

    def __init__(self, graph: Graph, *, reuse: bool = True, runners: Mapping[str, NodeRunner] | None = None) -> None:
        self._graph = graph
        self._runners = dict(runners or {})
        self._reusable = reusable(graph) if reuse else frozenset()
        values = graph.values()
        self._types = {name: value.type for name, value in values.items()}
        self._outputs = tuple(values[name] for name in graph.outputs)
        self._weights = used_weights(graph)
        self._slots = {name: slot for slot, name in enumerate(self._types)}
        self._weight_slots = {name: len(self._slots) + index for index, name in enumerate(self._weights)}
        self._size = len(self._slots) + len(self._weights)
        self._read = {self._slots[ref.name] for node in graph.nodes for ref in references(node) if isinstance(ref, Ref)}
        self._read.update(self._slots[name] for name in graph.outputs)
        self._drops = self._plan_drops()
        self._prepared: dict[tuple[int, ...], _Prepared] = {}

    def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; see :meth:`motte.engines.interface.Program.run`.

        Raises:
            InputError: an input, weight or dimension is missing, or has another type than the graph says.
            GraphError: an operation refuses its arguments (``where`` names the node).
        """
        prepared = self._prepare(dims)
        self._check_inputs(prepared, inputs, weights)
        with torch.inference_mode():
            env = self._environment(inputs, weights)
            for step in prepared.steps:
                _execute(step, env)
            outputs = [env[self._slots[name]] for name in self._graph.outputs]
        self._check_outputs(prepared, outputs)
        return outputs

    def profile(
        self, inputs: Sequence[Any], weights: Mapping[str, Any], dims: Mapping[str, int], *, repeats: int
    ) -> dict[str, float]:
        """Median time of each node in seconds, by node name, over ``repeats`` runs after one that does not count.

        ``inputs`` are kept. Raises what :meth:`run` raises.
        """
        if repeats < 1:
            raise InputError("profiling needs at least one repeat", got=str(repeats))
        prepared = self._prepare(dims)
        self._check_inputs(prepared, inputs, weights)
        samples: dict[str, list[float]] = {step.name: [] for step in prepared.steps}
        with torch.inference_mode():
            for turn in range(repeats + 1):
                env = self._environment(list(inputs), weights)
                for step in prepared.steps:
                    start = time.perf_counter_ns()
                    _execute(step, env)
                    if turn:
                        samples[step.name].append((time.perf_counter_ns() - start) / 1e9)
        return {name: sorted(values)[len(values) // 2] for name, values in samples.items()}

    # --- preparation ------------------------------------------------------------------------------------------------

    def _plan_drops(self) -> tuple[tuple[int, ...], ...]:
        last: dict[int, int] = {}
        for index, node in enumerate(self._graph.nodes):
            for ref in references(node):
                slots = self._slots if isinstance(ref, Ref) else self._weight_slots
                last[slots[ref.name]] = index
            # A result that nobody reads is dropped where it is made.
            last.update((self._slots[value.name], index) for value in node.outputs if value is not None)
        kept = {self._slots[name] for name in self._graph.outputs}
        drops: list[list[int]] = [[] for _ in self._graph.nodes]
        for slot, index in last.items():
            if slot not in kept:
                drops[index].append(slot)
        return tuple(tuple(slots) for slots in drops)

    def _prepare(self, dims: Mapping[str, int]) -> _Prepared:
        key = read_sizes(self._graph, dims)
        found = self._prepared.get(key)
        if found is not None:
            return found
        sizes = check_sizes(self._graph, key)
        found = _Prepared(
            steps=tuple(self._step(index, node, sizes) for index, node in enumerate(self._graph.nodes)),
            inputs=tuple(shape_of(value.type, sizes) for value in self._graph.inputs),
            outputs=tuple(shape_of(self._types[name], sizes) for name in self._graph.outputs),
        )
        prepared = dict(list(self._prepared.items())[1 - _MAX_PREPARED :])
        prepared[key] = found
        self._prepared = prepared
        return found

    def _step(self, index: int, node: Node, sizes: Mapping[str, int]) -> _Step:
        holes: list[tuple[int, int]] = []
        lists: list[tuple[int, tuple[Any, ...], tuple[tuple[int, int], ...]]] = []
        args: list[Any] = []
        positional, kwargs = _positional(node)
        for position, arg in enumerate(positional):
            if isinstance(arg, Ref | WeightRef):
                holes.append((position, self._slot(arg)))
                args.append(None)
            elif isinstance(arg, tuple):
                inner = tuple((i, self._slot(item)) for i, item in enumerate(arg) if isinstance(item, Ref | WeightRef))
                items = [None if isinstance(item, Ref | WeightRef) else _plain(item, sizes) for item in arg]
                if inner:
                    lists.append((position, tuple(items), inner))
                args.append(items)
            else:
                args.append(_plain(arg, sizes))
        results = [-1 if value is None else self._slots[value.name] for value in node.outputs]
        return _Step(
            call=self._call(node, sizes),
            args=tuple(args),
            kwargs={key: _plain(arg, sizes) for key, arg in kwargs.items()},
            holes=tuple(holes),
            lists=tuple(lists),
            result=results[0] if _single(node) else tuple(results),
            drops=self._drops[index],
            name=node.name,
        )

    def _slot(self, ref: Ref | WeightRef) -> int:
        return self._slots[ref.name] if isinstance(ref, Ref) else self._weight_slots[ref.name]

    def _call(self, node: Node, sizes: Mapping[str, int]) -> Call:
        if node.name in self._runners:
            return self._runners[node.name]
        found = tensors.overload(node.op)
        call: Call = _FAST[node.op] if node.op in _FAST else getattr(found, "_op", found)
        if node.name not in self._reusable or node.outputs[0] is None:
            return call
        inplace = _inplace(node.op)
        two = len(node.args) > 1 and isinstance(node.args[1], Ref)
        return _reusing(call, inplace, shape_of(node.outputs[0].type, sizes), two=two)

    # --- one run ----------------------------------------------------------------------------------------------------

    def _environment(self, inputs: list[Any], weights: Mapping[str, Any]) -> list[Any]:
        env: list[Any] = [None] * self._size
        for slot, tensor in enumerate(inputs):
            if slot in self._read:
                env[slot] = tensor
        inputs.clear()
        for name, slot in self._weight_slots.items():
            env[slot] = weights[name]
        return env

    def _check_inputs(self, prepared: _Prepared, inputs: Sequence[Any], weights: Mapping[str, Any]) -> None:
        check_arrays(self._graph.inputs, prepared.inputs, inputs, has_type=_has_type, described=_described)
        check_weights(self._weights, weights)

    def _check_outputs(self, prepared: _Prepared, outputs: list[Any]) -> None:
        check_outputs(self._outputs, prepared.outputs, outputs, has_type=_has_type, described=_described)


class TorchBound:
    """A graph with its weights (see :class:`motte.engines.interface.Bound`); they are read in place."""

    copy_bytes: int | None = 0

    def __init__(self, program: TorchProgram, weights: Mapping[str, Any]) -> None:
        self._program, self._weights = program, dict(weights)

    def run(self, inputs: list[Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; raises what :meth:`TorchProgram.run` raises."""
        return self._program.run(inputs, self._weights, dims)


class TorchEngine:
    """The torch engine (see :class:`motte.engines.interface.Engine`)."""

    name = "torch"
    joins = False
    needs_lowered = False

    def compile(
        self, graph: Graph, *, lowered: OnnxProgram | None = None, runners: Mapping[str, NodeRunner] | None = None
    ) -> TorchProgram:
        """Prepare a **verified** graph to run; the nodes named in ``runners`` are run by these, ``lowered`` by nobody.

        Raises:
            GraphError: this torch does not have one of its operations, or there is no such node with one result.
        """
        for node in graph.nodes:
            tensors.overload(node.op)
        replaceable = {node.name for node in graph.nodes if _single(node)}
        unknown = sorted(set(runners or ()) - replaceable)
        if unknown:
            raise GraphError("no such node with one result to replace", where=graph.name, got=", ".join(unknown[:5]))
        return TorchProgram(graph, runners=runners)

    def load(
        self, graph: Graph, weights: Mapping[str, torch.Tensor], *, lowered: OnnxProgram | None = None
    ) -> TorchBound:
        """Prepare a **verified** graph to run on ``weights``; nothing is copied.

        Raises:
            GraphError: see :meth:`compile`. InputError: a weight is missing.
        """
        check_weights(used_weights(graph), weights)
        return TorchBound(self.compile(graph), weights)

    def weight(self, graph: Graph, name: str, buffer: memoryview) -> torch.Tensor:
        """View ``buffer`` as the weight ``name`` of ``graph``; copies nothing, and the tensor keeps the buffer alive.

        ``buffer`` holds exactly the weight's bytes in its memory order. Let it start at a multiple of 64 bytes, as
        torch's own allocations do, so that kernels see what they see in eager.

        Raises:
            InputError: the buffer has another length, or does not start at a multiple of the element size.
        """
        weight = graph.weights[name]
        if buffer.nbytes != weight.bytes:
            lengths = (f"{weight.bytes} bytes", f"{buffer.nbytes} bytes")
            raise InputError(f"buffer of weight {name!r} has another length", expected=lengths[0], got=lengths[1])
        dtype = tensors.DTYPES[weight.dtype]
        if weight.elements == 0:
            return tensors.restore(torch.empty(0, dtype=dtype), weight)
        with warnings.catch_warnings():
            # torch warns of read-only buffers, since it cannot mark a tensor so; no program writes to a weight.
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            flat = torch.frombuffer(buffer, dtype=dtype)
        if flat.data_ptr() % flat.element_size():
            expected = f"a multiple of {flat.element_size()} bytes"
            raise InputError(f"buffer of weight {name!r} is not aligned", expected=expected)
        return tensors.restore(flat, weight)

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: memoryview) -> torch.Tensor:
        """A tensor over row-major ``data``; shares its memory when that may be written to, else copies.

        Raises:
            InputError: ``data`` has another length.
        """
        kind = tensors.DTYPES[dtype]
        if data.nbytes != math.prod(shape) * kind.itemsize:
            found = f"{data.nbytes} bytes for {dtype} {list(shape)}"
            raise InputError("tensor bytes do not match its shape", got=found)
        if not data.nbytes:
            return torch.empty(shape, dtype=kind)
        return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=kind).reshape(shape)

    def to_bytes(self, array: torch.Tensor) -> tuple[str, tuple[int, ...], memoryview]:
        """Graph dtype, shape and row-major bytes of a tensor of any strides."""
        flat = array.contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        return tensors.DTYPE_NAMES[array.dtype], tuple(array.shape), data

    def profile(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dims: Mapping[str, int],
        repeats: int,
    ) -> dict[str, float]:
        """Median seconds of each node, by name; see :meth:`TorchProgram.profile`."""
        return self.compile(graph).profile(inputs, weights, dims, repeats=repeats)


def _execute(step: _Step, env: list[Any]) -> None:
    args = list(step.args)
    for position, slot in step.holes:
        args[position] = env[slot]
    for position, items, holes in step.lists:
        filled = list(items)
        for place, slot in holes:
            filled[place] = env[slot]
        args[position] = filled
    try:
        result = step.call(*args, **step.kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError) as problem:
        raise GraphError("an operation failed", where=step.name, got=str(problem).splitlines()[0][:300]) from problem
    if isinstance(step.result, int):
        env[step.result] = result
    else:
        if len(result) != len(step.result):
            counts = (str(len(step.result)), str(len(result)))
            raise GraphError("wrong number of results", where=step.name, expected=counts[0], got=counts[1])
        for slot, item in zip(step.result, result, strict=True):
            if slot >= 0:
                env[slot] = item
    for slot in step.drops:
        env[slot] = None


def _single(node: Node) -> bool:
    spec = OPS[node.op]
    return spec.results == 1 and not spec.returns_list


def _positional(node: Node) -> tuple[list[Arg], dict[str, Arg]]:
    """Keyword arguments that hold tensors, made positional, since only positions have holes."""
    args, kwargs = list(node.args), dict(node.kwargs)
    parameters = OPS[node.op].parameters
    wanted = [index for index, item in enumerate(parameters) if _holds_tensor(kwargs.get(item.name))]
    for parameter in parameters[len(args) : max(wanted, default=-1) + 1]:
        if parameter.name not in kwargs and not parameter.optional:
            raise GraphError("a tensor by keyword behind an argument left out", where=node.name, got=parameter.name)
        args.append(kwargs.pop(parameter.name, None))
    return args, kwargs


def _inplace(op: str) -> Call:
    kind = op.rpartition(".")[2]
    found = getattr(getattr(torch.ops.aten, INPLACE[op]), kind)
    bound: Call = getattr(torch.Tensor, INPLACE[op], None) or getattr(found, "_op", found)
    return bound


def _holds_tensor(arg: Arg) -> bool:
    return isinstance(arg, Ref | WeightRef) or (isinstance(arg, tuple) and any(_holds_tensor(item) for item in arg))


def _plain(arg: Arg, sizes: Mapping[str, int]) -> Any:
    if isinstance(arg, Size):
        return evaluate(arg, sizes)
    if isinstance(arg, DType | MemoryFormat):
        return tensors.plain_argument(arg)
    if isinstance(arg, tuple):
        return [_plain(item, sizes) for item in arg]
    return arg


def _reusing(call: Call, inplace: Call, shape: Sequence[int], *, two: bool) -> Call:
    """``call``, or its in-place form where that gives the same strides.

    An element-wise operation gives a dense result: contiguous where its arguments are, channels-last where they are
    that and not both. Everything else keeps the plain call.
    """
    contiguous = torch.empty(shape, device="meta").stride()
    last = contiguous
    if len(shape) == 4 and 0 not in shape:
        like = torch.empty(shape, device="meta", memory_format=torch.channels_last)
        last = contiguous if like.is_contiguous() else like.stride()

    def one_tensor(x: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        stride = x.stride()
        return inplace(x, *rest, **kwargs) if stride in (contiguous, last) else call(x, *rest, **kwargs)

    def two_tensors(x: torch.Tensor, y: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        stride = x.stride()
        if stride in (contiguous, last) and stride == y.stride():
            return inplace(x, y, *rest, **kwargs)
        return call(x, y, *rest, **kwargs)

    return two_tensors if two else one_tensor


def _has_type(tensor: Any, type_: TensorType, shape: tuple[int, ...]) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype is tensors.DTYPES[type_.dtype] and tensor.shape == shape


def _described(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{tensors.DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {tuple(tensor.shape)}"
