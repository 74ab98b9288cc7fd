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
"""

from __future__ import annotations

import re
from typing import Final, cast

from motte.errors import FormatError
from motte.limits import MAX_GRAPH_WEIGHTS
from motte.plan.lines import LineReader, exactly, fraction, name_word, number, one_of
from motte.plan.offload import (
    ADJACENCIES,
    DECOMPOSITIONS,
    INTEGRITIES,
    MAX_ITERATIONS,
    MAX_PLANNED_RANK,
    MAX_REASON_BYTES,
    MAX_VECTORS,
    NOISE_NAMES,
    RANK_NUMBERS,
    RESIDUAL_DTYPES,
    SIDES,
    OffloadPlan,
    PlannedLayer,
    PlannedMechanism,
    PlannedNoise,
    PlannedRank,
    RankName,
    Side,
)

_REASON = re.compile(r"[!-~]+(?: [!-~]+)*")
_RANK: Final = number(MAX_PLANNED_RANK)
_RANK_CHECKS: Final = {
    "fixed": (number(MAX_PLANNED_RANK, least=0),),
    "schedule": (_RANK, number(64), _RANK),
    "energy": (fraction(1.0), _RANK),
    "entropy": (_RANK,),
}


def offload_lines(section: OffloadPlan) -> list[str]:
    """The lines of ``section``, without line ends."""
    return [
        f"offload {section.scheme}",
        " ".join(["rank", section.rank.rule, *map(repr, section.rank.numbers)]),
        f"iterations {section.iterations}",
        f"decomposition {section.decomposition}",
        f"residual-dtype {section.residual_dtype}",
        *_noise_lines(section.noise),
        f"integrity {section.integrity} {section.integrity_vectors}",
        *(f"layer {layer.name} {layer.side} {layer.reason}" for layer in section.layers),
    ]


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
    reader.take("offload", exactly("asymmetric"))
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
