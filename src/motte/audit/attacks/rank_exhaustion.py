"""Rank exhaustion: planted answers that fill the principal part of the next layer, so that the secret has to leave.

The decomposition keeps the R strongest directions inside. An accelerator that adds R directions of its own, far
stronger than everything else, to the product of one layer takes all of them at the next, and what should have stayed
inside is in the next residual. Noted for AsymML (arXiv 2110.01229) and 3LegRace (PoPETs 2022(4)), which have no check
of answers; a planted rank-1 answer under an energy rule, a planted rank R against a fixed rank R. The planted
directions are positive everywhere, so that a ReLU between the two layers lets the secret through.

With integrity on, the answer is refused before anything more leaves: the attack then has what an honest accelerator
has.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor

from motte.audit.attacks.reconstruction import input_of, spread_over
from motte.audit.interface import (
    Attack,
    Context,
    Job,
    Knowledge,
    Metric,
    Outcome,
    Position,
    PublicData,
    Result,
    Scene,
    Scored,
    Subject,
    Truth,
    View,
    bracketed,
    standard_job,
)
from motte.audit.intervals import of_mean
from motte.audit.views import VictimAccess, pipeline_of
from motte.errors import SettingError
from motte.offload.settings import Asymmetric, Energy, Entropy, Fixed, Rank, Schedule

STRENGTH: Final = 1000.0
"""How far the planted directions stand above the honest product's largest value. The directions are found to about 1e-6
of them in float32, and that must stay small against the secret."""
_STAYED: Final = 30.0
"""What left is that much larger than honestly, only if the planted directions were not kept inside."""
MOST_PAIRS: Final = 4


def planted_rank(rank: Rank, position: int) -> int:
    """How many directions the layer at ``position`` keeps, so far as the public settings tell: one suffices where the
    data decide, since it then holds all the energy that is asked for."""
    if isinstance(rank, Fixed):
        return max(rank.rank, 1)
    if isinstance(rank, Schedule):
        return rank.rank(position)
    if isinstance(rank, Energy | Entropy):
        return 1
    raise SettingError("an unknown rule", got=type(rank).__name__)


def plant(y: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """``y`` (N, M, *spatial) or (N, T, M) with ``rank`` positive directions on top, of its shape and dtype."""
    rows = y.shape[1]
    places = y[0, 0].numel()
    left = torch.rand(rows, rank, generator=generator, dtype=torch.float64) + 0.1
    right = torch.rand(rank, places, generator=generator, dtype=torch.float64) + 0.1
    strength = STRENGTH * y.abs().max().double().clamp_min(1e-6)
    return (y.double() + strength * (left @ right).reshape(y.shape[1:])).to(y.dtype)


def explained_share(guess: Tensor, secret: Tensor) -> Tensor:
    """Share of a sample's variance that a linear function of the guess explains, (N,): squared correlation within
    channels. Both (N, C, ...)."""
    a, b = (each.double().flatten(2) for each in (guess, secret))
    a, b = ((each - each.mean(2, keepdim=True)).flatten(1) for each in (a, b))
    norms = a.norm(dim=1) * b.norm(dim=1)
    found = (a * b).sum(1) / norms.clamp_min(1e-30)
    return torch.where(norms > 0, found.square(), torch.zeros_like(found))


class RankExhaustion:
    """The attack on ``target``, whose input depends on the answers for ``planted``.

    Metrics: the share of the honest activation's variance that what left explains, after planted answers and, for
    comparison, after honest ones. Both are shares of variance within channels, over private records.

    Args:
        planted: layer whose answers are lies. target: layer whose residual is looked at.
        rank: directions planted.
    """

    name = "rank exhaustion"
    reference = "Niu, Ali, Avestimehr, AsymML, arXiv 2110.01229: its unverified answers; planted directions as here"
    metrics: tuple[Metric, ...] = (
        Metric("explained, planted answers", "share"),
        Metric("explained, honest answers", "share"),
    )
    knowledge: tuple[Knowledge, ...] = (Knowledge.RECORDING, Knowledge.ANSWERS)

    def __init__(self, planted: str, target: str, rank: int) -> None:
        self.layer: str | None = target
        self._planted = planted
        self._rank = rank

    def fit(self, public: PublicData, context: Context) -> None:
        """Nothing is learnt."""

    def attack(self, view: View, context: Context) -> Result:
        """See :class:`motte.audit.interface.Attack`."""
        target = self.layer or ""
        honest = view.batch(target)
        if honest is None or context.access is None:
            return Result({}, ("Nothing was seen, and nobody asks this accelerator.",))
        generator = context.generator("planted")

        def answer(layer: str, y: Tensor) -> Tensor:
            return plant(y, self._rank, generator) if layer == self._planted else y

        after = context.access.lie(answer).batch(target)
        if after is None or len(after) < len(honest):
            note = f"The planted answer of {self._planted} was refused: nothing more left."
            return Result({"honest": honest, "planted": honest}, (note,))
        if after.double().norm() > _STAYED * honest.double().norm():
            return Result(
                {"honest": honest, "planted": honest}, ("What was planted left again: nothing stays inside.",)
            )
        note = f"{self._rank} directions were planted in the answer of {self._planted}, and nobody noticed."
        return Result({"honest": honest, "planted": after}, (note,))

    def score(self, result: Result, truth: Truth, context: Context) -> Scored:
        """See :class:`motte.audit.interface.Attack`."""
        secret = truth.activations.get(self.layer or "")
        if secret is None:
            with torch.no_grad():
                secret = input_of(truth.model, self.layer or "", truth.images)
        brackets = {}
        for name, key in (("explained, planted answers", "planted"), ("explained, honest answers", "honest")):
            guess = result.values.get(key)
            count = len(secret) if guess is None else len(guess)
            share = torch.zeros(count) if guess is None else explained_share(guess, secret[:count])
            brackets[name] = of_mean(share.tolist(), seed=context.seed)
        return Scored(brackets)


class RankExhaustions:
    """Registered: a layer and the next one outside, with the scheme's integrity and with it turned the other way; in
    the full suite :data:`MOST_PAIRS` pairs."""

    def plan(self, scene: Scene) -> list[Job]:
        """See :class:`motte.audit.interface.Planned`."""
        pairs = list(zip(scene.outside, scene.outside[1:], strict=False))
        chosen = spread_over([str(place) for place in range(len(pairs))], 1 if scene.suite == "quick" else MOST_PAIRS)
        jobs = []
        for place in map(int, chosen):
            rank = 1 if scene.scheme is None else planted_rank(scene.scheme.rank, place + 1)
            jobs.append(self._as_it_is(scene, pairs[place], rank))
            if scene.scheme is not None:
                jobs.append(self._other_way(scene, scene.scheme, pairs[place], rank))
        return jobs

    def _as_it_is(self, scene: Scene, pair: tuple[str, str], rank: int) -> Job:
        def make() -> Attack:
            return RankExhaustion(*pair, rank)

        return standard_job(f"rank exhaustion, {pair[0]} to {pair[1]}", make, scene, "inference")

    def _other_way(self, scene: Scene, scheme: Asymmetric, pair: tuple[str, str], rank: int) -> Job:
        turned = "off" if scheme.integrity == "freivalds" else "freivalds"
        name = f"rank exhaustion, {pair[0]} to {pair[1]}, integrity {turned}"

        def make() -> Attack:
            return RankExhaustion(*pair, rank)

        def run(context: Context) -> Outcome:
            floor, middle, ceiling = (scene.subject(position, "inference") for position in Position)
            other = pipeline_of(
                dataclasses.replace(scheme, integrity="off" if turned == "off" else "freivalds"),
                everything_leaves=False,
                position=Position.SCHEME,
                model=scene.model,
                audited=f"{scene.audited}, integrity {turned}",
                input_shape=scene.input_shape,
                classes=scene.classes,
            )
            truth = scene.truth("inference")
            access = VictimAccess(other, truth.images, None, context.budget.queries)
            view = other.observe(truth.images, seed=context.seed, layers=(pair[1],))
            return bracketed(
                make,
                floor,
                Subject(view, middle.public, access),
                ceiling,
                truth,
                seed=context.seed,
                budget=context.budget,
                progress=context.progress,
            )

        return Job(name, run)
