"""What the tests of lowering share: one thread, every installed engine, and random graphs of tests/plan."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch

from motte.capture.graph import Graph, read_weights
from motte.engines.interface import OnnxProgram, dim_input
from motte.lower.lower import lower
from motte.lower.lowered import Lowered
from motte.plan.plan import Plan
from motte.plan.tile import apply_tiles
from motte.split.split import split

Checked = Callable[[Graph, Plan], Lowered]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _one_registry() -> Iterator[None]:
    """The exporter reads its table of translations anew on every call, which takes longer than a small graph does."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def engines() -> tuple[str, ...]:
    """The default engine, and the optional one where it is installed."""
    return ("onnxruntime", "openvino") if find_spec("openvino") is not None else ("onnxruntime",)


@pytest.fixture(scope="session")
def random_graphs() -> ModuleType:
    name = "motte_tests_random_graphs"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "plan" / "random_graphs.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def lowered_and_valid() -> Checked:
    """``lower``, with every message of the result looked at."""

    def lowered(graph: Graph, plan: Plan) -> Lowered:
        found = lower(graph, plan)
        assert isinstance(found, Lowered), found
        graphs = [*(part.graph for part in split(graph, plan)), apply_tiles(graph, plan.tiles)]
        for each, program in zip(graphs, (*found.parts, found.joined), strict=True):
            check_program(each, program)
        return found

    return lowered


def check_program(graph: Graph, program: OnnxProgram) -> None:
    """The core is ONNX that takes and gives what ``graph`` does, and holds no weight."""
    read = {name for node in graph.nodes for name in read_weights(node)}
    names = [name for name in graph.weights if name in read]
    core = onnx.load_from_string(program.core)
    assert [each.name for each in core.graph.input] == [
        *(value.name for value in graph.inputs),
        *map(dim_input, program.dims),
    ]
    assert [dim.name for dim in graph.dims if dim.name in program.dims] == list(program.dims)
    assert len(core.graph.output) == len(graph.outputs)
    constants = {each.name for each in core.graph.initializer}
    assert not constants & set(names)
    assert sum(each.ByteSize() for each in core.graph.initializer) < 8192
    # Nothing of where or how it was made.
    assert not core.doc_string
    assert not core.metadata_props
    assert not core.graph.metadata_props
    for value in (*core.graph.input, *core.graph.output):
        assert (value.doc_string, len(value.metadata_props)) == ("", 0)
    assert not core.graph.value_info
    for node in core.graph.node:
        assert (node.domain, node.name, node.doc_string, len(node.metadata_props)) == ("", "", "", 0)
    fed = onnx.load_from_string(program.core + program.weight_inputs)
    assert [each.name for each in fed.graph.input][len(core.graph.input) :] == names
    if graph.outputs:
        onnx.checker.check_model(fed)
        onnx.shape_inference.infer_shapes(fed, check_type=True, strict_mode=True, data_prop=True)
    held = onnx.load_from_string(program.core + program.weight_initializers)
    stored = {each.name: each for each in held.graph.initializer if each.name not in constants}
    assert list(stored) == names
    for name in names:
        weight, tensor = graph.weights[name], stored[name]
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        assert list(tensor.dims) == [weight.shape[dim] for dim in weight.order]
        assert {entry.key: entry.value for entry in tensor.external_data}["length"] == str(weight.bytes)
        assert not tensor.raw_data
        assert not tensor.float_data
