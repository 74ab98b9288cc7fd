"""The page: one HTML file that needs nothing else and reaches no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from motte.bench.results import CaseResult
from motte.report import diagram, words
from motte.report.answers import answers, sentence
from motte.report.audit_section import GROUP as AUDIT_GROUP
from motte.report.audit_section import audit_section
from motte.report.chart import Chart, NotDrawn
from motte.report.cost_tables import cost_tables
from motte.report.gathered import Gathered, Slice
from motte.report.html import Markup, data_block, joined, tag, trusted_source
from motte.report.images import Inlined
from motte.report.interactive import Arrays, figure
from motte.report.palette import DARK, LIGHT, css_variables
from motte.report.plotly_source import Library, digest

if TYPE_CHECKING:
    from motte.audit.document import AuditDocument

SIMULATED: Final = (
    "SIMULATED: no hardware protection. Root on the machine could read everything that ran in the trusted process; "
    "times and sizes are those of a process, not of an enclave."
)


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a page is made of. ``data`` is None where only an audit was run; ``files``: paths relative to the page."""

    data: Gathered | None
    audit: AuditDocument | None
    charts: Sequence[Chart | NotDrawn]
    files: Sequence[str]
    with_files: bool
    images: Inlined
    library: Library


def page(content: Content) -> str:
    """The whole file.

    All text of the results is escaped, and the content security policy lets run our two scripts alone, by their
    digests, and forbids every request.
    """
    script = _asset("page.js")
    policy = (
        f"default-src 'none'; script-src '{digest(script.encode())}' '{content.library.digest}'; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        trusted_source(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", _title(content)),
        tag("style", trusted_source(_style())),
    )
    arrays = Arrays()
    drawn = {each.slug: figure(each, arrays) for each in content.charts if isinstance(each, Chart)}
    body = tag(
        "body",
        tag("a", "To the content", href="#main", class_="skip"),
        _banner(content),
        _header(content),
        tag("main", *_sections(content), id="main"),
        _footer(content),
        data_block({"figures": drawn, "arrays": arrays.stored()}, "figures"),
        trusted_source(f'<script type="text/plain" id="plotly">{content.library.packed}</script>'),
        trusted_source(f"<script>{script}</script>"),
    )
    return f'<!DOCTYPE html>\n<html lang="en">{head}{body}</html>\n'


def _style() -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} }} }}"
    return f":root {{ {css_variables(LIGHT)} }}\n{dark}\n{_asset('page.css')}"


def _asset(name: str) -> str:
    return resources.files("motte.report").joinpath("assets", name).read_text(encoding="utf-8")


def _title(content: Content) -> str:
    if content.data is None:
        return f"motte audit: {content.audit.model}" if content.audit is not None else "motte report"
    models = content.data.models
    named = words.listed(models) if len(models) <= 3 else f"{len(models)} models"
    return f"What protection costs: {named}"


def _banner(content: Content) -> Markup:
    if content.data is None or not content.data.results.simulated:
        return Markup("")
    return tag("div", tag("p", SIMULATED), class_="banner", role="note")


def _header(content: Content) -> Markup:
    links = [
        ("answers", "Answers"), ("machine", "Machine and caveats"), ("tables", "Tables"), ("figures-all", "Figures"),
        ("plans", "Plans"), ("flow", "How it runs"),
    ]  # fmt: skip
    if content.data is None:
        links = [("figures-all", "Figures")]
    if content.audit is not None:
        links.append(("audit", "Audit"))
    links.append(("files", "Files"))
    items = [tag("li", tag("a", text, href=f"#{name}")) for name, text in links]
    lead = tag("p", sentence(content.data), class_="lead") if content.data is not None else Markup("")
    return tag("header", tag("h1", _title(content)), lead, tag("nav", tag("ul", *items), aria_label="On this page"))


def _sections(content: Content) -> Iterable[Markup]:
    data = content.data
    if data is not None:
        yield _answers(data)
        yield _section("machine", "Machine and caveats", _machine(data), _caveats(data))
        yield _section("tables", "Tables", tag("p", "Every heading is a button that sorts."), cost_tables(data))
    yield _section(
        "figures-all", "Figures", *_figures(content, [each for each in content.charts if each.group != AUDIT_GROUP])
    )
    if data is not None:
        yield _section("plans", "Plans: the parts and their sides", *_plans(data))
        yield _section("flow", "How it runs", *_flow(data))
    if content.audit is not None:
        found = [each for each in content.charts if each.group == AUDIT_GROUP]
        yield _section("audit", "Audit", audit_section(content.audit, content.images), *_figures(content, found))
    yield _section("files", "Files beside this page", *_files(content.files))


def _section(identifier: str, title: str, *children: Markup) -> Markup:
    return tag(
        "section", tag("h2", title, id=f"h-{identifier}"), *children, id=identifier, aria_labelledby=f"h-{identifier}"
    )


def _answers(data: Gathered) -> Markup:
    tiles = [
        tag("section", tag("h2", each.question), tag("p", f"{each.answer}.", class_="answer"),
            tag("ul", *(tag("li", detail) for detail in each.details)))
        for each in answers(data)
    ]  # fmt: skip
    return tag("div", *tiles, class_="answers", id="answers")


def _machine(data: Gathered) -> Markup:
    run = data.results.run
    machine = run.machine
    cores = f"{machine.usable_cores} usable of {machine.logical_cores} logical"
    if machine.physical_cores is not None:
        cores += f", {machine.physical_cores} physical"
    revision = "not a git checkout" if run.revision is None else run.revision.commit[:12]
    changed = ", changed since" if run.revision is not None and run.revision.dirty else ""
    threads = sorted({each.threads for each in data.results.cases})
    pairs = [
        ("processor", f"{machine.cpu_model} ({machine.architecture})"),
        ("cores", cores),
        ("threads of the engine", words.listed([str(each) for each in threads])),
        ("memory", words.bytes_(machine.memory_bytes)),
        ("kernel", machine.kernel),
        ("virtual machine", "yes" if machine.virtual else "none is reported, which proves nothing"),
        ("frequency governor", machine.governor or "not readable"),
        ("packages", ", ".join(f"{name} {version}" for name, version in run.packages.items())),
        ("revision", revision + changed),
        ("measured", run.time),
        ("asked", ", ".join(f"{name}: {_json_text(value)}" for name, value in run.asked.items())),
    ]
    rows = [tag(name, text) for pair in pairs for name, text in zip(("dt", "dd"), pair, strict=True)]
    return joined(tag("dl", *rows, tag("dt", "command"), tag("dd", tag("code", " ".join(run.command)))))


def _json_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _caveats(data: Gathered) -> Markup:
    results = data.results
    found = list(results.run.caveats)
    if results.simulated:
        found.insert(0, SIMULATED)
    fewest = min(len(each.seconds.samples) for each in results.cases) if results.cases else 0
    if 0 < fewest < 10:
        found.append(f"Some cases have {words.counted(fewest, 'sample')} only: their intervals are wide.")
    if results.run.machine.virtual:
        found.append("A virtual machine shares its processor with others; times vary with what they do.")
    if results.run.revision is not None and results.run.revision.dirty:
        found.append("The code had changes that its revision does not show.")
    found.append("Nothing in this folder is signed: it is evidence for whoever measured it.")
    return joined(tag("h3", "Caveats"), tag("ul", *(tag("li", each) for each in dict.fromkeys(found))))


# --- figures --------------------------------------------------------------------------------------------------------
def _figures(content: Content, charts: Sequence[Chart | NotDrawn]) -> Iterable[Markup]:
    yield tag(
        "noscript", tag("p", "Interactive figures need JavaScript. The same ones lie in figures/ beside this page.")
    )
    if not any(isinstance(each, Chart) for each in charts):
        yield tag("p", "None could be drawn.")
    models = {one.title for one in content.data.slices} if content.data is not None else set()
    for group in dict.fromkeys(each.group for each in charts):
        members = [each for each in charts if each.group == group]
        shown = [_figure(each, with_files=content.with_files) for each in members if isinstance(each, Chart)]
        left_out = _not_drawn([each for each in members if isinstance(each, NotDrawn)])
        if group in models:
            title = tag("summary", f"{group} over time ({words.counted(len(shown), 'figure')})")
            yield tag("details", title, tag("div", *shown, class_="two"), left_out)
        else:
            yield joined(tag("h3", group), *shown, left_out)


def _figure(chart: Chart, *, with_files: bool) -> Markup:
    place = tag(
        "div", "The figure is drawn when it comes into sight.", class_="plot waiting", data_figure=chart.slug,
        role="img", aria_label=f"{chart.title}. {chart.describe()}",
    )  # fmt: skip
    parts = [tag("figcaption", tag("h4", chart.title)), place]
    if chart.note:
        parts.append(tag("p", chart.note, class_="note"))
    if with_files:
        links = [
            tag("a", name, href=f"figures/{quote(chart.slug)}.{name.lower()}", aria_label=f"{name} of: {chart.title}")
            for name in ("PNG", "SVG")
        ]
        parts.append(tag("p", *links, class_="files"))
    return tag("figure", *parts)


def _not_drawn(missing: Sequence[NotDrawn]) -> Markup:
    if not missing:
        return Markup("")
    by_reason: dict[str, list[str]] = {}
    for each in missing:
        by_reason.setdefault(each.reason, []).append(each.title)
    items = [tag("li", f"{'; '.join(titles)}: {reason}.") for reason, titles in by_reason.items()]
    return joined(tag("p", "Not drawn, and why:", class_="why"), tag("ul", *items, class_="reasons"))


# --- drawings -------------------------------------------------------------------------------------------------------
def _plans(data: Gathered) -> Iterable[Markup]:
    plans = [(one, each) for one in data.slices for each in one.results if str(each.case) in data.results.plans]
    if not plans:
        yield tag("p", "No plan was stored with these results.")
    # The one with the most parts is the one worth seeing first.
    most = max((len(data.results.plans[str(each.case)].parts) for _, each in plans), default=0)
    opened = False
    for number, (one, members) in enumerate(_alike(data)):
        drawing = data.results.plans[str(members[0].case)]
        summary = tag("summary", f"{one.title}: {'; '.join(data.way(each.case) for each in members)}")
        said = tag("p", f"{diagram.describe(drawing)} The cuts were chosen by: {drawing.objective}.", class_="note")
        first = not opened and len(drawing.parts) == most
        opened = opened or first
        yield tag("details", summary, said, diagram.plan(drawing, f"plan-{number}"), open=first)


def _alike(data: Gathered) -> Iterable[tuple[Slice, list[CaseResult]]]:
    """Cases of one model that share a plan, together."""
    for one in data.slices:
        groups: list[list[CaseResult]] = []
        for each in one.results:
            drawing = data.results.plans.get(str(each.case))
            if drawing is None:
                continue
            found = next((group for group in groups if data.results.plans[str(group[0].case)] == drawing), None)
            if found is None:
                groups.append([each])
            else:
                found.append(each)
        yield from ((one, group) for group in groups)


def _flow(data: Gathered) -> Iterable[Markup]:
    simulated = data.results.simulated
    yield tag("p", "From a model to an answer: what is done where, and what each step sees.")
    yield diagram.flow("flow-across", simulated=simulated, upright=False)
    yield diagram.flow("flow-upright", simulated=simulated, upright=True)


def _files(files: Sequence[str]) -> Iterable[Markup]:
    yield tag("p", "Links work where the page still lies in its folder of results.", class_="note")
    plans = [name for name in files if name.startswith("plans/")]
    yield _links([name for name in files if name not in plans])
    if plans:
        yield tag("details", tag("summary", words.counted(len(plans), "plan")), _links(plans))


def _links(names: Sequence[str]) -> Markup:
    return tag("ul", *(tag("li", tag("a", name, href=quote(name))) for name in names))


def _footer(content: Content) -> Markup:
    text = (
        "Made by motte report from the files of its folder, none of which is signed. Charts are drawn by plotly.js "
        f"(package plotly {content.library.version}, MIT licence), which this page carries along. "
        "It reaches no network."
    )
    return tag("footer", tag("p", text))
