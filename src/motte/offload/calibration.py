"""From (epsilon, delta) to clip and noise: how far one record moves a release, and how much noise that asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal

from motte.errors import SettingError
from motte.offload.accountant import GaussianReleases, composed_epsilon, composed_mu
from motte.offload.analytic import check_delta, check_epsilon, noise_multiplier
from motte.offload.settings import Adjacency, Gaussian, Mechanism

Kind = Literal["residual", "gradient", "update"]
MAX_COUNT: Final = 1 << 53
_TRIES: Final = 60


def sensitivity(kind: Kind, adjacency: Adjacency, *, samples: int = 1) -> float:
    """The L2 distance, in clips, that one record can put between two releases.

    A residual or an output gradient leaves as one tensor with a row of norm at most 1 clip for each sample; an update
    is the sum of such rows. ``samples`` rows can change with one record: 1 where samples do not meet each other, the
    whole batch where they do (BatchNorm in training mode, a rank that is found over the batch, trusted parameters
    that learnt from the record).

    * A changed row moves by at most 2 clips, and rows are orthogonal: 2 * sqrt(samples) for what has rows.
    * In a sum they add up: 2 * samples.
    * ``add-remove``: the record's own row is there, or its place is empty, which moves it by 1 clip only. The other
      rows still change from one value to another, by 2.

    Raises:
        SettingError: no samples.
    """
    if type(samples) is not int or not 1 <= samples <= MAX_COUNT:
        raise SettingError("samples out of range", expected="at least 1", got=repr(samples))
    own = 2.0 if adjacency == "replace" else 1.0
    if kind == "update":
        return own + 2.0 * (samples - 1)
    return math.sqrt(own * own + 4.0 * (samples - 1))


def gaussian(
    epsilon: float,
    delta: float,
    *,
    residual_clip: float,
    gradient_clip: float | None = None,
    update_clip: float | None = None,
    adjacency: Adjacency = "replace",
    releases: int = 1,
    coupled_samples: int = 1,
) -> Gaussian:
    """Noise such that everything together keeps to (epsilon, delta) for each record; one multiplier for all kinds.

    Args:
        epsilon, delta: of the whole, not of one release.
        residual_clip, gradient_clip, update_clip: the L2 norm that one sample keeps to, in the units of the tensor;
            None: this kind leaves as it is, and then no training has a finite epsilon.
        adjacency: see :class:`motte.offload.settings.Gaussian`.
        releases: how many releases of **each** kind can depend on one record: layers that run split times how often
            the record is used. :class:`motte.offload.accounting.TrainingRun` counts them.
        coupled_samples: samples of a batch that one record can change, see :func:`sensitivity`.

    Raises:
        SettingError: a value out of range.
        ResourceError: more than one release in all, and dp-accounting is not installed.
    """
    clips: dict[Kind, float | None] = {"residual": residual_clip, "gradient": gradient_clip, "update": update_clip}
    if type(releases) is not int or not 1 <= releases <= MAX_COUNT:
        raise SettingError("releases out of range", expected="at least 1", got=repr(releases))
    moves = [sensitivity(kind, adjacency, samples=coupled_samples) for kind, clip in clips.items() if clip is not None]
    multiplier = multiplier_for(
        epsilon, delta, lambda tried: [GaussianReleases(tried, move, releases) for move in moves]
    )
    made = {kind: None if clip is None else Mechanism(clip, multiplier) for kind, clip in clips.items()}
    residual = made["residual"]
    if residual is None:
        raise SettingError("residuals need a clip")
    return Gaussian(residual=residual, gradient=made["gradient"], update=made["update"], adjacency=adjacency)


def multiplier_for(epsilon: float, delta: float, planned: Callable[[float], Sequence[GaussianReleases]]) -> float:
    """The noise multiplier at which ``planned(multiplier)`` keeps to (epsilon, delta).

    For one release the smallest one, exactly. For more, the smallest one by the closed form, raised by as much as it
    takes until dp-accounting's upper bound is within epsilon too, which costs less than 0.1 % of epsilon.

    Args:
        planned: the releases for a multiplier; their number and sensitivities must not depend on it.

    Raises:
        SettingError: epsilon or delta out of range, nothing is released, or the noise is beyond all bounds.
        ResourceError: more than one release, and dp-accounting is not installed.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    together = composed_mu(planned(1.0))
    if together == 0:
        raise SettingError("nothing is released, so there is nothing to calibrate")
    multiplier = noise_multiplier(epsilon, delta, together)
    if sum(each.count for each in planned(multiplier)) == 1:
        return multiplier
    for _ in range(_TRIES):
        found = composed_epsilon(planned(multiplier), delta)
        if found <= epsilon:
            return multiplier
        multiplier *= 1 + max(1.5 * (found / epsilon - 1), 1e-9)
    raise SettingError("no noise multiplier was found", got=f"epsilon {epsilon!r}, delta {delta!r}")
