"""Membership by shadow models: learn, on models of one's own, how a model answers about what it was trained on.

Shokri, Stronati, Song, Shmatikov, "Membership Inference Attacks Against Machine Learning Models" (S&P 2017). There each
class has an attack model of its own; here one network is given the class too (with few records a class alone has
too few examples), and it sees the sorted probabilities besides the loss, as Salem et al. (NDSS 2019) do.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.audit.attacks.membership import Candidates, Membership, Train
from motte.audit.attacks.membership_models import Trained, confidence, losses
from motte.audit.interface import Context
from motte.zoo.weights import seeded

_HIDDEN: Final = 32
_STEPS: Final = 300
_FEWEST: Final = 2
_SORTED: Final = 3


class Shadow:
    """Shadow models of the attacker's own, and a small network that learnt from them. See the module."""

    name = "membership-shadow"
    reference = "Shokri et al., Membership Inference Attacks Against Machine Learning Models, S&P 2017"

    def __init__(self) -> None:
        self._network: nn.Module | None = None
        self._mean, self._spread = torch.zeros(1), torch.ones(1)

    def fit(self, candidates: Candidates, train: Train, context: Context) -> None:
        """Train ``budget.repeats`` shadow models (two at least) on other coins, and the network on their answers.

        A shadow model's candidates are those of the target: the attacker has the records, and not who was used.
        """
        features, members = [], []
        generator = context.generator("shadow models")
        for number in range(max(_FEWEST, context.budget.repeats)):
            if number >= _FEWEST and context.out_of_time():
                break
            member = candidates.draw(generator)
            shadow = train(member, context.seed + 1 + number)
            features.append(_features(shadow.logits(candidates.images), candidates.labels))
            members.append(member)
        given, wanted = torch.cat(features), torch.cat(members).float()
        self._mean, self._spread = given.mean(0), given.std(0).clamp_min(1e-6)
        with seeded(context.seed):
            self._network = nn.Sequential(nn.Linear(given.shape[1], _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
            optimizer = torch.optim.Adam(self._network.parameters(), lr=1e-2, weight_decay=1e-4)
            for _ in range(_STEPS):
                said = self._network((given - self._mean) / self._spread).squeeze(1)
                loss = functional.binary_cross_entropy_with_logits(said, wanted)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def attack(self, target: Trained, candidates: Candidates) -> tuple[Tensor, float]:
        """See :class:`motte.audit.attacks.membership.MembershipAttack`."""
        if self._network is None:
            raise RuntimeError("fit comes before attack")
        given = _features(target.logits(candidates.images), candidates.labels)
        said: Tensor = self._network((given - self._mean) / self._spread).squeeze(1)
        return said.double(), 0.0


def _features(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, features): the highest probabilities, loss and confidence of the true label, and the label itself."""
    highest = logits.log_softmax(1).topk(min(_SORTED, logits.shape[1]), 1).values
    own = torch.stack((losses(logits, labels), confidence(logits, labels)), 1).float().clamp(-50, 50)
    return torch.cat((highest.clamp_min(-50), own, functional.one_hot(labels, logits.shape[1]).float()), 1)


class ShadowMembership(Membership):
    """:class:`Shadow` in the full suite."""

    attack = Shadow
    suites = ("full",)
