"""Mutual information between inputs and what left, estimated from samples: a stated lower bound.

KSG: Kraskov, Stögbauer, Grassberger, "Estimating mutual information", Phys. Rev. E 69 (2004), their second estimator.
It takes the density around a point for uniform, and falls far short where two sides depend on each other strongly. The
correction for local non-uniformity, LNC: Gao, Ver Steeg, Galstyan, "Efficient estimation of mutual information for
strongly dependent variables" (AISTATS 2015), looks at the box around each point's neighbours along their own axes.

Both sides are projected first, onto at most :data:`MAX_DIMENSIONS` principal components in all. What a projection loses
is not counted, so the true information is at least that of the projections (data processing). Tried on Gaussians with
2000 samples: within 5 % of the closed form for one or two dimensions a side, and below it by 15 % with three, by 40 %
with five. At independence it gives next to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from motte.errors import MeasureError

MAX_DIMENSIONS: Final = 10
_ERROR_RATE: Final = 5e-3
"""How often the correction may be made where there is nothing to correct, as in the paper (section 5.2). There the
threshold comes from uniform neighbourhoods; here from the same samples with their pairs torn apart, which also bounds
what the tails of a density pretend in many dimensions."""
_EULER: Final = 0.577_215_664_901_532_9
_JITTER: Final = 1e-10

Array = NDArray[np.float64]


def mutual_information(x: Array, y: Array, *, seed: int, neighbours: int | None = None) -> float:
    """Between (N, dx) and (N, dy), in nats; not below 0.

    Args:
        seed: of the noise that parts equal values, far below any digit that counts.
        neighbours: None: 3 more than there are dimensions in all, at least 5.

    Raises:
        MeasureError: too many dimensions, or too few samples for them.
    """
    dimensions = x.shape[1] + y.shape[1]
    if dimensions > MAX_DIMENSIONS:
        raise MeasureError("too many dimensions", expected=f"at most {MAX_DIMENSIONS}", got=str(dimensions))
    k = max(5, dimensions + 3) if neighbours is None else neighbours
    if len(x) != len(y) or len(x) < 4 * k:
        raise MeasureError("too few samples", expected=f"{4 * k} at least, alike many", got=f"{len(x)} and {len(y)}")
    generator = np.random.default_rng(seed)
    first, second = (_whitened(each) for each in (x, y))
    first, second = (each + _JITTER * generator.standard_normal(each.shape) for each in (first, second))
    count = len(first)
    near = _near(first, second, k)
    found = _digamma(k) - 1.0 / k + _digamma(count)
    found -= float(np.mean(_digammas(near.inside_x) + _digammas(near.inside_y)))
    # The same for pairs that were torn apart: what of it is there is no information.
    torn = _near(first, second[generator.permutation(count)], k).boxes
    return max(
        0.0, found - float(np.where(near.boxes < np.quantile(torn, _ERROR_RATE), near.boxes - torn.mean(), 0.0).mean())
    )


@dataclass(frozen=True, slots=True)
class _Near:
    """Of each point, (N,): how many others are within reach of its neighbours on either side alone, and the log of the
    volume of their box along their own axes over that of the box along the coordinates."""

    inside_x: NDArray[np.int64]
    inside_y: NDArray[np.int64]
    boxes: Array


def _near(first: Array, second: Array, k: int) -> _Near:
    distance_x, distance_y = _distances(first), _distances(second)
    nearest = np.argpartition(np.maximum(distance_x, distance_y), k, axis=1)[:, : k + 1]
    rows = np.arange(len(first))[:, None]
    # The point itself is among them, at distance 0.
    reach_x = distance_x[rows, nearest].max(1)
    reach_y = distance_y[rows, nearest].max(1)
    joint = np.concatenate((first, second), axis=1)
    boxes = _own_box(joint[nearest] - joint[:, None, :])
    boxes -= first.shape[1] * np.log(reach_x) + second.shape[1] * np.log(reach_y)
    inside_x = (distance_x <= reach_x[:, None]).sum(1) - 1
    inside_y = (distance_y <= reach_y[:, None]).sum(1) - 1
    return _Near(inside_x, inside_y, boxes)


def projected(values: Array, dimensions: int) -> Array:
    """(N, D) -> its first principal components, (N, at most ``dimensions``), none of them without variance."""
    centred = values - values.mean(0)
    left, scales, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(dimensions, int((scales > 1e-9 * max(scales.max(initial=0.0), 1e-300)).sum()))
    return np.asarray(left[:, :kept] * scales[:kept], dtype=np.float64)


def _whitened(values: Array) -> Array:
    """Rotated and scaled to unit covariance, each side by itself, which leaves mutual information as it is."""
    centred = np.asarray(values, dtype=np.float64) - values.mean(0)
    left, scales, _ = np.linalg.svd(centred, full_matrices=False)
    if not scales.size or scales[-1] <= 1e-9 * max(scales[0], 1e-300):
        raise MeasureError("a direction of the samples has no variance: project them first")
    return np.asarray(left * math.sqrt(len(values)), dtype=np.float64)


def _distances(values: Array) -> Array:
    """(N, N), largest difference of any coordinate."""
    found = np.zeros((len(values), len(values)))
    for column in values.T:
        np.maximum(found, np.abs(column[:, None] - column[None, :]), out=found)
    return found


def _own_box(around: Array) -> Array:
    """(N, K, d) around the origin -> (N,): log of half the extents along principal axes, summed."""
    _, vectors = np.linalg.eigh(np.einsum("nki,nkj->nij", around, around))
    extents = np.abs(np.einsum("nki,nij->nkj", around, vectors)).max(1)
    return np.asarray(np.log(np.maximum(extents, 1e-300)).sum(1), dtype=np.float64)


def _digamma(value: float) -> float:
    """For positive values, to about 1e-12: recurrence up to 8, then the asymptotic series."""
    shift = 0.0
    while value < 8.0:
        shift -= 1.0 / value
        value += 1.0
    inverse = 1.0 / (value * value)
    series = inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse * (1 / 240 - inverse / 132))))
    return shift + math.log(value) - 0.5 / value - series


def _digammas(counts: NDArray[np.int64]) -> Array:
    """Of positive whole numbers, by the harmonic sums."""
    table = np.concatenate(([np.nan, -_EULER], np.cumsum(1.0 / np.arange(1, max(2, int(counts.max())))) - _EULER))
    return np.asarray(table[counts], dtype=np.float64)


def gaussian_information(correlations: Array) -> float:
    """The closed form in nats for Gaussians whose canonical correlations are these: -1/2 sum log(1 - rho^2)."""
    return float(-0.5 * np.log1p(-np.square(correlations)).sum())
