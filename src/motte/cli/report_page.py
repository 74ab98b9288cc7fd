"""``motte report``: a folder of results -> figures and one page; or -> event files for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from motte.cli.output import Line, Output, bytes_text
from motte.cli.verb import verb
from motte.errors import SettingError


@verb
def report(
    out: Output,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Results of motte bench or motte compare, of motte audit, or of both.")
    ],
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Also write every figure as PNG and SVG, into DIR/figures.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier DIR/report.html.")] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            "--tensorboard",
            metavar="LOGDIR",
            help="Instead: write DIR's records and traces as event files into a new folder. DIR may hold a"
            " records.jsonl alone.",
        ),
    ] = None,
) -> None:
    """Write DIR/report.html: what protection costs and what left, with all figures, in one file that needs no network.

    Nothing in DIR is signed or verified; its text is shown as text, whatever it holds.
    """
    if tensorboard is not None:
        if overwrite or not figures:
            given = "--overwrite" if overwrite else "--no-figures"
            raise SettingError("--tensorboard writes no page", where="--tensorboard", got=given)
        _events(out, folder, tensorboard)
        return
    from motte.report.page import SIMULATED
    from motte.report.write import make_report

    with out.progress("drawing figures", total=None) as bar:
        made = make_report(folder, figures=figures, overwrite=overwrite, progress=bar.set)
    if made.simulated:
        out.warn(SIMULATED)
    for each in made.not_drawn:
        out.note(f"not drawn: {each.title}: {each.reason}")
    document = {
        "page": str(made.page),
        "page_bytes": made.page_bytes,
        "figures": [str(path) for path in made.figures],
        "not_drawn": [{"title": each.title, "reason": each.reason} for each in made.not_drawn],
        "answer": made.answer,
        "simulated": made.simulated,
    }
    lines = [Line(made.answer)] if made.answer is not None else []
    where = f", {len(made.figures)} files in {folder / 'figures'}" if made.figures else ""
    out.result(document, *lines, Line(f"{made.page} ({bytes_text(made.page_bytes)}){where}"))


def _events(out: Output, folder: Path, log_folder: Path) -> None:
    from motte.report.tensorboard import export

    with out.progress("writing event files"):
        made = export(folder, log_folder)
    document = {"folder": str(made.folder), "runs": list(made.runs), "scalars": made.scalars}
    out.result(document, Line(f"{made.folder}: {len(made.runs)} runs, {made.scalars} scalars"))
