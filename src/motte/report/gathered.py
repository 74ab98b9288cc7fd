"""What figures and tables ask of a results directory: which models, which cases stand for them, in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from motte.bench.results import MODES, Case, CaseResult, Results, TracePoint
from motte.report import words

TRUSTED: Final = ("resident", "streamed")
"""Modes in which everything runs inside."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What is comparable: one model at one batch size on one engine. ``title``: as short as it can be here."""

    model: str
    batch: int
    engine: str
    title: str
    slug: str
    results: tuple[CaseResult, ...]

    @property
    def native(self) -> CaseResult | None:
        """The unprotected baseline, when it was measured."""
        return next((each for each in self.results if each.case.mode == "native"), None)

    @property
    def protected(self) -> tuple[CaseResult, ...]:
        """All but native and accelerator only."""
        return tuple(each for each in self.results if each.case.mode not in ("native", "accelerator"))

    def chosen(self) -> tuple[CaseResult, ...]:
        """One case a mode, scheme and enclave: with the fewest parts, but streamed ones with the most."""
        found: dict[tuple[str, str, str], CaseResult] = {}
        for each in self.results:
            key = (each.case.mode, each.case.scheme, each.case.enclave)
            before = found.get(key)
            fewer = before is None or each.case.parts < before.case.parts
            if before is None or fewer != (each.case.mode == "streamed"):
                found[key] = each
        return tuple(found.values())

    def trusted(self) -> CaseResult | None:
        """The case that stands for "inside": resident before streamed, fewest parts."""
        inside = [each for each in self.results if each.case.mode in TRUSTED]
        return min(inside, key=lambda each: (TRUSTED.index(each.case.mode), each.case.parts), default=None)


@dataclass(frozen=True)
class Gathered:
    """:class:`Results` with what is asked of them often."""

    results: Results
    slices: tuple[Slice, ...]
    _traces: dict[Case, tuple[TracePoint, ...]] = field(repr=False)

    def trace(self, case: Case) -> tuple[TracePoint, ...]:
        """The samples of ``case``; empty when it was not traced."""
        return self._traces.get(case, ())

    def way(self, case: Case) -> str:
        """:func:`motte.report.words.way`, with the kind of enclave where there is more than one."""
        more = len(self.enclaves) > 1 and case.enclave != "none"
        return words.way(case) + (f", {case.enclave}" if more else "")

    @property
    def enclaves(self) -> tuple[str, ...]:
        """Kinds of enclave that were measured, in the order in which they first appear."""
        return _distinct(each.case.enclave for each in self.results.cases if each.case.enclave != "none")

    @property
    def models(self) -> tuple[str, ...]:
        """In the order in which they first appear."""
        return _distinct(each.case.model for each in self.results.cases)


def gather(results: Results) -> Gathered:
    """Sort the cases into slices; within one: by mode, scheme, enclave and number of parts."""
    keys = list(dict.fromkeys((each.case.model, each.case.batch, each.case.engine) for each in results.cases))
    batches, engines = {key[1] for key in keys}, {key[2] for key in keys}
    slices = []
    for model, batch, engine in keys:
        named = [model, *([f"batch {batch}"] if len(batches) > 1 else []), *([engine] if len(engines) > 1 else [])]
        members = [
            each
            for each in results.cases
            if (each.case.model, each.case.batch, each.case.engine) == (model, batch, engine)
        ]
        slices.append(
            Slice(
                model, batch, engine, ", ".join(named), f"{model}-b{batch}-{engine}", tuple(sorted(members, key=_order))
            )
        )
    traces: dict[Case, list[TracePoint]] = {}
    for point in results.traces:
        traces.setdefault(point.case, []).append(point)
    return Gathered(results, tuple(slices), {case: tuple(points) for case, points in traces.items()})


def _order(result: CaseResult) -> tuple[int, str, str, int]:
    case = result.case
    return MODES.index(case.mode), case.scheme, case.enclave, case.parts


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
