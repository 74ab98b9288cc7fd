"""Games that tell two neighbouring worlds apart by what leaves for an accelerator: the audit of the noise itself.

Nasr, Song, Thakurta, Papernot, Carlini, "Adversary Instantiation: Lower Bounds for Differentially Private Machine
Learning" (S&P 2021): let the adversary be as strong as the definition allows, and the lower bound that it reaches shows
how much of the stated epsilon is real. Two games:

* *mechanism*: one record of norm ``clip`` in a worst direction, or another (or none); the adversary sees ``releases``
  of it. It plays :class:`motte.offload.noise.Noise` itself, for residuals, gradients and updates.
* *pipeline*: two images go through the user's protected model; the adversary knows both, and all weights, and sees
  every residual that leaves. Real frames; the clean residuals under each hypothesis are found by running the model once
  more with what was seen in their place, so that layers that follow each other are judged as the composition they are.

Games run side by side, as rows of one batch: rows have noise of their own, and in evaluation mode they do not meet.

A bound above the accountant's refutes it; :mod:`motte.audit.epsilon` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.audit.epsilon import EmpiricalEpsilon, LowerBound, beside, bound_from_scores
from motte.audit.interface import Bracket, Context, Finding, Job, Knowledge, Metric, Outcome, Position, Progress, silent
from motte.errors import SettingError
from motte.offload.accountant import GaussianReleases, composed_mu
from motte.offload.accounting import DELTA
from motte.offload.analytic import epsilon_of
from motte.offload.calibration import sensitivity
from motte.offload.noise import Kind, Noise, Released
from motte.offload.protect import protect
from motte.offload.settings import Adjacency, Asymmetric, Gaussian, Mechanism

if TYPE_CHECKING:
    from motte.audit.interface import Scene

SURE: Final = 0.9999
"""Confidence of these bounds: one honest audit in ten thousand is accused."""
_DIMENSIONS: Final = 16
_SIDE_BY_SIDE: Final = 64
_PAIRS: Final = 8
"""Images among which the pair is looked for that the mechanism tells apart best."""
METRIC: Final = Metric("epsilon proven", "epsilon")
KNOWLEDGE: Final = (
    Knowledge.ALL_WEIGHTS,
    Knowledge.RECORDING,
    Knowledge.CANDIDATES,
    Knowledge.PIPELINE,
)


class Privatise(Protocol):
    """:meth:`motte.offload.noise.Noise.privatise`, or what is audited in its place."""

    def __call__(
        self, x: Tensor, mechanism: Mechanism, *, layer: str, kind: Kind, step: int, per_sample: bool = True
    ) -> Released:
        """What may leave for ``x`` (N, ...)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of the games in each world, (n,) float64 each, higher = more likely the first one."""

    inside: Tensor
    outside: Tensor


# --- the mechanism ----------------------------------------------------------------------------------------------------
def mechanism_scores(
    mechanism: Mechanism,
    kind: Kind,
    *,
    games: int,
    seed: int,
    adjacency: Adjacency = "replace",
    releases: int = 1,
    privatise: Privatise | None = None,
) -> Scores:
    """Play ``games`` games in each world, side by side. Each release is a step of its own: its noise is independent.

    Args:
        kind: a residual and a gradient are rows, an update is a sum over rows that were clipped before.
        releases: of the same record in a game.
        privatise: what is audited; None: :class:`motte.offload.noise.Noise` under a fresh key.

    Raises:
        SettingError: no games.
    """
    if games < 1 or releases < 1:
        raise SettingError("a game has releases", got=f"{games} games of {releases}")
    release = privatise or Noise.fresh().privatise
    direction = torch.randn(_DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    direction = direction / direction.norm()
    ends = {"replace": (1.0, -1.0), "add-remove": (1.0, 0.0)}[adjacency]
    rows = kind != "update"
    found = []
    for world, sign in enumerate(ends):
        clean = (sign * mechanism.clip * direction).expand(games, _DIMENSIONS).contiguous()
        scores = torch.zeros(games, dtype=torch.float64)
        for step in range(1 + world * releases, 1 + (world + 1) * releases):
            seen = release(clean, mechanism, layer="audit", kind=kind, step=step, per_sample=rows).tensor
            scores += seen.double() @ direction.double()
        found.append(scores)
    return Scores(*found)


def audit_mechanism(
    mechanism: Mechanism,
    kind: Kind,
    *,
    games: int,
    seed: int,
    adjacency: Adjacency = "replace",
    releases: int = 1,
    delta: float = DELTA,
    privatise: Privatise | None = None,
    confidence: float = SURE,
) -> EmpiricalEpsilon:
    """The lower bound of the mechanism game beside the accountant's closed form."""
    scores = mechanism_scores(
        mechanism, kind, games=games, seed=seed, adjacency=adjacency, releases=releases, privatise=privatise
    )
    counted = [GaussianReleases(mechanism.noise_multiplier, sensitivity(kind, adjacency), releases)]
    many = "one release" if releases == 1 else f"{releases} releases"
    return _beside(
        scores,
        upper=epsilon_of(delta, composed_mu(counted)),
        because=f"{many} of kind {kind}, noise multiplier {mechanism.noise_multiplier:g}, closed form",
        adjacency=adjacency,
        delta=delta,
        seed=seed,
        confidence=confidence,
    )


def _beside(
    scores: Scores, *, upper: float, because: str, adjacency: str, delta: float, seed: int, confidence: float
) -> EmpiricalEpsilon:
    bound = _bound(scores, delta=delta, seed=seed, confidence=confidence)
    return beside(
        bound,
        upper=upper,
        upper_because=because,
        delta=delta,
        adjacency=adjacency,
        method="gaussian",
        trials=len(scores.inside) + len(scores.outside),
        confidence=confidence,
    )


def _bound(scores: Scores, *, delta: float, seed: int, confidence: float) -> LowerBound:
    return bound_from_scores(
        scores.inside.numpy(), scores.outside.numpy(), delta=delta, seed=seed, method="gaussian", confidence=confidence
    )


# --- the pipeline -----------------------------------------------------------------------------------------------------
class _Seeing(InProcessAccelerator):
    """Honest; keeps what it was sent, call by call."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Tensor]] = []
        super().__init__()

    def forward(self, layer: str, x: Tensor, *, step: int, hold: bool) -> Any:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        self.sent.append((layer, x.detach().clone()))
        return super().forward(layer, x, step=step, hold=hold)


class _Replaying(InProcessAccelerator):
    """Gives the products of what was seen in a game, whatever it is sent; keeps what it is sent: clean residuals."""

    def __init__(self, seen: Sequence[tuple[str, Tensor]]) -> None:
        self.clean: list[Tensor] = []
        self._seen = list(seen)
        super().__init__()

    def forward(self, layer: str, x: Tensor, *, step: int, hold: bool) -> Any:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        name, seen = self._seen[len(self.clean)]
        if name != layer:
            raise SettingError("the model takes another way under a replay", expected=name, got=layer)
        self.clean.append(x.detach().clone())
        return super().forward(layer, seen, step=step, hold=hold)


@dataclass(slots=True, eq=False)
class PipelineGame:
    """Which of two images went through the protected model?

    Args:
        model: plain, in evaluation mode, never changed.
        scheme: with noise.
        images: (2, C, H, W), the two worlds (more where a pair is looked for).
    """

    model: nn.Module
    scheme: Asymmetric
    images: Tensor
    releases: int = field(default=0, init=False)
    """Of one run, once a game was played."""

    def play(self, world: int, games: int) -> Tensor:
        """``games`` games in one world: how much likelier the first world is, as log-likelihood ratios (games,), from
        what left alone.

        Raises:
            SettingError: a scheme without noise, or a model of which nothing leaves.
        """
        noise = self.scheme.noise
        if noise is None:
            raise SettingError("without noise there is nothing to play against", where="scheme")
        link = _Seeing()
        self._run(link, self.scheme, world, games)
        if not link.sent:
            raise SettingError("nothing leaves under this scheme", where="scheme")
        self.releases = len(link.sent)
        ratio = torch.zeros(games, dtype=torch.float64)
        for hypothesis, sign in ((1, 1.0), (0, -1.0)):
            # The same model without noise, fed with what was seen: what it would have sent under the hypothesis.
            replay = _Replaying(link.sent)
            self._run(replay, replace(self.scheme, noise=None, integrity="off"), hypothesis, games)
            for (_, seen), clean in zip(link.sent, replay.clean, strict=True):
                away = (seen.double() - clipped(clean, noise.residual.clip)).square().flatten(1).sum(1)
                ratio += sign * away / (2 * noise.residual.sigma**2)
        return ratio

    def clean(self, world: int) -> Tensor:
        """All residuals of one image, clipped and end to end, (values,)."""
        noise = self.scheme.noise
        link = _Seeing()
        self._run(link, replace(self.scheme, noise=None, integrity="off"), world, 1)
        clip = float("inf") if noise is None else noise.residual.clip
        return torch.cat([clipped(sent, clip).flatten() for _, sent in link.sent])

    def _run(self, link: InProcessAccelerator, scheme: Asymmetric, world: int, games: int) -> None:
        images = self.images[world].expand(games, *self.images.shape[1:]).contiguous()
        try:
            split = protect(self.model, replace(scheme, pieces=1), accelerator=link, example_input=images[:1]).eval()
            with torch.no_grad():
                split(images)
        finally:
            link.close()

    def scores(self, games: int, *, progress: Progress = silent) -> Scores:
        """``games`` games in each world."""
        found = []
        for world in (0, 1):
            pieces = []
            for at in range(0, games, _SIDE_BY_SIDE):
                pieces.append(self.play(world, min(_SIDE_BY_SIDE, games - at)))
                progress(world * games + at + len(pieces[-1]), 2 * games, "games about what leaves")
            found.append(torch.cat(pieces))
        return Scores(*found)


def clipped(x: Tensor, clip: float) -> Tensor:
    """Each sample of (N, ...) scaled to norm at most ``clip``, float64."""
    rows = x.double().flatten(1)
    factors = (clip / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)).clamp(max=1.0)
    scaled: Tensor = rows * factors
    return scaled.reshape(x.shape)


def telling_pair(model: nn.Module, scheme: Asymmetric, images: Tensor) -> Tensor:
    """The two of ``images`` (N, C, H, W), N at least 2, whose clipped residuals differ most: (2, C, H, W).

    Raises:
        SettingError: a scheme without noise, or fewer than two images.
    """
    if scheme.noise is None or len(images) < 2:
        raise SettingError("a pair needs two images, and a clip", got=f"{len(images)} images")
    game = PipelineGame(model, scheme, images)
    rows = [game.clean(at) for at in range(len(images))]
    apart = torch.cdist(torch.stack(rows)[None], torch.stack(rows)[None])[0]
    first, second = divmod(int(apart.argmax()), len(images))
    return images[[first, second]]


def audit_pipeline(
    model: nn.Module,
    scheme: Asymmetric,
    images: Tensor,
    *,
    games: int,
    seed: int,
    delta: float = DELTA,
    confidence: float = SURE,
    progress: Progress = silent,
) -> EmpiricalEpsilon:
    """The lower bound of the pipeline game beside the accountant's figure for one query.

    Args:
        images: (N, C, H, W) from which the pair is taken.

    Raises:
        SettingError: a scheme without noise, or of which nothing leaves.
    """
    noise = scheme.noise
    if noise is None:
        raise SettingError("without noise there is nothing to play against", where="scheme")
    game = PipelineGame(model, scheme, telling_pair(model, scheme, images))
    scores = game.scores(games, progress=progress)
    # Two given images are worlds of ``replace``, whatever the scheme counts as neighbours.
    counted = [GaussianReleases(noise.residual.noise_multiplier, sensitivity("residual", "replace"), game.releases)]
    return _beside(
        scores,
        upper=epsilon_of(delta, composed_mu(counted)),
        because=f"one query through {game.releases} split layers, closed form",
        adjacency="replace",
        delta=delta,
        seed=seed,
        confidence=confidence,
    )


# --- the planned audit ------------------------------------------------------------------------------------------------
GAMES: Final[Mapping[Literal["quick", "full"], tuple[int, int]]] = {"quick": (4000, 128), "full": (100_000, 4096)}
"""Games in each world: of the mechanism, of the pipeline."""


class ReleaseGames:
    """The planned audit: one job, where the scheme has noise."""

    def plan(self, scene: Scene) -> Sequence[Job]:
        """One job for a scheme with noise, else none: there is no epsilon to hold against."""
        if scene.scheme is None or scene.scheme.noise is None:
            return ()
        return [Job("empirical-epsilon", partial(run, scene))]


def run(scene: Scene, context: Context) -> Outcome:
    """All games of a scene, and a finding: what was proven of the pipeline, between nothing and what the same number of
    games proves without any noise."""
    scheme = scene.scheme
    if scheme is None or scheme.noise is None:
        raise SettingError("without noise there is nothing to play against", where="scheme")
    few, fewer = GAMES[scene.suite]
    found = list(_mechanisms(scheme.noise, games=few, seed=context.seed))
    images = scene.subject(Position.SCHEME, "inference").public.images[:_PAIRS]
    pipeline = audit_pipeline(scene.model, scheme, images, games=fewer, seed=context.seed, progress=context.progress)
    found.append(pipeline)
    certain = Scores(torch.ones(fewer, dtype=torch.float64), torch.zeros(fewer, dtype=torch.float64))
    most = _bound(certain, delta=DELTA, seed=context.seed, confidence=SURE).epsilon
    finding = Finding(
        attack="empirical-epsilon",
        audited=scene.audited,
        metric=METRIC.name,
        unit=METRIC.unit,
        higher_is_worse=True,
        layer=None,
        scheme=_exactly(min(pipeline.lower, most)),
        floor=_exactly(0.0),
        ceiling=_exactly(most),
        knowledge=KNOWLEDGE,
        budget=context.budget,
        seed=context.seed,
        notes=(
            f"Lower bounds at confidence {SURE:g}, so they have no interval of their own.",
            f"The ceiling is all that {2 * fewer} games can prove: what they prove where nothing is noised.",
            f"Stated: {pipeline}.",
        ),
    )
    return Outcome((finding,), epsilons=tuple(found))


def _mechanisms(noise: Gaussian, *, games: int, seed: int) -> list[EmpiricalEpsilon]:
    kinds: tuple[tuple[Kind, Mechanism | None], ...] = (
        ("residual", noise.residual),
        ("gradient", noise.gradient),
        ("update", noise.update),
    )
    return [
        audit_mechanism(mechanism, kind, games=games, seed=seed, adjacency=noise.adjacency, releases=releases)
        for kind, mechanism in kinds
        if mechanism is not None
        for releases in (1, 4)
    ]


def _exactly(value: float) -> Bracket:
    return Bracket(value, value, value)
