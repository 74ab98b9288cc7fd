"""Runs lowered graphs with ONNX Runtime on CPU. Imports numpy and onnxruntime, and nothing heavier.

Its Linux builds carry a telemetry client that starts a thread and writes a database and a device id below the home
directory as soon as it is imported. One environment variable, read at that moment, keeps it out; it is set here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from motte.capture.graph import Graph
from motte.engines.checks import Checks, Shapes, check_weights, need_lowered, used_weights
from motte.engines.interface import NodeRunner, OnnxProgram, dim_input
from motte.engines.numpy_arrays import NumpyArray, described, from_bytes, has_type, to_bytes, weight_view
from motte.engines.settled import settled_bytes
from motte.errors import GraphError, ResourceError, SettingError

_FAILURES: Final = (
    state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
    state.ModelLoaded, state.NoModel, state.NoSuchFile, state.NotImplemented, state.RuntimeException,
    RuntimeError, ValueError, TypeError,
)  # fmt: skip
"""What onnxruntime raises: its own kinds have no common root."""
_MEMORY_WORDS: Final = ("Failed to allocate memory", "bad_alloc", "bad allocation", "out of memory")
_BFLOAT16: Final = 16
"""``TensorProto.BFLOAT16``; the only graph type that numpy cannot tell onnxruntime by itself."""
_TYPES: Final[Mapping[str, str]] = {
    "f64": "tensor(double)", "f32": "tensor(float)", "f16": "tensor(float16)", "bf16": "tensor(bfloat16)",
    "i64": "tensor(int64)", "i32": "tensor(int32)", "i16": "tensor(int16)", "i8": "tensor(int8)",
    "u8": "tensor(uint8)", "bool": "tensor(bool)",
}  # fmt: skip
_FATAL: Final = 4
_MESSAGE: Final = 300
"""Characters of its words that a message keeps."""
_allocator_lock = threading.Lock()
_allocator_made = False


class _Session:
    """One onnxruntime session and what it takes and gives. Safe to call from several threads."""

    def __init__(self, graph: Graph, model: bytes, options: ort.SessionOptions, dims: Sequence[str]) -> None:
        self._graph = graph
        self._checks = Checks(graph, has_type=has_type, described=described)
        with _failures(graph.name, "onnxruntime refuses the lowered graph"):
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        self._dims = tuple(dims)
        self.weights = self._read_weights()
        self._taken = frozenset(given.name for given in self._session.get_inputs())
        self._outputs = tuple(output.name for output in self._session.get_outputs())
        self._check_outputs()

    def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; ``weights`` are those that the session takes as inputs."""
        shapes = self._checks.check_inputs(inputs, dims)
        check_weights(self.weights, weights)
        # A binding costs 2 us an input where a dictionary of arrays costs 5, and gives results without a copy. It lives
        # for one call, so that nothing of the call is kept and calls from several threads do not meet.
        binding = self._session.io_binding()
        given = [
            *((value.name, array, value.type.dtype) for value, array in zip(self._graph.inputs, inputs, strict=True)),
            *((dim_input(name), np.array(dims[name], np.int64), "i64") for name in self._dims),
            *((name, weights[name], self._graph.weights[name].dtype) for name in self.weights),
        ]
        inputs.clear()
        # These keep the arrays until the run is over; not every version of a binding does.
        values = [_value(array, dtype) for _, array, dtype in given]
        for (name, _, _), value in zip(given, values, strict=True):
            binding.bind_ortvalue_input(name, value)
        own = self._bind_outputs(binding, shapes)
        with _failures(self._graph.name, "an operation failed"):
            self._session.run_with_iobinding(binding)
        del given, values
        results = binding.get_outputs()
        outputs = [
            own[name] if name in own else found.numpy() for name, found in zip(self._outputs, results, strict=True)
        ]
        # A result that is an input is the caller's memory, which nothing would keep alive.
        outputs = [
            found.copy() if name in self._taken else found for name, found in zip(self._outputs, outputs, strict=True)
        ]
        self._checks.check_outputs(outputs, shapes)
        return outputs

    def _bind_outputs(self, binding: ort.IOBinding, shapes: Shapes) -> dict[str, NumpyArray]:
        """Leave the results to onnxruntime's allocator, which reuses memory; but bfloat16 it cannot hand to numpy."""
        own = {}
        for name, value, shape in zip(self._outputs, self._checks.outputs, shapes.outputs, strict=True):
            if value.type.dtype == "bf16":
                own[name] = np.empty(shape, np.uint16)
                binding.bind_output(name, "cpu", 0, _BFLOAT16, shape, own[name].ctypes.data)
            else:
                binding.bind_output(name)
        return own

    def _read_weights(self) -> tuple[str, ...]:
        expected = {value.name: value.type.dtype for value in self._graph.inputs}
        expected |= {dim_input(name): "i64" for name in self._dims}
        weights = []
        for given in self._session.get_inputs():
            dtype = expected.pop(given.name, None)
            if dtype is None and given.name in self._graph.weights:
                weights.append(given.name)
                dtype = self._graph.weights[given.name].dtype
            if dtype is None or given.type != _TYPES[dtype]:
                wanted = None if dtype is None else _TYPES[dtype]
                raise GraphError(
                    f"the lowered graph takes {given.name!r}, and the graph does not",
                    where=self._graph.name,
                    expected=wanted,
                    got=given.type,
                )
        if expected:
            missing = ", ".join(sorted(expected))
            raise GraphError("the lowered graph does not take an input", where=self._graph.name, got=missing)
        return tuple(weights)

    def _check_outputs(self) -> None:
        expected = [_TYPES[value.type.dtype] for value in self._checks.outputs]
        got = [output.type for output in self._session.get_outputs()]
        if expected != got:
            raise GraphError(
                "the lowered graph has other outputs",
                where=self._graph.name,
                expected=" ".join(expected),
                got=" ".join(got),
            )


class _Nothing:
    """Stands for a part without outputs, which only makes views of weights: onnxruntime refuses an empty graph."""

    weights: tuple[str, ...] = ()

    def __init__(self, graph: Graph) -> None:
        self._checks = Checks(graph, has_type=has_type, described=described)

    def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
        """Check what is given, and give nothing."""
        self._checks.check_inputs(inputs, dims)
        inputs.clear()
        return []


class OnnxruntimeProgram:
    """A lowered graph that takes its weights on every call (see :class:`motte.engines.interface.Program`)."""

    def __init__(self, session: _Session | _Nothing) -> None:
        self._session = session

    def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; see :meth:`motte.engines.interface.Program.run`. Results are row-major and may be read-only.

        Raises:
            InputError: an input, weight or dimension is missing, or has another type than the graph says.
            GraphError: an operation fails, or a result has another type than the graph says.
            ResourceError: not enough memory.
        """
        return self._session.run(inputs, weights, dims)


class OnnxruntimeBound:
    """A lowered graph with its weights (see :class:`motte.engines.interface.Bound`), which it keeps alive.

    ``copy_bytes`` is the growth of this process's anonymous memory while the session was made. Weights of matrix
    products and of most convolutions are held once more, packed for the kernels; all others are read in place. The
    figure counts the session's own structures too (a few MiB), and is right in a process that does nothing else
    meanwhile.
    """

    def __init__(self, session: _Session | _Nothing, weights: Sequence[Any], copy_bytes: int) -> None:
        self._session, self._weights = session, tuple(weights)
        self.copy_bytes: int | None = copy_bytes

    def run(self, inputs: list[Any], dims: Mapping[str, int]) -> list[Any]:
        """Run once; raises what :meth:`OnnxruntimeProgram.run` raises."""
        return self._session.run(inputs, {}, dims)


class OnnxruntimeEngine:
    """The onnxruntime engine (see :class:`motte.engines.interface.Engine`); computes in the types of the graph.

    Args:
        threads: compute threads of each session.
    """

    name = "onnxruntime"
    joins = True
    needs_lowered = True

    def __init__(self, *, threads: int = 1) -> None:
        if threads < 1:
            raise SettingError("an engine needs a thread", expected="at least 1", got=str(threads))
        self._threads = threads
        ort.set_default_logger_severity(_FATAL)
        _share_allocator()

    def compile(
        self, graph: Graph, *, lowered: OnnxProgram | None = None, runners: Mapping[str, NodeRunner] | None = None
    ) -> OnnxruntimeProgram:
        """Prepare a **verified** graph's lowered form to run on weights given with every call.

        Raises:
            UnsupportedError: no lowered form, or runners.
            GraphError: onnxruntime refuses it, or its inputs and outputs are not the graph's.
        """
        program = need_lowered(self.name, graph, lowered, runners)
        if not graph.outputs:
            return OnnxruntimeProgram(_Nothing(graph))
        options = self._options()
        # Each session has threads of its own, which by default look for work for a while after a run. In a chain that
        # is while the next part runs: on two busy cores twelve parts took 3.7 times as long so.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return OnnxruntimeProgram(_Session(graph, program.core + program.weight_inputs, options, program.dims))

    def load(
        self, graph: Graph, weights: Mapping[str, NumpyArray], *, lowered: OnnxProgram | None = None
    ) -> OnnxruntimeBound:
        """Prepare a **verified** graph's lowered form to run on ``weights``.

        Raises:
            UnsupportedError, GraphError: see :meth:`compile`. InputError: a weight is missing.
            ResourceError: not enough memory.
        """
        program = need_lowered(self.name, graph, lowered)
        check_weights(used_weights(graph), weights)
        if not graph.outputs:
            return OnnxruntimeBound(_Nothing(graph), (), 0)
        # onnxruntime drops an initializer that no node reads, and then refuses a value for it.
        names = [name for name in used_weights(graph) if _mentions(program.core, name)]
        arrays = [weights[name] for name in names]
        values = [_value(array, graph.weights[name].dtype) for name, array in zip(names, arrays, strict=True)]
        options = self._options()
        # Threads may look for work between operations, though not for long, and not between runs, when others need the
        # processor. On two busy cores ResNet-50 took 204 ms so, 248 without looking and 306 as onnxruntime would have
        # it. (Versions before this key look longer.)
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        before = settled_bytes()
        with _failures(graph.name, "onnxruntime refuses the weights"):
            options.add_external_initializers(names, values)
            # The line above lets the optimizer read the values, but leaves a copy of each in the session. Named here
            # too, they are read from our memory when it runs, and the copies are dropped.
            for name, value in zip(names, values, strict=True):
                options.add_initializer(name, value)
        session = _Session(graph, program.core + program.weight_initializers, options, program.dims)
        if session.weights:
            left = ", ".join(session.weights[:5])
            raise GraphError("the lowered graph still takes weights as inputs", where=graph.name, got=left)
        return OnnxruntimeBound(session, [*arrays, *values], max(0, settled_bytes() - before))

    def weight(self, graph: Graph, name: str, buffer: memoryview) -> NumpyArray:
        """``buffer`` as a stored weight; see :func:`motte.engines.numpy_arrays.weight_view`."""
        return weight_view(graph, name, buffer)

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: memoryview) -> NumpyArray:
        """An array over ``data``; see :func:`motte.engines.numpy_arrays.from_bytes`."""
        return from_bytes(dtype, shape, data)

    def to_bytes(self, array: NumpyArray) -> tuple[str, tuple[int, ...], memoryview]:
        """Graph dtype, shape and row-major bytes; see :func:`motte.engines.numpy_arrays.to_bytes`."""
        return to_bytes(array)

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # One arena for all sessions of the process: the parts of a chain run one after another, and each would
        # otherwise keep its own peak of activations. Six sessions of ResNet-50 held 160 MB, with one arena 44 MB, and
        # without memory patterns (which also add an entry for every new input shape) 32 MB; times did not differ.
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        # Packed weights outside that arena, so that a session that is dropped gives them back.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        return options


def _share_allocator() -> None:
    global _allocator_made  # noqa: PLW0603 - onnxruntime has one environment a process, and so one such allocator
    with _allocator_lock:
        if not _allocator_made:
            place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            ort.create_and_register_allocator(place, None)
            _allocator_made = True


def _mentions(core: bytes, name: str) -> bool:
    """Whether a message holds ``name`` as the text of field 1, which is where ONNX has the inputs of a node."""
    text = name.encode()
    size = len(text)
    length = b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return b"\x0a" + length + bytes([size]) + text in core


def _value(array: NumpyArray, dtype: str) -> ort.OrtValue:
    """``array`` as onnxruntime sees it; shares its memory if that is row-major, and keeps it."""
    array = np.asarray(array, order="C")
    if dtype == "bf16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


@contextlib.contextmanager
def _failures(where: str, message: str) -> Iterator[None]:
    """Give what onnxruntime raises inside the project's errors, with one line of its words."""
    try:
        yield
    except MemoryError as problem:
        raise ResourceError("out of memory", where=where, hint="run a smaller batch") from problem
    except _FAILURES as problem:
        words = " ".join(str(problem).split())
        if any(word in words for word in _MEMORY_WORDS):
            raise ResourceError("out of memory", where=where, got=words[-120:], hint="run a smaller batch") from problem
        # The kind of failure stands in front, what happened at the end, and signatures of its functions between them.
        words = words if len(words) <= _MESSAGE else f"{words[:80]} ... {words[80 - _MESSAGE :]}"
        raise GraphError(message, where=where, got=words) from problem
