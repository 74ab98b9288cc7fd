"""Results as records: one line of docs/spec/records.md for every figure of every case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from motte.bench.case import CaseResult
from motte.measure.record import UNPROTECTED, Digests, Enclave, Interval, Parameter, Record, Setting, state

WHAT = {
    "infer": "one request, input decoded, to its answer",
    "train": "one training step: forward, loss, backward, SGD",
    "split": "captured graph to sealed bundle",
    "open": "bundle given to worker ready",
    "link": "tensor given to answer checked, without the accelerator's arithmetic",
    "start": "process spawned to its first word",
}
"""From where to where the steady series of each verb runs."""
_FIGURES = {
    "peak_memory_bytes": ("memory, peak of the process", "B"),
    "weight_memory_bytes": ("memory, opened weights", "B"),
    "mean_memory_bytes": ("memory, mean of the process", "B"),
    "cpu_percent": ("processor time", "%"),
    "energy_j": ("energy", "J"),
    "power_w": ("power", "W"),
    "accuracy": ("accuracy on the labelled images", "1"),
    "bytes_out": ("bytes to the accelerator in one request", "B"),
    "bytes_in": ("bytes from the accelerator in one request", "B"),
    "trusted_flops": ("arithmetic inside, one request", "FLOP"),
    "outside_flops": ("arithmetic outside, one request", "FLOP"),
    "exposed": ("share of activation energy that left", "1"),
}


def records_of(
    results: Sequence[CaseResult],
    *,
    verb: str,
    device: str,
    digests: Mapping[str, Digests],
    workloads: Mapping[str, Mapping[str, str | int]],
) -> list[Record]:
    """Every figure that is there; what is missing is in the results themselves, and no record.

    Args:
        device: of the accelerator, where a case has one.
        digests: ``str(case)`` -> what was measured; none for cases that are not in it.
        workloads: ``str(case)`` -> what a record says of the inputs; nothing for cases that are not in it.
    """
    found: list[Record] = []
    for result in results:
        # Machine, versions and revision are the same for all, and asking git for them takes longer than some cases.
        template = found[0] if found else _first(result, verb)
        slug = str(result.case)
        made = _of_case(template, result, verb, device, digests.get(slug, Digests()))
        found += [replace(each, parameters={**each.parameters, **workloads.get(slug, {})}) for each in made]
    return found


def _first(result: CaseResult, verb: str) -> Record:
    setting = Setting(threads=1, dtype="none", device="none", engine="none", enclave=UNPROTECTED)
    return state(series=verb, what=WHAT[verb], value=result.seconds.median, unit="s", setting=setting)


def _of_case(template: Record, result: CaseResult, verb: str, device: str, digests: Digests) -> Iterator[Record]:
    case = result.case
    parameters: dict[str, Parameter] = {
        "model": case.model,
        "mode": case.mode,
        "parts": case.parts,
        "batch": case.batch,
    }
    if case.scheme:
        parameters["scheme"] = case.scheme
    setting = Setting(
        threads=result.threads,
        dtype=result.dtype,
        device=device if case.mode in ("asymmetric", "accelerator") else "cpu",
        engine=case.engine,
        enclave=Enclave(case.enclave, simulated=result.simulated),
    )
    first = replace(
        template,
        series=f"{verb}, latency",
        what=WHAT[verb],
        value=result.seconds.median,
        unit="s",
        statistic="median",
        samples=result.seconds.samples,
        interval=None,
        parameters=parameters,
        setting=setting,
        digests=digests,
    )
    yield first
    single = replace(first, statistic="single", samples=(), interval=None)
    if result.ratio is not None:
        ratio = result.ratio
        interval = Interval(ratio.low, ratio.high, ratio.confidence)
        what = f"{WHAT[verb]}, over the native case"
        yield replace(single, series=f"{verb}, ratio", what=what, value=ratio.median, unit="1", interval=interval)
    for name, seconds in result.segments.items():
        if name != "steady":
            yield replace(single, series=f"{verb}, segment {name}", what=f"segment {name}", value=seconds, unit="s")
    for name, (what, unit) in _FIGURES.items():
        value = getattr(result, name)
        if value is not None:
            yield replace(single, series=f"{verb}, {name}", what=what, value=float(value), unit=unit)
