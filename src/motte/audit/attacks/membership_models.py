"""The models of a membership game: trained by the audit itself, plainly, or on one half of the activations only.

The two research modes of :mod:`motte.offload.settings` are what a membership attack on a split model comes down to:

* ``residual``: split layers see the (noised) residual only. What a host could train from what leaves, if it had the
  labels too, which it has not: more than a host has.
* ``lowrank``: split layers see the principal part only. What stays inside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.errors import MeasureError, SettingError
from motte.offload.protect import parametrised, protect
from motte.offload.settings import Asymmetric, LowRank, Residual
from motte.zoo.weights import seeded

Mode = Literal["plain", "residual", "lowrank"]
_EVALUATION_BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model of the game is trained: Adam on bounded gradients, no augmentation: it may overfit.

    Args:
        steps: optimizer steps.
        batch_size: at most all members.
        lr: of Adam.
    """

    steps: int
    batch_size: int = 32
    lr: float = 2e-3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0:
            raise SettingError("not a recipe", got=str(self))


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A model of the game: what computes its logits, the mean loss on its own training records, and its steps."""

    logits: Callable[[Tensor], Tensor]
    training_loss: float
    steps: int = 0


def fresh_like(model: nn.Module, seed: int) -> nn.Module:
    """A copy of ``model`` with weights drawn anew: a public initialisation. Torch's generator is as before afterwards.

    Modules that can reset themselves do; parameters that stand alone become small Gaussian numbers, vectors zeros.
    """
    made = copy.deepcopy(model)
    with seeded(seed), torch.no_grad():
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 0.02)
                else:
                    parameter.zero_()
    return made.train()


def half_scheme(model: nn.Module, scheme: Asymmetric, mode: Mode) -> Residual | LowRank:
    """The research mode that splits what ``scheme`` would split.

    Raises:
        SettingError: a mode that is none of the two.
    """
    trusted = scheme.trusted_layers
    if scheme.offloaded_layers is not None:
        trusted = tuple(name for name in parametrised(model) if name not in scheme.offloaded_layers)
    given = {
        "rank": scheme.rank,
        "iterations": scheme.iterations,
        "decomposition": scheme.decomposition,
        "trusted_layers": trusted,
    }
    if mode == "lowrank":
        return LowRank(**given)  # type: ignore[arg-type]
    if mode == "residual":
        return Residual(noise=scheme.noise, **given)  # type: ignore[arg-type]
    raise SettingError("not a research mode", expected="residual or lowrank", got=repr(mode))


def train_model(
    architecture: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    half: Residual | LowRank | None = None,
    tick: Callable[[], bool] = lambda: True,
) -> Trained:
    """Train a fresh copy of ``architecture`` on all records given.

    Args:
        images: (N, C, H, W) float32, normalised. labels: (N,) int64.
        half: a research mode; None: the plain model.
        seed: of weights, order and dropout.
        tick: called after every step; false: enough. May raise.

    Raises:
        MeasureError: the training diverged.
    """
    model = fresh_like(architecture, seed)
    if half is not None:
        model = protect(model, half, example_input=images[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    batch = min(recipe.batch_size, len(images))
    with seeded(seed):
        model.train()
        order, at = torch.randperm(len(images)), 0
        done = 0
        while done < recipe.steps:
            done += 1
            if at + batch > len(images):
                order, at = torch.randperm(len(images)), 0
            chosen = order[at : at + batch]
            at += batch
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            _bound(model)
            optimizer.step()
            if not tick():
                break
    logits = answers(model)
    training_loss = float(functional.cross_entropy(logits(images), labels))
    if not torch.isfinite(torch.tensor(training_loss)):
        raise MeasureError("a model of the membership game diverged", got=f"loss {training_loss}")
    return Trained(logits, training_loss, done)


def _bound(model: nn.Module) -> None:
    """Keep every gradient finite: where a residual is all but zero, norms that follow divide by next to nothing, layer
    after layer, and no sum of that is a number any more."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(nan=0.0, posinf=1.0, neginf=-1.0).clamp_(-1.0, 1.0)


def answers(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images (N, C, H, W) -> logits (N, classes) of ``model`` in evaluation mode, a few at a time."""

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        model.eval()
        return torch.cat([model(part) for part in images.split(_EVALUATION_BATCH)])

    return logits


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of the true label, (N,) float64: close to Gaussian over trainings (Carlini et al. 2022)."""
    each = logits.double()
    own = each.gather(1, labels[:, None]).squeeze(1)
    others = each.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return own - others


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each record, (N,) float64."""
    return functional.cross_entropy(logits.double(), labels, reduction="none")
