"""What a bench gives back: the results to be written, and every case that has none, with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motte.bench.case import CaseResult, LayerTime, PlanDrawing, Results, TracePoint, state_run
from motte.bench.records_of import records_of
from motte.bench.request import Refused, Request
from motte.enclave.process import SIMULATED
from motte.measure.record import Digests


@dataclass(frozen=True)
class Outcome:
    """What was measured; None: nothing could be. ``refused``: what was not, and why."""

    results: Results | None
    refused: tuple[Refused, ...]

    @property
    def failed(self) -> bool:
        """Whether a case failed that should have worked."""
        return any(each.failed for each in self.refused)


def outcome(
    request: Request,
    cases: Sequence[CaseResult],
    refused: Sequence[Refused],
    *,
    caveats: Sequence[str] = (),
    traces: Sequence[TracePoint] = (),
    layers: Sequence[LayerTime] = (),
    plans: Mapping[str, PlanDrawing] | None = None,
    digests: Mapping[str, Digests] | None = None,
    workloads: Mapping[str, Mapping[str, str | int]] | None = None,
) -> Outcome:
    """Put a run together. Every refused case stands in what was asked, and among the caveats."""
    if not cases:
        return Outcome(None, tuple(refused))
    simulated = [SIMULATED] if any(result.simulated for result in cases) else []
    missing = [f"not measured: {each.case}: {each.why}" for each in refused]
    asked = request.asked() | {
        "missing_cases": [{"case": str(each.case), "why": each.why, "failed": each.failed} for each in refused]
    }
    # A case that failed in the middle may have left a plan or a trace behind.
    known = {str(result.case) for result in cases}
    results = Results(
        cases=tuple(cases),
        traces=tuple(each for each in traces if str(each.case) in known),
        layers=tuple(each for each in layers if str(each.case) in known),
        plans={slug: plan for slug, plan in (plans or {}).items() if slug in known},
        records=tuple(
            records_of(
                cases, verb=request.verb, device=request.device, digests=digests or {}, workloads=workloads or {}
            )
        ),
        audit=None,
        run=state_run(asked, caveats=[*simulated, *caveats, *missing]),
    )
    return Outcome(results, tuple(refused))
