"""The findings in words and tables: what the command line prints, and a page of Markdown (docs/findings.md)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motte.seal.atomic import atomic_file

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from motte.audit.document import AuditDocument, SchemeReport
    from motte.audit.finding import Bracket, Finding

Rows = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Line:
    """One attack and metric under all schemes, at one layer: the one of which most was learnt under any scheme that
    lets a part leave.

    Attributes:
        by_scheme: a finding for each scheme of the document, in its order; None where there is none.
    """

    attack: str
    metric: str
    layer: str
    floor: Bracket
    ceiling: Bracket
    by_scheme: tuple[Finding | None, ...]


def lines(document: AuditDocument) -> tuple[Line, ...]:
    """A line for each attack and metric; an attack that varies a scheme ("..., integrity off") has some of its own."""
    names = [each.audited for each in document.schemes]
    partly = {each.audited for each in document.schemes if each.kind == "asymmetric"}
    groups: dict[tuple[str, str], dict[str, list[Finding]]] = {}
    for finding in document.findings:
        name = max((each for each in names if finding.audited.startswith(each)), key=len, default=finding.audited)
        attack = finding.attack + finding.audited[len(name) :]
        groups.setdefault((attack, _metric(finding)), {}).setdefault(name, []).append(finding)
    return tuple(_line(attack, metric, found, names, partly) for (attack, metric), found in groups.items())


def _line(
    attack: str, metric: str, found: Mapping[str, Sequence[Finding]], names: Sequence[str], partly: Collection[str]
) -> Line:
    telling = [each for name, some in found.items() for each in some if name in partly]
    worst = max(telling or [each for some in found.values() for each in some], key=_standing)
    chosen = tuple(next((each for each in found.get(name, ()) if each.layer == worst.layer), None) for name in names)
    return Line(attack, metric, worst.layer or "", worst.floor, worst.ceiling, chosen)


def _standing(finding: Finding) -> float:
    position = finding.position_percent
    return float("-inf") if position is None else position


def _metric(finding: Finding) -> str:
    return finding.metric if finding.unit == "1" else f"{finding.metric}, {finding.unit}"


def scheme_numbers(document: AuditDocument) -> list[str]:
    """``[1] trusted``: what the columns of the tables are called."""
    return [f"[{number}] {each.audited}" for number, each in enumerate(document.schemes, 1)]


def finding_rows(document: AuditDocument, *, brief: bool) -> Rows:
    """A row for each line: attack, metric, layer, floor, a cell for each scheme, ceiling; ``brief`` leaves out layers,
    and of each scheme all but the position."""
    return [
        (
            each.attack,
            each.metric,
            *(() if brief else (each.layer,)),
            _short(each.floor),
            *(_cell(finding, brief=brief) for finding in each.by_scheme),
            _short(each.ceiling),
        )
        for each in lines(document)
    ]


def _cell(finding: Finding | None, *, brief: bool) -> str:
    if finding is None:
        return ""
    position = position_text(finding)
    return position if brief else f"{_interval(finding.scheme)}: {position}"


def position_text(finding: Finding) -> str:
    """``37 %``; ``n/a`` where the attack tells nothing from everything by no sure margin."""
    position = finding.position_percent
    return "n/a" if position is None else f"{round(position)} %"


def exposure_rows(document: AuditDocument) -> Rows:
    """For each scheme the layer of whose activation most left, by direction."""
    return [_most_exposed(each) for each in document.schemes]


def _most_exposed(scheme: SchemeReport) -> tuple[str, ...]:
    known = [(row.exposed, row.layer) for row in scheme.inference if row.exposed is not None]
    if not known:
        return (scheme.audited, "", "nothing" if not scheme.inference else "n/a", "")
    exposed, layer = max(known, key=lambda each: each[0].aligned)
    return (scheme.audited, layer, f"{exposed.energy:.2%}", f"{exposed.aligned:.2%}")


def claims_lines(document: AuditDocument) -> list[str]:
    """A sentence for each claim that was tested, and one for all that were not."""
    tested = [f"{each.claim}: {each.sentence}" for each in document.claims if each.verdict != "not tested"]
    untested = [each.claim for each in document.claims if each.verdict == "not tested"]
    return [*tested, f"Not tested by this audit: {'; '.join(untested)}."] if untested else tested


def markdown(document: AuditDocument) -> str:
    """The page."""
    numbers = [f"[{number}]" for number in range(1, len(document.schemes) + 1)]
    head = ["attack", "metric", "layer", "floor", *numbers, "ceiling"]
    parts = [
        f"## {document.model} on {document.data}",
        "",
        f"Made {document.made} by the {document.suite} suite in {document.seconds:.0f} s, seed {document.seed}, "
        f"motte {document.versions.get('motte', '?')}, torch {document.versions.get('torch', '?')}. "
        f"Data: {document.provenance}. {document.budget.samples} private records, "
        f"{document.budget.public_samples} of the attacker's own.",
        "",
        "### What left",
        "",
        *_table(["scheme", "most exposed layer", "energy that left", "aligned"], exposure_rows(document)),
        "",
        "### What was learnt",
        "",
        "0 % = as good as an attacker who sees nothing, 100 % = as good as one who sees everything; n/a = the attack "
        "does not tell these two apart here, and says nothing. A cell is a result with its 95 % interval, and where it "
        "stands.",
        "",
        "The layer is the one of which most was learnt under a scheme that lets a part leave. "
        f"Schemes: {'; '.join(scheme_numbers(document))}.",
        "",
        *_table(head, finding_rows(document, brief=False)),
        "",
        *_measures(document),
        "### Claims of the threat model",
        "",
        *[f"* **{line.partition(':')[0]}**: {line.partition(': ')[2]}" for line in claims_lines(document)],
        "",
    ]
    if document.epsilons:
        parts += ["### Epsilon", "", *[f"* {audited}: {each}" for audited, each in document.epsilons], ""]
    if document.failures:
        said = [f"* {each.job}, {each.audited}: {each.message}" for each in document.failures]
        parts += ["### Jobs that failed, and found nothing", "", *said, ""]
    return "\n".join(parts)


def _measures(document: AuditDocument) -> list[str]:
    chosen = [
        each
        for each in document.figures
        if each.name.startswith(("mutual information", "Fisher", "SVD-channel", "patch entropy"))
    ]
    rows = [
        (
            each.name,
            each.audited or "",
            each.layer or "",
            f"n/a: {each.missing}" if each.value is None else f"{each.value:.3g} {each.unit}",
        )
        for each in chosen
    ]
    return ["### Measures without an attacker", "", *_table(["measure", "scheme", "layer", "value"], rows), ""]


def write_page(document: AuditDocument, path: Path, *, overwrite: bool = False) -> None:
    """Write the page, whole or not at all.

    Raises:
        InputError: the file exists. ResourceError: it cannot be written.
    """
    with atomic_file(path, overwrite=overwrite) as fd, os.fdopen(fd, "wb", closefd=False) as file:
        file.write(markdown(document).encode("utf-8"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["Nothing."]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)]


def _short(bracket: Bracket) -> str:
    return f"{bracket.value:.3g}"


def _interval(bracket: Bracket) -> str:
    return f"{bracket.value:.3g} ({bracket.low:.3g} to {bracket.high:.3g})"
