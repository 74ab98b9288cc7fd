"""How a loaded bundle runs: part after part, or all parts joined into one program where the engine runs that faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from motte.capture.graph import Graph
from motte.engines.interface import Array, Bound, Engine, NodeRunner, Program
from motte.errors import UnsupportedError
from motte.lower.lowered import Lowered, NotLowered
from motte.plan.streamed import copy_bytes
from motte.plan.tile import apply_tiles
from motte.seal.manifest import LaidOutPart, Manifest
from motte.split.chain import run_parts
from motte.trusted.weights import PartWeights


class Execution(Protocol):
    """Runs the model.

    ``joined``: all parts as one program. ``copy_bytes``: weights that the engine holds beside ours, computed for the
    part where that is largest, or measured where the parts are joined; None: it cannot be told.
    """

    joined: bool
    copy_bytes: int | None

    def run(self, inputs: list[Array], dims: Mapping[str, int]) -> list[Array]:
        """Run once on inputs in the graph's order; the list is emptied."""
        ...


class Chain:
    """Part after part, each with its weights for as long as it runs."""

    joined = False

    def __init__(
        self, parts: Sequence[LaidOutPart], programs: Sequence[Program], graph: Graph, weights: PartWeights
    ) -> None:
        self._parts = [laid_out.part for laid_out in parts]
        self._programs = programs
        self._graph = graph
        self._weights = weights
        self.copy_bytes: int | None = max(copy_bytes(part.graph) for part in self._parts)

    def run(self, inputs: list[Array], dims: Mapping[str, int]) -> list[Array]:
        """See :class:`Execution`."""
        return run_parts(self._parts, self._programs, self._graph, inputs, self._weights.part, dims)


class Joined:
    """All parts as one program with its weights, which stay opened."""

    joined = True

    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self.copy_bytes: int | None = bound.copy_bytes

    def run(self, inputs: list[Array], dims: Mapping[str, int]) -> list[Array]:
        """See :class:`Execution`."""
        return self._bound.run(inputs, dims)


def prepare(
    manifest: Manifest,
    parts: Sequence[LaidOutPart],
    engine: Engine,
    weights: PartWeights,
    *,
    resident: bool,
    runners: Mapping[str, NodeRunner],
) -> Execution:
    """Compile the model for ``engine``.

    Args:
        weights: opened already where ``resident``.
        runners: run the named nodes instead of the engine.

    Raises:
        UnsupportedError: the engine needs a lowered form that the bundle does not hold.
    """
    lowered = lowered_for(manifest, engine)
    if lowered is not None and engine.joins and resident and not runners:
        every: dict[str, Array] = {}
        for index in range(len(parts)):
            with weights.part(index) as held:
                every.update(held)
        whole = apply_tiles(manifest.graph, manifest.plan.tiles)
        return Joined(engine.load(whole, every, lowered=lowered.joined))
    forms = [None] * len(parts) if lowered is None else lowered.parts
    programs = [
        engine.compile(laid_out.part.graph, lowered=form, runners=_of(laid_out.part.graph, runners))
        for laid_out, form in zip(parts, forms, strict=True)
    ]
    return Chain(parts, programs, manifest.graph, weights)


def lowered_for(manifest: Manifest, engine: Engine) -> Lowered | None:
    """The lowered form for an engine that needs one.

    Raises:
        UnsupportedError: the bundle holds none; says why.
    """
    if not engine.needs_lowered:
        return None
    found = manifest.lowered
    if isinstance(found, Lowered):
        return found
    raise UnsupportedError(
        "this bundle can only run on the torch engine",
        where=manifest.graph.name,
        got=f"{engine.name}; {why_not_lowered(found)}",
        hint="use --engine torch (engine='torch')"
        + ("" if isinstance(found, NotLowered) else ", or let its owner seal it with --lower"),
    )


def why_not_lowered(found: NotLowered | None) -> str:
    """Why a bundle has no lowered form, in one line."""
    return "it was sealed without lowering" if found is None else f"not lowered: {found}"


def _of(graph: Graph, runners: Mapping[str, NodeRunner]) -> dict[str, NodeRunner]:
    return {node.name: runners[node.name] for node in graph.nodes if node.name in runners}
