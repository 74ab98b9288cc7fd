"""Runs lowered graphs with OpenVINO on CPU. Imports numpy and openvino, and nothing heavier."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from motte.capture.graph import Graph
from motte.capture.sizes import shape_of
from motte.engines.checks import Checks, check_weights, need_lowered, used_weights
from motte.engines.interface import NodeRunner, OnnxProgram, dim_input
from motte.engines.numpy_arrays import DTYPES, NumpyArray, described, from_bytes, has_type, to_bytes, weight_view
from motte.engines.quiet_openvino import FrontEndManager, ov
from motte.engines.settled import settled_bytes
from motte.errors import GraphError, InputError, ResourceError, SettingError, UnsupportedError

_TYPES: Final[Mapping[str, ov.Type]] = {
    "f32": ov.Type.f32, "f16": ov.Type.f16, "bf16": ov.Type.bf16, "i64": ov.Type.i64, "i32": ov.Type.i32,
    "i16": ov.Type.i16, "i8": ov.Type.i8, "u8": ov.Type.u8, "bool": ov.Type.boolean,
}  # fmt: skip
"""No ``f64``: OpenVINO would compute it in f32."""
_INT32: Final = np.iinfo(np.int32)


class _Compiled:
    """One compiled model and what it takes and gives. Safe to call from several threads."""

    def __init__(self, graph: Graph, model: ov.Model, core: ov.Core, config: Mapping[str, Any]) -> None:
        self._graph = graph
        self._checks = Checks(graph, has_type=has_type, described=described)
        with _failures(graph.name, "openvino refuses the lowered graph"):
            self._compiled = core.compile_model(model, "CPU", dict(config))
            self.precisions = _precisions(self._compiled)
        # What nobody reads is no input of the compiled model.
        self._inputs = {port.get_any_name(): port for port in self._compiled.inputs}
        self._passed = [bool(port.get_names() & set(self._inputs)) for port in self._compiled.outputs]
        self._check_ports()
        self.weights = tuple(name for name in graph.weights if name in self._inputs)

    def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; ``weights`` are those that the model takes as inputs."""
        shapes = self._checks.check_inputs(inputs, dims)
        check_weights(self.weights, weights)
        given = {value.name: array for value, array in zip(self._graph.inputs, inputs, strict=True)}
        inputs.clear()
        given |= {dim_input(dim.name): np.array(dims[dim.name], np.int64) for dim in self._graph.dims}
        given |= {name: weights[name] for name in self.weights}
        given = {name: array for name, array in given.items() if name in self._inputs}
        for name, array in given.items():
            _check_integers(name, array)
        # A request keeps its tensors until it goes; it costs 0.1 ms, so each call has its own.
        request = self._compiled.create_infer_request()
        with _failures(self._graph.name, "an operation failed"):
            for name, array in given.items():
                request.set_tensor(self._inputs[name], _tensor(array))
            request.infer()
        outputs = [
            _array(request.get_output_tensor(index), value.type.dtype)
            for index, value in enumerate(self._checks.outputs)
        ]
        # A result that is an input is the caller's memory, which nothing would keep alive.
        outputs = [found.copy() if passed else found for found, passed in zip(outputs, self._passed, strict=True)]
        self._checks.check_outputs(outputs, shapes)
        return outputs

    def release(self) -> None:
        """Give back the memory of tensors between operations."""
        self._compiled.release_memory()

    def smallest(self) -> tuple[list[NumpyArray], dict[str, int]]:
        """Inputs of zeros of the smallest shapes, and their dimensions."""
        dims = {dim.name: dim.low for dim in self._graph.dims}
        inputs = [np.zeros(shape_of(value.type, dims), DTYPES[value.type.dtype]) for value in self._graph.inputs]
        return inputs, dims

    def _check_ports(self) -> None:
        types = {value.name: value.type.dtype for value in self._graph.inputs}
        types |= {dim_input(dim.name): "i64" for dim in self._graph.dims}
        types |= {name: weight.dtype for name, weight in self._graph.weights.items()}
        for name, port in self._inputs.items():
            if name not in types or port.get_element_type() != _TYPES[types[name]]:
                raise GraphError(
                    f"the lowered graph takes {name!r}, and the graph does not",
                    where=self._graph.name,
                    expected=types.get(name),
                    got=str(port.get_element_type()),
                )
        expected = [str(_TYPES[value.type.dtype]) for value in self._checks.outputs]
        got = [str(port.get_element_type()) for port in self._compiled.outputs]
        if expected != got:
            raise GraphError(
                "the lowered graph has other outputs",
                where=self._graph.name,
                expected=" ".join(expected),
                got=" ".join(got),
            )


class OpenvinoProgram:
    """A lowered graph that takes its weights on every call (see :class:`motte.engines.interface.Program`).

    ``precisions`` are the floating-point types in which its operations really run, as the compiled model tells.
    """

    def __init__(self, compiled: _Compiled) -> None:
        self._compiled = compiled
        self._lock = threading.Lock()
        self.precisions = compiled.precisions

    def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; see :meth:`motte.engines.interface.Program.run`. Results are row-major.

        Raises:
            InputError: an input, weight or dimension is missing, or has another type than the graph says; or a 64-bit
                integer does not fit into the 32 bits in which OpenVINO computes.
            GraphError: an operation fails, or a result has another type than the graph says.
            ResourceError: not enough memory.
        """
        # Memory can be given back only while nothing runs; a compiled model runs one request at a time anyhow.
        with self._lock:
            try:
                return self._compiled.run(inputs, weights, dims)
            finally:
                # It keeps what it made of the weights, in the order that its kernels read, for a next call: all parts
                # of a chain together as much as all weights. No difference in time was seen.
                self._compiled.release()


class OpenvinoBound:
    """A lowered graph with its weights (see :class:`motte.engines.interface.Bound`), which it keeps alive.

    ``copy_bytes`` is the growth of this process's anonymous memory while the model was compiled and run once: kernels
    of matrix products and convolutions read packed copies, and some are made when it first runs. It counts the model's
    own structures and one run's activations, and is right in a process that does nothing else meanwhile.
    ``precisions``: see :class:`OpenvinoProgram`.
    """

    def __init__(self, compiled: _Compiled, weights: Sequence[Any], copy_bytes: int) -> None:
        self._compiled, self._weights = compiled, tuple(weights)
        self.precisions = compiled.precisions
        self.copy_bytes: int | None = copy_bytes

    def run(self, inputs: list[Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; raises what :meth:`OpenvinoProgram.run` raises."""
        return self._compiled.run(inputs, {}, dims)


class OpenvinoEngine:
    """The openvino engine (see :class:`motte.engines.interface.Engine`).

    Args:
        threads: compute threads.
        precision: ``f32`` or ``bf16``: what f32 layers are computed in. Always stated: OpenVINO's own choice depends on
            the processor. A processor without bfloat16 instructions computes in bf16 too, but more slowly than in f32
            (``native_bf16`` tells).

    Raises:
        SettingError: another precision, or no thread. UnsupportedError: OpenVINO does not run in that precision here.
    """

    name = "openvino"
    joins = True
    needs_lowered = True

    def __init__(self, *, threads: int = 1, precision: str = "f32") -> None:
        if threads < 1:
            raise SettingError("an engine needs a thread", expected="at least 1", got=str(threads))
        if precision not in ("f32", "bf16"):
            raise SettingError("unknown precision", expected="f32, bf16", got=repr(precision))
        self.precision = precision
        self._core = ov.Core()
        self._frontend = FrontEndManager().load_by_framework("onnx")
        self._config = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        self.native_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16":
            self._check_bf16()

    def compile(
        self, graph: Graph, *, lowered: OnnxProgram | None = None, runners: Mapping[str, NodeRunner] | None = None
    ) -> OpenvinoProgram:
        """Prepare a **verified** graph's lowered form to run on weights given with every call.

        Raises:
            UnsupportedError: no lowered form, or runners, or a graph that computes in f64.
            GraphError: openvino refuses it, or its inputs and outputs are not the graph's.
        """
        program = need_lowered(self.name, graph, lowered, runners)
        _check_types(graph)
        model = self._read(graph, program)
        return OpenvinoProgram(self._compile(graph, model))

    def load(
        self, graph: Graph, weights: Mapping[str, NumpyArray], *, lowered: OnnxProgram | None = None
    ) -> OpenvinoBound:
        """Prepare a **verified** graph's lowered form to run on ``weights``, and run it once on zeros.

        Raises:
            UnsupportedError, GraphError: see :meth:`compile`. InputError: a weight is missing, or holds a 64-bit
                integer that does not fit into 32 bits. ResourceError: not enough memory.
        """
        program = need_lowered(self.name, graph, lowered)
        _check_types(graph)
        names = used_weights(graph)
        check_weights(names, weights)
        before = settled_bytes()
        model = self._read(graph, program)
        with _failures(graph.name, "openvino refuses the weights"):
            for parameter in list(model.get_parameters()):
                name = parameter.output(0).get_any_name()
                if name in weights:
                    _check_integers(name, weights[name])
                    constant = ov.op.Constant(_tensor(weights[name]), shared_memory=True)
                    parameter.output(0).replace(constant.output(0))
                    model.remove_parameter(parameter)
        compiled = self._compile(graph, model)
        if compiled.weights:
            left = ", ".join(compiled.weights[:5])
            raise GraphError("the lowered graph still takes weights as inputs", where=graph.name, got=left)
        del model
        inputs, dims = compiled.smallest()
        compiled.run(inputs, {}, dims)
        copied = max(0, settled_bytes() - before)
        return OpenvinoBound(compiled, [weights[name] for name in names], copied)

    def weight(self, graph: Graph, name: str, buffer: memoryview) -> NumpyArray:
        """``buffer`` as a stored weight; see :func:`motte.engines.numpy_arrays.weight_view`."""
        return weight_view(graph, name, buffer)

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: memoryview) -> NumpyArray:
        """An array over ``data``; see :func:`motte.engines.numpy_arrays.from_bytes`."""
        return from_bytes(dtype, shape, data)

    def to_bytes(self, array: NumpyArray) -> tuple[str, tuple[int, ...], memoryview]:
        """Graph dtype, shape and row-major bytes; see :func:`motte.engines.numpy_arrays.to_bytes`."""
        return to_bytes(array)

    def _read(self, graph: Graph, program: OnnxProgram) -> ov.Model:
        # The reader for ONNX by name: left to choose, openvino tries every reader that it has.
        with _failures(graph.name, "openvino refuses the lowered graph"):
            return self._frontend.convert(self._frontend.load(io.BytesIO(program.core + program.weight_inputs)))

    def _compile(self, graph: Graph, model: ov.Model) -> _Compiled:
        compiled = _Compiled(graph, model, self._core, self._config)
        held = {value.type.dtype for value in graph.values().values()} | {w.dtype for w in graph.weights.values()}
        more = set(compiled.precisions) - held - {"f32", self.precision}
        if more:
            raise UnsupportedError(
                "openvino would run this graph in another precision",
                where=graph.name,
                expected=self.precision,
                got=", ".join(sorted(more)),
            )
        return compiled

    def _check_bf16(self) -> None:
        """Compile one matrix product, and see in what it would run."""
        x = ov.op.Parameter(ov.Type.f32, ov.PartialShape([16, 16]))
        product = ov.opset13.matmul(x, ov.op.Constant(np.ones((16, 16), np.float32)), False, False)
        compiled = self._core.compile_model(ov.Model([product], [x]), "CPU", self._config)
        found = _precisions(compiled)
        if "bf16" not in found:
            raise UnsupportedError(
                "openvino does not compute in bf16 on this processor",
                expected="bf16",
                got=", ".join(found) or "none",
                hint="run with --precision f32",
            )


def _check_types(graph: Graph) -> None:
    used = [graph.weights[name].dtype for name in used_weights(graph)]
    if "f64" in used or any(value.type.dtype == "f64" for value in graph.values().values()):
        raise UnsupportedError(
            "openvino would compute f64 in f32", where=graph.name, hint="use the torch or the onnxruntime engine"
        )


def _check_integers(name: str, array: NumpyArray) -> None:
    # OpenVINO computes 64-bit integers in 32 and makes a larger one another number without a word.
    if array.dtype == np.int64 and array.size and not _INT32.min <= array.min() <= array.max() <= _INT32.max:
        raise InputError(f"{name!r} holds an integer that openvino cannot compute with", expected="32 bits")


def _precisions(compiled: ov.CompiledModel) -> tuple[str, ...]:
    """The floating-point types in which operations of ``compiled`` run; conversions and copies do not count."""
    found = set()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "runtimePrecision" in info and "layerType" in info:
            kind = info["layerType"].astype(str)
            if kind not in ("Input", "Output", "Const", "Convert", "Reorder", "Reshape", "Result", "Parameter"):
                found.add(info["runtimePrecision"].astype(str))
    return tuple(sorted(found & {"f64", "f32", "f16", "bf16"}))


class _Shared:
    """Lets openvino, which writes to no input and no constant, share memory that is marked read-only."""

    def __init__(self, array: NumpyArray) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor(array: NumpyArray) -> ov.Tensor:
    """``array`` as openvino sees it; shares its memory if that is row-major."""
    array = np.asarray(array, order="C")
    if not array.flags.writeable:
        array = np.asarray(_Shared(array))
    if array.dtype == np.uint16:
        return ov.Tensor(array, list(array.shape), ov.Type.bf16)
    return ov.Tensor(array, shared_memory=True)


def _array(tensor: ov.Tensor, dtype: str) -> NumpyArray:
    found: NumpyArray = tensor.data
    return found.view(np.uint16) if dtype == "bf16" else found


@contextlib.contextmanager
def _failures(where: str, message: str) -> Iterator[None]:
    """Give what openvino raises inside the project's errors, with one line of its words."""
    try:
        yield
    except MemoryError as problem:
        raise ResourceError("out of memory", where=where, hint="run a smaller batch") from problem
    except (RuntimeError, ValueError, TypeError) as problem:
        # Its first lines say where in its source; the reason follows.
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        words = " ".join(lines[1:] if len(lines) > 1 and lines[0].startswith("Exception from") else lines)
        if "bad_alloc" in words or "allocate" in words:
            raise ResourceError("out of memory", where=where, got=words[-120:], hint="run a smaller batch") from problem
        raise GraphError(message, where=where, got=words[:300]) from problem
