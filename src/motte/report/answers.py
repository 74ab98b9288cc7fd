"""The three questions that the page answers first: how much slower, how much memory, what left the enclave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from motte.bench.results import CaseResult
from motte.report import words
from motte.report.gathered import TRUSTED, Gathered


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, its answer in one line, and sentences that belong to it."""

    question: str
    answer: str
    details: tuple[str, ...]


def answers(data: Gathered) -> tuple[Answer, Answer, Answer]:
    """The three answers; what was not measured is said, with the reason."""
    return _slower(data), _memory(data), _left(data)


def sentence(data: Gathered) -> str:
    """All three in one sentence, for the head of the page and for the command line."""
    slower, memory, left = answers(data)
    models = data.models[0] if len(data.models) == 1 else words.counted(len(data.models), "model")
    return f"{models}: {slower.answer}; {memory.answer}; {left.answer}."


def _protected(data: Gathered) -> dict[str, list[CaseResult]]:
    """Results by way, number of parts left out, in the order of the modes."""
    found: dict[str, list[CaseResult]] = {}
    for one in data.slices:
        for each in one.results:
            if each.case.mode != "native":
                name = words.MODE_WORDS[each.case.mode] + (f" ({each.case.scheme})" if each.case.scheme else "")
                found.setdefault(name, []).append(each)
    return found


def _slower(data: Gathered) -> Answer:
    question = "How much slower?"
    details: list[str] = []
    inside: list[float] = []
    for name, members in _protected(data).items():
        ratios = [each.ratio for each in members if each.ratio is not None]
        if not ratios:
            details.append(f"{name}: not measured against native ({_reasons(members, 'ratio')}).")
            continue
        inside += [each.median for each in ratios] if members[0].case.mode != "accelerator" else []
        if len(ratios) == 1:
            one = ratios[0]
            interval = f"{one.confidence:.0%} interval {words.digits(one.low)} to {words.digits(one.high)}"
            details.append(f"{name}: {words.digits(one.median)} times native ({interval}).")
        else:
            text = _range([each.median for each in ratios])
            details.append(f"{name}: {text} times native, over {words.counted(len(ratios), 'case')}.")
    if not inside:
        return Answer(question, "how much slower was not measured", tuple(details) or ("No protected case was run.",))
    return Answer(question, f"protected runs take {_range(inside)} times as long as native ones", tuple(details))


def _memory(data: Gathered) -> Answer:
    question = "How much memory?"
    protected = [each for one in data.slices for each in one.protected]
    known = [each.peak_memory_bytes for each in protected if each.peak_memory_bytes is not None]
    details: list[str] = []
    factors = []
    for one in data.slices:
        native = one.native.peak_memory_bytes if one.native is not None else None
        if native:
            factors += [each.peak_memory_bytes / native for each in one.protected if each.peak_memory_bytes is not None]
    if factors:
        details.append(f"{_range(factors)} times the peak of the native process of the same model.")
    if weights := [each.weight_memory_bytes for each in protected if each.weight_memory_bytes is not None]:
        details.append(f"Opened weights in memory at a time: {_bytes_range(weights)}.")
    over = [each for each in protected if _over_bound(each)]
    bounded = [
        each for each in protected if each.memory_bound_bytes is not None and each.weight_memory_bytes is not None
    ]
    if bounded:
        details.append(
            f"Above their bound for weights: {len(over)} of {words.counted(len(bounded), 'case')} that had one."
        )
    if not known:
        why = _reasons(protected, "peak_memory_bytes") if protected else "no protected case was run"
        return Answer(question, "how much memory was not measured", (f"Peak memory: {why}.", *details))
    return Answer(question, f"protected runs hold {_bytes_range(known)} of memory at their peak", tuple(details))


def _over_bound(result: CaseResult) -> bool:
    bound, held = result.memory_bound_bytes, result.weight_memory_bytes
    return bound is not None and held is not None and held > bound


def _left(data: Gathered) -> Answer:
    question = "What left the enclave?"
    details = []
    schemes: list[str] = []
    inside_told = False
    for name, members in _protected(data).items():
        mode = members[0].case.mode
        shares = [each.exposed for each in members if each.exposed is not None]
        sent = [each.bytes_out for each in members if each.bytes_out is not None]
        told = [f"{_bytes_range(sent)} a request" if sent else f"bytes: n/a ({_reasons(members, 'bytes_out')})"]
        if shares:
            told.append(f"{_range([100 * share for share in shares])} % of the energy of the activations")
        else:
            told.append(f"share of the activations: n/a ({_reasons(members, 'exposed')})")
        details.append(f"{name}: {', '.join(told)}.")
        if mode not in TRUSTED or len(sent) < len(members):
            # Known in some cases alone is not known: zero is said only where every case was measured.
            sent = sent if len(sent) == len(members) else []
            inside_told = inside_told or mode in TRUSTED
            schemes.append(f"{name} sent {told[0]}" if sent else f"what {name} sent was not measured")
        elif any(sent) or any(shares):
            schemes.append(f"{name} sent {told[0]}")
            inside_told = True
    ran_inside = any(each.case.mode in TRUSTED for one in data.slices for each in one.results)
    if not details:
        return Answer(question, "what left was not measured", ("No protected case was run.",))
    if not schemes:
        return Answer(question, "no activation left the trusted side for an accelerator", tuple(details))
    quiet = ran_inside and not inside_told
    prefix = "nothing of the wholly trusted runs left for an accelerator, " if quiet else ""
    return Answer(question, prefix + words.listed(schemes), tuple(details))


def _range(values: Sequence[float]) -> str:
    low, high = (words.digits(value) for value in words.span(values))
    return low if low == high else f"{low} to {high}"


def _bytes_range(values: Sequence[int]) -> str:
    low, high = (words.bytes_(value) for value in words.span(values))
    return low if low == high else f"{low} to {high}"


def _reasons(results: Iterable[CaseResult], name: str) -> str:
    found = Counter(each.missing[name] for each in results if name in each.missing)
    return "; ".join(reason for reason, _ in found.most_common(2)) or "not measured"
