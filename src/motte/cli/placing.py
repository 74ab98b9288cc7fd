"""``motte plan --offload``: which layers run split, how much work that leaves inside, and the section for the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.gpu_placing import GpuOptions
from motte.cli.output import Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.scheme import SchemeOptions
from motte.errors import SettingError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from motte.accelerator.interface import Accelerator
    from motte.capture.graph import Graph
    from motte.offload.layers import Trace
    from motte.offload.memory import MemoryNeed
    from motte.offload.placement import Placement
    from motte.offload.settings import Asymmetric
    from motte.offload.trial import Trial
    from motte.offload.work import Pass, WorkTable
    from motte.plan.offload import OffloadPlan
    from motte.plan.plan import Plan
    from motte.zoo.models import BuiltModel

_PANEL = "Offload: what may run split"
_WORDS = "all, none, auto, or names of layers joined by commas"


@dataclass(frozen=True, slots=True)
class PlaceOptions:
    """Where each linear layer runs."""

    offload: Annotated[
        str | None,
        typer.Option(
            "--offload",
            metavar="LAYERS",
            rich_help_panel=_PANEL,
            help=f"{_WORDS}. Needs --noise. auto measures each layer here, inside and split.",
        ),
    ] = None
    exposure: Annotated[
        str | None,
        typer.Option(
            "--exposure",
            metavar="BUDGET",
            rich_help_panel=_PANEL,
            help="For auto: how much may leave, as layers=N, bytes=SIZE of a batch, or energy=SHARE.",
        ),
    ] = None
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator",
            metavar="ADDRESS",
            rich_help_panel=_PANEL,
            help="For auto: unix:PATH or tcp:HOST:PORT. (default: a process of this machine, on its CPU)",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            max=1024,
            rich_help_panel=_PANEL,
            help="For auto: compute threads of the trusted side. (default: all cores)",
        ),
    ] = None
    training: Annotated[
        bool,
        typer.Option("--training", rich_help_panel=_PANEL, help="For auto: decide for training steps, not answers."),
    ] = False

    def check(self, scheme: SchemeOptions) -> None:
        """Refuse settings that nothing reads.

        Raises:
            SettingError: so it is.
        """
        for_auto = {
            "--exposure": self.exposure,
            "--accelerator": self.accelerator,
            "--threads": self.threads,
            "--training": self.training or None,
        }
        given = [name for name, value in for_auto.items() if value is not None]
        if given and self.offload != "auto":
            raise SettingError("this is read by --offload auto only", got=", ".join(given))
        if self.offload == "auto" and self.exposure is None:
            raise SettingError(
                "say how much may leave", where="--exposure", expected="layers=N, bytes=SIZE or energy=SHARE"
            )
        if self.offload is None and scheme != SchemeOptions():
            raise SettingError("a scheme without layers", expected=f"--offload {_WORDS}")


@dataclass(frozen=True, slots=True)
class Offloading:
    """What ``--offload`` found."""

    section: OffloadPlan
    work: WorkTable
    training_memory: MemoryNeed
    inference_memory: MemoryNeed
    trial: Trial | None
    cautions: tuple[str, ...]
    """What leaves in spite of the scheme, in sentences."""
    determined: Mapping[str, int]
    """Split layer -> the most samples of a training step of which its weights before and after tell its whole input."""


def offloading(
    out: Output, options: PlaceOptions, gpu: GpuOptions, settings: SchemeOptions, built: BuiltModel, graph: Graph,
    made: Plan, inputs: Mapping[str, Tensor],
) -> Offloading:  # fmt: skip
    """Place every layer of ``built``, count its work, and, for ``auto``, measure first.

    Args:
        graph: the captured model; made: its plan; inputs: an example by name, at the plan's sizes.

    Raises:
        SettingError: no word on noise, a layer that is not there, a budget that is none.
        UnsupportedError: the model does not run on shapes alone. LinkError, TrustError: the accelerator of a trial.
    """
    from motte.offload.cautions import determined_samples, placement_cautions
    from motte.offload.layers import trace
    from motte.offload.memory import inference_memory, training_memory
    from motte.offload.placement import to_plan
    from motte.offload.work import work

    scheme = replace(settings, scheme="asymmetric").make()
    if scheme is None:
        raise RuntimeError("a scheme was asked for")
    seen = within(graph, made, trace(built.model, (), inputs))
    trial: Trial | None = None
    if options.offload == "auto":
        trial = _trial(out, options, built, scheme, seen, inputs)
        placement = trial.placement
    else:
        placement = _placement(options.offload or "", seen, scheme)
    if gpu.given:
        placement = gpu.place(graph, placement, made.tiles)
    cautions = placement_cautions(scheme, placement, seen.layers, batch=seen.batch if options.training else None)
    for each in cautions:
        out.warn(each)
    return Offloading(
        section=to_plan(scheme, placement, gpu_references=gpu.references()),
        work=work(seen, None, scheme, placement),
        training_memory=training_memory(built.model, scheme, (), seen.batch, placement=placement, keywords=inputs),
        inference_memory=inference_memory(built.model, scheme, (), seen.batch, placement=placement, keywords=inputs),
        trial=trial,
        cautions=cautions,
        determined=determined_samples([layer for layer in seen.layers if layer.name in placement.split]),
    )


def within(graph: Graph, made: Plan, seen: Trace) -> Trace:
    """``seen`` with the reasons that the captured graph gives: a layer that it does not hold as it is stays inside."""
    from motte.offload.graph_layers import graph_layers
    from motte.plan.linear_nodes import layer_weight, linear_nodes, other_readers

    linear, tiled = linear_nodes(graph), {tile.node for tile in made.tiles}
    refused = {layer.weight: layer.refused for layer in graph_layers(graph)}

    sharing: dict[str, list[str]] = {}
    for layer in seen.layers:
        stored = layer_weight(graph, layer.name)
        if stored is not None:
            sharing.setdefault(stored.name, []).append(layer.name)

    def reason(name: str) -> str | None:
        weight = layer_weight(graph, name)
        if weight is None or weight.name not in linear:
            return "the captured graph holds no such layer"
        if len(sharing[weight.name]) > 1:
            return f"it shares its weight with {next(each for each in sharing[weight.name] if each != name)}"
        other = next(other_readers(graph, weight.name), None)
        if other is not None:
            return f"its weight is also read by {other.name}"
        if any(node.name in tiled for node in linear[weight.name]):
            return "the plan tiles it"
        return refused.get(weight.name)

    layers = tuple(replace(layer, must_stay=layer.must_stay or reason(layer.name)) for layer in seen.layers)
    return replace(seen, layers=layers)


def _placement(words: str, seen: Trace, scheme: Asymmetric) -> Placement:
    from motte.offload.placement import place_all, place_listed, place_none

    if words == "all":
        return place_all(seen.layers, scheme)
    if words == "none":
        return place_none(seen.layers)
    names = [name for name in words.split(",") if name]
    if not names:
        raise SettingError("no layers are named", where="--offload", expected=_WORDS, got=repr(words))
    return place_listed(seen.layers, scheme, names)


def _trial(
    out: Output,
    options: PlaceOptions,
    built: BuiltModel,
    scheme: Asymmetric,
    seen: Trace,
    inputs: Mapping[str, Tensor],
) -> Trial:
    from motte.offload.decide import Budget
    from motte.offload.trial import run_trial

    budget = Budget.parse(options.exposure or "")
    with _accelerator(options) as accelerator, _threads(options.threads), out.progress("measuring the layers"):
        out.note("the accelerator sees residuals of the example input while this measures")
        return run_trial(
            built.model, (), scheme, accelerator, budget, keywords=inputs, training=options.training, seen=seen
        )


@contextlib.contextmanager
def _accelerator(options: PlaceOptions) -> Iterator[Accelerator]:
    if options.accelerator is None:
        from motte.accelerator.process import LocalAccelerator

        with LocalAccelerator() as local:
            yield local.link
        return
    from motte.accelerator.connect import connect

    link = connect(options.accelerator)
    try:
        yield link
    finally:
        link.close()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- shown ----------------------------------------------------------------------------------------------------------
def placing_json(found: Offloading) -> dict[str, Any]:
    """Plain values: multiply-adds as counts, sizes in bytes, times in seconds."""
    passes: tuple[Pass, ...] = ("forward", "training")
    document: dict[str, Any] = {
        "work": {
            "batch": found.work.batch,
            "layers": [asdict(row) for row in found.work.rows],
            "elsewhere_forward": found.work.elsewhere_forward,
            "elsewhere_backward": found.work.elsewhere_backward,
            "traffic": asdict(found.work.traffic),
            "totals": {each: _totals(found.work, each) for each in passes},
        },
        "memory": {
            "training": asdict(found.training_memory) | {"total": found.training_memory.total},
            "inference": asdict(found.inference_memory) | {"total": found.inference_memory.total},
        },
        "cautions": list(found.cautions),
        "determined_samples": dict(found.determined),
    }
    if found.trial is not None:
        document["trial"] = {
            "budget": str(found.trial.budget),
            "training": found.trial.training,
            "rounds": found.trial.rounds,
            "ranks": dict(found.trial.ranks),
            "layers": {name: asdict(each) for name, each in found.trial.measured.items()},
        }
    return document


def _totals(work: WorkTable, which: Pass) -> dict[str, Any]:
    return {
        "whole": work.whole(which),
        "inside": asdict(work.inside(which)),
        "share_published": work.share(which, published=True),
        "share": work.share(which, published=False),
        "bound_published": work.bound(which, published=True),
        "bound": work.bound(which, published=False),
    }


def placing_lines(found: Offloading) -> list[Table | Line]:
    """The trial, if there was one, then work and bytes per layer with totals, the bounds, and the memory."""
    shown: list[Table | Line] = [] if found.trial is None else [_trial_table(found.trial)]
    shown.append(_work_table(found.work))
    shown += [Line(_bound_text(found.work, "forward")), Line(_bound_text(found.work, "training"))]
    for what, need in (("training", found.training_memory), ("an answer", found.inference_memory)):
        shown.append(Line(f"Trusted memory for {what}: {bytes_text(need.total)} ({need.breakdown()})."))
    return shown


def _trial_table(trial: Trial) -> Table:
    columns = (
        Column("layer", keep=True),
        Column("rank", number=True),
        *(Column(name, number=True) for name in ("inside", "split", "at best", "low", "there", "link", "rest")),
    )
    rows = []
    for name, each in trial.measured.items():
        phases = [phase for phase in (each.times.forward, each.times.backward) if phase is not None]
        seconds = (
            each.times.inside,
            each.times.split,
            sum(phase.at_best for phase in phases),
            sum(phase.low_rank for phase in phases),
            sum(phase.accelerator for phase in phases),
            sum(phase.transfer for phase in phases),
            sum(phase.alone for phase in phases),
        )
        rows.append((name, str(trial.ranks[name]), *map(seconds_text, seconds)))
    what = "a training step" if trial.training else "an answer"
    return table(columns, rows, title=f"Measured, for {what}; at most {trial.budget} may leave")


def _work_table(work: WorkTable) -> Table:
    columns = (
        Column("layer", keep=True),
        Column("runs", keep=True),
        Column("rank", number=True),
        Column("whole", number=True),
        Column("in (a)", number=True),
        Column("in (b)", number=True),
        Column("out", number=True),
        Column("back", number=True),
        Column("because"),
    )
    rows: list[tuple[str, ...]] = [
        (
            row.name,
            row.side,
            "" if row.rank is None else f"{'<= ' * row.rank_is_bound}{row.rank}",
            _count(row.whole_forward),
            _count(row.forward.product),
            _count(row.forward.total),
            bytes_text(row.traffic.forward_out) if row.side == "split" else "",
            bytes_text(row.traffic.forward_in) if row.side == "split" else "",
            row.reason,
        )
        for row in work.rows
    ]
    if work.elsewhere_forward:
        elsewhere = _count(work.elsewhere_forward)
        rows.append(("(elsewhere)", "inside", "", elsewhere, elsewhere, elsewhere, "", "", "other products"))
    inside, traffic = work.inside("forward"), work.traffic
    rows.append(
        (
            "all",
            "",
            "",
            _count(work.whole("forward")),
            _count(inside.product),
            _count(inside.total),
            bytes_text(traffic.forward_out),
            bytes_text(traffic.forward_in),
            "",
        )
    )
    title = f"Multiply-adds and bytes of one forward pass, batch {work.batch}"
    return table(columns, rows, title=title, totals=True)


def _bound_text(work: WorkTable, which: Pass) -> str:
    one, two = (100 * work.share(which, published=published) for published in (True, False))
    traffic = work.traffic
    out, back = traffic.forward_out, traffic.forward_in
    if which == "training":
        out, back = out + traffic.backward_out + traffic.weight_out, back + traffic.backward_in
    name = "A training step" if which == "training" else "A forward pass"
    return (
        f"{name} leaves {one:.1f} % of the multiply-adds inside as published (a), {two:.1f} % with decomposition,"
        f" per-sample weights and checks (b): at most {work.bound(which, published=True):.3g} and"
        f" {work.bound(which, published=False):.3g} times faster than everything inside, before"
        f" {bytes_text(out)} out and {bytes_text(back)} back."
    )


def _count(number: int) -> str:
    for scale, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= scale * 0.9995:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:.0f} {unit}"
    return str(number)
