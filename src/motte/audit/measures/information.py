"""Mutual information between inputs and what left of some layers, through the real pipeline, as figures of an audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from motte.audit.interface import Position
from motte.audit.measures.figure import Figure
from motte.audit.measures.mutual_information import mutual_information, projected

if TYPE_CHECKING:
    from motte.audit.interface import Suite
    from motte.audit.scene import SchemeScene

DIMENSIONS: Final = 3
"""Principal components of each side: the estimate falls short by more with every one."""
SAMPLES: Final[Mapping[Suite, int]] = {"quick": 192, "full": 2000}
_LAYERS: Final = 3
_NAME: Final = "mutual information, lower bound"


def information_figures(scene: SchemeScene) -> tuple[Figure, ...]:
    """One for each of a few layers, spread over those that run outside; in nats, beside what the pixels can have."""
    layers = spread(scene.outside, _LAYERS)
    records = len(scene.stage.data.test)
    start = scene.stage.budget.samples
    count = min(SAMPLES[scene.suite], records - start)
    note = (
        f"between {DIMENSIONS} principal components of the pixels and {DIMENSIONS} of what left, {count} images; "
        "what the projections lose is not counted"
    )

    def figure(layer: str, value: float | None, missing: str | None) -> Figure:
        return Figure(
            name=_NAME, audited=scene.audited, layer=layer, value=value, unit="nat", note=note, missing=missing
        )

    if count < 4 * (2 * DIMENSIONS + 3):
        return tuple(figure(layer, None, "too few images in the test split") for layer in layers)
    images, _ = scene.records("test", count, start=start)
    view = scene.pipeline(Position.SCHEME).observe(images, layers=layers, answers=False)
    pixels = projected(images.flatten(1).double().numpy(), DIMENSIONS)
    figures = []
    for layer in layers:
        sent = view.batch(layer)
        if sent is None:
            figures.append(figure(layer, 0.0, None))
            continue
        other = projected(sent.flatten(1).double().numpy(), DIMENSIONS)
        if not other.shape[1]:
            figures.append(figure(layer, 0.0, None))
            continue
        figures.append(figure(layer, mutual_information(pixels, other, seed=scene.stage.seed), None))
    return tuple(figures)


def spread(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The first, the last and some between, ``count`` at most, in order."""
    if len(names) <= count:
        return names
    places = {round(each * (len(names) - 1) / (count - 1)) for each in range(count)}
    return tuple(names[place] for place in sorted(places))
