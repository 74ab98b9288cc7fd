"""The rules that a plan keeps, one function each, all run before anything uses a plan.

The numbers are those of docs/spec/plan.md. Every refusal shows the plan's text with the bad line marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from motte.capture.graph import Graph
from motte.capture.text import digest
from motte.errors import PlanError
from motte.limits import MAX_PARTS
from motte.plan.linear_nodes import layer_weight, linear_nodes, other_readers
from motte.plan.offload import PlannedLayer
from motte.plan.plan import OBJECTIVES, Plan
from motte.plan.text import marked, plan_lines
from motte.plan.tile import apply_tiles, check_tile

_GRAPH_LINE, _OBJECTIVE_LINE, _FIRST_DIM_LINE = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Flaw:
    """One broken rule: the line of the plan's text (from 1) and what is wrong with it."""

    line: int
    problem: str
    expected: str | None = None
    got: str | None = None


def check_plan(plan: Plan, graph: Graph) -> None:
    """Run every rule on a plan for the captured (untiled) ``graph``.

    Raises:
        PlanError: the first broken rule, its number in ``where``; ``hint`` is the plan's text with the line marked.
    """
    for number, rule in RULES.items():
        for flaw in rule(plan, graph):
            raise PlanError(
                flaw.problem,
                where=f"plan line {flaw.line}, rule {number}",
                expected=flaw.expected,
                got=flaw.got,
                hint="the plan, with the bad line marked:\n" + marked(plan, flaw.line, flaw.problem),
            )


def digest_matches(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-1: the plan was made for this graph."""
    found = digest(graph)
    if plan.graph_digest != found:
        yield Flaw(_GRAPH_LINE, "the plan was made for another graph", found, plan.graph_digest)


def objective_known(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-2: the objective is one that exists."""
    if plan.objective not in OBJECTIVES:
        yield Flaw(_OBJECTIVE_LINE, "unknown objective", " or ".join(OBJECTIVES), plan.objective)


def dims_in_range(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-3: every dimension of the graph has one value in its range, in the graph's order, and no other has one."""
    stated = [name for name, _ in plan.dims]
    known = [dim.name for dim in graph.dims]
    if stated != known:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(stated, known, strict=False)))
        line = _OBJECTIVE_LINE + min(same + 1, len(stated))
        yield Flaw(line, "other dimensions than the graph's", ", ".join(known) or "none", ", ".join(stated) or "none")
        return
    for index, (dim, (_, size)) in enumerate(zip(graph.dims, plan.dims, strict=True)):
        if not dim.low <= size <= dim.high:
            yield Flaw(
                _FIRST_DIM_LINE + index, "a dimension is out of its range", f"{dim.low} to {dim.high}", str(size)
            )


def tiles_legal(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-4: every tiled node exists, is named once, in graph order, and can be tiled that many times."""
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    last = -1
    for index, tile in enumerate(plan.tiles):
        line = _FIRST_DIM_LINE + len(plan.dims) + index
        if tile.node not in position:
            yield Flaw(line, "no such node to tile", got=tile.node)
            return
        if position[tile.node] <= last:
            yield Flaw(line, "tiles are not in graph order, or a node is tiled twice", got=tile.node)
        last = position[tile.node]
        try:
            check_tile(graph, graph.nodes[last], tile.count)
        except PlanError as problem:
            yield Flaw(line, problem.message, problem.expected, problem.got)


def parts_in_bounds(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-5: no more parts than ``MAX_PARTS``."""
    if plan.parts > MAX_PARTS:
        yield Flaw(_first_cut_line(plan) + MAX_PARTS - 1, "too many parts", f"at most {MAX_PARTS}", str(plan.parts))


def cuts_exist(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-6: every cut names a node of the tiled graph."""
    names = {node.name for node in apply_tiles(graph, plan.tiles).nodes}
    for index, name in enumerate(plan.cut_after):
        if name not in names:
            yield Flaw(_first_cut_line(plan) + index, "no such node to cut after", got=name)


def cuts_in_order(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-7: every cut lies after the one before it; so no part but the last can be empty."""
    position = {node.name: index for index, node in enumerate(apply_tiles(graph, plan.tiles).nodes)}
    last = -1
    for index, name in enumerate(plan.cut_after):
        if position[name] <= last:
            yield Flaw(_first_cut_line(plan) + index, "cuts are not in graph order, or two are in one place", got=name)
        last = position[name]


def last_part_not_empty(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-8: something is left after the last cut."""
    if plan.cut_after and plan.cut_after[-1] == apply_tiles(graph, plan.tiles).nodes[-1].name:
        yield Flaw(_first_cut_line(plan) + len(plan.cut_after) - 1, "nothing is left for the last part")


def layers_exist(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-9: every layer of the offload section exists; one that is not inside is a convolution or linear layer."""
    layers = list(_layer_lines(plan))
    linear = linear_nodes(graph)
    nodes = {node.name for node in apply_tiles(graph, plan.tiles).nodes} if layers else set()
    for line, layer in layers:
        weight = layer_weight(graph, layer.name)
        if weight is None and (layer.side != "inside" or layer.name not in nodes):
            yield Flaw(line, "no such layer", "LAYER of a weight LAYER.weight", layer.name)
        elif layer.side != "inside" and weight is not None and weight.name not in linear:
            yield Flaw(line, f"a {_word(layer)} layer is no convolution and no linear layer", got=layer.name)


def split_weights_serve_only_their_layer(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-10: what reads the weight of a layer that is not inside is a convolution or linear layer, and is not tiled."""
    linear, tiled = linear_nodes(graph), {tile.node for tile in plan.tiles}
    for line, layer in _layer_lines(plan):
        weight = layer_weight(graph, layer.name)
        if layer.side == "inside" or weight is None:
            continue
        what = _word(layer)
        for node in other_readers(graph, weight.name):
            yield Flaw(line, f"the weight of a {what} layer is also read by {node.name} ({node.op})", got=layer.name)
        for node in linear[weight.name]:
            if node.name in tiled:
                yield Flaw(line, f"a {what} layer is tiled", got=f"{layer.name}, tile {node.name}")


def tied_weights_on_one_side(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-11: layers that share one weight are all on one side."""
    sides: dict[str, tuple[str, str]] = {}
    for line, layer in _layer_lines(plan):
        weight = layer_weight(graph, layer.name)
        if weight is None:
            continue
        name, side = sides.setdefault(weight.name, (layer.name, layer.side))
        if side != layer.side:
            yield Flaw(line, f"shares its weight with {name}, which is on the other side", side, layer.side)


def gpu_can_be_measured(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-12: layers on a confidential GPU come with good measurements of it, and good measurements with such layers."""
    references = () if plan.offload is None else plan.offload.gpu_references
    placed = [(line, layer) for line, layer in _layer_lines(plan) if layer.side == "confidential-gpu"]
    if placed and not references:
        line, layer = placed[0]
        yield Flaw(line, "nothing says which measurements of the GPU are good", "a gpu-reference line", layer.name)
    if references and not placed:
        line = _first_cut_line(plan) + len(plan.cut_after)
        yield Flaw(line, "good measurements of a GPU on which nothing is placed", "no gpu-reference line")


def trusted_splits_nothing(plan: Plan, graph: Graph) -> Iterator[Flaw]:
    """P-13: under the scheme ``trusted`` no layer is split."""
    if plan.offload is not None and plan.offload.scheme == "trusted":
        for line, layer in _layer_lines(plan):
            if layer.side == "split":
                yield Flaw(line, "a layer is split under a scheme that lets nothing leave", "inside", layer.name)


def _word(layer: PlannedLayer) -> str:
    return "split" if layer.side == "split" else "confidential GPU"


def _layer_lines(plan: Plan) -> Iterator[tuple[int, PlannedLayer]]:
    layers = () if plan.offload is None else plan.offload.layers
    # Layer lines are the last of the text.
    first = len(plan_lines(plan)) - len(layers) + 1
    return zip(range(first, first + len(layers)), layers, strict=True)


def _first_cut_line(plan: Plan) -> int:
    return _FIRST_DIM_LINE + len(plan.dims) + len(plan.tiles)


RULES: dict[str, Callable[[Plan, Graph], Iterator[Flaw]]] = {
    "P-1": digest_matches,
    "P-2": objective_known,
    "P-3": dims_in_range,
    "P-4": tiles_legal,
    "P-5": parts_in_bounds,
    "P-6": cuts_exist,
    "P-7": cuts_in_order,
    "P-8": last_part_not_empty,
    "P-9": layers_exist,
    "P-10": split_weights_serve_only_their_layer,
    "P-11": tied_weights_on_one_side,
    "P-12": gpu_can_be_measured,
    "P-13": trusted_splits_nothing,
}
"""In the order in which they run: a later rule may rely on the earlier ones."""
