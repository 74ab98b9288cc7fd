"""``motte compare MODEL``: of all schemes that this machine can run, the fastest one within what may leave and be held.

The choice is among cases that were measured in one interleaved run. A case whose exposure or memory is not known is
never chosen: nobody can say that it keeps the bounds.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from motte.bench.case import CaseResult
from motte.bench.request import Request
from motte.errors import SettingError

PARTS: Final = (1, 4, 12)
MODES: Final = ("native", "resident", "streamed", "asymmetric", "accelerator")


@dataclass(frozen=True)
class Bounds:
    """``exposed``: the most of the activations' energy that may leave, 0 to 1. ``memory_bytes``: the most that the
    trusted process may hold; None: as much as it wants.

    Raises:
        SettingError: a number out of its range.
    """

    exposed: float = 0.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.exposed <= 1:
            raise SettingError("out of range", where="--max-exposed", expected="0 to 1", got=repr(self.exposed))
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise SettingError("out of range", where="--max-memory", got=str(self.memory_bytes))


@dataclass(frozen=True)
class Judged:
    """One scheme: ``why_not`` is empty where it keeps the bounds."""

    result: CaseResult
    why_not: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """``chosen`` None: nothing keeps the bounds. ``why``: sentences. ``commands``: what to type to use it."""

    judged: tuple[Judged, ...]
    chosen: CaseResult | None
    why: tuple[str, ...]
    commands: tuple[str, ...]


def advise(results: Sequence[CaseResult], bounds: Bounds, request: Request) -> Advice:
    """Judge every case but the native one, which is what the others are compared with, and choose the fastest."""
    judged = tuple(Judged(each, _why_not(each, bounds)) for each in results if each.case.mode != "native")
    kept = sorted((each.result for each in judged if not each.why_not), key=lambda each: each.seconds.median)
    if not kept:
        return Advice(judged, None, ("no scheme keeps the bounds",), ())
    best = kept[0]
    return Advice(judged, best, tuple(_reasons(best, kept[1:], judged)), commands(best, request))


def commands(result: CaseResult, request: Request) -> tuple[str, ...]:
    """The command lines that run the model as ``result`` was measured; keys and inputs are the user's own names."""
    case, model = result.case, request.models[0]
    if case.mode == "accelerator":
        return ()
    bundle = f"{case.model}.motte"
    seal = ["motte", "seal", model, *_cut_words(case.parts, request), *_weight_words(request)]
    if case.mode == "asymmetric":
        seal += ["--scheme", "asymmetric", "--noise", request.noise, "--rank", request.rank]
        seal += ["--integrity", request.integrity, "--public-weights", ",".join(request.layers)]
    seal += ["--recipient", "client.pub", "--signer-key", "owner.key", "-o", bundle]
    run = ["motte", "run", bundle, "--key", "client.key", "--signer", "owner.pub", "--input", "FILE"]
    run += ["--engine", case.engine, "--threads", str(request.threads), "--batch", str(case.batch)]
    if case.mode == "streamed":
        run += ["--mode", "streamed", "--weight-memory", str(result.memory_bound_bytes)]
    if case.mode == "asymmetric":
        local = "local" if request.device == "cpu" else f"local:{request.device}"
        run += ["--accelerator", local if request.accelerator == "local" else request.accelerator]
    if case.enclave != "process":
        run += ["--enclave", case.enclave]
        run += ["--image", str(request.image)] if request.image is not None else []
        run += ["--vm", request.vm] if request.vm is not None and case.enclave == "vm" else []
    return (shlex.join(seal), shlex.join(run))


def _cut_words(parts: int, request: Request) -> list[str]:
    if request.cuts == "published" and parts > 1:
        return ["--cuts", "published"]
    return ["--parts", str(parts), "--objective", request.cuts if request.cuts != "published" else "weights"]


def _weight_words(request: Request) -> list[str]:
    words = ["--random-weights"] if request.random_weights else []
    weights: Path | None = request.weights
    words += ["--weights", str(weights)] if weights is not None else []
    words += [word for name, size in request.dims.items() for word in ("--dim", f"{name}={size}")]
    return words + (["--input-shape", request.input_shape] if request.input_shape is not None else [])


def _why_not(result: CaseResult, bounds: Bounds) -> tuple[str, ...]:
    found = []
    if result.exposed is None:
        found.append(f"nobody knows what leaves: {result.missing['exposed']}")
    elif result.exposed > bounds.exposed:
        found.append(f"{result.exposed:.1%} of the activations' energy leaves, {bounds.exposed:.1%} may")
    if bounds.memory_bytes is not None and result.case.mode != "accelerator":
        if result.peak_memory_bytes is None:
            found.append(f"nobody knows its memory: {result.missing['peak_memory_bytes']}")
        elif result.peak_memory_bytes > bounds.memory_bytes:
            found.append(f"it held {result.peak_memory_bytes} bytes, {bounds.memory_bytes} may be")
    return tuple(found)


def _reasons(best: CaseResult, others: Sequence[CaseResult], judged: Sequence[Judged]) -> list[str]:
    said = [f"{label(best)} is the fastest that keeps the bounds: {best.seconds.median * 1e3:.3g} ms"]
    if best.ratio is not None:
        said[0] += f", {best.ratio.median:.2f} times native ({best.ratio.low:.2f} to {best.ratio.high:.2f})"
    alike = [label(each) for each in others if _overlap(best, each)]
    if alike:
        said.append(f"not told apart from it by this run: {', '.join(alike)}")
    faster = (each for each in judged if each.why_not and each.result.seconds.median < best.seconds.median)
    said.extend(f"faster, but out: {label(each.result)}: {'; '.join(each.why_not)}" for each in faster)
    return said


def _overlap(one: CaseResult, other: CaseResult) -> bool:
    if one.ratio is None or other.ratio is None or one.ratio.baseline != other.ratio.baseline:
        return False
    return one.ratio.low <= other.ratio.high and other.ratio.low <= one.ratio.high


def label(result: CaseResult) -> str:
    """``streamed in 12 parts on torch``."""
    case = result.case
    parts = f" in {case.parts} part{'s' * (case.parts != 1)}" if case.enclave != "none" else ""
    return f"{case.mode}{parts} on {case.engine}"
