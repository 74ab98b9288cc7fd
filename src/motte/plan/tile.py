"""Tiling: one large operation becomes several over slices of its output features, and a concatenation.

Each tile reads a slice of the stored weight (:class:`motte.capture.graph.Slice`), so that no part need hold the whole.
Every output feature is computed by the same operation from the same numbers, but a kernel may add in another order for
another width: results agree to 1e-6 of the largest one, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from motte.capture.graph import Arg, Graph, Node, Ref, Slice, TensorType, Value, Weight, WeightRef, references
from motte.errors import PlanError
from motte.limits import MAX_TILES
from motte.plan.plan import Tile
from motte.plan.streamed import aligned


@dataclass(frozen=True, slots=True)
class _Family:
    """How to tile one kind of operation.

    ``weight`` and ``bias`` are positions among its arguments, ``axis`` the weight's dimension of output features,
    ``out_dim`` the output's (counted from the end), ``groups`` the position of the group count, -1 if it has none.
    """

    weight: int
    axis: int
    out_dim: int
    bias: int = -1
    groups: int = -1


_FAMILIES: Mapping[str, _Family] = {
    **{
        f"aten.conv{rank}d.{overload}": _Family(weight=1, axis=0, out_dim=-(rank + 1), bias=2, groups=6)
        for rank in (1, 2, 3)
        for overload in ("default", "padding")
    },
    "aten.linear.default": _Family(weight=1, axis=0, out_dim=-1, bias=2),
    "aten.embedding.default": _Family(weight=0, axis=1, out_dim=-1),
    "aten.mm.default": _Family(weight=1, axis=1, out_dim=-1),
    "aten.addmm.default": _Family(weight=2, axis=1, out_dim=-1, bias=0),
}


@dataclass(frozen=True, slots=True)
class Tileable:
    """What can be tiled: ``features`` output features of ``weight``, cut only at multiples of ``step``.

    ``input`` is set where each tile reads only its own channels of it: a grouped convolution.
    """

    node: Node
    output: Value
    weight: Weight
    bias: Weight | None
    features: int
    step: int
    input: Ref | None

    @property
    def most(self) -> int:
        """The largest number of tiles."""
        return min(self.features // self.step, MAX_TILES)

    def spans(self, count: int) -> list[tuple[int, int]]:
        """``count`` balanced ranges of output features; sizes differ by one step at most, larger ones first."""
        units, rest = divmod(self.features // self.step, count)
        ends, end = [], 0
        for index in range(count):
            end += (units + (index < rest)) * self.step
            ends.append(end)
        return list(zip([0, *ends], ends, strict=False))

    def tile_bytes(self, width: int) -> int:
        """Bytes of weight and bias of a tile of ``width`` output features, as they are laid out in a part."""
        stored = (self.weight, *((self.bias,) if self.bias is not None else ()))
        return sum(aligned(weight.bytes // self.features * width) for weight in stored)


def tileable(graph: Graph, node: Node) -> Tileable | str:
    """How ``node`` can be tiled, or the reason why not."""
    family = _FAMILIES.get(node.op)
    if family is None:
        return f"{node.op} is no convolution, linear layer or embedding"
    if set(node.kwargs) & {"weight", "bias", "groups", "mat2", "mat1", "beta", "alpha"}:
        return "its weight, bias or groups are named arguments"
    source = node.args[family.weight]
    if not isinstance(source, WeightRef):
        return "its weight is computed, not stored"
    weight = graph.weights[source.name]
    if weight.slice is not None or len(weight.shape) <= family.axis:
        return "its weight is a tile already"
    bias_arg = _argument(node, family.bias)
    features = weight.shape[family.axis]
    bias: Weight | None = None
    if isinstance(bias_arg, WeightRef):
        bias = graph.weights[bias_arg.name]
        if bias.slice is not None or bias.shape != (features,):
            return "its bias is not one number per output feature"
    elif bias_arg is not None:
        return "its bias is computed, not stored"
    groups, source_value = _groups(node, family), node.args[0]
    if groups < 1 or features % groups:
        return "its output features are no multiple of its groups"
    if len(node.outputs) != 1 or node.outputs[0] is None:
        return "its result is not used"
    if groups == 1:
        return Tileable(node, node.outputs[0], weight, bias, features, 1, None)
    if not isinstance(source_value, Ref):
        return "the input of a grouped convolution is stored, not computed"
    return Tileable(node, node.outputs[0], weight, bias, features, features // groups, source_value)


def apply_tiles(graph: Graph, tiles: Sequence[Tile]) -> Graph:
    """The tiled graph: every tiled node replaced by its tiles and a concatenation.

    The concatenation keeps the name and the output of the node that it replaces, so nothing else changes. Returns
    ``graph`` itself when there is nothing to tile.

    Raises:
        PlanError: an unknown node, one named twice, one that cannot be tiled, or a count that cannot be made.
    """
    if not tiles:
        return graph
    counts = {tile.node: tile.count for tile in tiles}
    if len(counts) != len(tiles):
        names = [tile.node for tile in tiles]
        raise PlanError("a node is tiled twice", got=next(name for name in names if names.count(name) > 1))
    unknown = counts.keys() - {node.name for node in graph.nodes}
    if unknown:
        raise PlanError("no such node to tile", got=", ".join(sorted(unknown)[:5]), where=graph.name)
    values = graph.values()
    taken = {node.name for node in graph.nodes} | set(values)
    slices = _Slices(graph.weights)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in counts:
            count = counts[node.name]
            nodes += _tiled(values, check_tile(graph, node, count), count, taken, slices)
        else:
            nodes.append(node)
    read = {ref.name for node in nodes for ref in references(node) if isinstance(ref, WeightRef)}
    # A weight that only tiles read is gone from the graph; one that another node reads whole stays.
    tiled_only = {weight.slice.source for weight in slices.added.values() if weight.slice is not None} - read
    kept = {name: weight for name, weight in graph.weights.items() if name not in tiled_only}
    return replace(graph, nodes=tuple(nodes), weights={**kept, **slices.added})


def check_tile(graph: Graph, node: Node, count: int) -> Tileable:
    """Refuse a tile that cannot be made.

    Raises:
        PlanError: with the reason.
    """
    found = tileable(graph, node)
    if isinstance(found, str):
        raise PlanError("this node cannot be tiled", where=node.name, got=found)
    if not 2 <= count <= found.most:
        raise PlanError(
            "no such number of tiles",
            where=node.name,
            expected=f"2 to {found.most}"
            if found.most > 1
            else "an operation with several (groups of) output features",
            got=str(count),
        )
    return found


def _argument(node: Node, position: int) -> Arg:
    return node.args[position] if 0 <= position < len(node.args) else None


def _groups(node: Node, family: _Family) -> int:
    given = _argument(node, family.groups)
    return given if isinstance(given, int) and not isinstance(given, bool) else 1


def _tiled(values: Mapping[str, Value], found: Tileable, count: int, taken: set[str], slices: _Slices) -> list[Node]:
    node, family, whole = found.node, _FAMILIES[found.node.op], found.output
    nodes: list[Node] = []
    pieces: list[Arg] = []
    for index, (start, stop) in enumerate(found.spans(count)):
        args = list(node.args)
        args[family.weight] = slices.take(found.weight, family.axis, start, stop)
        if found.bias is not None:
            args[family.bias] = slices.take(found.bias, 0, start, stop)
        if isinstance(found.input, Ref):
            narrow = _narrowed(
                values[found.input.name], found, (start, stop), _fresh(f"{node.name}_input{index}", taken)
            )
            nodes.append(narrow)
            args[0] = Ref(narrow.name)
            args[family.groups] = (stop - start) // found.step
        name = _fresh(f"{node.name}_tile{index}", taken)
        out = Value(name, _with_extent(whole.type, family.out_dim, stop - start))
        nodes.append(replace(node, name=name, args=tuple(args), outputs=(out,)))
        pieces.append(Ref(name))
    dim = len(whole.type.shape) + family.out_dim
    joined = replace(node, op="aten.cat.default", args=(tuple(pieces), dim), kwargs={})
    return [*nodes, joined]


def _narrowed(source: Value, found: Tileable, span: tuple[int, int], name: str) -> Node:
    """A view of the input channels that the output features ``span`` of a grouped convolution read."""
    per_group = found.weight.shape[1]
    dim = len(source.type.shape) - (len(found.weight.shape) - 1)
    start, stop = (edge // found.step * per_group for edge in span)
    out = Value(name, _with_extent(source.type, dim, stop - start))
    args: tuple[Arg, ...] = (Ref(source.name), dim, start, stop, 1)
    return replace(found.node, name=name, op="aten.slice.Tensor", args=args, kwargs={}, outputs=(out,))


def _with_extent(type_: TensorType, dim: int, extent: int) -> TensorType:
    shape = list(type_.shape)
    shape[dim] = extent
    return TensorType(type_.dtype, tuple(shape))


class _Slices:
    """The stored slices of one tiled graph, by name."""

    def __init__(self, stored: Mapping[str, Weight]) -> None:
        self._stored = stored
        self.added: dict[str, Weight] = {}

    def take(self, weight: Weight, axis: int, start: int, stop: int) -> WeightRef:
        """A slice in its source's memory order: the same order of the dimensions, dense again."""
        name = f"{weight.name}[{':,' * axis}{start}:{stop}]"
        if name in self._stored:
            raise PlanError("a weight of the model has the name of a tile", got=name)
        shape = (*weight.shape[:axis], stop - start, *weight.shape[axis + 1 :])
        cut = Slice(weight.name, axis, start, stop)
        self.added[name] = Weight(name, weight.dtype, shape, weight.order, (), cut)
        return WeightRef(name)


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
