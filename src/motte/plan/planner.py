"""Graph -> Plan: where to cut, and what to tile. Every function returns a plan that :func:`check_plan` accepts.

Optimality (docs/spec/plan.md, checked against brute force): :func:`plan_parts` minimises the largest part exactly, and
among all such plans the total bytes crossing the cuts. :func:`plan_under` uses the fewest parts that the bound allows.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from motte.capture.graph import Graph
from motte.capture.sizes import bytes_of
from motte.capture.text import digest
from motte.errors import PlanError
from motte.limits import MAX_PARTS
from motte.plan.costs import Costs, check_dims, costs_of
from motte.plan.partition import (
    Line,
    Progress,
    best_boundary,
    best_monotone,
    greedy,
    smallest_bound,
    smallest_boundary,
)
from motte.plan.plan import Plan, Tile
from motte.plan.streamed import ARENA_SLACK_BYTES, aligned
from motte.plan.tile import Tileable, apply_tiles, tileable

OPTIMISED = ("weights", "memory", "time", "boundary")
"""The objectives of :func:`plan_parts`."""
_NS = 1_000_000_000


def plan_parts(
    graph: Graph,
    *,
    parts: int,
    objective: str,
    dims: Mapping[str, int],
    times: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Exactly ``parts`` non-empty parts whose largest is as small as it can be.

    Args:
        objective: what makes a part large. ``weights``: bytes of its distinct weights. ``memory``: these plus the most
            activation bytes held while it runs at ``dims``. ``time``: the sum of ``times``, in whole nanoseconds.
            ``boundary``: bytes entering plus bytes leaving.
        dims: a value for every dynamic dimension of ``graph``.
        times: seconds of every node by name; only for, and required by, the objective ``time``.
        progress: called with (steps done, steps in all).

    Raises:
        PlanError: more parts than nodes, an unknown objective, missing times, or dims that do not fit the graph.
    """
    if objective not in OPTIMISED:
        raise PlanError("unknown objective", expected=" or ".join(OPTIMISED), got=objective)
    _check_count(graph, parts)
    costs = costs_of(graph, dims)
    if objective == "boundary":
        bound = smallest_boundary(costs.cut_bytes, parts, progress)
        ends = best_boundary(costs.cut_bytes, parts, bound)
    else:
        line = _line(graph, costs, objective, times)
        ends = best_monotone(line, parts, smallest_bound(line, parts, progress), progress)
    return _plan(graph, graph, objective, dims, ends)


def plan_under(
    graph: Graph,
    *,
    max_part_bytes: int,
    objective: str = "memory",
    dims: Mapping[str, int],
    progress: Progress | None = None,
) -> Plan:
    """As few parts as possible with none above ``max_part_bytes``; at that count the largest as small as it can be.

    A convolution, linear layer or embedding that alone is above the bound is tiled first, into as few tiles as fit.

    Raises:
        PlanError: a node that alone is above the bound and cannot be tiled (enough), with its bytes.
    """
    if objective not in ("memory", "weights"):
        raise PlanError("unknown objective for a bound", expected="memory or weights", got=objective)
    costs = costs_of(graph, dims)
    memory = objective == "memory"
    if memory:
        _refuse_activations(graph, costs, max_part_bytes)
    tiles = _tiles_under(graph, costs, max_part_bytes, memory)
    tiled = apply_tiles(graph, tiles)
    if tiles:
        costs = costs_of(tiled, dims)
        if memory:
            _refuse_activations(tiled, costs, max_part_bytes)
    _refuse_oversized(tiled, costs, max_part_bytes, costs.live_bytes if memory else [0] * len(tiled.nodes))
    line = _line(tiled, costs, objective, None)
    return _plan(graph, tiled, objective, dims, _fewest(line, max_part_bytes, progress), tiles)


def plan_streamed(
    graph: Graph, *, weight_memory_bytes: int, dims: Mapping[str, int], progress: Progress | None = None
) -> Plan:
    """A plan whose streamed run needs at most ``weight_memory_bytes``, by :func:`motte.plan.streamed.streamed_need`.

    A model that fits whole becomes one part. Otherwise operations above a third of the bound are tiled (a part, the
    next part and the engine's copy must fit beside each other). With L the largest copy that is left, parts of at most
    (bound - L) / 2 keep the rule in any order; the plan has as few of them as possible, the largest as small as it can
    be. Sufficient, not necessary: an uneven plan may get along with fewer parts, but the opening of its largest part
    would have nothing to hide behind.

    Raises:
        PlanError: a node whose weights alone do not fit, with its bytes.
    """
    costs = costs_of(graph, dims)
    room = weight_memory_bytes - ARENA_SLACK_BYTES
    whole = sum(aligned(costs.weight_sizes[name]) for name in {name for names in costs.weights for name in names})
    if whole + max(costs.copy_bytes, default=0) <= room:
        return _plan(graph, graph, "weights", dims, [len(graph.nodes)])
    tiles = _tiles_under(graph, costs, room // 3, with_activations=False)
    tiled = apply_tiles(graph, tiles)
    costs = costs_of(tiled, dims)
    bound = (room - max(costs.copy_bytes, default=0)) // 2
    _refuse_oversized(tiled, costs, bound, [0] * len(tiled.nodes))
    line = _line(tiled, costs, "weights", None)
    return _plan(graph, tiled, "weights", dims, _fewest(line, bound, progress), tiles)


def plan_cuts(graph: Graph, *, cut_after: Sequence[str], objective: str = "chosen", dims: Mapping[str, int]) -> Plan:
    """Parts that end where the caller says.

    Args:
        cut_after: names of nodes, or paths of modules: a cut falls after the last node of the module or of anything
            inside it. In the order in which they run.
        objective: ``chosen``, or ``published`` for a preset.

    Raises:
        PlanError: an unknown name (with the closest known ones), names out of order or twice, an empty last part.
    """
    if objective not in ("chosen", "published"):
        raise PlanError("unknown objective for chosen cuts", expected="chosen or published", got=objective)
    check_dims(graph, dims)
    last = _last_nodes(graph)
    ends: list[int] = []
    for name in cut_after:
        if name not in last:
            close = difflib.get_close_matches(name, last, n=3, cutoff=0.5)
            raise PlanError(
                "no node or module of this name does anything",
                got=name,
                where=graph.name,
                hint=f"did you mean {' or '.join(close)}?" if close else "list the modules with the plan's table",
            )
        ends.append(last[name] + 1)
    for (before, after), (name, following) in zip(pairwise(ends), pairwise(cut_after), strict=True):
        if after <= before:
            raise PlanError(
                "cuts out of order" if after < before else "two cuts in one place",
                where=graph.name,
                got=f"{following} after {name}",
                hint="name the cuts in the order in which the model runs",
            )
    if ends and ends[-1] == len(graph.nodes):
        raise PlanError("nothing is left for the last part", where=graph.name, got=f"a cut after {cut_after[-1]}")
    return _plan(graph, graph, objective, dims, [*ends, len(graph.nodes)])


def _check_count(graph: Graph, parts: int) -> None:
    count = len(graph.nodes)
    if not 1 <= parts <= min(count, MAX_PARTS):
        expected = f"1 to {min(count, MAX_PARTS)} (the model has {count} nodes)"
        raise PlanError("no such number of parts", where=graph.name, expected=expected, got=str(parts))


def _line(graph: Graph, costs: Costs, objective: str, times: Mapping[str, float] | None) -> Line:
    count = len(graph.nodes)
    if objective == "time":
        nanoseconds = _nanoseconds(graph, times)
        return Line([(index,) for index in range(count)], nanoseconds, [0] * count, costs.cut_bytes)
    # Sizes as they are laid out in a part, so that a bound holds for what is really held.
    index_of = {name: index for index, name in enumerate(costs.weight_sizes)}
    items = [tuple(index_of[name] for name in names) for names in costs.weights]
    levels = costs.live_bytes if objective == "memory" else [0] * count
    return Line(items, [aligned(size) for size in costs.weight_sizes.values()], levels, costs.cut_bytes)


def _nanoseconds(graph: Graph, times: Mapping[str, float] | None) -> list[int]:
    if times is None:
        raise PlanError("the objective time needs the time of every node", hint="measure them first")
    missing = [node.name for node in graph.nodes if node.name not in times]
    if missing:
        raise PlanError("a node has no time", where=graph.name, got=", ".join(missing[:5]))
    for name, seconds in times.items():
        if not 0 <= seconds < 1e6:
            raise PlanError("not a time in seconds", where=name, got=str(seconds))
    return [round(times[node.name] * _NS) for node in graph.nodes]


def _fewest(line: Line, bound: int, progress: Progress | None) -> list[int]:
    ends = greedy(line, bound)
    if ends is None:
        raise PlanError("one node alone is above the bound", expected=f"at most {bound} bytes")
    if len(ends) > MAX_PARTS:
        raise PlanError("too many parts", expected=f"at most {MAX_PARTS}", got=str(len(ends)), hint="raise the bound")
    return best_monotone(line, len(ends), smallest_bound(line, len(ends), progress), progress)


def _tiles_under(graph: Graph, costs: Costs, bound: int, with_activations: bool) -> list[Tile]:
    tiles: list[Tile] = []
    for index, node in enumerate(graph.nodes):
        live = costs.live_bytes[index] if with_activations else 0
        if _node_bytes(costs, index) + live <= bound:
            continue
        found = tileable(graph, node)
        if isinstance(found, str):
            continue  # refused below, where every node is looked at
        output = bytes_of(found.output.type, costs.dims) if with_activations else 0
        count = _fewest_tiles(found, bound - live + output, output)
        if count is not None:
            tiles.append(Tile(node.name, count))
    return tiles


def _fewest_tiles(found: Tileable, room: int, output_bytes: int) -> int | None:
    """The fewest tiles that fit, each with its weights and the outputs of the tiles before it; None where none does.

    ``room`` is what is left for weights and for the tiles' outputs. The tile that runs last holds all outputs, so it
    bounds the count from below; the largest tile beside all outputs bounds it from above.
    """

    def fits(count: int) -> bool:
        return all(
            found.tile_bytes(stop - start) + output_bytes * stop // found.features <= room
            for start, stop in found.spans(count)
        )

    def smallest(bytes_at: Callable[[int], int]) -> int:
        return bisect_left(range(2, found.most), True, key=lambda count: bytes_at(count) + output_bytes <= room) + 2

    low = smallest(lambda count: found.tile_bytes(found.features // found.step // count * found.step))
    high = smallest(lambda count: found.tile_bytes(-(-(found.features // found.step) // count) * found.step))
    return next((count for count in range(low, min(high, found.most) + 1) if fits(count)), None)


def _node_bytes(costs: Costs, index: int) -> int:
    return sum(aligned(costs.weight_sizes[name]) for name in costs.weights[index])


def _refuse_activations(graph: Graph, costs: Costs, bound: int) -> None:
    """Refuse where activations alone are above the bound: neither a cut nor a tile helps against those."""
    worst = max(range(len(graph.nodes)), key=costs.live_bytes.__getitem__)
    if costs.live_bytes[worst] > bound:
        node = graph.nodes[worst]
        joined = " (where tiles are joined, their outputs are held twice)" if node.op == "aten.cat.default" else ""
        raise PlanError(
            "the activations at one node alone are above the bound",
            where=_place(graph, worst),
            expected=f"at most {bound} bytes",
            got=f"{costs.live_bytes[worst]} bytes of activations{joined}",
            hint="state smaller dimensions (a smaller batch), or raise the bound",
        )


def _refuse_oversized(graph: Graph, costs: Costs, bound: int, lives: Sequence[int]) -> None:
    worst = max(range(len(graph.nodes)), key=lambda index: _node_bytes(costs, index) + lives[index])
    weights, live = _node_bytes(costs, worst), lives[worst]
    if weights + live > bound:
        reason = tileable(graph, graph.nodes[worst])
        raise PlanError(
            "one node alone is above the bound",
            where=_place(graph, worst),
            expected=f"at most {bound} bytes",
            got=f"{weights} bytes of weights + {live} bytes of activations" if live else f"{weights} bytes of weights",
            hint=f"raise the bound: it cannot be tiled{': ' + reason if isinstance(reason, str) else ' finely enough'}",
        )


def _place(graph: Graph, index: int) -> str:
    node = graph.nodes[index]
    return f"{node.name}, {node.op}, module {node.module or graph.name}"


def _last_nodes(graph: Graph) -> dict[str, int]:
    """Index of the last node of every module path; a node's own name wins over a module's."""
    found: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        path = node.module
        while path:
            found[path] = index
            path = path.rpartition(".")[0]
    found.update((node.name, index) for index, node in enumerate(graph.nodes))
    return found


def _plan(
    captured: Graph,
    tiled: Graph,
    objective: str,
    dims: Mapping[str, int],
    ends: Sequence[int],
    tiles: Sequence[Tile] = (),
) -> Plan:
    stated = tuple((dim.name, dims[dim.name]) for dim in captured.dims)
    cut_after = tuple(tiled.nodes[end - 1].name for end in ends[:-1])
    return Plan(digest(captured), objective, stated, cut_after, tuple(tiles))
