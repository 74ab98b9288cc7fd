"""How a command line says where to cut: the options that ``plan`` and ``seal`` share, and the plan that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motte.cli.building import example_inputs
from motte.cli.options import parse_dims, parse_size
from motte.cli.output import Output
from motte.errors import InputError, SettingError
from motte.limits import MAX_PARTS, MAX_PLAN_TEXT_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from motte.capture.export import Captured
    from motte.capture.graph import Graph
    from motte.plan.plan import Plan
    from motte.zoo.models import BuiltModel

_CUTS = "Cuts: choose one way"
_SIZES = "Sizes"
_WAYS = "--parts N, --max-part-memory SIZE, --weight-memory SIZE, --cuts published or --cut-after NAME"
_PROFILE_RUNS = 5


@dataclass(frozen=True, slots=True)
class CutOptions:
    """One way to cut, and the sizes at which memory is counted."""

    parts: Annotated[
        int | None,
        typer.Option(
            "--parts",
            metavar="N",
            min=1,
            max=MAX_PARTS,
            rich_help_panel=_CUTS,
            help="Exactly N parts whose largest is as small as can be.",
        ),
    ] = None
    objective: Annotated[
        Literal["weights", "memory", "time", "boundary"] | None,
        typer.Option(
            "--objective",
            metavar="WHAT",
            rich_help_panel=_CUTS,
            help="What makes a part large: weights, memory, time or boundary for --parts; weights or memory for"
            " --max-part-memory. (default: memory)",
        ),
    ] = None
    max_part_memory: Annotated[
        int | None,
        typer.Option(
            "--max-part-memory",
            metavar="SIZE",
            parser=parse_size,
            rich_help_panel=_CUTS,
            help="As few parts as possible, none above SIZE (64MiB); larger operations are tiled.",
        ),
    ] = None
    weight_memory: Annotated[
        int | None,
        typer.Option(
            "--weight-memory",
            metavar="SIZE",
            parser=parse_size,
            rich_help_panel=_CUTS,
            help="Parts that a streamed run can hold in SIZE of weight memory.",
        ),
    ] = None
    cuts: Annotated[
        Literal["published"] | None,
        typer.Option("--cuts", rich_help_panel=_CUTS, help="The published 12-part cuts of the eight classics."),
    ] = None
    cut_after: Annotated[
        list[str] | None,
        typer.Option(
            "--cut-after",
            metavar="NAME",
            rich_help_panel=_CUTS,
            help="Cut after this module or node. Repeat it, or join names with commas.",
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", metavar="N", min=1, rich_help_panel=_SIZES, help="Batch at which memory is counted. (default: 1)"
        ),
    ] = None
    dim: Annotated[
        list[str] | None,
        typer.Option(
            "--dim", metavar="NAME=N", rich_help_panel=_SIZES, help="Size of another dimension, such as sequence=128."
        ),
    ] = None

    def _ways(self) -> list[str]:
        given = {
            "--parts": self.parts,
            "--max-part-memory": self.max_part_memory,
            "--weight-memory": self.weight_memory,
            "--cuts": self.cuts,
            "--cut-after": self.cut_after or None,
        }
        return [name for name, value in given.items() if value is not None]

    @property
    def given(self) -> bool:
        """Whether a way to cut was chosen."""
        return bool(self._ways())

    def check(self, plan_file: Path | None = None) -> None:
        """Refuse no way to cut, two ways, and settings that the chosen way does not read.

        Raises:
            SettingError: so it is.
        """
        ways = self._ways() + (["--plan"] if plan_file is not None else [])
        if not ways:
            raise SettingError("no way to cut is given", expected=_WAYS)
        if len(ways) > 1:
            raise SettingError("two ways to cut are given", got=" and ".join(ways), hint="keep one of them")
        if plan_file is not None and (self.objective or self.batch or self.dim):
            raise SettingError("the plan says already how it was made", got="--plan with --objective, --batch or --dim")
        if self.objective is not None and ways[0] not in ("--parts", "--max-part-memory"):
            raise SettingError(f"{ways[0]} has no objective to choose", got=f"--objective {self.objective}")
        if self.max_part_memory is not None and self.objective in ("time", "boundary"):
            raise SettingError(
                "no such objective for --max-part-memory", expected="memory or weights", got=self.objective
            )

    def make(self, out: Output, built: BuiltModel, captured: Captured) -> Plan:
        """The plan.

        Raises:
            SettingError: dimensions that the model does not have, or that are missing.
            PlanError: no plan does what was asked.
        """
        from motte.plan.planner import plan_cuts, plan_parts, plan_streamed, plan_under

        graph = captured.graph
        dims = self._dims(graph)
        if self.cuts is not None or self.cut_after:
            names = self._names(built)
            return plan_cuts(graph, cut_after=names, objective="published" if self.cuts else "chosen", dims=dims)
        objective = self.objective or "memory"
        times = _node_seconds(out, built, captured, dims) if objective == "time" else None
        with out.progress(f"planning {graph.name}") as bar:
            if self.weight_memory is not None:
                return plan_streamed(graph, weight_memory_bytes=self.weight_memory, dims=dims, progress=bar.set)
            if self.max_part_memory is not None:
                return plan_under(
                    graph, max_part_bytes=self.max_part_memory, objective=objective, dims=dims, progress=bar.set
                )
            return plan_parts(
                graph, parts=self.parts or 1, objective=objective, dims=dims, times=times, progress=bar.set
            )

    def _names(self, built: BuiltModel) -> list[str]:
        if self.cuts is None:
            return [name for text in self.cut_after or () for name in text.split(",") if name]
        from motte.zoo.published_cuts import CLASSICS, PUBLISHED_CUTS

        if built.name not in PUBLISHED_CUTS:
            raise InputError("no cuts were published for this model", got=built.name, expected=", ".join(CLASSICS))
        return list(PUBLISHED_CUTS[built.name])

    def _dims(self, graph: Graph) -> dict[str, int]:
        given = parse_dims(self.dim, self.batch)
        known = {dim.name: dim for dim in graph.dims}
        for name in given:
            if name not in known:
                raise SettingError(
                    "the model has no such dimension", where=graph.name, got=name, expected=", ".join(known) or "none"
                )
        if "batch" in known and "batch" not in given:
            given["batch"] = max(1, known["batch"].low)
        for name, dim in known.items():
            if name not in given:
                raise SettingError(
                    "a dimension needs a size",
                    where=graph.name,
                    expected=f"{name} from {dim.low} to {dim.high}",
                    hint=f"give it, such as --dim {name}={min(dim.high, max(dim.low, 128))}",
                )
        return given


def _node_seconds(out: Output, built: BuiltModel, captured: Captured, dims: Mapping[str, int]) -> dict[str, float]:
    """Median time of every node here and now, with the example inputs brought to the sizes ``dims``."""
    from motte.engines.torch_engine import TorchEngine

    inputs = list(resized_inputs(built, captured, dims).values())
    with out.progress(f"timing the operations of {built.name}"):
        program = TorchEngine().compile(captured.graph)
        return program.profile(inputs, captured.weights, dims, repeats=_PROFILE_RUNS)


def resized_inputs(built: BuiltModel, captured: Captured, dims: Mapping[str, int]) -> dict[str, Tensor]:
    """The example inputs by name, in the order of the graph's, brought to the sizes ``dims``."""
    from motte.capture.sizes import shape_of

    return {
        value.name: _resized(example, shape_of(value.type, dims))
        for example, value in zip(example_inputs(built, captured), captured.graph.inputs, strict=True)
    }


def _resized(example: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``example`` repeated and cut until it has ``shape``."""
    for axis, extent in enumerate(shape):
        have = example.shape[axis]
        times = [-(-extent // have) if other == axis else 1 for other in range(len(shape))]
        example = example.repeat(times).narrow(axis, 0, extent)
    return example.contiguous()


def read_plan(path: Path, graph: Graph) -> Plan:
    """The plan in the file ``path``, checked against ``graph``.

    Raises:
        InputError: no such file, or one far too large.
        FormatError: not the text of a plan. PlanError: of another model, or it breaks a rule.
    """
    from motte.plan.rules import check_plan
    from motte.plan.text import loads

    try:
        with path.open("rb") as file:
            data = file.read(MAX_PLAN_TEXT_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as problem:
        raise InputError("cannot read the plan", where=str(path), got=problem.strerror) from problem
    except UnicodeDecodeError as problem:
        raise InputError("not the text of a plan", where=str(path)) from problem
    plan = loads(text)
    check_plan(plan, graph)
    return plan
