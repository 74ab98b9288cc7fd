"""Lowered programs against the reference: the torch engine on the same graph, weights and inputs. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Final

import torch
from torch import Tensor

from motte.capture import tensors
from motte.capture.binding import bind_dims
from motte.capture.graph import Graph, Ref, WeightRef, references
from motte.engines.checks import used_weights
from motte.engines.interface import Array, Engine
from motte.engines.select import make_engine
from motte.engines.torch_engine import TorchEngine
from motte.errors import GraphError, MismatchError
from motte.lower.examples import other_sizes, random_inputs
from motte.lower.lowered import EngineCheck, Lowered
from motte.plan.plan import Plan
from motte.plan.tile import apply_tiles
from motte.split.oracle import weights_of
from motte.split.split import Part, split

TOLERANCE: Final = 1e-4
"""Largest |difference| over largest |reference| of a tensor of f32 or f64: what is left is the order of additions."""
HALF_TOLERANCE: Final = 1e-2
"""The same where the graph's own tensor is f16: it has 11 bits, and each layer rounds (2^-11 is 5e-4)."""
BF16_TOLERANCE: Final = 5e-2
"""The same where layers compute in bf16, on request or because the graph's own tensor is: 8 bits, so that one rounding
is up to 4e-3, and those of a deep model add up. Six models differ by 4e-3 to 1.3e-2 (docs/spec/lowered.md)."""
_HUGE: Final = 1e30
"""From here on a number stands for infinity, as in a mask; it is compared with itself, and is no scale for others."""
_FLOATS: Final = ("f64", "f32", "f16", "bf16")
_SEED: Final = 20_240_229

Progress = Callable[[str], None]


def check_lowered(
    lowered: Lowered,
    graph: Graph,
    plan: Plan,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    engines: Sequence[str] = ("onnxruntime",),
    precision: str = "f32",
    progress: Progress | None = None,
) -> tuple[EngineCheck, ...]:
    """Compare what ``lower(graph, plan)`` gave with the torch engine, on ``inputs`` and on seeded random ones.

    Every part runs on the reference's own values with weights given per call, as a streamed worker runs it; the joined
    program runs end to end with weights that are loaded, as a resident one does. Random inputs have other sizes of the
    dynamic dimensions, the least included. An integer that follows from no float must be equal; of other integers, as
    of an argmax, the share that differs counts as the difference. It has no bound in bf16, where two scores are easily
    one.

    Args:
        graph: the captured (untiled) graph. weights: its tensors by name. inputs: in its order.
        precision: what the engines compute f32 layers in; ``bf16`` is openvino's alone.
        progress: called with a line before each comparison.

    Returns:
        For each engine the largest difference on the example and on random inputs; those on which the reference itself
        fails (an index that a smaller size makes too large) are left out.

    Raises:
        MismatchError: above the tolerance, not finite where the reference is, or of another type; names engine, part
            and value.
        GraphError: an engine refuses a program, or an operation fails.
        UnsupportedError: an engine is not installed, or does not compute in ``precision``.
        InputError: the inputs do not fit the graph.
    """
    sizes = bind_dims(graph, [(tensors.dtype_name(x.dtype), tuple(x.shape)) for x in inputs])
    setting = _Setting(graph, apply_tiles(graph, plan.tiles), split(graph, plan), precision)
    stored = weights_of(setting.tiled, weights)
    runs = [_Runs(make_engine(name, threads=torch.get_num_threads(), precision=precision), setting, stored, lowered)
            for name in engines]  # fmt: skip
    cases = [("example", list(inputs), sizes)]
    for index, other in enumerate(other_sizes(graph, sizes)):
        cases.append(("random", random_inputs(graph, inputs, other, seed=_SEED + index), other))
    found: dict[tuple[str, str], float] = {}
    for kind, given, dims in cases:
        values: dict[str, Tensor] | None = None
        # Random indices or sizes may be more than the model itself takes; the example never is.
        with suppress(*((GraphError,) if kind == "random" else ())):
            values = setting.reference(given, stored, dims)
        for run in runs if values is not None else ():
            if progress is not None:
                progress(f"{run.engine.name}: {kind} inputs, {_sizes_text(dims)}")
            key = (run.engine.name, kind)
            found[key] = max(found.get(key, 0.0), run.compare(values or {}, given, dims))
    return tuple(
        EngineCheck(engine, version(engine), precision, kind, difference)
        for (engine, kind), difference in sorted(found.items())
    )


def difference(value: Tensor, reference: Tensor) -> float:
    """Largest |difference| over largest |reference|; infinite where only one of two elements is finite.

    Integers: the share of elements that differ. Elements of 1e30 and more are each compared with themselves.
    """
    if value.dtype is not reference.dtype or value.shape != reference.shape:
        return float("inf")
    if not reference.is_floating_point():
        return float((value != reference).double().mean()) if value.numel() else 0.0
    a, b = value.to(torch.float64).reshape(-1), reference.to(torch.float64).reshape(-1)
    other = ~((a == b) | (a.isnan() & b.isnan()))
    plain = b[b.isfinite() & (b.abs() < _HUGE)]
    a, b = a[other], b[other]
    if not a.numel():
        return 0.0
    scale = float(plain.abs().max()) if plain.numel() else 0.0
    scales = torch.where(b.abs() < _HUGE, scale, b.abs())
    found = float(((a - b).abs() / scales).max())
    return found if found == found else float("inf")


@dataclass(frozen=True, slots=True)
class _Setting:
    """What is compared: the graph as captured and as tiled, its parts, the precision."""

    graph: Graph
    tiled: Graph
    parts: tuple[Part, ...]
    precision: str

    def reference(
        self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor], dims: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Every value that crosses a cut or is returned, inputs included, by name."""
        names = tuple(dict.fromkeys((*(n for part in self.parts for n in part.graph.outputs), *self.tiled.outputs)))
        observed = replace(self.tiled, outputs=names, output_names=names)
        made = TorchEngine().compile(observed).run(list(inputs), weights, dims)
        given = {value.name: tensor for value, tensor in zip(self.graph.inputs, inputs, strict=True)}
        return {**given, **dict(zip(names, made, strict=True))}

    def tolerance(self, value: str) -> float:
        """What the tensor ``value`` may differ by."""
        dtype = self.tiled.values()[value].type.dtype
        if dtype in _FLOATS:
            own = {"bf16": BF16_TOLERANCE, "f16": HALF_TOLERANCE}.get(dtype, TOLERANCE)
            return BF16_TOLERANCE if self.precision == "bf16" else own
        if value not in _follow_from_floats(self.tiled):
            return 0.0
        return 1.0 if self.precision == "bf16" else TOLERANCE


class _Runs:
    """One engine with every program of a lowered model."""

    def __init__(self, engine: Engine, setting: _Setting, weights: Mapping[str, Tensor], lowered: Lowered) -> None:
        self.engine = engine
        self._setting = setting
        self._weights = {
            name: engine.weight(setting.tiled, name, _stored_bytes(setting.tiled, name, weights[name]))
            for name in used_weights(setting.tiled)
        }
        # A part that only makes views of weights gives nothing: there is nothing to run.
        self._parts = [
            (part, engine.compile(part.graph, lowered=form))
            for part, form in zip(setting.parts, lowered.parts, strict=True)
            if part.graph.outputs
        ]
        self._joined = engine.load(setting.tiled, self._weights, lowered=lowered.joined)

    def compare(self, values: Mapping[str, Tensor], inputs: Sequence[Tensor], dims: Mapping[str, int]) -> float:
        """The largest difference of any value.

        Raises:
            MismatchError: see :func:`check_lowered`.
        """
        worst = 0.0
        for part, program in self._parts:
            given = [self._array(values[value.name]) for value in part.graph.inputs]
            weights = {name: self._weights[name] for name in used_weights(part.graph)}
            made = program.run(given, weights, dims)
            place = f"part {part.index + 1} of {len(self._setting.parts)}"
            worst = max(worst, self._worst(part.graph.outputs, part.graph.outputs, made, values, place))
        made = self._joined.run([self._array(tensor) for tensor in inputs], dims)
        outputs, shown = self._setting.tiled.outputs, self._setting.graph.output_names
        return max(worst, self._worst(outputs, shown, made, values, "all parts joined"))

    def _worst(
        self,
        names: Sequence[str],
        shown: Sequence[str],
        made: Sequence[Array],
        values: Mapping[str, Tensor],
        place: str,
    ) -> float:
        worst = 0.0
        for name, label, array in zip(names, shown, made, strict=True):
            dtype, shape, data = self.engine.to_bytes(array)
            found = difference(_TORCH.from_bytes(dtype, shape, data), values[name])
            most = self._setting.tolerance(name)
            if not found <= most:
                raise MismatchError(
                    f"the {self.engine.name} engine answers otherwise than torch",
                    where=f"{place}, value {label}",
                    expected=f"a difference of at most {most} of the largest element",
                    got=f"{found:.3g}",
                    hint="seal without lowering: the torch engine runs every model",
                )
            worst = max(worst, found)
        return worst

    def _array(self, tensor: Tensor) -> Any:
        return self.engine.from_bytes(*_TORCH.to_bytes(tensor))


_TORCH: Final = TorchEngine()


def _stored_bytes(graph: Graph, name: str, tensor: Tensor) -> memoryview:
    flat = tensors.flatten(tensor, graph.weights[name].order)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _follow_from_floats(graph: Graph) -> frozenset[str]:
    """Values that are floats or may depend on one."""
    found = {value.name for value in graph.inputs if value.type.dtype in _FLOATS}
    for node in graph.nodes:
        reads = any(
            (isinstance(ref, Ref) and ref.name in found)
            or (isinstance(ref, WeightRef) and graph.weights[ref.name].dtype in _FLOATS)
            for ref in references(node)
        )
        found.update(v.name for v in node.outputs if v is not None and (reads or v.type.dtype in _FLOATS))
    return frozenset(found)


def _sizes_text(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in dims.items()) or "fixed sizes"
