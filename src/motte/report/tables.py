"""Tables of the page: sortable by every column, with the reason below for every figure that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from motte.report.html import Markup, escaped, joined, tag

_LONG: Final = 28
"""Letters above which the words of a column are broken."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, its unit (empty: none), whether figures stand in it."""

    title: str
    unit: str = ""
    number: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a cell; ``value``: what it is sorted by. ``reason``: why there is no figure."""

    text: str
    value: float | str | None = None
    reason: str | None = None


def absent(reason: str) -> Cell:
    """A figure that is not there."""
    return Cell("n/a", None, reason)


def table(identifier: str, caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Markup:
    """A table with its notes. The first column names its row. Figures that are not there sort last, either way."""
    reasons: dict[str, int] = {}
    long = [any(len(row[at].text) > _LONG for row in rows) and not each.number for at, each in enumerate(columns)]
    body = []
    for row in rows:
        cells = zip(row, columns, long, strict=True)
        made = [_cell(*each, reasons, identifier, first=at == 0) for at, each in enumerate(cells)]
        body.append(tag("tr", *made))
    head = tag("tr", *(_heading(column) for column in columns))
    # No caption: it would be as wide as the table, and cut off where that is scrolled.
    name = f"{identifier}-name"
    whole = tag("table", tag("thead", head), tag("tbody", *body), class_="sortable", aria_labelledby=name)
    scrolled = tag("div", whole, class_="scroll", role="region", aria_labelledby=name, tabindex=0)
    region = joined(tag("p", caption, class_="caption", id=name), scrolled)
    if not reasons:
        return region
    notes = [
        tag("li", tag("span", str(number), class_="mark"), " ", reason, id=f"{identifier}-{number}")
        for reason, number in reasons.items()
    ]
    return joined(region, tag("p", "Why a figure is not there:", class_="why"), tag("ul", *notes, class_="reasons"))


def _heading(column: Column) -> Markup:
    unit = tag("span", f" ({column.unit})", class_="unit") if column.unit else Markup("")
    arrow = tag("span", class_="arrow", aria_hidden="true")
    button = tag("button", column.title, unit, arrow, type="button")
    return tag("th", button, scope="col", aria_sort="none", class_="number" if column.number else None)


def _cell(cell: Cell, column: Column, long: bool, reasons: dict[str, int], identifier: str, *, first: bool) -> Markup:
    shown = escaped(cell.text)
    if cell.reason is not None:
        number = reasons.setdefault(cell.reason, len(reasons) + 1)
        link = tag("a", str(number), href=f"#{identifier}-{number}", aria_label=f"why: {cell.reason}")
        shown = joined(shown, tag("sup", link))
    value = None if cell.value is None else repr(cell.value) if isinstance(cell.value, float) else str(cell.value)
    kind = "number" if column.number else "long" if long else None
    if first:
        return tag("th", shown, scope="row", data_value=value, class_=kind)
    return tag("td", shown, data_value=value, class_=kind)
