"""Label recovery: the label of each private record from what leaves in training.

Where the gradient of the softmax leaves (the output gradient of the last layer), it is (prediction - label), and its
one negative entry is the label: Zhao, Mopuri & Bilen, "iDLG: Improved Deep Leakage from Gradients" (2020), exactly and
for every record. From the weight gradient of the last layer alone the labels of a batch follow as in Yin et al., "See
through Gradients: Image Batch Recovery via GradInversion" (CVPR 2021), as long as no label is there twice.

Where the last layer runs inside, output gradients of earlier layers still point where the label lies: what the attacker
learns from labelled public records that went through the same pipeline.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from motte.audit.attacks.first_step import seen_in_first_steps
from motte.audit.interface import (
    Attack,
    Context,
    Job,
    Knowledge,
    Metric,
    PublicData,
    Result,
    Scene,
    Scored,
    Truth,
    View,
    standard_job,
)
from motte.audit.intervals import of_share
from motte.errors import InputError, SettingError

_RIDGE: Final = 1e-2
_BALANCED: Final = 1e-3
"""How far from 0 the entries of a softmax gradient may sum, relative to the largest."""


def labels_of_softmax_gradient(gradient: Tensor) -> Tensor | None:
    """The label of each record from (N, K) gradients of cross entropy to logits, at any scale: (N,) int64.

    None where the rows are no such gradients: each has exactly one negative entry, and sums to 0.
    """
    if gradient.dim() != 2 or not gradient.numel():
        return None
    rows = gradient.double()
    size = rows.abs().amax(1)
    if bool((size == 0).any()) or bool((rows.sum(1).abs() > _BALANCED * size).any()):
        return None
    if bool(((rows < -_BALANCED * size.unsqueeze(1)).sum(1) != 1).any()):
        return None
    lowest: Tensor = rows.argmin(1)
    return lowest


def labels_of_weight_gradient(gradient: Tensor, count: int) -> Tensor:
    """The labels of a batch of ``count`` records from the weight gradient (K, D) of the last layer: (count,) int64,
    sorted; right where its inputs are not negative (they come from a ReLU) and no label is there twice.

    Raises:
        InputError: not a weight of K >= count classes.
    """
    if gradient.dim() != 2 or not 1 <= count <= len(gradient):
        raise InputError("not a weight gradient of so many classes", got=f"{tuple(gradient.shape)}, {count} records")
    lowest: Tensor = gradient.amin(1).argsort()[:count].sort().values
    return lowest


class GradientClassifier:
    """Linear, from the direction of a record's output gradient to its label, in closed form.

    Args:
        gradients: (N, ...) of public records. labels: (N,) int64. classes: K.
    """

    def __init__(self, gradients: Tensor, labels: Tensor, classes: int) -> None:
        rows = _directions(gradients)
        wanted = torch.nn.functional.one_hot(labels, classes).double() - 1 / classes
        gram = rows.T @ rows
        ridge = _RIDGE * float(gram.diagonal().mean()) + 1e-12
        self._weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), rows.T @ wanted)

    def __call__(self, gradients: Tensor) -> Tensor:
        """(N, ...) -> (N,) int64."""
        best: Tensor = (_directions(gradients) @ self._weights).argmax(1)
        return best


def _directions(gradients: Tensor) -> Tensor:
    """(N, features + 1) float64: means over positions, of norm 1. Tokens have their channels last."""
    flat = gradients.double()
    if flat.dim() == 3:
        flat = flat.mean(1)
    elif flat.dim() > 3:
        flat = flat.flatten(2).mean(2)
    norms: Tensor = flat.norm(dim=1, keepdim=True)
    unit = flat / norms.clamp_min(1e-30)
    return torch.cat((unit, unit.new_ones(len(unit), 1)), 1)


class LabelRecovery:
    """The attack; see the module's text. Metric: share of private records whose label is found."""

    name = "label recovery"
    reference = (
        "Zhao, Mopuri, Bilen, iDLG: Improved Deep Leakage from Gradients, 2020; "
        "Yin et al., See through Gradients, CVPR 2021"
    )
    metrics: tuple[Metric, ...] = (Metric("accuracy", "share"),)
    knowledge: tuple[Knowledge, ...] = (Knowledge.RECORDING, Knowledge.PUBLIC_DATA, Knowledge.PIPELINE)
    layer: str | None = None

    def __init__(self) -> None:
        self._commonest: int | None = None
        self._learnt: tuple[str, GradientClassifier] | None = None

    def fit(self, public: PublicData, context: Context) -> None:
        """Learn from the gradients of labelled public records."""
        images, labels = (each[: context.budget.public_samples] for each in (public.images, public.labels))
        self._commonest = int(labels.bincount().argmax())
        seen = seen_in_first_steps(public, images, labels, last_with_gradient, "gradient", seed=context.seed)
        if seen is not None:
            self._learnt = (seen.layer, GradientClassifier(seen.values, labels[: len(seen.values)], seen.classes))

    def attack(self, view: View, context: Context) -> Result:
        """See :class:`motte.audit.interface.Attack`.

        Raises:
            SettingError: called before fit.
        """
        if self._commonest is None:
            raise SettingError("an attack is fitted before it attacks", where=self.name)
        for layer, operation in view.operations.items():
            gradients = view.batch(layer, "gradient")
            if operation.out_channels != view.classes or gradients is None:
                continue
            found = labels_of_softmax_gradient(gradients)
            if found is not None:
                return Result({"labels": found}, (f"The gradient of the softmax left, for {layer}.",))
        if self._learnt is not None:
            layer, classifier = self._learnt
            gradients = view.batch(layer, "gradient")
            if gradients is not None:
                note = f"A linear classifier of the output gradients of {layer}, learnt from public records."
                return Result({"labels": classifier(gradients)}, (note,))
        guess = torch.full((context.budget.samples,), self._commonest)
        return Result({"labels": guess}, ("Nothing was seen: the guess is the commonest public label.",))

    def score(self, result: Result, truth: Truth, context: Context) -> Scored:
        """See :class:`motte.audit.interface.Attack`."""
        found = result.values["labels"][: len(truth.labels)]
        return Scored({"accuracy": of_share(int((found == truth.labels[: len(found)]).sum()), len(found))})


def last_with_gradient(view: View) -> str | None:
    """The layer whose output gradient crossed first in the first step: backward passes begin at the end."""
    return next((each.layer for each in view.sightings if each.kind == "gradient"), None)


class LabelRecoveries:
    """Registered: one job."""

    def plan(self, scene: Scene) -> list[Job]:
        """See :class:`motte.audit.interface.Planned`."""

        def make() -> Attack:
            return LabelRecovery()

        return [standard_job("label recovery", make, scene, "training")] if scene.outside else []
