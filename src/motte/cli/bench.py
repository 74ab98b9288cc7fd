"""``motte bench infer|train|split|open|link|start``: what each way of running a model costs, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motte.cli.bench_options import (
    HowOptions,
    OutOptions,
    PartOptions,
    SplitOptions,
    WeightOptions,
    WhatOptions,
    counts,
    make_request,
    words,
)
from motte.cli.options import parse_size
from motte.cli.output import Bar, Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.verb import FAILED, verb
from motte.errors import SettingError, UnsupportedError

if TYPE_CHECKING:
    from motte.bench.case import CaseResult
    from motte.bench.interleave import Progress
    from motte.bench.outcome import Outcome
    from motte.bench.request import Request

app = typer.Typer(help="Measures every way of running a model against the plain one, interleaved, with intervals.")
_NONE = "n/a"
_SUITE_REPEATS = 5
_SUITE_WARMUP = 1


class BarProgress:
    """A bench's progress as a bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._done = 0
        self._total = 0

    def say(self, text: str) -> None:
        """See :class:`motte.bench.interleave.Progress`."""
        self._bar.describe(text)

    def expect(self, more: int) -> None:
        """See :class:`motte.bench.interleave.Progress`."""
        self._total += more
        self._bar.set(self._done, self._total)

    def advance(self, steps: int) -> None:
        """See :class:`motte.bench.interleave.Progress`."""
        self._done += steps
        self._bar.set(self._done, self._total)


@app.command()
@verb
def infer(
    out: Output,
    what: WhatOptions,
    where: PartOptions,
    scheme: SplitOptions,
    weights: WeightOptions,
    how: HowOptions,
    results: OutOptions,
    suite: Annotated[
        Literal["classic"] | None,
        typer.Option(
            "--suite",
            rich_help_panel="What is measured",
            help="classic: the eight classic models, native and resident, in 1 and in the published 12 parts, random"
            " weights, batch 1.",
        ),
    ] = None,
) -> None:
    """One request, input decoded, to its answer."""
    from motte.bench.infer import bench_infer

    if _compared(out, results, given=_given(what) or suite is not None):
        return
    request = _classic(what, where, how) if suite else _request("infer", what, how, weights, where, scheme)
    _run(out, request, results, lambda progress: bench_infer(request, progress))


@app.command()
@verb
def train(
    out: Output,
    what: WhatOptions,
    scheme: SplitOptions,
    weights: WeightOptions,
    how: HowOptions,
    results: OutOptions,
) -> None:
    """One training step: forward, loss, backward, SGD."""
    from motte.bench.train import bench_train

    if _compared(out, results, given=_given(what)):
        return
    request = _request("train", what, how, weights, None, scheme, modes="native,asymmetric")
    _run(out, request, results, lambda progress: bench_train(request, progress))


@app.command()
@verb
def split(
    out: Output,
    what: WhatOptions,
    where: PartOptions,
    scheme: SplitOptions,
    weights: WeightOptions,
    how: HowOptions,
    results: OutOptions,
) -> None:
    """A captured model to a sealed bundle on the disk."""
    _lifecycle("split", out, what, where, scheme, weights, how, results, modes="resident")


@app.command("open")
@verb
def open_(
    out: Output,
    what: WhatOptions,
    where: PartOptions,
    scheme: SplitOptions,
    weights: WeightOptions,
    how: HowOptions,
    results: OutOptions,
) -> None:
    """A bundle given to a started worker, until that is ready."""
    _lifecycle("open", out, what, where, scheme, weights, how, results, modes="native,resident")


@app.command()
@verb
def start(
    out: Output,
    what: WhatOptions,
    where: PartOptions,
    scheme: SplitOptions,
    weights: WeightOptions,
    how: HowOptions,
    results: OutOptions,
) -> None:
    """A process spawned, until it says its first word."""
    _lifecycle("start", out, what, where, scheme, weights, how, results, modes="native,resident")


@app.command()
@verb
def link(
    out: Output,
    how: HowOptions,
    results: OutOptions,
    sizes: Annotated[
        str,
        typer.Option(
            "--sizes", metavar="SIZE,SIZE", rich_help_panel="What is measured", help="Of the tensor each way."
        ),
    ] = "4KiB,1MiB,64MiB",
) -> None:
    """A tensor to an accelerator and one back, without its arithmetic, against two copies in memory."""
    from motte.bench.link_bench import bench_link

    if _compared(out, results, given=False):
        return
    asked = tuple(parse_size(word) for word in words(sizes, option="--sizes"))
    request = make_request("link", ("link",), how, modes=("native", "asymmetric"))
    _run(out, request, results, lambda progress: bench_link(request, asked, progress))


def _lifecycle(
    name: str, out: Output, what: WhatOptions, where: PartOptions, scheme: SplitOptions, weights: WeightOptions,
    how: HowOptions, results: OutOptions, *, modes: str,
) -> None:  # fmt: skip
    from motte.bench.lifecycle import bench_lifecycle

    if _compared(out, results, given=_given(what)):
        return
    request = _request(name, what, how, weights, where, scheme, modes=modes)
    _run(out, request, results, lambda progress: bench_lifecycle(request, progress))


def _given(what: WhatOptions) -> bool:
    return bool(what.model) or what.modes is not None


def _request(
    name: str, what: WhatOptions, how: HowOptions, weights: WeightOptions, where: PartOptions | None,
    scheme: SplitOptions, *, modes: str = "native,resident",
) -> Request:  # fmt: skip
    models = [word for text in what.model or () for word in words(text, option="--model")]
    if not models:
        raise SettingError(
            "no model is named", where="--model", expected="a name of `motte zoo list`, or file.py:factory"
        )
    return make_request(
        name, models, how, modes=words(what.modes or modes, option="--modes"), weights=weights, where=where,
        scheme=scheme, batches=counts(what.batch, option="--batch"),
    )  # fmt: skip


def _classic(what: WhatOptions, where: PartOptions, how: HowOptions) -> Request:
    """The suite as the earlier work ran it."""
    from motte.zoo.published_cuts import CLASSICS, PUBLISHED_PARTS

    others = [
        option
        for option, given in (
            ("--model", what.model),
            ("--modes", what.modes),
            ("--parts", where.parts),
            ("--cuts", where.cuts),
            ("--batch", what.batch != "1"),
        )
        if given
    ]
    if others:
        raise SettingError("the suite says itself what it measures", got=f"--suite classic with {', '.join(others)}")
    return make_request(
        "infer", CLASSICS, how, modes=("native", "resident"), where=where,
        repeats=how.repeats or _SUITE_REPEATS, warmup=_SUITE_WARMUP if how.warmup is None else how.warmup,
        parts=(1, PUBLISHED_PARTS), cuts="published", random_weights=True,
    )  # fmt: skip


def _run(out: Output, request: Request, results: OutOptions, bench: Callable[[Progress], Outcome]) -> None:
    results.check()
    with out.progress("starting", total=1) as bar:
        found = bench(BarProgress(bar))
    show_outcome(out, request, found, results)


def show_outcome(out: Output, request: Request, found: Outcome, results: OutOptions) -> None:
    """Write and print what was measured; exit status 1 where a case failed that should have worked.

    Raises:
        UnsupportedError: nothing could be measured.
    """
    from motte.bench.results import write_results

    if found.results is None:
        first = found.refused[0] if found.refused else None
        raise UnsupportedError(
            "nothing could be measured",
            where=None if first is None else str(first.case),
            got=None if first is None else first.why,
        )
    if results.out_dir is not None:
        write_results(results.out_dir, found.results, overwrite=results.overwrite)
    document = {
        "verb": request.verb,
        "out": None if results.out_dir is None else str(results.out_dir),
        "caveats": list(found.results.run.caveats),
        "cases": [case_json(each) for each in found.results.cases],
        "missing": [{"case": str(each.case), "why": each.why, "failed": each.failed} for each in found.refused],
    }
    shown: list[Any] = [*case_tables(found.results.cases), *(Line(text) for text in found.results.run.caveats)]
    out.result(document, *shown)
    if results.out_dir is not None:
        out.note(f"results in {results.out_dir}; show them with: motte report {results.out_dir}")
    if found.failed:
        raise typer.Exit(FAILED)


def case_json(result: CaseResult) -> dict[str, Any]:
    """One row as JSON values; seconds and bytes."""
    ratio = result.ratio
    figures = ("peak_memory_bytes", "mean_memory_bytes", "weight_memory_bytes", "memory_bound_bytes", "cpu_percent",
               "energy_j", "power_w", "accuracy", "bytes_out", "bytes_in", "trusted_flops", "outside_flops",
               "exposed")  # fmt: skip
    return {
        "case": str(result.case),
        "model": result.case.model,
        "mode": result.case.mode,
        "parts": result.case.parts,
        "batch": result.case.batch,
        "engine": result.case.engine,
        "enclave": result.case.enclave,
        "simulated": result.simulated,
        "threads": result.threads,
        "median_seconds": result.seconds.median,
        "spread_seconds": result.seconds.spread,
        "seconds": list(result.seconds.samples),
        "ratio": None
        if ratio is None
        else {"median": ratio.median, "low": ratio.low, "high": ratio.high, "confidence": ratio.confidence},
        "segments": dict(result.segments),
        **{name: getattr(result, name) for name in figures},
        "missing": dict(result.missing),
    }


def case_tables(cases: Sequence[CaseResult]) -> list[Any]:
    """A table for every model and batch; a column that has nothing to say is left out."""
    titles = ("case", "median", "ratio", "interval", "memory", "out", "exposed")
    found = []
    for model, batch in dict.fromkeys((each.case.model, each.case.batch) for each in cases):
        rows = [_row(each) for each in cases if (each.case.model, each.case.batch) == (model, batch)]
        kept = [place for place in range(len(titles)) if any(row[place] != _NONE for row in rows)]
        columns = [Column(titles[place], number=place > 0, keep=True) for place in kept]
        cells = [[row[place] for place in kept] for row in rows]
        found.append(table(columns, cells, title=f"{model}, batch {batch}"))
    return found


def _row(result: CaseResult) -> tuple[str, ...]:
    case, ratio = result.case, result.ratio
    # Words only where they tell two rows apart.
    place = "" if case.enclave in ("none", "process") else f" {case.enclave}"
    engine = "" if case.engine == "torch" else f" {case.engine}"
    parts = f" p{case.parts}" if case.mode in ("resident", "streamed", "asymmetric") else ""
    return (
        f"{case.mode}{parts}{engine}{place}",
        seconds_text(result.seconds.median),
        _NONE if ratio is None else f"{ratio.median:.2f}",
        _NONE if ratio is None else f"{ratio.low:.2f}-{ratio.high:.2f}",
        _NONE if result.peak_memory_bytes is None else bytes_text(result.peak_memory_bytes),
        _NONE if result.bytes_out is None else bytes_text(result.bytes_out),
        _NONE if result.exposed is None else f"{result.exposed:.1%}",
    )


# --- two runs ---------------------------------------------------------------------------------------------------------
def _compared(out: Output, results: OutOptions, *, given: bool) -> bool:
    """Whether two runs were compared instead of one being made."""
    if results.compare is None:
        results.check()
        return False
    if given or results.out_dir is not None:
        raise SettingError("compare two runs, or measure a new one", got="--compare with what to measure")
    from motte.bench.regress import DEFAULT_BOUND, compare_runs
    from motte.bench.results import read_results

    old, new = (read_results(folder) for folder in results.compare)
    found = compare_runs(old, new, bound=DEFAULT_BOUND if results.bound is None else results.bound)
    rows = []
    for row in found.rows:
        ratio = row.ratio
        figures = (_NONE, _NONE) if ratio is None else (f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}")
        rows.append((str(row.case), *figures, "ok" if row.passed else f"FAIL{': ' + row.why if row.why else ''}"))
    document = {
        "old": str(results.compare[0]),
        "new": str(results.compare[1]),
        "bound": found.bound,
        "passed": found.passed,
        "cases": [
            {
                "case": str(row.case),
                "ratio": None if row.ratio is None else row.ratio.median,
                "low": None if row.ratio is None else row.ratio.low,
                "high": None if row.ratio is None else row.ratio.high,
                "passed": row.passed,
                "why": row.why,
            }
            for row in found.rows
        ],
        "added": [str(case) for case in found.added],
        "overlapping": found.overlapping,
        "overlap_of": found.overlap_of,
    }
    columns = (Column("case"), Column("ratio", number=True), Column("interval", number=True), Column("verdict"))
    title = f"median of NEW over median of OLD; at most {found.bound:g}"
    shown: list[Any] = [table(columns, rows, title=title)]
    shown += [Line(f"new, and not compared: {case}") for case in found.added]
    if found.overlap_of:
        shown.append(
            Line(f"ratios over native: the intervals of {found.overlapping} of {found.overlap_of} cases overlap")
        )
    out.result(document, *shown)
    if not found.passed:
        failed = sum(not row.passed for row in found.rows)
        out.failure(f"{failed} of {len(found.rows)} cases are missing, or slower than {found.bound:g} times before")
        raise typer.Exit(FAILED)
    return True
