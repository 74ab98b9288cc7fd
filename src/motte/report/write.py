"""From a folder of results to its page and figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from motte.bench.results import Results, read_results
from motte.errors import InputError, ResourceError
from motte.limits import MAX_RESULTS_FILE_BYTES
from motte.report.chart import Chart, NotDrawn
from motte.report.charts import charts
from motte.report.gathered import Gathered, gather
from motte.report.images import Inlined
from motte.report.page import Content, page
from motte.report.plotly_source import library
from motte.seal.atomic import atomic_file

if TYPE_CHECKING:
    from motte.audit.document import AuditDocument

PAGE: Final = "report.html"
FIGURES: Final = "figures"
_FIXED: Final = ("summary.csv", "layers.csv", "records.jsonl", "run.json", "audit.json")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written. ``answer``: the three answers in one sentence, None where only an audit was run."""

    page: Path
    page_bytes: int
    figures: tuple[Path, ...]
    not_drawn: tuple[NotDrawn, ...]
    answer: str | None
    simulated: bool


def silent(done: int, total: int) -> None:
    """Nobody is told."""


def make_report(
    folder: Path, *, figures: bool = True, overwrite: bool = True, progress: Callable[[int, int], None] = silent
) -> Report:
    """Write ``report.html`` into ``folder``, and every figure as PNG and SVG into ``folder/figures``.

    Everything in ``folder`` is **unverified**. The page is written last and whole; figures of an earlier report that
    are not drawn any more are left where they lie.

    Args:
        figures: False: the page alone.
        overwrite: replace an earlier page.
        progress: told how many figures are drawn, of how many.

    Raises:
        InputError: neither results nor an audit lie there, or a page does and ``overwrite`` is false.
        RecordError: a file of the results is malformed.
        ResourceError: plotly or matplotlib is not installed, or the folder cannot be written to.
    """
    place = folder / PAGE
    if not overwrite and os.path.lexists(place):
        raise InputError("the file exists already", where=str(place), hint="--overwrite replaces it")
    data, audit = _read(folder)
    found = list(charts(data)) if data is not None else []
    if audit is not None:
        from motte.report.audit_section import audit_charts

        found += audit_charts(audit)
    drawn = [each for each in found if isinstance(each, Chart)]
    paths = _draw(drawn, folder / FIGURES, progress) if figures and drawn else ()
    content = Content(
        data=data, audit=audit, charts=found, files=_files(folder, data), with_files=bool(paths),
        images=Inlined(folder), library=library(),
    )  # fmt: skip
    text = page(content).encode("utf-8")
    with atomic_file(place, overwrite=True) as fd:
        _write_all(fd, text)
    from motte.report.answers import sentence

    return Report(
        page=place, page_bytes=len(text), figures=tuple(paths),
        not_drawn=tuple(each for each in found if isinstance(each, NotDrawn)),
        answer=sentence(data) if data is not None else None,
        simulated=data is not None and data.results.simulated,
    )  # fmt: skip


def _read(folder: Path) -> tuple[Gathered | None, AuditDocument | None]:
    audit_file = folder / "audit.json"
    audit: AuditDocument | None = None
    if audit_file.is_file():
        from motte.audit.document import decode_audit

        audit = decode_audit(_bytes(audit_file), where=str(audit_file))
    if audit is not None and not (folder / "run.json").exists():
        return None, audit
    results: Results = read_results(folder)
    if not results.cases:
        raise InputError("the results hold no case", where=str(folder))
    return gather(results), audit


def _draw(drawn: list[Chart], folder: Path, progress: Callable[[int, int], None]) -> tuple[Path, ...]:
    from motte.report.static_figures import save

    try:
        folder.mkdir(exist_ok=True)
    except OSError as problem:
        raise ResourceError("the folder cannot be made", where=str(folder), got=problem.strerror) from problem
    paths: list[Path] = []
    for number, chart in enumerate(drawn, start=1):
        paths += save(chart, folder)
        progress(number, len(drawn))
    return tuple(paths)


def _files(folder: Path, data: Gathered | None) -> list[str]:
    names = [_FIXED[0]]
    if data is not None:
        names += [f"{model}.csv" for model in data.models]
        names += [*_FIXED[1:], *(f"plans/{case}.json" for case in data.results.plans)]
    else:
        names += _FIXED[1:]
    return [name for name in names if (folder / name).is_file()]


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_RESULTS_FILE_BYTES + 1)
    except OSError as problem:
        raise ResourceError("a file of the results cannot be read", where=str(path), got=problem.strerror) from problem


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
