"""``motte compare MODEL``: the fastest way to run a model here, within what may leave and what may be held."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.bench import BarProgress, case_json
from motte.cli.bench_options import HowOptions, SplitOptions, WeightOptions, counts, make_request, words
from motte.cli.options import parse_size
from motte.cli.output import Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.verb import FAILED, verb
from motte.errors import UnsupportedError

if TYPE_CHECKING:
    from motte.bench.advise import Advice
    from motte.bench.outcome import Outcome

_BOUNDS = "Bounds"


@verb
def compare(
    out: Output,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name of `motte zoo list`, or file.py:factory.")],
    scheme: SplitOptions,
    weights: WeightOptions,
    how: HowOptions,
    max_exposed: Annotated[
        float,
        typer.Option(
            "--max-exposed", metavar="SHARE", min=0, max=1, rich_help_panel=_BOUNDS,
            help="How much of the activations' energy may leave: 0 nothing, 1 everything.",
        ),
    ] = 0.0,
    max_memory: Annotated[
        int | None,
        typer.Option(
            "--max-memory", metavar="SIZE", parser=parse_size, rich_help_panel=_BOUNDS,
            help="What the trusted process may hold. (default: as much as it wants)",
        ),
    ] = None,
    parts: Annotated[
        str, typer.Option("--parts", metavar="N,N", rich_help_panel=_BOUNDS, help="Part counts to try.")
    ] = "1,4,12",
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, rich_help_panel=_BOUNDS, help="Inputs that run together.")
    ] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", metavar="NAMES", rich_help_panel=_BOUNDS, help="Engines to try. (default: all installed)"
        ),
    ] = None,
) -> None:  # fmt: skip
    """Run every scheme that supports the model on this machine, and say which is the fastest within the bounds."""
    from motte.bench.advise import MODES, Bounds, advise
    from motte.bench.infer import bench_infer
    from motte.engines.select import ENGINES

    bounds = Bounds(max_exposed, max_memory)
    installed = tuple(name for name in ENGINES if find_spec(name) is not None)
    request = make_request(
        "infer", (model,), how, modes=MODES, weights=weights, scheme=scheme, batches=(batch,),
        parts=counts(parts, option="--parts"),
        engines=installed if engine is None else words(engine, option="--engine"),
    )  # fmt: skip
    with out.progress(f"comparing {model}", total=1) as bar:
        found = bench_infer(request, BarProgress(bar))
    if found.results is None:
        first = found.refused[0] if found.refused else None
        raise UnsupportedError("nothing could be measured", got=None if first is None else f"{first.case}: {first.why}")
    advice = advise(found.results.cases, bounds, request)
    out.result(_document(found, advice), *_shown(found, advice))
    if advice.chosen is None:
        out.failure("no scheme keeps the bounds")
        raise typer.Exit(FAILED)
    for each in found.refused:
        out.note(f"not tried: {each.case}: {each.why}")


def _document(found: Outcome, advice: Advice) -> dict[str, Any]:
    cases = [] if found.results is None else [case_json(each) for each in found.results.cases]
    return {
        "chosen": None if advice.chosen is None else str(advice.chosen.case),
        "why": list(advice.why),
        "commands": list(advice.commands),
        "judged": [{"case": str(each.result.case), "out": list(each.why_not)} for each in advice.judged],
        "caveats": [] if found.results is None else list(found.results.run.caveats),
        "cases": cases,
        "missing": [{"case": str(each.case), "why": each.why, "failed": each.failed} for each in found.refused],
    }


def _shown(found: Outcome, advice: Advice) -> list[Any]:
    from motte.bench.advise import label

    columns = (
        Column("scheme"), Column("median", number=True), Column("ratio", number=True), Column("memory", number=True),
        Column("exposed", number=True), Column("verdict"),
    )  # fmt: skip
    rows = []
    for each in sorted(advice.judged, key=lambda each: each.result.seconds.median):
        result, ratio = each.result, each.result.ratio
        verdict = "; ".join(each.why_not) or ("chosen" if result is advice.chosen else "keeps the bounds")
        rows.append(
            (
                label(result),
                seconds_text(result.seconds.median),
                "n/a" if ratio is None else f"{ratio.median:.2f}",
                "n/a" if result.peak_memory_bytes is None else bytes_text(result.peak_memory_bytes),
                "n/a" if result.exposed is None else f"{result.exposed:.1%}",
                verdict,
            )
        )
    shown: list[Any] = [table(columns, rows)]
    shown += [Line(text) for text in advice.why]
    if advice.chosen is not None and not advice.commands:
        shown.append(Line("no command of motte: run the plain module on the device; nothing is protected there"))
    shown += [Line(command) for command in advice.commands]
    if found.results is not None:
        shown += [Line(text) for text in found.results.run.caveats if not text.startswith("not measured:")]
    return shown
