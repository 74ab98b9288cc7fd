"""``motte doctor``: what this machine offers, what each absence means, and what a worker loads."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from motte.cli.output import Column, Line, Output, table
from motte.cli.verb import verb
from motte.errors import SettingError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from motte.doctor.tcb import WorkerTcb

_MARKS = {"present": "yes", "absent": "no", "unknown": "?"}
_MB = 1e6


@verb
def doctor(
    out: Output,
    tcb: Annotated[
        bool,
        typer.Option(
            "--tcb",
            help="Instead: start a worker of each engine, let it answer one image, and list the files it loaded, all of"
            " which have to be trusted.",
        ),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", metavar="NAME", help="With --tcb: torch, onnxruntime or openvino. (default: all installed)"
        ),
    ] = None,
) -> None:
    """List what this machine offers for protection and speed, and what the absence of each thing means.

    Nothing here is a verification: whoever owns the machine can fake every answer.
    """
    if tcb:
        _tcb(out, engine)
        return
    if engine is not None:
        raise SettingError("--engine says whose files to list", expected="--engine with --tcb", got=engine)
    from motte.doctor.examine import examine

    findings = examine()
    # One width for all groups, so that their columns stand below each other.
    longest = max(len(each.name) for each in findings)
    columns = (
        Column("", keep=True, width=longest),
        Column("there", keep=True),
        Column("what was seen, and what it means"),
    )
    shown: list[Table] = []
    for group, members in groupby(findings, key=lambda each: each.group):
        rows = [(each.name, _MARKS[each.state], f"{each.detail}\n{each.meaning}") for each in members]
        shown.append(table(columns, rows, title=group))
    last = Line("Nothing here is verified: whoever owns the machine can fake every answer.")
    out.result({"findings": [each.to_json() for each in findings]}, *shown, last)


def _tcb(out: Output, engine: str | None) -> None:
    from motte.doctor.tcb import KIND, chosen_engines, measure_tcb

    engines = chosen_engines(engine)
    with out.progress("sealing the shipped model", total=len(engines)) as bar:
        found: list[WorkerTcb] = []
        for each in measure_tcb(engines, bar.describe):
            found.append(each)
            bar.advance(1)
    longest = max(len(package.name) for each in found for package in each.tcb.packages)
    shown: list[RenderableType] = [item for each in found for item in _show(each, longest)]
    last = Line(
        f"SIMULATED: no hardware protection (enclave kind: {KIND}). A list is the worker's own, and nothing proves it."
    )
    simulated = any(each.simulated for each in found)
    out.result({"enclave": KIND, "simulated": simulated, "engines": [each.to_json() for each in found]}, *shown, last)


def _show(found: WorkerTcb, width: int) -> tuple[RenderableType, ...]:
    columns = (Column("package", keep=True, width=width), Column("files", number=True), Column("MB", number=True))
    packages = sorted(found.tcb.packages, key=lambda each: each.bytes, reverse=True)
    rows = [(each.name, str(len(each.files)), f"{each.bytes / _MB:.1f}") for each in packages]
    whole = ("all", str(found.tcb.files), f"{found.tcb.bytes / _MB:.1f}")
    stripped = (
        f"of these files, {found.strippable_bytes / _MB:.1f} MB are symbols and debug information that no process maps;"
        f" {(found.tcb.bytes - found.strippable_bytes) / _MB:.1f} MB without"
    )
    resident = (
        f"resident memory: {found.rss_after_import_bytes / _MB:.1f} MB after import,"
        f" {found.rss_after_answer_bytes / _MB:.1f} MB after the answer ({found.answer}), 1 thread"
    )
    title = f"{found.engine} {found.engine_version}: files that the worker loaded"
    return table(columns, [*rows, whole], title=title, totals=True), Line(stripped), Line(resident)
