"""Membership inference: was this record in the training set? The game, its scoring, and the simplest attack.

The game is played on models that the audit trains itself, on the architecture and the data of the user: for each pair
of records a coin decides which of the two is trained on. So members and others come from one distribution, half of the
records are members, and every coin is independent of all others, which is what the bound of
:func:`motte.audit.epsilon.one_run_bound` needs.

An attacker who sees nothing guesses at random (floor); one who sees everything has the plain model's answers (ceiling);
in between stands the model in a research mode, see :mod:`motte.audit.attacks.membership_models`.

Accuracy says little: what counts is how many members are found while almost nobody else is accused (Carlini et al.
2022), so every finding stands beside the true-positive rate at 1 % and at 0.1 % false positives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from motte.audit.attacks.membership_models import (
    Mode,
    Recipe,
    Trained,
    half_scheme,
    losses,
    train_model,
)
from motte.audit.epsilon import EmpiricalEpsilon, LowerBound, beside, one_run_bound
from motte.audit.interface import (
    Bracket,
    Context,
    Curve,
    Finding,
    Job,
    Knowledge,
    Metric,
    Outcome,
    Position,
    Scored,
)
from motte.audit.statistics import clopper_pearson, roc
from motte.errors import SettingError
from motte.offload.accounting import DELTA
from motte.offload.settings import LowRank, Residual

if TYPE_CHECKING:
    from torch import nn

    from motte.audit.interface import Scene

METRICS: Final = (
    Metric("tpr at 0.1 % fpr", "share"),
    Metric("tpr at 1 % fpr", "share"),
    Metric("auc", "share"),
    Metric("accuracy", "share"),
    Metric("epsilon proven", "epsilon"),
)
PROVEN: Final = METRICS[-1].name
KNOWLEDGE: Final = (Knowledge.ARCHITECTURE, Knowledge.QUERIES, Knowledge.LABELS, Knowledge.CANDIDATES)
_EPOCHS: Final = 40
"""Of a target: enough to fit a small training set by heart."""
_QUICK: Final = 128
"""Candidates of the quick suite: few, so that few steps are enough to learn them by heart."""
_MODELS: Final = 3
_VENTURED: Final = 0.1
"""Share of the pairs about which the bound of one run ventures a guess: the surest."""


# --- the game ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The records of which it is asked whether they were used: records 2i and 2i + 1 are a pair, one of them a member.

    Attributes:
        images: (2k, C, H, W) float32, normalised. labels: (2k,) int64.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or len(self.images) < 4 or len(self.images) % 2:
            raise SettingError("candidates come in pairs, two at least", got=f"{len(self.images)}, {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Who is a member: (2k,) bool, one of each pair by a fair coin."""
        coins = torch.rand(len(self) // 2, generator=generator) < 0.5
        return torch.stack((coins, ~coins), 1).flatten()


Train = Callable[[Tensor, int], Trained]
"""Trains a model of the game on the members (2k,) bool under a seed, as the target was: for shadow models."""


Known = Callable[[Position], tuple[MutableMapping[tuple[str, str], Scored], tuple[str, str]]]
"""Where the result of a position is kept, and under which key."""


class MembershipAttack(Protocol):
    """One way of telling members. A fresh one for each target."""

    name: str
    reference: str

    def fit(self, candidates: Candidates, train: Train, context: Context) -> None:
        """Learn from models of the attacker's own."""
        ...

    def attack(self, target: Trained, candidates: Candidates) -> tuple[Tensor, float]:
        """Scores (2k,) float64, higher = more likely a member, and the threshold from which the attacker says so."""
        ...


class Threshold:
    """Loss threshold: a record whose loss is below the mean training loss, which is known, was trained on.

    Yeom, Giacomelli, Fredrikson, Jha, "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting"
    (CSF 2018), adversary 1. Needs no model of its own.
    """

    name = "membership-threshold"
    reference = "Yeom et al., Privacy Risk in Machine Learning, CSF 2018"

    def fit(self, candidates: Candidates, train: Train, context: Context) -> None:
        """Nothing to learn."""

    def attack(self, target: Trained, candidates: Candidates) -> tuple[Tensor, float]:
        """See :class:`MembershipAttack`."""
        return -losses(target.logits(candidates.images), candidates.labels), -target.training_loss


# --- scoring ----------------------------------------------------------------------------------------------------------
def score(scores: Tensor, threshold: float, member: Tensor) -> Scored:
    """Brackets of :data:`METRICS`, the ROC curve, and what one training proves, in words.

    Args:
        scores: (2k,), higher = more likely a member. member: (2k,) bool, the truth.

    Raises:
        MeasureError: a score is not a number.
    """
    values, truth = scores.double().numpy(), member.numpy()
    curve = roc(values[truth], values[~truth])
    right = int(((values >= threshold) == truth).sum())
    bound = one_run(scores, member)
    brackets = {
        "tpr at 0.1 % fpr": curve.tpr_at(0.001),
        "tpr at 1 % fpr": curve.tpr_at(0.01),
        "auc": curve.auc_interval(),
        "accuracy": clopper_pearson(right, len(values)),
        PROVEN: Bracket(bound.epsilon, bound.epsilon, bound.epsilon),
    }
    title = "membership, true against false positives"
    drawn = Curve(title, "false-positive rate", "true-positive rate", curve.points(), log_axes=True)
    return Scored(brackets, curves=(drawn,), notes=(f"{bound.counted}: one training proves that much epsilon.",))


def one_run(scores: Tensor, member: Tensor, *, delta: float = DELTA) -> LowerBound:
    """What one trained model proves about epsilon for itself, adjacency ``replace``, 95 %.

    About the surest tenth of the pairs it is guessed which of the two was used.
    """
    values, truth = scores.double().numpy().reshape(-1, 2), member.numpy().reshape(-1, 2)
    lead = values[:, 0] - values[:, 1]
    surest = np.argsort(-np.abs(lead), kind="stable")[: max(1, round(_VENTURED * len(lead)))]
    correct = int(((lead[surest] > 0) == truth[surest, 0]).sum())
    counted = f"{correct} of {len(surest)} guesses about {len(lead)} pairs right"
    return LowerBound(one_run_bound(correct, len(surest), len(lead), delta=delta), counted)


def _unpromised(scored: Scored, pairs: int) -> EmpiricalEpsilon:
    """The accountant counts what leaves for an accelerator and promises nothing of a trained model's answers."""
    return beside(
        LowerBound(scored.brackets[PROVEN].value, scored.notes[0].partition(":")[0]),
        upper=math.inf,
        upper_because="no accounting covers what a trained model answers",
        delta=DELTA,
        adjacency="replace",
        method="one run",
        trials=pairs,
    )


def play(
    make: Callable[[], MembershipAttack],
    candidates: Candidates,
    train: Mapping[Position, Train | None],
    *,
    audited: str,
    context: Context,
    notes: Sequence[str] = (),
    known: Known | None = None,
) -> Outcome:
    """The game at floor, scheme and ceiling: the same coins, the same attack, another target.

    Args:
        train: how the target of a position is trained; None: nothing of it is seen, and the attacker guesses. Positions
            that name one function share its target.
        known: where the result of a position is kept, if it is worth keeping.
    """
    member = candidates.draw(context.generator("who is a member"))
    played: dict[int, Scored] = {}
    scored: dict[Position, Scored] = {}
    for position in Position:
        how = train[position]
        kept, key = ({}, ("", "")) if known is None else known(position)
        if how is not None and id(how) in played:
            kept[key] = played[id(how)]
        if key not in kept:
            kept[key] = guessed(member) if how is None else _played(make, candidates, how, member, context)
        scored[position] = kept[key]
        if how is not None:
            played[id(how)] = kept[key]
    said = [*notes, _resolution(len(candidates) // 2)]
    said += [f"{position}: {note}" for position, each in scored.items() for note in each.notes]
    findings = tuple(
        Finding(
            attack=make().name,
            audited=audited,
            metric=metric.name,
            unit=metric.unit,
            higher_is_worse=True,
            layer=None,
            scheme=scored[Position.SCHEME].brackets[metric.name],
            floor=scored[Position.FLOOR].brackets[metric.name],
            ceiling=scored[Position.CEILING].brackets[metric.name],
            knowledge=KNOWLEDGE,
            budget=context.budget,
            seed=context.seed,
            notes=tuple(said),
        )
        for metric in METRICS
    )
    curves = tuple(replace(curve, position=at) for at, each in scored.items() for curve in each.curves)
    proven = () if train[Position.SCHEME] is None else (_unpromised(scored[Position.SCHEME], len(candidates) // 2),)
    return Outcome(findings, curves=curves, epsilons=proven)


def guessed(member: Tensor) -> Scored:
    """What an attacker comes to who sees nothing: one score for all, so that a guess is right as often as not, and
    finds as large a share of members as it accuses of others. Exact, not the luck of a draw; but for its intervals."""
    found = score(torch.zeros(len(member), dtype=torch.float64), 0.5, member)
    count = int(member.sum())
    brackets = dict(found.brackets)
    for name, rate in (("tpr at 0.1 % fpr", 0.001), ("tpr at 1 % fpr", 0.01)):
        near = clopper_pearson(round(rate * count), count)
        brackets[name] = Bracket(rate, min(near.low, rate), max(near.high, rate))
    return Scored(brackets | {PROVEN: Bracket(0.0, 0.0, 0.0)}, curves=found.curves)


def _played(
    make: Callable[[], MembershipAttack], candidates: Candidates, how: Train, member: Tensor, context: Context
) -> Scored:
    attack = make()
    attack.fit(candidates, how, context)
    target = how(member, context.seed)
    found = score(*attack.attack(target, candidates), member)
    facts = f"A target of {target.steps} steps, mean loss on its members {target.training_loss:.3g}."
    return replace(found, notes=(*found.notes, facts))


def _resolution(others: int) -> str:
    if others >= 1000:
        return f"{others} members, {others} others."
    return f"{others} members, {others} others: a false-positive rate below 1 / {others} means none at all."


# --- jobs -------------------------------------------------------------------------------------------------------------
class Membership:
    """The planned attacks on membership: a job for each mode in which the scheme lets something be learnt."""

    attack: Callable[[], MembershipAttack] = Threshold
    suites: tuple[str, ...] = ("quick", "full")

    def plan(self, scene: Scene) -> Sequence[Job]:
        """One job under ``trusted`` and ``accelerator``; one for each research mode under a split scheme."""
        if scene.suite not in self.suites:
            return ()
        modes: tuple[Mode, ...] = ("residual", "lowrank") if scene.scheme is not None else ("plain",)
        name = self.attack().name
        return [Job(name if mode == "plain" else f"{name}-{mode}", partial(self._run, scene, mode)) for mode in modes]

    def _run(self, scene: Scene, mode: Mode, context: Context) -> Outcome:
        candidates = _candidates(scene, context)
        plain = trainer(scene.model, candidates, context)
        train: dict[Position, Train | None] = {Position.FLOOR: None, Position.SCHEME: None, Position.CEILING: plain}
        audited, notes = scene.audited, [_TRAINED]
        if scene.everything_leaves:
            train[Position.SCHEME] = plain
        if scene.scheme is not None:
            half = half_scheme(scene.model, scene.scheme, mode)
            train[Position.SCHEME] = trainer(scene.model, candidates, context, half=half)
            audited = f"{scene.audited}, {mode} mode"
            notes.append(_MEANING[mode])
        name = self.attack().name

        def known(position: Position) -> tuple[MutableMapping[tuple[str, str], Scored], tuple[str, str]]:
            # Floor and ceiling are the same for every mode and every scheme.
            job = name if mode == "plain" or position is not Position.SCHEME else f"{name}-{mode}"
            return scene.known_scores(job, position)

        return play(self.attack, candidates, train, audited=audited, context=context, notes=notes, known=known)


_TRAINED: Final = (
    "Played on models that the audit trained itself, of this architecture, on few records and without augmentation:"
    " they fit their records by heart, the deployed model may not."
)
_MEANING: Final[Mapping[str, str]] = {
    "residual": "The scheme's target learns from residuals alone, with the labels: more than a host has.",
    "lowrank": "The scheme's target learns from the principal parts alone, which never leave.",
}


def trainer(
    architecture: nn.Module, candidates: Candidates, context: Context, *, half: Residual | LowRank | None = None
) -> Train:
    """How models of the game are trained within the budget: each may take a third of its seconds."""
    recipe = game_recipe(len(candidates) // 2, context)

    def train(member: Tensor, seed: int) -> Trained:
        done = 0

        ends = time.monotonic() + context.budget.seconds / _MODELS

        def tick() -> bool:
            nonlocal done
            done += 1
            context.progress(done, recipe.steps, "steps of a model of the membership game")
            return time.monotonic() < ends

        images, labels = candidates.images[member], candidates.labels[member]
        return train_model(architecture, images, labels, recipe, seed=seed, half=half, tick=tick)

    return train


def game_recipe(members: int, context: Context) -> Recipe:
    """Forty epochs, or the budget's steps if those are fewer."""
    batch = min(32, max(1, members // 4))
    return Recipe(steps=max(1, min(context.budget.steps, _EPOCHS * -(-members // batch))), batch_size=batch)


def _candidates(scene: Scene, context: Context) -> Candidates:
    most = _QUICK if scene.suite == "quick" else context.budget.public_samples
    images, labels = scene.records("train", min(most, context.budget.public_samples) // 2 * 2)
    count = len(images) // 2 * 2
    return Candidates(images[:count], labels[:count])
