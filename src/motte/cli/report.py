"""The report of ``motte run``: answers, times with from where to where, memory, protection."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motte.cli.output import Column, Line, bytes_text, seconds_text, table
from motte.enclave.process import SIMULATED

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from motte.attest.verify import Verdict
    from motte.run.answers import Answer
    from motte.run.model import Model
    from motte.run.settings import LoadSettings
    from motte.run.told import EngineUsed, Outside

    Array = NDArray[Any]

_OPENED = "open and load"
_INSIDE = {
    "attest": "evidence made and proved, data keys released",
    "verify": "keys opened to graph read and checked",
    "open": "to parts decrypted and authenticated",
    "load": "to programs compiled",
}
"""What the worker times inside the segment :data:`_OPENED`, in order."""
_MEMORY = {
    "weight_arena_bytes": "weights, opened",
    "engine_copy_bytes": "engine's own copies of weights",
    "rss_before_open_bytes": "whole worker, before opening",
    "rss_bytes": "whole worker, now",
    "rss_peak_bytes": "whole worker, at most",
}
_SHOWN_VALUES = 4


@dataclass(slots=True)
class Measured:
    """What one ``motte run`` saw."""

    answers: list[Answer] = field(default_factory=list)
    raw: list[Array] = field(default_factory=list)
    """Per batch, what ``--out`` saves."""
    first_batch: int = 0
    """Inputs in the batch that is timed."""
    steady_s: list[float] = field(default_factory=list)
    """One entry per repetition of the first batch."""
    activation_peak_bytes: int = 0
    outside: list[Outside] = field(default_factory=list)
    """What crossed to the accelerator, per run; empty where everything ran inside."""

    @property
    def steady_median_s(self) -> float | None:
        """None where nothing was repeated."""
        return statistics.median(self.steady_s) if self.steady_s else None


def engine_line(engine: EngineUsed) -> str:
    """One line: what computes, why, and how far its answers may be from the reference's."""
    form = "all parts joined" if engine.joined else "part by part"
    if engine.name == "torch":
        worth = "the reference"
    elif engine.difference is None:
        worth = "not compared with the reference when this bundle was sealed"
    else:
        versions = sorted({check.engine_version for check in engine.checks})
        other = "" if versions == [engine.version] else f" (compared with {', '.join(versions)})"
        worth = f"within {engine.difference:.2g} of the reference when this bundle was sealed{other}"
    return f"engine: {engine.name} {engine.version}, {engine.precision}, {form}; {engine.why}; {worth}"


def report_json(
    bundle: Path, model: Model, settings: LoadSettings, found: Measured, memory: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything as JSON values; times in seconds, sizes in bytes."""
    segments = model.clock.segments()
    return {
        "bundle": str(bundle),
        "model": model.signature.model,
        "weights_origin": model.signature.weights_origin,
        "enclave": model.enclave,
        "simulated": model.simulated,
        "protection": SIMULATED if model.simulated else "hardware",
        "engine": {
            "name": model.engine.name,
            "version": model.engine.version,
            "precision": model.engine.precision,
            "joined": model.engine.joined,
            "why": model.engine.why,
            "difference": model.engine.difference,
        },
        "mode": settings.mode,
        "weight_memory_bytes": settings.weight_memory_bytes or None,
        "parts": len(model.parts),
        "answers": [answer.to_json() for answer in found.answers],
        "segments": [
            {"name": each.name, "since": each.since, "until": each.until, "seconds": each.seconds}
            for each in segments.items
        ],
        "worker_seconds": dict(model.worker_seconds),
        "unaccounted_seconds": segments.unaccounted_s,
        "to_first_answer_seconds": segments.total_s,
        "steady": {
            "batch": found.first_batch,
            "runs": len(found.steady_s),
            "median_seconds": found.steady_median_s,
            "seconds": found.steady_s,
        },
        "memory": dict(memory),
        "hardening": model.hardening.to_json(),
        "verified": None
        if model.verdict is None
        else {
            "platform": model.verdict.claims.platform,
            "simulated": model.verdict.claims.simulated,
            "measurements": dict(model.verdict.claims.measurements),
        },
        "activation_peak_bytes": found.activation_peak_bytes,
    }


def show_report(
    bundle: Path, model: Model, settings: LoadSettings, found: Measured, memory: Mapping[str, Any]
) -> list[Table | Line]:
    """The same for people."""
    shown: list[Table | Line] = []
    said = model.signature
    if said.weights_origin == "random":
        shown.append(Line("RANDOM WEIGHTS: these answers mean nothing"))
    shown.append(_answers(found))
    shown.append(_times(model, found))
    bound = f", at most {bytes_text(settings.weight_memory_bytes)} of weights" if settings.weight_memory_bytes else ""
    facts = [
        ("model", f"{said.model}, weights: {said.weights_origin}, {len(model.parts)} parts, {bundle.name}"),
        ("mode", settings.mode + bound),
        ("engine", engine_line(model.engine).removeprefix("engine: ")),
        *((title, _size(memory[name])) for name, title in _MEMORY.items() if name in memory),
        ("activations, at most", f"{bytes_text(found.activation_peak_bytes)}, computed for the largest batch run"),
        ("weights locked in RAM", "yes" if memory.get("weights_locked") else "no: the system may swap them out"),
        ("weights out of direct reach", _secret(memory)),
        *([] if model.verdict is None else [("evidence", verdict_line(model.verdict))]),
        ("protection", f"{SIMULATED} (enclave kind: {model.enclave})" if model.simulated else f"{model.enclave}"),
    ]
    shown.append(table((Column("worker", keep=True), Column("")), facts))
    return shown


def verdict_line(verdict: Verdict) -> str:
    """One line: what the worker proved, and by what."""
    claims = verdict.claims
    measured = ", ".join(f"{name} {value[:16]}..." for name, value in list(claims.measurements.items())[:2])
    return f"verified: {claims.platform}, {measured}" + (" (SIMULATED)" if claims.simulated else "")


def _secret(memory: Mapping[str, Any]) -> str:
    held, secret = memory["weight_arena_bytes"], memory["weight_secret_bytes"]
    if secret == held:
        return "all that are opened (memfd_secret); not an engine's copies of them"
    return f"{bytes_text(secret)} of {bytes_text(held)} (memfd_secret)"


def _size(count: int | None) -> str:
    return "cannot be told" if count is None else bytes_text(count)


def _answers(found: Measured) -> Table:
    if any(answer.top for answer in found.answers):
        rows = [
            (answer.input if place == 0 else "", ranked.label, ranked.percent)
            for answer in found.answers
            for place, ranked in enumerate(answer.top)
        ]
        return table((Column("input"), Column("label"), Column("per cent", number=True)), rows)
    rows = [(answer.input, *_vector(answer)) for answer in found.answers]
    return table((Column("input"), Column("answer", keep=True), Column("begins with")), rows)


def _vector(answer: Answer) -> tuple[str, str]:
    if answer.embedding is not None:
        return f"embedding {list(answer.embedding.shape)}", _begin(answer.embedding)
    shapes = " ".join(str(list(each.shape)) for each in answer.outputs)
    return f"output {shapes}", _begin(answer.outputs[0]) if answer.outputs else ""


def _begin(array: Array) -> str:
    values = array.reshape(-1)[:_SHOWN_VALUES]
    more = ", ..." if array.size > _SHOWN_VALUES else ""
    return ", ".join(f"{float(value):.4g}" for value in values) + more


def _times(model: Model, found: Measured) -> Table:
    segments = model.clock.segments()
    rows = []
    for each in segments.items:
        rows.append((each.name, seconds_text(each.seconds), f"{each.since} -> {each.until}"))
        if each.name == _OPENED:
            rows += [
                (f"  {name}", seconds_text(model.worker_seconds[name]), f"in the worker: {until}")
                for name, until in _INSIDE.items()
                if model.worker_seconds.get(name)
            ]
    rows.append(("between these", seconds_text(segments.unaccounted_s), "reading the inputs"))
    rows.append(
        ("to first answer", seconds_text(segments.total_s), "the whole, from the first line to the first answer")
    )
    median = found.steady_median_s
    if median is not None:
        spread = f"{seconds_text(min(found.steady_s))} to {seconds_text(max(found.steady_s))}"
        what = f"median of {len(found.steady_s)} more runs ({spread}), batch {found.first_batch}, sent -> received"
        rows.append(("steady inference", seconds_text(median), what))
    return table((Column("time", keep=True), Column("", number=True), Column("from -> to")), rows)
