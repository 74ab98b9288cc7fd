"""Small runnable graphs drawn at random, and an interpreter that runs any graph and measures what it holds.

Loaded by path from the conftest files of tests/plan and tests/split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

import torch

from motte.capture.graph import (
    Arg,
    Dim,
    DType,
    Extent,
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
)
from motte.capture.sizes import evaluate, shape_of

WIDTHS = (4, 6, 8)
BATCH = Size("batch")


class Builder:
    """Adds one node after another; every value is (batch, width), f32, or (batch, width) i64."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.nodes: list[Node] = []
        self.weights: dict[str, Weight] = {}
        self.inputs = tuple(
            self._value(f"x{index}", (BATCH, random.choice(WIDTHS))) for index in range(random.randint(1, 2))
        )
        self.floats: list[Value] = list(self.inputs)

    def graph(self, count: int) -> Graph:
        """A graph of ``count`` nodes or a few more."""
        while len(self.nodes) < count:
            self.random.choice(self.STEPS)(self)
        made = [value for node in self.nodes for value in node.outputs if value is not None]
        outputs = [made[-1].name, *(self.random.choice(made).name for _ in range(self.random.randint(0, 2)))]
        if self.random.random() < 0.2:
            outputs.append(self.inputs[0].name)
        used = {name for node in self.nodes for name in read_values(node)} | set(outputs)
        # As in a captured graph: a result that nobody uses has no value.
        nodes = tuple(
            replace(node, outputs=tuple(v if v is not None and v.name in used else None for v in node.outputs))
            if len(node.outputs) > 1
            else node
            for node in self.nodes
        )
        names = tuple(f"out{index}" for index in range(len(outputs)))
        return Graph("random", (Dim("batch", 1, 16),), self.inputs, self.weights, nodes, tuple(outputs), names)

    def _value(self, name: str, shape: tuple[Extent, ...], dtype: str = "f32") -> Value:
        return Value(name, TensorType(dtype, shape))

    def _any(self) -> Value:
        return self.random.choice(self.floats)

    def _weight(self, shape: tuple[int, ...]) -> WeightRef:
        same = [name for name, weight in self.weights.items() if weight.shape == shape]
        if same and self.random.random() < 0.4:
            return WeightRef(self.random.choice(same))
        name = f"w{len(self.weights)}"
        self.weights[name] = Weight(name, "f32", shape, tuple(range(len(shape))))
        return WeightRef(name)

    def _add(
        self, op: str, args: tuple[Arg, ...], *types: TensorType, kwargs: Mapping[str, Arg] | None = None
    ) -> list[Value]:
        name = f"n{len(self.nodes)}"
        values = [Value(f"{name}_{i}" if len(types) > 1 else name, type_) for i, type_ in enumerate(types)]
        module = f"block{len(self.nodes) // 3}.m{len(self.nodes) % 3}"
        self.nodes.append(Node(name, f"aten.{op}", args, kwargs or {}, tuple(values), module))
        return values

    def _float(self, *shape: Extent) -> TensorType:
        return TensorType("f32", shape)

    def linear(self) -> None:
        x = self._any()
        out = self.random.choice(WIDTHS)
        args: tuple[Arg, ...] = (Ref(x.name), self._weight((out, width(x))))
        if self.random.random() < 0.5:
            args = (*args, self._weight((out,)))
        self.floats += self._add("linear.default", args, self._float(BATCH, out))

    def relu(self) -> None:
        x = self._any()
        self.floats += self._add("relu.default", (Ref(x.name),), x.type)

    def add(self) -> None:
        x = self._any()
        other = self.random.choice([value for value in self.floats if value.type == x.type])
        self.floats += self._add("add.Tensor", (Ref(x.name), Ref(other.name)), x.type)

    def scale(self) -> None:
        x = self._any()
        self.floats += self._add("mul.Tensor", (Ref(x.name), self._weight((width(x),))), x.type)

    def halves(self) -> None:
        x = self._any()
        half = self._float(BATCH, width(x) // 2)
        made = self._add("split.Tensor", (Ref(x.name), width(x) // 2, 1), half, half)
        joined = (Ref(made[self.random.randint(0, 1)].name), Ref(x.name), Ref(made[1].name))
        self.floats += self._add("cat.default", (joined, 1), self._float(BATCH, width(x) * 2))
        self.floats += self._add("slice.Tensor", (Ref(self.floats[-1].name), 1, 0, 4), self._float(BATCH, 4))

    def fold(self) -> None:
        x = self._any()
        shape = (BATCH, width(x) // 2, 2)
        op = "view.default" if contiguous(self, x) else "reshape.default"
        (made,) = self._add(op, (Ref(x.name), shape), self._float(*shape))
        (turned,) = self._add("transpose.int", (Ref(made.name), 1, 2), self._float(BATCH, 2, width(x) // 2))
        self.floats += self._add("reshape.default", (Ref(turned.name), (BATCH, width(x))), self._float(BATCH, width(x)))

    def turned_weight(self) -> None:
        x = self._any()
        out = self.random.choice(WIDTHS)
        (view,) = self._add("t.default", (self._weight((out, width(x))),), TensorType("f32", (width(x), out)))
        self.relu()
        self.floats += self._add("mm.default", (Ref(x.name), Ref(view.name)), self._float(BATCH, out))

    def spread_weight(self) -> None:
        x = self._any()
        (view,) = self._add("expand.default", (self._weight((1, width(x))), (BATCH, width(x))), x.type)
        self.add()
        self.floats += self._add("add.Tensor", (Ref(x.name), Ref(view.name)), x.type)
        if self.random.random() < 0.3:
            self.floats.append(view)

    def norm(self) -> None:
        x = self._any()
        one = self._float(BATCH, 1)
        self.floats += self._add(
            "native_layer_norm.default", (Ref(x.name), (width(x),), None, None, 1e-5), x.type, one, one
        )[:1]

    def largest(self) -> None:
        x = self._any()
        kept = self._float(BATCH, 4)
        made = self._add("topk.default", (Ref(x.name), 4), kept, TensorType("i64", (BATCH, 4)))
        if self.random.random() < 0.5:
            self.floats.append(made[0])
        else:
            (as_float,) = self._add("_to_copy.default", (Ref(made[1].name),), kept, kwargs={"dtype": DType("f32")})
            self.floats.append(as_float)

    STEPS = (linear, linear, relu, add, add, scale, halves, fold, turned_weight, spread_weight, norm, largest)


def width(value: Value) -> int:
    """Extent of the last dimension."""
    extent = value.type.shape[-1]
    assert isinstance(extent, int)
    return extent


def contiguous(builder: Builder, value: Value) -> bool:
    """Whether a value surely has the strides that a view of it needs."""
    maker = next((node for node in builder.nodes if value in node.outputs), None)
    return maker is None or maker.op in ("aten.linear.default", "aten.mm.default")


def random_graph(seed: int, count: int) -> Graph:
    """A valid graph of about ``count`` nodes; the same for the same arguments."""
    return Builder(Random(seed)).graph(count)


def random_weights(graph: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values for every weight of ``graph``."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in graph.weights.items()}


def random_inputs(graph: Graph, dims: Mapping[str, int], seed: int = 1) -> list[torch.Tensor]:
    """Values for every input of ``graph``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape_of(value.type, dims), generator=generator) for value in graph.inputs]


_DTYPES = {"f32": torch.float32, "f64": torch.float64, "i64": torch.int64, "bool": torch.bool, "f16": torch.float16,
           "bf16": torch.bfloat16, "i32": torch.int32, "u8": torch.uint8}  # fmt: skip
_FORMATS = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
}


def operation(name: str) -> Callable[..., Any]:
    """torch's own operation of this name."""
    _, family, overload = name.split(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, family), overload)
    return found


class Interpreter:
    """The slow obvious way to run a graph, which watches the memory of every tensor that it holds.

    ``held_bytes[i]`` is what is held while node i runs, by distinct storages, weights left out.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.held_bytes: list[int] = []
        last: dict[str, int] = {name: len(graph.nodes) for name in graph.outputs}
        for index, node in enumerate(graph.nodes):
            for name in read_values(node):
                last[name] = max(last.get(name, index), index)
        self._last = last

    def run(
        self, inputs: list[torch.Tensor], weights: Mapping[str, torch.Tensor], dims: Mapping[str, int]
    ) -> list[torch.Tensor]:
        """The outputs of the graph."""
        live = {value.name: tensor for value, tensor in zip(self.graph.inputs, inputs, strict=True)}
        inputs.clear()
        stored = {storage_of(tensor)[0] for tensor in weights.values()}
        for index, node in enumerate(self.graph.nodes):
            args = [_read(arg, live, weights, dims) for arg in node.args]
            kwargs = {name: _read(arg, live, weights, dims) for name, arg in node.kwargs.items()}
            made = operation(node.op)(*args, **kwargs)
            made = list(made) if isinstance(made, tuple | list) else [made]
            held = dict(storage_of(tensor) for tensor in (*live.values(), *made))
            self.held_bytes.append(sum(size for address, size in held.items() if address not in stored))
            outputs = zip(node.outputs, made, strict=True)
            live.update((value.name, tensor) for value, tensor in outputs if value is not None)
            del made, args, kwargs, outputs
            live = {name: tensor for name, tensor in live.items() if self._last.get(name, -1) > index}
        return [live[name] for name in self.graph.outputs]


def _read(
    arg: Arg, live: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], dims: Mapping[str, int]
) -> Any:
    match arg:
        case Ref():
            return live[arg.name]
        case WeightRef():
            return weights[arg.name]
        case Size():
            return evaluate(arg, dims)
        case DType():
            return _DTYPES[arg.name]
        case MemoryFormat():
            return _FORMATS[arg.name]
        case tuple():
            return [_read(item, live, weights, dims) for item in arg]
    return arg


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and size of the memory behind ``tensor``."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
