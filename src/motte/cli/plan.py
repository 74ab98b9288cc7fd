"""``motte plan``: where to cut a model, as a table and as a text that ``motte seal --plan`` takes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.building import ModelOptions, capture_model
from motte.cli.cutting import CutOptions, resized_inputs
from motte.cli.gpu_placing import GpuOptions
from motte.cli.output import Column, Line, Output, bytes_text, table
from motte.cli.placing import Offloading, PlaceOptions, offloading, placing_json, placing_lines
from motte.cli.scheme import SchemeOptions, offload_json, offload_lines, setting_lines
from motte.cli.verb import verb
from motte.plan.plan import OBJECTIVES

if TYPE_CHECKING:
    from rich.table import Table

    from motte.plan.plan import Plan
    from motte.plan.table import PlanTable

_SHOWN_TILES = 8
_CHOSEN_BY = {name: f"by {name}" for name in OBJECTIVES} | {
    "published": "with the published cuts",
    "chosen": "with the chosen cuts",
}


@verb
def plan(
    out: Output,
    model: ModelOptions,
    cuts: CutOptions,
    place: PlaceOptions,
    gpu: GpuOptions,
    scheme: SchemeOptions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan as text to this new file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
) -> None:
    """Cut a model into parts, place its layers, and show what that costs and sends. Nothing is sealed."""
    from motte.offload.placement import to_plan
    from motte.plan.rules import check_plan
    from motte.plan.table import plan_table
    from motte.plan.text import dumps
    from motte.seal.atomic import atomic_file

    place.check(scheme)
    references = gpu.references()
    if (place.offload is not None or gpu.given) and not cuts.given:
        # Where layers run and where the model is cut are two questions; whoever asks only the first gets one part.
        cuts = replace(cuts, parts=1)
    cuts.check()
    built = model.build(out)
    captured = capture_model(out, built)
    made = cuts.make(out, built, captured)
    placed: Offloading | None = None
    if place.offload is not None:
        inputs = resized_inputs(built, captured, dict(made.dims))
        placed = offloading(out, place, gpu, scheme, built, captured.graph, made, inputs)
        made = replace(made, offload=placed.section)
        check_plan(made, captured.graph)
    elif gpu.given:
        placement = gpu.place(captured.graph, None, made.tiles)
        made = replace(made, offload=to_plan(None, placement, gpu_references=references))
        check_plan(made, captured.graph)
    text = dumps(made)
    if output is not None:
        with atomic_file(output, overwrite=overwrite) as fd, os.fdopen(os.dup(fd), "wb") as file:
            file.write(text.encode("ascii"))
    found = plan_table(made, captured.graph)
    origin = built.signature.weights_origin
    document = plan_json(made, found) | {"model": built.name, "weights_origin": origin, "plan": text}
    shown = show_plan(built.name, origin, made, found)
    if made.offload is not None:
        document["offload"] = offload_json(made.offload)
        shown += (
            offload_lines(made.offload) if placed is None else [*placing_lines(placed), *setting_lines(made.offload)]
        )
    if placed is not None:
        document |= placing_json(placed)
    out.result(document, *shown)
    if output is not None:
        out.note(f"plan written to {output}; seal with --plan {output}")


def plan_json(made: Plan, found: PlanTable) -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes, FLOPs as a count."""
    return {
        "graph_digest": made.graph_digest,
        "objective": made.objective,
        "dims": dict(found.dims),
        "tiles": [{"node": tile.node, "count": tile.count} for tile in made.tiles],
        "parts": [
            {
                "part": row.part,
                "first_node": row.first_node,
                "last_node": row.last_node,
                "ops": row.ops,
                "weight_bytes": row.weight_bytes,
                "peak_activation_bytes": row.peak_activation_bytes,
                "flops": row.flops,
                "entering_bytes": row.entering_bytes,
                "leaving_bytes": row.leaving_bytes,
            }
            for row in found.rows
        ],
        "totals": {
            "ops": found.totals.ops,
            "weight_bytes": found.totals.weight_bytes,
            "distinct_weight_bytes": found.totals.distinct_weight_bytes,
            "largest_part_weight_bytes": found.totals.largest_weight_bytes,
            "largest_part_memory_bytes": found.totals.largest_memory_bytes,
            "peak_activation_bytes": found.totals.peak_activation_bytes,
            "flops": found.totals.flops,
            "boundary_bytes": found.totals.cut_bytes,
        },
    }


def show_plan(name: str, origin: str, made: Plan, found: PlanTable) -> list[Table | Line]:
    """The plan for people: one row a part, the totals, and what is tiled."""
    rows = [
        (
            str(row.part),
            row.last_node,
            str(row.ops),
            bytes_text(row.weight_bytes),
            bytes_text(row.peak_activation_bytes),
            _flops(row.flops),
            bytes_text(row.leaving_bytes),
        )
        for row in found.rows
    ]
    totals = found.totals
    rows.append(
        (
            "all",
            "",
            str(totals.ops),
            bytes_text(totals.weight_bytes),
            bytes_text(totals.peak_activation_bytes),
            _flops(totals.flops),
            bytes_text(totals.cut_bytes),
        )
    )
    columns = (
        Column("part", number=True),
        Column("ends after"),
        Column("ops", number=True),
        Column("weights", number=True),
        Column("peak act.", number=True),
        Column("FLOPs", number=True),
        Column("boundary", number=True),
    )
    random = ", RANDOM WEIGHTS" if origin == "random" else ""
    dims = ", ".join(f"{dim} {size}" for dim, size in found.dims.items()) or "fixed sizes"
    title = f"{name}{random}: {len(found.rows)} part{'s' * (len(found.rows) > 1)} {_CHOSEN_BY[made.objective]}, {dims}"
    shown: list[Table | Line] = [table(columns, rows, title=title, totals=True)]
    shown.append(
        Line(
            f"Largest part: {bytes_text(totals.largest_weight_bytes)} of weights,"
            f" {bytes_text(totals.largest_memory_bytes)} with its activations."
        )
    )
    if totals.weight_bytes != totals.distinct_weight_bytes:
        twice = bytes_text(totals.weight_bytes - totals.distinct_weight_bytes)
        shown.append(Line(f"{twice} of weights stand in more than one part."))
    if made.tiles:
        names = ", ".join(f"{tile.node} x{tile.count}" for tile in made.tiles[:_SHOWN_TILES])
        more = f" and {len(made.tiles) - _SHOWN_TILES} more" if len(made.tiles) > _SHOWN_TILES else ""
        shown.append(Line(f"Tiled: {names}{more}. Answers agree with the whole to 1e-6, not bit for bit."))
    return shown


def _flops(count: int) -> str:
    """``4.09 G``; whole below a thousand."""
    for scale, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= scale * 0.9995:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return str(count)
