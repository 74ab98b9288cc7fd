"""The lines of a plan's offload section, written and read. There is one text for a section. Format: docs/spec/plan.md.

offload asymmetric
rank schedule 2 2 32
iterations 1
decomposition als
residual-dtype same
noise gaussian replace
mechanism residual 1.0 0.5
integrity freivalds 2
layer features.0 inside the first parametrised layer
layer features.2 split placement all

A section under which nothing leaves, but layers run on a confidential GPU:

offload trusted
gpu-reference 550.90.07 96.00.9F.00.01
gpu-measurement 1 5b0d...
layer features.0 inside not chosen
layer features.2 confidential-gpu chosen by the owner
"""

from __future__ import annotations

import re
from typing import Final, cast

from motte.errors import FormatError
from motte.limits import MAX_GPU_MEASUREMENTS, MAX_GRAPH_WEIGHTS
from motte.plan.lines import LineReader, exactly, fraction, name_word, number, one_of
from motte.plan.offload import (
    ADJACENCIES,
    DECOMPOSITIONS,
    INTEGRITIES,
    MAX_GPU_REFERENCES,
    MAX_GPU_VALUES,
    MAX_ITERATIONS,
    MAX_PLANNED_RANK,
    MAX_REASON_BYTES,
    MAX_VECTORS,
    NOISE_NAMES,
    RANK_NUMBERS,
    RESIDUAL_DTYPES,
    SCHEMES,
    SIDES,
    OffloadPlan,
    PlannedGpuReference,
    PlannedLayer,
    PlannedMechanism,
    PlannedNoise,
    PlannedRank,
    RankName,
    Side,
    nothing_leaves,
)

_REASON = re.compile(r"[!-~]+(?: [!-~]+)*")
_VALUE = re.compile(r"[0-9a-f]{96}|[0-9a-f]{128}")
_RANK: Final = number(MAX_PLANNED_RANK)
_RANK_CHECKS: Final = {
    "fixed": (number(MAX_PLANNED_RANK, least=0),),
    "schedule": (_RANK, number(64), _RANK),
    "energy": (fraction(1.0), _RANK),
    "entropy": (_RANK,),
}


def offload_lines(section: OffloadPlan) -> list[str]:
    """The lines of ``section``, without line ends."""
    settings = [] if section.scheme == "trusted" else _setting_lines(section)
    references = [line for each in section.gpu_references for line in _reference_lines(each)]
    layers = [f"layer {layer.name} {layer.side} {layer.reason}" for layer in section.layers]
    return [f"offload {section.scheme}", *settings, *references, *layers]


def _setting_lines(section: OffloadPlan) -> list[str]:
    return [
        " ".join(["rank", section.rank.rule, *map(repr, section.rank.numbers)]),
        f"iterations {section.iterations}",
        f"decomposition {section.decomposition}",
        f"residual-dtype {section.residual_dtype}",
        *_noise_lines(section.noise),
        f"integrity {section.integrity} {section.integrity_vectors}",
    ]


def _reference_lines(reference: PlannedGpuReference) -> list[str]:
    values = [f"gpu-measurement {number} {','.join(good)}" for number, good in reference.measurements]
    return [f"gpu-reference {reference.driver} {reference.vbios}", *values]


def _noise_lines(noise: PlannedNoise | None) -> list[str]:
    if noise is None:
        return ["noise none"]
    mechanisms = [f"mechanism {each.name} {each.clip!r} {each.noise_multiplier!r}" for each in noise.mechanisms]
    return [f"noise gaussian {noise.adjacency}", *mechanisms]


def read_offload(reader: LineReader) -> OffloadPlan | None:
    """The section, from **unverified** lines; None where the plan has none.

    Raises:
        FormatError: a line that does not follow the format, with its number.
    """
    if not reader.at("offload"):
        return None
    (scheme,) = reader.take("offload", one_of(SCHEMES))
    if scheme == "trusted":
        references = _read_references(reader)
        return nothing_leaves(_read_layers(reader), references)
    rank = _read_rank(reader)
    (iterations,) = reader.take("iterations", number(MAX_ITERATIONS))
    (decomposition,) = reader.take("decomposition", one_of(DECOMPOSITIONS))
    (residual_dtype,) = reader.take("residual-dtype", one_of(RESIDUAL_DTYPES))
    noise = _read_noise(reader)
    integrity, vectors = reader.take("integrity", one_of(INTEGRITIES), number(MAX_VECTORS))
    return OffloadPlan(
        rank=rank,
        iterations=int(iterations),
        decomposition=decomposition,
        residual_dtype=residual_dtype,
        noise=noise,
        integrity=integrity,
        integrity_vectors=int(vectors),
        gpu_references=_read_references(reader),
        layers=_read_layers(reader),
    )


def _read_rank(reader: LineReader) -> PlannedRank:
    for rule, checks in _RANK_CHECKS.items():
        if reader.begins(f"rank {rule} "):
            words = reader.take("rank", exactly(rule), *checks)[1:]
            numbers = tuple(float(word) if rule == "energy" and not at else int(word) for at, word in enumerate(words))
            return PlannedRank(cast(RankName, rule), numbers)
    reader.take("rank", one_of(tuple(RANK_NUMBERS)))
    # Only reached for a known rule without a single number.
    raise FormatError("a rank rule without its numbers", where=f"plan line {reader.line - 1}")


def _read_noise(reader: LineReader) -> PlannedNoise | None:
    if reader.begins("noise none"):
        reader.take("noise", exactly("none"))
        return None
    _, adjacency = reader.take("noise", exactly("gaussian"), one_of(ADJACENCIES))
    mechanisms: list[PlannedMechanism] = []
    for name in NOISE_NAMES:
        if name == "residual" or reader.begins(f"mechanism {name} "):
            _, clip, multiplier = reader.take("mechanism", exactly(name), fraction(), fraction())
            mechanisms.append(PlannedMechanism(name, float(clip), float(multiplier)))
    return PlannedNoise(adjacency, tuple(mechanisms))


def _read_references(reader: LineReader) -> tuple[PlannedGpuReference, ...]:
    found: list[PlannedGpuReference] = []
    while reader.at("gpu-reference"):
        if len(found) == MAX_GPU_REFERENCES:
            raise reader.error(f"at most {MAX_GPU_REFERENCES} gpu-reference lines")
        driver, vbios = reader.take("gpu-reference", name_word, name_word)
        table: list[tuple[int, tuple[str, ...]]] = []
        while reader.at("gpu-measurement") or not table:
            least = table[-1][0] + 1 if table else 0
            at, values = reader.take("gpu-measurement", number(MAX_GPU_MEASUREMENTS - 1, least=least), _values)
            table.append((int(at), tuple(values.split(","))))
        found.append(PlannedGpuReference(driver, vbios, tuple(table)))
    return tuple(found)


def _values(word: str) -> str | None:
    values = word.split(",")
    good = all(map(_VALUE.fullmatch, values)) and values == sorted(set(values)) and len(values) <= MAX_GPU_VALUES
    return None if good else f"SHA-384 or SHA-512 digests in hexadecimal, sorted, with commas, at most {MAX_GPU_VALUES}"


def _read_layers(reader: LineReader) -> tuple[PlannedLayer, ...]:
    found: dict[str, PlannedLayer] = {}
    first = reader.line
    lines = reader.take_all_text("layer", name_word, one_of(SIDES), text=_reason, most=MAX_GRAPH_WEIGHTS)
    for index, (name, side, reason) in enumerate(lines):
        if name in found:
            raise FormatError(
                "a layer stands twice in the offload section", where=f"plan line {first + index}", got=name
            )
        found[name] = PlannedLayer(name, cast(Side, side), reason)
    return tuple(found.values())


def _reason(text: str) -> str | None:
    good = len(text) <= MAX_REASON_BYTES and _REASON.fullmatch(text)
    return (
        None if good else f"a reason: words of printable ASCII with one space between, at most {MAX_REASON_BYTES} bytes"
    )
