"""What an audit found, on the page: claims, findings between floor and ceiling, pictures, curves, what crossed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from motte.report import words
from motte.report.chart import Axis, Chart, NotDrawn, Series
from motte.report.html import Markup, escaped, joined, tag
from motte.report.images import Inlined
from motte.report.tables import Cell, Column, absent, table

if TYPE_CHECKING:
    from motte.audit.document import AuditDocument, CurveData, PictureFile
    from motte.audit.finding import Bracket, Finding

GROUP = "What the attacks found"
_VERDICT_CLASS = {"held": "held", "not held": "broken", "not tested": "quiet"}


# --- figures --------------------------------------------------------------------------------------------------------
def audit_charts(document: AuditDocument) -> Iterator[Chart | NotDrawn]:
    """Where each finding stands between floor and ceiling, and the curves, those of one title in one figure."""
    yield _positions(document)
    grouped: dict[tuple[str, str, str, str, bool], list[CurveData]] = {}
    for curve in document.curves:
        key = (curve.audited, curve.title, curve.x_label, curve.y_label, curve.log_axes)
        grouped.setdefault(key, []).append(curve)
    for number, ((audited, title, x_label, y_label, log), curves) in enumerate(grouped.items(), start=1):
        yield _curves(
            number, f"{title}: {audited}", Axis(x_label or "x", None, log), Axis(y_label or "y", None, log), curves
        )


def _positions(document: AuditDocument) -> Chart | NotDrawn:
    title = "How far each attack came: 0 = saw nothing, 100 = saw everything"
    series: list[Series] = []
    for audited in dict.fromkeys(each.audited for each in document.findings):
        found: dict[str, float] = {}
        for each in document.findings:
            if each.audited == audited and each.position_percent is not None:
                found.setdefault(_name(each), each.position_percent)
        if found:
            place = len(series)
            series.append(
                Series(
                    name=audited, source=f"audit:{audited}", kind="point", x=tuple(found), y=tuple(found.values()),
                    place=place,
                )
            )  # fmt: skip
    if not series:
        return NotDrawn(title=title, group=GROUP, reason="no attack told its ceiling from its floor")
    weak = sum(not each.powerful for each in document.findings)
    note = (
        f"Not in it: {words.counted(weak, 'finding')} of attacks too weak to tell everything from nothing."
        if weak
        else ""
    )
    return Chart(
        slug="audit-positions", title=title, group=GROUP, x=Axis("Attack, metric", None),
        y=Axis("Position between floor and ceiling", "%"), series=tuple(series), horizontal=True, note=note,
    )  # fmt: skip


def _name(finding: Finding) -> str:
    return f"{finding.attack}, {finding.metric}" + (f", {finding.layer}" if finding.layer is not None else "")


def _curves(number: int, title: str, x: Axis, y: Axis, curves: Sequence[CurveData]) -> Chart | NotDrawn:
    series: list[Series] = []
    names: set[str] = set()
    for each in curves:
        points = [(a, b) for a, b in each.points if not x.log or (a > 0 and b > 0)]
        name = str(each.position) if each.position is not None else each.audited
        if not points or name in names:
            continue
        names.add(name)
        across, up = zip(*points, strict=True)
        source = f"curve:{number}:{name}"
        series.append(Series(name=name, source=source, kind="line", x=across, y=up, place=len(series)))
    if not series:
        return NotDrawn(title=title, group=GROUP, reason="no point of the curve can be shown on its axes")
    note = "Points at zero are not on logarithmic axes." if x.log else ""
    return Chart(slug=f"audit-curve-{number}", title=title, group=GROUP, x=x, y=y, series=tuple(series), note=note)


# --- text and tables ------------------------------------------------------------------------------------------------
def audit_section(document: AuditDocument, images: Inlined) -> Markup:
    """Everything but the figures. Headings below h2."""
    parts = [_facts(document)]
    if document.contradictions:
        text = f"An attack proved more than motte's accountant states, for {words.listed(document.contradictions)}."
        parts.append(tag("p", text, class_="broken", role="alert"))
    parts += [tag("h3", "Claims"), _claims(document), tag("h3", "Findings"), _findings(document)]
    if document.checks:
        parts += [tag("h3", "What was tried and had to be refused"), _checks(document)]
    if document.epsilons:
        parts += [tag("h3", "Measured privacy loss"), _epsilons(document)]
    if document.figures:
        parts += [tag("h3", "Measures of the recording"), _measures(document)]
    if any(scheme.inference or scheme.training for scheme in document.schemes):
        parts += [tag("h3", "Every tensor that crossed"), _crossed(document)]
    if document.pictures:
        parts += [tag("h3", "Pictures"), _pictures(document.pictures, images)]
    if document.failures:
        parts += [tag("h3", "Attacks that ended in an error and found nothing"), _failures(document)]
    return joined(*parts)


def _facts(document: AuditDocument) -> Markup:
    pairs = (
        ("model", document.model), ("weights", document.weights_origin), ("data", document.data),
        ("where from", document.provenance), ("suite", f"{document.suite}, seed {document.seed}"),
        ("made", f"{document.made}, in {words.seconds(document.seconds)}"),
        ("schemes", ", ".join(scheme.audited for scheme in document.schemes) or "none"),
    )  # fmt: skip
    return tag("dl", *(tag(name, text) for pair in pairs for name, text in zip(("dt", "dd"), pair, strict=True)))


def _claims(document: AuditDocument) -> Markup:
    if not document.claims:
        return tag("p", "The audit says nothing of any claim.")
    items = [
        tag("li", tag("strong", each.claim), " ", tag("span", each.verdict, class_=_VERDICT_CLASS[each.verdict]), ": ",
            each.sentence)
        for each in document.claims
    ]  # fmt: skip
    return tag("ul", *items)


def _bracket(value: Bracket) -> Cell:
    return Cell(f"{words.digits(value.value)} [{words.digits(value.low)}, {words.digits(value.high)}]", value.value)


def _findings(document: AuditDocument) -> Markup:
    columns = (
        Column("Attack", number=False), Column("Scheme", number=False), Column("Layer", number=False),
        Column("Metric", number=False), Column("Floor"), Column("Scheme's"), Column("Ceiling"), Column("Position", "%"),
        Column("Learnt something", number=False), Column("What the attacker has", number=False),
    )  # fmt: skip
    weak = "the attack does not tell its ceiling from its floor, so it says nothing of the scheme"
    rows = []
    for each in document.findings:
        metric = f"{each.metric} ({each.unit}), {'higher' if each.higher_is_worse else 'lower'} is worse"
        position = each.position_percent
        knowledge = ", ".join(map(str, each.knowledge))
        learnt = "yes" if each.above_floor else "not shown"
        rows.append([
            Cell(each.attack, each.attack), Cell(each.audited, each.audited),
            Cell(each.layer or "all", each.layer or ""),
            Cell(metric, metric), _bracket(each.floor), _bracket(each.scheme), _bracket(each.ceiling),
            absent(weak) if position is None else Cell(words.digits(position), position),
            Cell(learnt, learnt) if each.powerful else absent(weak), Cell(knowledge, knowledge),
        ])  # fmt: skip
    made = table("t-findings", "Results at three positions, each with its interval", columns, rows)
    notes = list(dict.fromkeys(f"{each.attack}: {note}" for each in document.findings for note in each.notes))
    if not notes:
        return made
    return joined(
        made, tag("details", tag("summary", "Notes of the attacks"), tag("ul", *(tag("li", n) for n in notes)))
    )


def _checks(document: AuditDocument) -> Markup:
    columns = (
        Column("Tried", number=False), Column("Claim", number=False), Column("Held", number=False),
        Column("What happened", number=False),
    )  # fmt: skip
    rows = []
    for each in document.checks:
        held = "held" if each.held else "not held"
        rows.append([Cell(text, text) for text in (each.name, each.claim, held, each.how)])
    return table("t-checks", "Attempts against the conformance list", columns, rows)


def _epsilons(document: AuditDocument) -> Markup:
    columns = (
        Column("Scheme", number=False), Column("At least"), Column("At most, as stated"), Column("Delta"),
        Column("Confidence", "%"), Column("Adjacency", number=False), Column("Trials"), Column("Method", number=False),
    )  # fmt: skip
    rows = []
    for audited, each in document.epsilons:
        finite = each.upper < float("inf")
        rows.append([
            Cell(audited, audited), Cell(words.digits(each.lower), each.lower),
            Cell(words.digits(each.upper), each.upper) if finite else absent(each.upper_because),
            Cell(f"{each.delta:g}", each.delta), Cell(words.digits(100 * each.confidence), each.confidence),
            Cell(each.adjacency, each.adjacency), Cell(str(each.trials), each.trials),
            Cell(f"{each.method}: {each.counted}", each.method),
        ])  # fmt: skip
    return table("t-epsilons", "Epsilon that was proved by attack beside the one that is stated", columns, rows)


def _measures(document: AuditDocument) -> Markup:
    columns = (
        Column("Measure", number=False), Column("Scheme", number=False), Column("Layer", number=False), Column("Value"),
        Column("Unit", number=False), Column("What it says", number=False),
    )  # fmt: skip
    rows = [
        [
            Cell(each.name, each.name), Cell(each.audited or "-", each.audited or ""),
            Cell(each.layer or "-", each.layer or ""),
            absent(each.missing or "") if each.value is None else Cell(words.digits(each.value), each.value),
            Cell(each.unit, each.unit), Cell(each.note, each.note),
        ]
        for each in document.figures
    ]  # fmt: skip
    return table("t-measures", "Figures that need no attack", columns, rows)


def _crossed(document: AuditDocument) -> Markup:
    columns = (
        Column("Scheme", number=False), Column("Phase", number=False), Column("Layer", number=False),
        Column("Direction", number=False), Column("Kind", number=False), Column("Tensors"), Column("Bytes", "KiB"),
        Column("Exposed", "% of energy"),
    )  # fmt: skip
    rows = []
    for scheme in document.schemes:
        for phase, crossed in (("inference", scheme.inference), ("training", scheme.training)):
            for each in crossed:
                share = None if each.exposed is None else 100 * each.exposed.energy
                texts = (scheme.audited, phase, each.layer, each.direction, each.kind)
                rows.append([
                    *(Cell(text, text) for text in texts), Cell(str(each.tensors), each.tensors),
                    Cell(words.digits(each.bytes / 1024), each.bytes),
                    absent("not known for this kind of tensor") if share is None else Cell(words.digits(share), share),
                ])  # fmt: skip
    return table("t-crossed", "Tensors on the link, by layer", columns, rows)


def _pictures(pictures: Sequence[PictureFile], images: Inlined) -> Markup:
    shown = []
    for each in pictures:
        rows = f"rows from the top: {', '.join(each.rows)}" if each.rows else "one row"
        at = f", {each.position}" if each.position is not None else ""
        caption = f"{each.title} ({each.audited}{at})"
        address = images.address(each.file)
        if address is None:
            link = tag("a", words.visible(each.file), href=quote(each.file))
            shown.append(tag("p", f"{caption}: not carried along, see ", link, "."))
            continue
        image = tag("img", src=address, alt=f"{caption}; {rows}", loading="lazy")
        shown.append(tag("figure", tag("figcaption", tag("h4", caption), tag("p", rows, class_="note")), image))
    return tag("div", *shown, class_="grid")


def _failures(document: AuditDocument) -> Markup:
    items = [tag("li", escaped(f"{each.audited}, {each.job}: {each.message}")) for each in document.failures]
    return tag("ul", *items)
