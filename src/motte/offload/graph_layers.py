"""The layers of a captured graph beside a plan's offload section: which nodes run split, and which could.

Both halves ask here: the owner before a bundle is sealed, the worker before anything is sent. Needs no torch. The
checks M-3 and M-4 are those of docs/spec/bundle.md; what a plan alone shows (P-9 to P-13) was checked before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from motte.capture.graph import Graph, Node, read_values
from motte.capture.sizes import bytes_of
from motte.errors import BundleError, SettingError
from motte.linear.nodes import LinearNode, weighted_products
from motte.offload.placement import Placed, Placement, place_on_gpu, refuse_unproved
from motte.plan.linear_nodes import layer_weight, linear_nodes, linear_weight, other_readers
from motte.plan.offload import OffloadPlan
from motte.plan.plan import Tile

if TYPE_CHECKING:
    from motte.offload.confidential_gpu import ProvedGpu

ALL_BUT_FIRST_LAST = "all-but-first-last"
"""Every layer that can run split, but those with no layer before them and those with none behind them."""
_WILD = frozenset("*?[")
_SUFFIX = ".weight"
_TILED = "the plan computes it in tiles"


@dataclass(frozen=True, slots=True)
class SplitNode:
    """A node that runs split: ``name`` is its name at the accelerator and in errors (where several nodes read one
    weight, each has a name of its own), ``position`` its place among the split layers, for rank schedules."""

    name: str
    position: int
    linear: LinearNode


@dataclass(frozen=True, slots=True)
class GraphLayer:
    """A convolution or linear layer of a graph.

    ``refused``: why it must stay inside; None: it can run split. ``first``: nothing that it reads comes from another
    layer. ``last``: no other layer reads what comes of its result. Embeddings and recurrent layers count as layers.
    """

    name: str
    weight: str
    refused: str | None
    first: bool
    last: bool


def graph_layers(graph: Graph) -> tuple[GraphLayer, ...]:
    """The convolutions and linear layers of ``graph``, in the order in which they first run.

    One that runs several times can run split only if every time can.
    """
    products = {node.name: (node, found) for node, found in weighted_products(graph)}
    fed, read = _fed(graph, products), _read_again(graph, products)
    layers: dict[str, GraphLayer] = {}
    for node, found in products.values():
        weight = linear_weight(node)
        if weight is None or not weight.endswith(_SUFFIX):
            continue
        refused = found if isinstance(found, str) else next(_other_uses(graph, weight), None)
        layer = GraphLayer(weight.removesuffix(_SUFFIX), weight, refused, node.name not in fed, node.name not in read)
        known = layers.get(weight)
        if known is not None:
            refused = known.refused or layer.refused
            layer = replace(layer, refused=refused, first=known.first or layer.first, last=known.last or layer.last)
        layers[weight] = layer
    return tuple(layers.values())


def choose_layers(graph: Graph, words: Sequence[str], *, tiles: Sequence[Tile] = ()) -> Placement:
    """Every layer of ``graph`` with its side: split where ``words`` choose it. Positions count in the order in which
    layers first run.

    Args:
        graph: as it was captured.
        tiles: of its plan: a layer that is computed in tiles stays inside.
        words: :data:`ALL_BUT_FIRST_LAST`, or names of layers or weights, or patterns (``*``, ``?``, ``[]``) of layers;
            each word is one or several, separated by commas.

    Raises:
        SettingError: a word that fits no layer, a layer named outright that cannot run split, or nothing to split.
    """
    layers = _without_tiles(graph, graph_layers(graph), {tile.node for tile in tiles})
    wanted = [word for text in words for word in text.split(",") if word]
    for word in wanted:
        if word != ALL_BUT_FIRST_LAST and not any(_fits(word, layer) for layer in layers):
            hint = "layers are named by their modules, such as features.10; * stands for any text"
            raise SettingError("no such convolution or linear layer", got=word, where=graph.name, hint=hint)
    reasons = [_inside(layer, wanted) for layer in layers]
    if None not in reasons:
        raise SettingError("no layer is left to run on the accelerator", where=graph.name, got=", ".join(words))
    return Placement(
        tuple(
            Placed(layer.name, "split" if reason is None else "inside", reason or "chosen by the owner")
            for layer, reason in zip(layers, reasons, strict=True)
        )
    )


def choose_gpu_layers(
    graph: Graph, words: Sequence[str], placement: Placement | None = None, *, tiles: Sequence[Tile] = ()
) -> Placement:
    """``placement`` with the layers that ``words`` choose on the confidential GPU; they leave no more.

    More layers can run there than can run split, since nothing is taken apart: all that multiply with a stored weight
    that serves nothing else.

    Args:
        graph: as it was captured.
        words: names of layers or weights, or patterns of layers, as for :func:`choose_layers`.
        placement: None: every layer of ``graph`` inside.
        tiles: of its plan: a layer that is computed in tiles stays where it is.

    Raises:
        SettingError: a word that fits no layer, a layer named outright that cannot run there, or none that can.
    """
    layers, tiled = graph_layers(graph), {tile.node for tile in tiles}
    if placement is None:
        placement = Placement(tuple(Placed(layer.name, "inside", "not chosen") for layer in layers))
    chosen: set[str] = set()
    for word in [word for text in words for word in text.split(",") if word]:
        fitting = [layer for layer in layers if _fits(word, layer)]
        able = {layer.weight for layer in fitting if _not_on_gpu(graph, layer.weight, tiled) is None}
        if not able:
            got = _not_on_gpu(graph, fitting[0].weight, tiled) if fitting else None
            raise SettingError("no layer that can run on a GPU", where=word, got=got or "no such layer")
        chosen |= able
    if not chosen:
        raise SettingError("no layer is named for the GPU", where=graph.name, got=", ".join(words))
    return place_on_gpu(
        placement,
        [
            each.name
            for each in placement.layers
            if (weight := layer_weight(graph, each.name)) and weight.name in chosen
        ],
    )


def public_names(graph: Graph, section: OffloadPlan) -> tuple[str, ...]:
    """The weights of the split layers of ``section``: what the header of a bundle has to mark public."""
    found = (layer_weight(graph, name) for name in section.split)
    return tuple(sorted({weight.name for weight in found if weight is not None}))


def split_nodes(
    graph: Graph, section: OffloadPlan, public: Collection[str], *, gpu: ProvedGpu | None = None
) -> tuple[SplitNode, ...]:
    """The nodes of ``graph``, as it was captured, that run split. By rule P-10 none of them is tiled.

    Args:
        public: names of weights that the signed header of the bundle marks as public.
        gpu: what proves that a GPU counts as inside, for layers that are placed there.

    Raises:
        BundleError: check M-3, a split layer whose weight is not marked public; check M-4, one that does not exist,
            or that cannot run split. AttestationError: layers on a confidential GPU that nothing proves (U-1).
    """
    refuse_unproved(section, gpu)
    return _split_nodes(graph, section, public)


def check_layers(graph: Graph, section: OffloadPlan, public: Collection[str]) -> None:
    """What a worker will check of ``section``, for the owner who seals it, and who has no GPU to prove.

    Raises:
        BundleError: checks M-3 and M-4.
    """
    _split_nodes(graph, section, public)
    _gpu_nodes(graph, section)


def _split_nodes(graph: Graph, section: OffloadPlan, public: Collection[str]) -> tuple[SplitNode, ...]:
    layers = {layer.weight: layer for layer in graph_layers(graph)}
    positions: dict[str, tuple[str, int]] = {}
    for position, name in enumerate(section.split):
        weight = layer_weight(graph, name)
        layer = layers.get(weight.name) if weight is not None else None
        if layer is None:
            raise BundleError("the placement splits a layer that is not there", check="M-4", where=f"layer {name}")
        if layer.weight not in public:
            raise BundleError(
                "the placement sends out a weight that the signed header does not mark public",
                check="M-3",
                where=f"layer {name}, weight {layer.weight}",
                hint="the owner seals it again, with the layer in --public-weights or without it in the placement",
            )
        if layer.refused is not None:
            raise BundleError(
                "the placement splits a layer that has to stay inside",
                check="M-4",
                where=f"layer {name}",
                got=layer.refused,
            )
        positions.setdefault(layer.weight, (name, position))
    return tuple(_nodes(graph, positions))


def gpu_nodes(graph: Graph, section: OffloadPlan, gpu: ProvedGpu | None) -> tuple[Node, ...]:
    """The nodes of ``graph``, as it was captured, that run whole on ``gpu``, in the order in which they run.

    Raises:
        AttestationError: there are such, and nothing proves a GPU (U-1). BundleError: check M-4, a layer that does not
            exist or cannot run alone.
    """
    refuse_unproved(section, gpu)
    return _gpu_nodes(graph, section)


def _gpu_nodes(graph: Graph, section: OffloadPlan) -> tuple[Node, ...]:
    weights: set[str] = set()
    for name in section.confidential_gpu:
        weight = layer_weight(graph, name)
        refused = "no such layer" if weight is None else _not_on_gpu(graph, weight.name, ())
        if weight is None or refused is not None:
            raise BundleError(
                "the placement puts a layer on a GPU that cannot run there",
                check="M-4",
                where=f"layer {name}",
                got=refused,
            )
        weights.add(weight.name)
    return tuple(node for node in graph.nodes if linear_weight(node) in weights)


def _not_on_gpu(graph: Graph, weight: str, tiled: Collection[str]) -> str | None:
    """Why the layer of ``weight`` cannot run whole on a GPU; None: it can."""
    nodes = linear_nodes(graph).get(weight)
    if nodes is None:
        return "it is no convolution and no linear layer"
    if any(node.name in tiled for node in nodes):
        return _TILED
    return next(_other_uses(graph, weight), None)


def split_extra_bytes(graph: Graph, nodes: Sequence[SplitNode], dims: Mapping[str, int]) -> int:
    """Activation bytes that the largest split layer holds beside its input and its result, at ``dims``: padded input,
    residual, what of it is noised or rounded, a working copy of the decomposition; the accelerator's answer."""
    values = graph.values()
    outputs = {node.name: node.outputs[0] for node in graph.nodes if node.outputs}
    found = 0
    for node in nodes:
        result = outputs[node.linear.node]
        made = 0 if result is None else bytes_of(result.type, dims)
        found = max(found, 4 * bytes_of(values[node.linear.input].type, dims) + 2 * made)
    return found


def _nodes(graph: Graph, positions: dict[str, tuple[str, int]]) -> list[SplitNode]:
    found: list[SplitNode] = []
    uses: dict[str, int] = {}
    for _, linear in weighted_products(graph):
        if isinstance(linear, LinearNode) and linear.weight in positions:
            name, position = positions[linear.weight]
            uses[name] = uses.get(name, 0) + 1
            found.append(SplitNode(name if uses[name] == 1 else f"{name}#{uses[name]}", position, linear))
    return found


def _without_tiles(graph: Graph, layers: Sequence[GraphLayer], tiled: Collection[str]) -> list[GraphLayer]:
    weights = {linear_weight(node) for node in graph.nodes if node.name in tiled}
    return [replace(layer, refused=layer.refused or _TILED) if layer.weight in weights else layer for layer in layers]


def _inside(layer: GraphLayer, wanted: Sequence[str]) -> str | None:
    """Why ``layer`` stays inside; None: it is split."""
    named = [word for word in wanted if word != ALL_BUT_FIRST_LAST and _fits(word, layer)]
    if layer.refused is not None:
        if any(not _WILD & set(word) for word in named):
            raise SettingError("this layer has to stay inside", where=layer.name, got=layer.refused)
        return layer.refused
    if named:
        return None
    if ALL_BUT_FIRST_LAST not in wanted:
        return "not chosen"
    return "no layer before it" if layer.first else "no layer behind it" if layer.last else None


def _fits(word: str, layer: GraphLayer) -> bool:
    # No pattern over weights: all of them end in the same word, and "*t" would choose every layer.
    return fnmatchcase(layer.name, word) or word == layer.weight


def _other_uses(graph: Graph, weight: str) -> Iterator[str]:
    for node in other_readers(graph, weight):
        yield f"its weight is also read by {node.name} ({node.op})"


def _fed(graph: Graph, products: Collection[str]) -> set[str]:
    """The products that read something that comes of another product."""
    found: set[str] = set()
    made: set[str] = set()
    for node in graph.nodes:
        fed = not made.isdisjoint(read_values(node))
        if fed and node.name in products:
            found.add(node.name)
        if fed or node.name in products:
            made.update(value.name for value in node.outputs if value is not None)
    return found


def _read_again(graph: Graph, products: Collection[str]) -> set[str]:
    """The products from whose result another product comes."""
    found: set[str] = set()
    needed: set[str] = set()
    for node in reversed(graph.nodes):
        behind = any(value is not None and value.name in needed for value in node.outputs)
        if behind and node.name in products:
            found.add(node.name)
        if behind or node.name in products:
            needed.update(read_values(node))
    return found
