"""LiRA: a likelihood ratio for each record, from models that were trained with it and without it.

Carlini, Chien, Nasr, Song, Terzis, Tramer, "Membership Inference Attacks From First Principles" (S&P 2022). Online: the
attacker trains its models on random halves of the candidates, fits a Gaussian to the confidence log(p / (1 - p)) of
each record among models that had it and among those that had not, and scores by the ratio of both likelihoods. With
fewer than 64 models the variances are those of all records together (section VI-C there).
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from motte.audit.attacks.membership import Candidates, Membership, Train
from motte.audit.attacks.membership_models import Trained, confidence
from motte.audit.interface import Context

FEWEST: Final = 4
OWN_VARIANCE: Final = 64
"""From so many models on, each record has variances of its own."""


class Lira:
    """The likelihood-ratio attack, online. See the module."""

    name = "membership-lira"
    reference = "Carlini et al., Membership Inference Attacks From First Principles, S&P 2022"

    def __init__(self) -> None:
        self._seen = torch.zeros(0, 0, dtype=torch.float64)
        self._member = torch.zeros(0, 0, dtype=torch.bool)

    def fit(self, candidates: Candidates, train: Train, context: Context) -> None:
        """Train ``budget.repeats`` models (four at least), in twos of opposite coins: each record in half."""
        seen, members = [], []
        generator = context.generator("models of lira")
        for number in range(max(FEWEST, context.budget.repeats) // 2):
            if 2 * number >= FEWEST and context.out_of_time():
                break
            member = candidates.draw(generator)
            for half, mask in enumerate((member, ~member)):
                model = train(mask, context.seed + 1 + 2 * number + half)
                seen.append(confidence(model.logits(candidates.images), candidates.labels))
                members.append(mask)
        self._seen, self._member = torch.stack(seen), torch.stack(members)

    def attack(self, target: Trained, candidates: Candidates) -> tuple[Tensor, float]:
        """See :class:`motte.audit.attacks.membership.MembershipAttack`."""
        observed = confidence(target.logits(candidates.images), candidates.labels)
        return self.ratio(observed), 0.0

    def ratio(self, observed: Tensor) -> Tensor:
        """Log-likelihood ratio of (n,) confidences of the target: with the record against without it."""
        with_it, without = self._moments(self._member), self._moments(~self._member)
        return _log_density(observed, *with_it) - _log_density(observed, *without)

    def _moments(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each record among the models ``chosen`` (models, records)."""
        count = chosen.sum(0).clamp_min(1)
        kept = torch.where(chosen, self._seen, 0.0)
        mean = kept.sum(0) / count
        squares = torch.where(chosen, (self._seen - mean).square(), 0.0).sum(0)
        if len(self._seen) >= OWN_VARIANCE:
            variance = squares / (count - 1).clamp_min(1)
        else:
            variance = (squares.sum() / (count - 1).clamp_min(1).sum()).expand_as(mean)
        return mean, variance.sqrt().clamp_min(1e-6)


def _log_density(x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / spread).square() - spread.log() - 0.5 * math.log(2 * math.pi)


class LiraMembership(Membership):
    """:class:`Lira` in the full suite."""

    attack = Lira
    suites = ("full",)
