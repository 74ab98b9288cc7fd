"""``lower``: every part of a plan, and all of them joined, as ONNX without weights. Imports torch and onnx."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec

from motte.capture.graph import Dim, Graph
from motte.engines.checks import used_weights
from motte.engines.interface import OnnxProgram, dim_input
from motte.engines.select import make_engine
from motte.errors import MotteError, UnsupportedError
from motte.lower.lowered import Lowered, NotLowered
from motte.plan.plan import Plan
from motte.plan.tile import apply_tiles
from motte.split.split import Part, split

_PACKAGES = ("onnx", "onnxscript", "onnx_ir")
_MAKERS = ("torch", "onnx", "onnxscript", "onnx-ir")
MAX_REASON = 300
"""Characters of one reason."""
_SMALLEST = 2
"""torch takes a dimension of 1 for a constant."""


def lower(graph: Graph, plan: Plan) -> Lowered | NotLowered:
    """Lower the captured (untiled, **verified**) ``graph`` as ``plan`` cuts it.

    The whole graph is exported once, then cut, so every part has the values that the whole has. Weights are neither
    read nor stored: a program has their names, types and stored shapes. The same graph and plan give the same bytes
    under the same versions of the packages in ``made_by``. Nothing is compared yet (``checks`` is empty):
    :func:`motte.lower.check.check_lowered` does that.

    Returns:
        All of it; or, where one part does not lower or the onnxruntime that is installed refuses it, the reasons.

    Raises:
        PlanError: the plan breaks a rule.
        UnsupportedError: a package that lowering needs is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        hint = "pip install onnx onnxscript"
        raise UnsupportedError("lowering needs packages that are not installed", got=", ".join(missing), hint=hint)
    parts = split(graph, plan)
    tiled = apply_tiles(graph, plan.tiles)
    sizes = {dim.name: _example(dim, dict(plan.dims)) for dim in graph.dims}
    clashes = {part.index + 1: clash for part in parts if (clash := _clash(part.graph))}
    if not clashes and (clash := _clash(tiled)):
        _note(clashes, len(parts), len(parts), clash)
    made = NotLowered(clashes) if clashes else _programs(tiled, parts, sizes)
    if isinstance(made, NotLowered):
        return made
    *programs, joined = made
    refused = _refusals(tiled, parts, made)
    if refused:
        return NotLowered(refused)
    return Lowered(joined, tuple(programs), (), {name: version(name) for name in _MAKERS})


def _example(dim: Dim, planned: Mapping[str, int]) -> int:
    return min(dim.high, max(dim.low, _SMALLEST, planned.get(dim.name, _SMALLEST)))


def _clash(graph: Graph) -> str:
    """Names that would be two inputs of its program: values, weights and dimensions are called without a prefix."""
    weights = set(used_weights(graph))
    values = {value.name for value in graph.inputs}
    both = (values & weights) | ((values | weights) & {dim_input(dim.name) for dim in graph.dims})
    return f"two inputs of its program would have one name: {', '.join(sorted(both)[:5])}" if both else ""


def _programs(tiled: Graph, parts: tuple[Part, ...], sizes: Mapping[str, int]) -> tuple[OnnxProgram, ...] | NotLowered:
    """The programs of the parts, and behind them that of the whole."""
    from motte.lower.cut import program
    from motte.lower.trace import quiet, reason, trace

    names = tuple(dict.fromkeys((*(name for part in parts for name in part.graph.outputs), *tiled.outputs)))
    try:
        traced = trace(tiled, names, sizes)
    # A compiler of others, on any model: it raises what it likes, and each of it means that torch has to run this.
    except Exception as problem:  # noqa: BLE001
        return NotLowered(_blame(parts, sizes, reason(problem)))
    found = []
    reasons: dict[int, str] = {}
    for index, graph in enumerate((*(part.graph for part in parts), tiled)):
        try:
            with quiet():
                found.append(program(traced, graph))
        except Exception as problem:  # noqa: BLE001
            _note(reasons, index, len(parts), str(problem) if isinstance(problem, MotteError) else reason(problem))
    return NotLowered(reasons) if reasons else tuple(found)


def _note(reasons: dict[int, str], index: int, parts: int, words: str) -> None:
    """Keep one reason a part; what is wrong with the whole alone stands at the last part."""
    if index < parts:
        reasons[index + 1] = words[:MAX_REASON]
    else:
        reasons.setdefault(parts, f"all parts joined: {words}"[:MAX_REASON])


def _blame(parts: tuple[Part, ...], sizes: Mapping[str, int], whole: str) -> dict[int, str]:
    """Which parts the exporter refuses, each by itself and with fixed sizes; all of them if it is only the whole."""
    from motte.lower.trace import reason, trace

    found = {}
    for part in parts:
        if not part.graph.outputs:
            continue
        try:
            trace(part.graph, part.graph.outputs, sizes, dynamic=False)
        except Exception as problem:  # noqa: BLE001
            found[part.index + 1] = reason(problem)
    return found or {part.index + 1: whole for part in parts}


def _refusals(tiled: Graph, parts: tuple[Part, ...], programs: tuple[OnnxProgram, ...]) -> dict[int, str]:
    """What the installed onnxruntime has no kernel for; nothing where it is not installed."""
    if find_spec("onnxruntime") is None:
        return {}
    engine = make_engine("onnxruntime", threads=1)
    found: dict[int, str] = {}
    graphs = (*(part.graph for part in parts), tiled)
    for index, (graph, program) in enumerate(zip(graphs, programs, strict=True)):
        if not graph.outputs:
            continue
        try:
            engine.compile(graph, lowered=program)
        except MotteError as problem:
            _note(found, index, len(parts), str(problem))
    return found
