"""``nn.Module`` + example inputs -> graph and weights, through ``torch.export``. Imports torch.

Bits: the graph holds the operations that eager execution dispatches, so running it gives the eager result bit for bit
on the same machine and thread count. Eager itself makes two exceptions:

* in inference ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` may take a fused fast path with other bits;
  compare with ``torch.backends.mha.set_fastpath_enabled(False)``;
* recurrent layers compute differently when their weights require gradients, even where none are recorded; weights of a
  graph never do; compare with ``model.requires_grad_(False)``.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TextIO

import sympy
import torch
from torch import nn
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from motte.capture import lines, tensors
from motte.capture.checks import check_dim_name, check_graph, check_name
from motte.capture.fold import fold
from motte.capture.graph import Dim, Graph
from motte.capture.translate import translate
from motte.errors import CaptureError, GraphError, InputError, SettingError

DEFAULT_RANGE: Final = (1, 1024)
"""Range of a dynamic dimension for which the caller gives none; narrowed to what the model allows."""
_MAX_ATTEMPTS: Final = 5
_LARGEST_GUESS: Final = 5
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph and its weights, which share memory with the model where the model's are dense."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One example input: its name for the caller, its value, and its dynamic dimensions."""

    name: str
    value: Any
    dims: Mapping[int, str]


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str,
    dims: Mapping[str, Mapping[int, str]] | None = None,
    dim_ranges: Mapping[str, tuple[int, int]] | None = None,
) -> Captured:
    """Capture ``model`` as it runs on the example inputs.

    Args:
        model: in eval mode, on the CPU.
        args, kwargs: example inputs: tensors, containers of tensors, and plain settings, which become part of the
            graph as they are.
        name: of the graph.
        dims: the dynamic dimensions by input: ``{"x": {0: "batch"}}``. Inputs are called as ``forward`` calls them;
            item 1 of a tuple ``hx`` is ``hx_1``. Dimensions of one name have one size.
        dim_ranges: inclusive range of each dimension; :data:`DEFAULT_RANGE`, narrowed to what the model allows, where
            none is given.

    Raises:
        SettingError: ``dims`` or ``dim_ranges`` contradict the inputs.
        CaptureError: the model cannot be captured; ``op`` and ``where`` name the operation and the model's line.
    """
    _as_setting(check_name, name, "name")
    _check_model(model)
    leaves, structure = _leaves(model, args, dict(kwargs or {}), dims or {})
    ranges = _ranges(leaves, dim_ranges or {})
    fixed = frozenset(dim_ranges or {})
    examples = _examples(leaves)
    with _quiet(), torch.no_grad():
        program, ranges = _export(model, structure, examples, leaves, ranges, fixed)
        try:
            _remove_dropout(program)
            program = program.run_decompositions({})
        except Exception as problem:
            raise _explain(problem) from problem
        graph, weights = translate(
            program,
            name=name,
            dims=tuple(Dim(dim, low, high) for dim, (low, high) in ranges.items()),
            names=_symbols(program, leaves),
            input_names=tuple(leaf.name for leaf in leaves),
            aliases=_aliases(model),
        )
        graph, weights = fold(graph, weights, frozenset(program.graph_signature.parameters))
    try:
        check_graph(graph)
    except GraphError as problem:
        raise CaptureError(
            f"the captured graph breaks a rule: {problem.message}",
            expected=problem.expected,
            got=problem.got,
            where=problem.where,
        ) from problem
    return Captured(graph, weights)


def _as_setting(check: Callable[..., None], *args: object) -> None:
    try:
        check(*args)
    except GraphError as problem:
        raise SettingError(problem.message, expected=problem.expected, got=problem.got) from problem


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError("not an nn.Module", got=type(model).__name__)
    for path, module in model.named_modules():
        if module.training:
            name = path or type(model).__name__
            raise CaptureError("the model is in training mode", got=name, hint="call model.eval() before capture")


# --- example inputs -------------------------------------------------------------------------------------------------


def _leaves(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Mapping[str, Mapping[int, str]]
) -> tuple[list[_Leaf], pytree.TreeSpec]:
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as problem:
        raise InputError("the example inputs do not fit forward", got=str(problem)) from problem
    positional = [label for label, value in bound.items() for _ in _spread(model, label, value)]
    paths, structure = pytree.tree_flatten_with_path((tuple(args), kwargs))
    leaves = []
    for path, value in paths:
        first, *rest = (_key(entry) for entry in path[1:])
        label = _positional_name(positional, int(first), model) if _key(path[0]) == "0" else first
        leaves.append(_leaf("_".join([label, *rest]), value, dims))
    unknown = sorted(set(dims) - {leaf.name for leaf in leaves if isinstance(leaf.value, torch.Tensor)})
    if unknown:
        tensors = " ".join(leaf.name for leaf in leaves if isinstance(leaf.value, torch.Tensor))
        raise SettingError("dims name an input that does not exist", got=unknown[0], expected=tensors or "no tensor")
    return leaves, structure


def _spread(model: nn.Module, label: str, value: Any) -> list[str]:
    kind = inspect.signature(model.forward).parameters[label].kind
    return [label] * len(value) if kind is inspect.Parameter.VAR_POSITIONAL else [label]


def _positional_name(positional: list[str], index: int, model: nn.Module) -> str:
    label = positional[index]
    if inspect.signature(model.forward).parameters[label].kind is inspect.Parameter.VAR_POSITIONAL:
        return f"{label}_{index - positional.index(label)}"
    return label


def _key(entry: Any) -> str:
    for attribute in ("idx", "key", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise InputError("an input is in a container that cannot be captured", got=str(entry), hint="use tuples and dicts")


def _leaf(name: str, value: Any, dims: Mapping[str, Mapping[int, str]]) -> _Leaf:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or value.layout is not torch.strided:
            place = f"{name} on {value.device}"
            raise CaptureError("input is not a dense CPU tensor", got=place, hint="move the example inputs to the CPU")
        axes = dict(dims.get(name, {}))
        for axis, dim in axes.items():
            if type(axis) is not int or not 0 <= axis < value.dim():
                expected = f"0 to {value.dim() - 1}"
                raise SettingError("no such dimension of an input", got=f"{name}[{axis}]", expected=expected)
            _as_setting(check_dim_name, dim)
        return _Leaf(name, value.detach(), axes)
    if not isinstance(value, _PLAIN):
        raise CaptureError(
            "an input is a custom object",
            got=f"{name}: {type(value).__name__}",
            hint="pass tensors, tuples or dicts of tensors, or plain numbers and strings; wrap the model if need be",
        )
    return _Leaf(name, value, {})


def _ranges(leaves: list[_Leaf], given: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    extents: dict[str, tuple[int, str]] = {}
    for leaf in leaves:
        for axis, dim in leaf.dims.items():
            found[dim] = given.get(dim, DEFAULT_RANGE)
            size, place = leaf.value.shape[axis], f"{leaf.name}[{axis}]"
            if extents.setdefault(dim, (size, place))[0] != size:
                raise SettingError(
                    f"the example inputs give dimension {dim!r} two sizes",
                    got=f"{extents[dim][0]} at {extents[dim][1]}, {size} at {place}",
                )
    unused = sorted(set(given) - set(found))
    if unused:
        raise SettingError("dim_ranges name a dimension that no input has", got=unused[0], expected=" ".join(found))
    for dim, (low, high) in found.items():
        if not 1 <= low < high:
            raise SettingError(f"not a range of dimension {dim!r}", got=f"{low} to {high}", expected="1 <= low < high")
    return found


def _examples(leaves: list[_Leaf]) -> list[Any]:
    """Example values to trace with.

    Export takes an extent of 1 for a constant, so one is repeated to 2. A tensor given twice becomes two, since its
    dimensions are looked up by identity.
    """
    examples = []
    for leaf in leaves:
        value = leaf.value
        if isinstance(value, torch.Tensor):
            repeats = [2 if axis in leaf.dims and value.shape[axis] == 1 else 1 for axis in range(value.dim())]
            value = value.repeat(repeats) if 2 in repeats else value.detach()
        examples.append(value)
    return examples


# --- export ---------------------------------------------------------------------------------------------------------


def _export(
    model: nn.Module,
    structure: pytree.TreeSpec,
    examples: list[Any],
    leaves: list[_Leaf],
    ranges: dict[str, tuple[int, int]],
    fixed: frozenset[str],
) -> tuple[ExportedProgram, dict[str, tuple[int, int]]]:
    args, kwargs = pytree.tree_unflatten(examples, structure)
    for _ in range(_MAX_ATTEMPTS):
        dynamic = {dim: ExportDim(dim, min=low, max=high) for dim, (low, high) in ranges.items()}
        shapes = ShapesCollection()
        for leaf, value in zip(leaves, examples, strict=True):
            if leaf.dims:
                shapes[value] = {axis: dynamic[dim] for axis, dim in leaf.dims.items()}
        try:
            dynamic_shapes = shapes.dynamic_shapes(model, args, kwargs) if dynamic else None
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False), ranges
        except Exception as problem:
            narrower = _narrower(str(problem), ranges, fixed)
            if narrower == ranges:
                raise _explain(problem) from problem
            ranges = narrower
    raise CaptureError("no range of the dynamic dimensions fits the model", got=str(ranges), hint="give dim_ranges")


def _remove_dropout(program: ExportedProgram) -> None:
    """Give back the argument where eager does: decomposing would copy it, and make its strides dense."""
    outputs = {node for output in program.graph.find_nodes(op="output") for node in output.all_input_nodes}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        source, _, train = node.args
        if train is False and node not in outputs:
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
    program.graph_module.recompile()


_RANGE = re.compile(r"^\s*(\w+) = Dim\('\1'(?:, min=(\d+))?(?:, max=(\d+))?\)\s*$", re.MULTILINE)
_CONSTANT = re.compile(r"^\s*(\w+) = (\d+)\s*$", re.MULTILINE)
_RELATION = re.compile(r"^\s*(\w+) = (?!Dim\()(\S.*?)\s*$", re.MULTILINE)
_FLAT_WEIGHTS = r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, | (?=w)))+(was|were) assigned"
_VIOLATED = re.compile(r"Constraints violated \((.*?)\)")


def _narrower(text: str, ranges: dict[str, tuple[int, int]], fixed: frozenset[str]) -> dict[str, tuple[int, int]]:
    """The ranges narrowed as export suggests; unchanged where it suggests nothing or the caller gave the range."""
    found = dict(ranges)
    for dim, low, high in _RANGE.findall(text):
        if dim in found and dim not in fixed:
            old_low, old_high = found[dim]
            found[dim] = (max(old_low, int(low or 0)), min(old_high, int(high or old_high)))
    if "Suggested fixes:" not in text and (violated := _VIOLATED.search(text)):
        # Without a suggestion it is mostly a size derived from this one that must not be 1.
        for dim in violated[1].split(", "):
            if dim in found and dim not in fixed and found[dim][0] < _LARGEST_GUESS:
                found[dim] = (found[dim][0] + 2, found[dim][1])
    return found if all(low < high for low, high in found.values()) else ranges


def _explain(problem: Exception) -> CaptureError:
    """One clear error from what export raised."""
    if isinstance(problem, CaptureError):
        return problem
    text = str(problem)
    where = lines.of_exception(problem)
    if isinstance(problem, UserWarning) and text.startswith("The tensor attribute"):
        return CaptureError(
            "the model keeps a tensor in an attribute from one call to the next",
            got=text.split(" assigned during", maxsplit=1)[0].removeprefix("The tensor ")[:200],
            hint="use a local variable, or make it an input and an output",
        )
    if violated := _VIOLATED.search(text):
        return _explain_dims(text, violated[1].split(", "))
    if "data-dependent" in text or "DataDependent" in type(problem).__name__:
        return CaptureError(
            "the model's control flow or shapes depend on the values in a tensor",
            where=where,
            got=text.splitlines()[0][:200],
            hint="compute both branches and select with torch.where(), or capture the branch that you need",
        )
    return CaptureError(
        "the model cannot be exported",
        where=where,
        got=f"{type(problem).__name__}: {text.strip().splitlines()[0][:200] if text.strip() else ''}",
        hint="check that the model runs on the example inputs; then rewrite the line named, or wrap it",
    )


def _explain_dims(text: str, names: list[str]) -> CaptureError:
    suggested = text.partition("Suggested fixes:")[2]

    def named(pattern: re.Pattern[str]) -> tuple[str, ...]:
        return next((match for match in pattern.findall(suggested) if match[0] in names), ())

    if constant := named(_CONSTANT):
        dim, value = constant
        return CaptureError(
            f"the model fixes dynamic dimension {dim!r}",
            got=f"always {value}",
            hint=f"leave {dim!r} out of dims (static), or remove what fixes it: int(), a reshape, a branch",
        )
    if narrower := named(_RANGE):
        dim, low, high = narrower
        bounds = [f"at least {low}"] * bool(low) + [f"at most {high}"] * bool(high)
        return CaptureError(
            f"the model does not allow the whole range of dimension {dim!r}",
            expected=" and ".join(bounds),
            hint=f"give dim_ranges={{{dim!r}: (low, high)}} within it",
        )
    if relation := named(_RELATION):
        dim, value = relation
        other = "to another" if value.isidentifier() else "to a multiple"
        return CaptureError(
            f"the model ties dynamic dimension {dim!r} {other}",
            got=f"{dim} = {value}",
            hint="give two equal dimensions the same name; otherwise leave this one out of dims (static)",
        )
    reason = next((line.strip(" -") for line in text.splitlines() if line.startswith("  - ")), text[:200])
    return CaptureError(
        f"the model does not allow every size of dynamic dimension {names[0]!r}",
        got=reason[:300],
        hint=f"leave {names[0]!r} out of dims (static), or narrow it with dim_ranges",
    )


def _symbols(program: ExportedProgram, leaves: list[_Leaf]) -> dict[sympy.Symbol, str]:
    found: dict[sympy.Symbol, str] = {}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    user_inputs = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    for leaf, spec in zip(leaves, user_inputs, strict=True):
        for axis, dim in leaf.dims.items():
            extent = values[spec.arg.name].shape[axis]
            if not isinstance(extent, torch.SymInt) or not extent.node.expr.is_Symbol:
                hint = f"leave {dim!r} out of dims (static)"
                raise CaptureError(f"the model fixes dynamic dimension {dim!r}", got=str(extent), hint=hint)
            found[extent.node.expr] = dim
    return found


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    names: dict[tuple[object, ...], list[str]] = {}
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        names.setdefault(tensors.identity(tensor), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


class _WithoutPartialGraph(io.TextIOBase):
    """Standard error without the half-made graph that a failing export prints there; all else passes through."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._skip_newline = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        self._stream.flush()

    def write(self, text: str) -> int:
        drop = "def forward(self, arg0_1" in text or (self._skip_newline and text == "\n")
        self._skip_newline = drop and text != "\n"
        return len(text) if drop else self._stream.write(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what export says about its own internals, and keep eager's fused attention path out of the trace."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "torch"]
    loggers = [logging.getLogger(name) for name in names]
    states = [logger.disabled for logger in loggers]
    stderr = sys.stderr
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        # A tensor kept in an attribute from one call to the next would be lost; recurrent layers only rebuild a list.
        warnings.filterwarnings("error", message="The tensor attribute", category=UserWarning)
        warnings.filterwarnings("ignore", message=_FLAT_WEIGHTS, category=UserWarning)
        torch.backends.mha.set_fastpath_enabled(False)
        for logger in loggers:
            logger.disabled = True
        sys.stderr = _WithoutPartialGraph(stderr)
        try:
            yield
        finally:
            sys.stderr = stderr
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for logger, state in zip(loggers, states, strict=True):
                logger.disabled = state
