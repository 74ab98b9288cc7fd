"""The settings of a scheme: validated when they are made, frozen afterwards, unknown ones refused by the signature.

What a setting means for privacy stands with it. Nothing here imports torch: a bundle's header and a plan read these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from motte.errors import SettingError

Integrity = Literal["freivalds", "off"]
Decomposition = Literal["als", "range-finder"]
ResidualDtype = Literal["same", "float32", "bfloat16"]
Adjacency = Literal["replace", "add-remove"]
MAX_RANK: Final = 65_536
DEFAULT_DECOMPOSITION: Final[Decomposition] = "range-finder"
DEFAULT_ITERATIONS: Final = 3
"""The published way is alternating least squares with 1 or 2 iterations. The range finder with 3 leaves the residual as
little energy as 2 of those do (measured on a trained ResNet-20), in a tenth of the time: its work is matrix products,
theirs is passes over memory."""


def _whole(name: str, value: object, *, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise SettingError(f"{name} out of range", expected=f"a whole number from {low} to {high}", got=repr(value))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingError(f"unknown {name}", expected=" or ".join(allowed), got=repr(value))


def _names(name: str, value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise SettingError(f"{name} must be a sequence of layer names", got=repr(value)[:200])
    return tuple(value)


# --- how many principal channels stay inside ------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Fixed:
    """Always ``rank`` principal channels (fewer where a layer has fewer). 0: everything leaves as residual."""

    rank: int

    def __post_init__(self) -> None:
        _whole("rank", self.rank, low=0, high=MAX_RANK)


@dataclass(frozen=True, slots=True)
class Schedule:
    """``start`` for the first split layer, times ``factor`` after each, at most ``cap`` (AsymML, section 4).

    "Each" counts split layers in the order of registration: the first gets ``start``.
    """

    start: int = 2
    factor: int = 2
    cap: int = 32

    def __post_init__(self) -> None:
        _whole("start", self.start, low=1, high=MAX_RANK)
        _whole("factor", self.factor, low=1, high=64)
        _whole("cap", self.cap, low=1, high=MAX_RANK)

    def rank(self, position: int) -> int:
        """The rank of the split layer at ``position`` (0 is the first)."""
        rank = self.start
        for _ in range(position):
            if rank >= self.cap or self.factor == 1:
                break
            rank *= self.factor
        return min(rank, self.cap)


@dataclass(frozen=True, slots=True)
class Energy:
    """As many principal channels as hold ``share`` of the activation's energy, found per call (the worst sample
    counts), at most ``cap``. The rank itself does not leave, but how long a layer takes tells it."""

    share: float
    cap: int = MAX_RANK

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise SettingError("share of energy out of range", expected="above 0, at most 1", got=repr(self.share))
        _whole("cap", self.cap, low=1, high=MAX_RANK)


@dataclass(frozen=True, slots=True)
class Entropy:
    """``ceil(2 ** mu)``, mu the SVD-channel entropy (AsymML, section 3.3), found per call, at most ``cap``."""

    cap: int = MAX_RANK

    def __post_init__(self) -> None:
        _whole("cap", self.cap, low=1, high=MAX_RANK)


Rank = Fixed | Schedule | Energy | Entropy


# --- noise ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Mechanism:
    """One kind of Gaussian release: every sample's tensor is scaled to L2 norm at most ``clip``, then each value gets
    noise of standard deviation ``noise_multiplier * clip``."""

    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise SettingError(f"{name} must be a positive number", got=repr(value))

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on every value that leaves."""
        return self.noise_multiplier * self.clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """Clip and noise for what leaves.

    Args:
        residual: for the perturbed residuals of the forward pass.
        gradient: for output gradients; None: they leave as they are, and no finite epsilon holds for training.
        update: for the trusted part of weight gradients, from which every weight that leaves later follows; None: as
            they are, and no finite epsilon holds for training.
        adjacency: which data sets count as neighbours: one record replaced by another (sensitivity twice the clip), or
            one record added or removed (once the clip).
    """

    residual: Mechanism
    gradient: Mechanism | None = None
    update: Mechanism | None = None
    adjacency: Adjacency = "replace"

    def __post_init__(self) -> None:
        _one_of("adjacency", self.adjacency, ("replace", "add-remove"))

    @property
    def covers_training(self) -> bool:
        """Whether everything that a training step lets leave is privatised."""
        return self.gradient is not None and self.update is not None


# --- the schemes ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Asymmetric:
    """The principal part of each activation inside, the perturbed residual outside (AsymML, 3LegRace).

    Args:
        noise: no default, so that nobody runs without it unknowingly. ``None`` hides nothing of the residual.
        rank: how many principal channels stay inside.
        iterations: of alternating least squares per channel (or of the range finder), 1 to 16.
        decomposition: ``range-finder`` (QR of a random projection), or ``als`` as published.
        residual_dtype: of what leaves; ``same`` as the activation. ``bfloat16`` halves the bytes and rounds.
        trusted_layers: names of layers that stay inside. ``None``: the first and the last parametrised one.
        offloaded_layers: names of layers that may leave (a placement). ``None``: every convolution and linear layer
            that is not in ``trusted_layers``.
        integrity: ``freivalds`` checks every product that comes back; ``off`` only for an accelerator that is curious
            but honest.
        pieces: into how many the batch is cut, 1 to 16, so that one is taken apart, sent or checked while the
            accelerator works on another. The result is the same; noise is drawn by piece.
        integrity_vectors: random vectors per product, 1 to 8; each makes it less likely that a lie passes, see
            :mod:`motte.offload.integrity`.
    """

    noise: Gaussian | None
    rank: Rank = Schedule()
    iterations: int = DEFAULT_ITERATIONS
    decomposition: Decomposition = DEFAULT_DECOMPOSITION
    residual_dtype: ResidualDtype = "same"
    trusted_layers: tuple[str, ...] | None = None
    offloaded_layers: tuple[str, ...] | None = None
    integrity: Integrity = "freivalds"
    integrity_vectors: int = 2
    pieces: int = 1

    def __post_init__(self) -> None:
        if self.noise is not None and not isinstance(self.noise, Gaussian):
            raise SettingError("unknown noise", expected="None or Gaussian(...)", got=repr(self.noise))
        if not isinstance(self.rank, Rank):
            hint = "Fixed(r), Schedule(), Energy(share) or Entropy()"
            raise SettingError("unknown rank rule", expected=hint, got=repr(self.rank))
        _whole("iterations", self.iterations, low=1, high=16)
        _one_of("decomposition", self.decomposition, ("als", "range-finder"))
        _one_of("residual_dtype", self.residual_dtype, ("same", "float32", "bfloat16"))
        _one_of("integrity", self.integrity, ("freivalds", "off"))
        _whole("integrity_vectors", self.integrity_vectors, low=1, high=8)
        _whole("pieces", self.pieces, low=1, high=16)
        for name in ("trusted_layers", "offloaded_layers"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _names(name, value))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """Research mode: every layer that Asymmetric would split sees only the principal part. Nothing leaves."""

    rank: Rank = Schedule()
    iterations: int = DEFAULT_ITERATIONS
    decomposition: Decomposition = DEFAULT_DECOMPOSITION
    trusted_layers: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Research mode: every layer that Asymmetric would split sees only the perturbed residual. Nothing leaves.

    It is what an attacker who sees only residuals could train on.
    """

    noise: Gaussian | None
    rank: Rank = Schedule()
    iterations: int = DEFAULT_ITERATIONS
    decomposition: Decomposition = DEFAULT_DECOMPOSITION
    trusted_layers: tuple[str, ...] | None = None


Scheme = Asymmetric | LowRank | Residual
