"""Parts of random graphs against the whole: what each reads, makes, holds and drops."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.graph import Graph, read_values, read_weights
from motte.capture.text import digest
from motte.engines import torch_engine
from motte.engines.torch_engine import TorchEngine
from motte.errors import PlanError
from motte.plan.costs import costs_of, peak_activation_bytes
from motte.plan.plan import Plan, Tile
from motte.plan.planner import plan_parts
from motte.plan.storage import is_view, weight_views
from motte.plan.tile import apply_tiles, tileable
from motte.split.chain import run_parts
from motte.split.oracle import weights_of
from motte.split.split import Part, split

seeds = st.integers(0, 2**32)
DIMS = {"batch": 3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def cut_graphs(draw: st.DrawFn) -> tuple[int, int, float, list[int]]:
    """Seed, size, share of tiled nodes and where to cut."""
    return draw(seeds), draw(st.integers(3, 16)), draw(st.floats(0, 1)), draw(st.lists(st.integers(0, 40), max_size=6))


def planned(graph: Graph, share: float, cuts: list[int]) -> Plan:
    """A plan with arbitrary cuts and tiles, by no objective."""
    able = [found for node in graph.nodes if not isinstance(found := tileable(graph, node), str) and found.most > 1]
    tiles = tuple(Tile(found.node.name, 2) for found in able[: round(share * len(able))])
    tiled = apply_tiles(graph, tiles)
    places = sorted({cut % (len(tiled.nodes) - 1) for cut in cuts}) if len(tiled.nodes) > 1 else []
    dims = tuple((dim.name, DIMS[dim.name]) for dim in graph.dims)
    return Plan(digest(graph), "chosen", dims, tuple(tiled.nodes[place].name for place in places), tiles)


class Poisoned:
    """Weights in one buffer for each part, spoiled as soon as the part has run: nothing may still look at them."""

    def __init__(self, parts: tuple[Part, ...], weights: Mapping[str, torch.Tensor]) -> None:
        self._parts, self._weights = parts, weights
        self.order: list[int] = []

    @contextmanager
    def __call__(self, index: int) -> Iterator[Mapping[str, torch.Tensor]]:
        self.order.append(index)
        held = {name: tensor.clone() for name, tensor in weights_of(self._parts[index].graph, self._weights).items()}
        yield held
        for tensor in held.values():
            tensor.fill_(float("nan"))


@given(cut_graphs())
def test_parts_equal_the_whole_bit_for_bit(random_graphs: ModuleType, case: tuple[int, int, float, list[int]]) -> None:
    seed, count, share, cuts = case
    graph = random_graphs.random_graph(seed, count)
    plan = planned(graph, share, cuts)
    weights, tiled = random_graphs.random_weights(graph), apply_tiles(graph, plan.tiles)
    parts = split(graph, plan)
    assert len(parts) == plan.parts
    engine = TorchEngine()
    wanted = random_graphs.Interpreter(tiled).run(
        random_graphs.random_inputs(graph, DIMS), weights_of(tiled, weights), DIMS
    )
    inputs = random_graphs.random_inputs(graph, DIMS)
    source = Poisoned(parts, weights)
    programs = [engine.compile(part.graph) for part in parts]
    found = run_parts(parts, programs, graph, inputs, source, DIMS)
    assert inputs == []
    assert source.order == list(range(len(parts)))
    returned_views = weight_views(tiled)
    for name, value, reference in zip(graph.outputs, found, wanted, strict=True):
        assert value.shape == reference.shape
        if name in returned_views:
            continue  # a view of a weight is valid only until the weights are spoiled
        assert value.stride() == reference.stride()
        assert torch.equal(value, reference)


@given(cut_graphs())
def test_what_a_part_holds(random_graphs: ModuleType, case: tuple[int, int, float, list[int]]) -> None:
    seed, count, share, cuts = case
    graph = random_graphs.random_graph(seed, count)
    plan = planned(graph, share, cuts)
    tiled = apply_tiles(graph, plan.tiles)
    parts = split(graph, plan)
    views, order = weight_views(tiled), {name: i for i, name in enumerate(tiled.values())}
    position = {node.name: index for index, node in enumerate(tiled.nodes)}
    made_before: set[str] = {value.name for value in graph.inputs}
    seen: list[str] = []
    for part in parts:
        own = [node for node in part.graph.nodes if position[node.name] >= len(seen)]
        # Repeated nodes only make views of weights again.
        repeated = {node.name for node in part.graph.nodes} - {node.name for node in own}
        assert all(
            value.name in views for node in part.graph.nodes if node.name in repeated for value in node.outputs if value
        )
        seen += [node.name for node in own]
        inputs = [value.name for value in part.graph.inputs]
        made = {value.name for node in part.graph.nodes for value in node.outputs if value is not None}
        assert inputs == sorted(inputs, key=order.__getitem__)
        assert set(inputs) == {name for node in part.graph.nodes for name in read_values(node)} - made
        assert not set(inputs) & views.keys()
        assert set(inputs) <= made_before
        assert set(part.graph.weights) == {name for node in part.graph.nodes for name in read_weights(node)}
        made_before |= made
        later = {value.name for after in parts[part.index + 1 :] for value in after.graph.inputs}
        outputs = set(part.graph.outputs)
        assert outputs <= made
        assert outputs - views.keys() == {
            name for name in made - views.keys() if name in later or name in graph.outputs
        }
        assert set(part.graph.outputs) & views.keys() <= (set(graph.outputs) if part.index == len(parts) - 1 else set())
    assert seen == [node.name for node in tiled.nodes]


@given(cut_graphs())
def test_the_engine_never_holds_more_than_was_counted(
    random_graphs: ModuleType, case: tuple[int, int, float, list[int]]
) -> None:
    """The real engine, which writes some results over their arguments, watched after every step of a chain of parts."""
    seed, count, share, cuts = case
    graph = random_graphs.random_graph(seed, count)
    plan = planned(graph, share, cuts)
    weights = random_graphs.random_weights(graph)
    parts = split(graph, plan)
    live: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    execute = torch_engine._execute

    def watched(step: Any, env: list[Any]) -> None:
        before = [tensor for tensor in env if isinstance(tensor, torch.Tensor)]
        execute(step, env)
        live.extend(weakref.ref(tensor) for tensor in env if isinstance(tensor, torch.Tensor))
        passing = [tensor for ref in live if (tensor := ref()) is not None]
        sizes = dict(random_graphs.storage_of(tensor) for tensor in (*before, *passing))
        held.append(sum(size for address, size in sizes.items() if address not in stored))

    def give(index: int) -> Any:
        nonlocal stored
        kept[index] = weights_of(parts[index].graph, weights)
        stored = {random_graphs.storage_of(tensor)[0] for each in kept.values() for tensor in each.values()}
        return contextmanager(lambda: iter([kept[index]]))()

    kept: dict[int, dict[str, torch.Tensor]] = {}
    stored: set[int] = set()
    engine = TorchEngine()
    programs = [engine.compile(part.graph) for part in parts]
    inputs = random_graphs.random_inputs(graph, DIMS)
    live.extend(weakref.ref(tensor) for tensor in inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "_execute", watched)
        run_parts(parts, programs, graph, inputs, give, DIMS)
    assert held
    assert max(held) <= peak_activation_bytes(graph, plan, DIMS)


def test_values_are_dropped_after_their_last_part(random_graphs: ModuleType) -> None:
    # A view keeps the Python object that it is a view of alive, which says nothing of this library.
    candidates = (random_graphs.random_graph(seed, 14) for seed in range(1000))
    graph = next(found for found in candidates if not any(is_view(node) for node in found.nodes))
    plan = plan_parts(graph, parts=4, objective="memory", dims=DIMS)
    parts = split(graph, plan)
    weights = random_graphs.random_weights(graph)
    last_reader = {value.name: part.index for part in parts for value in part.graph.inputs}
    refs: dict[str, weakref.ref[torch.Tensor]] = {}
    engine = TorchEngine()

    class Watching:
        def __init__(self, part: Part) -> None:
            self.part, self.program = part, engine.compile(part.graph)

        def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
            gc.collect()
            alive = {name for name, ref in refs.items() if ref() is not None}
            done = {name for name, part in last_reader.items() if part < self.part.index and name not in graph.outputs}
            assert not alive & done
            for value, tensor in zip(self.part.graph.inputs, inputs, strict=True):
                refs[value.name] = weakref.ref(tensor)
            made = self.program.run(inputs, weights, dims)
            refs.update((name, weakref.ref(tensor)) for name, tensor in zip(self.part.graph.outputs, made, strict=True))
            return made

    run_parts(
        parts,
        [Watching(part) for part in parts],
        graph,
        random_graphs.random_inputs(graph, DIMS),
        Poisoned(parts, weights),
        DIMS,
    )
    assert set(refs) >= set(last_reader)
    assert any(part < len(parts) - 1 for part in last_reader.values())


def test_one_part_is_the_whole_graph(random_graphs: ModuleType) -> None:
    graph = random_graphs.random_graph(2, 9)
    (part,) = split(graph, plan_parts(graph, parts=1, objective="weights", dims=DIMS))
    assert part.index == 0
    assert part.graph.nodes == graph.nodes
    read = {name for node in graph.nodes for name in read_values(node)}
    assert part.graph.inputs == tuple(value for value in graph.inputs if value.name in read)


def test_a_plan_that_breaks_a_rule_is_not_split(random_graphs: ModuleType) -> None:
    graph = random_graphs.random_graph(2, 9)
    with pytest.raises(PlanError, match="no such node to cut after"):
        split(graph, Plan(digest(graph), "chosen", (("batch", 2),), ("nowhere",)))


def test_counted_peak_of_the_tiled_graph(random_graphs: ModuleType) -> None:
    graph = random_graphs.random_graph(4, 12)
    plan = planned(graph, 1.0, [2])
    tiled = apply_tiles(graph, plan.tiles)
    assert peak_activation_bytes(graph, plan, DIMS) == max(costs_of(tiled, DIMS).live_bytes)
