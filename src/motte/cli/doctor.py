"""``motte doctor``: what this machine offers, and what each absence means."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from motte.cli.output import Column, Line, Output, table
from motte.cli.verb import verb

if TYPE_CHECKING:
    from rich.table import Table

_MARKS = {"present": "yes", "absent": "no", "unknown": "?"}


@verb
def doctor(out: Output) -> None:
    """List what this machine offers for protection and speed, and what the absence of each thing means.

    Nothing here is a verification: whoever owns the machine can fake every answer.
    """
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
