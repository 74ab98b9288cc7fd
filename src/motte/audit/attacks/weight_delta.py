"""Weight-delta: what stayed inside, from two successive weights, output gradients and the accelerator's own work.

Noted for AsymML (Niu, Ali & Avestimehr, arXiv 2110.01229) and 3LegRace (PoPETs 2022(4)), whose backward pass shows the
output gradient of every layer outside: (W_t - W_t+1) / learning rate is the whole weight gradient under plain SGD; less
what the accelerator computed itself, it is the principal part's, which is linear in the principal part
(:mod:`motte.audit.attacks.weight_delta_system`). The residual's noise cancels. With the principal part and the residual
the whole activation is there, and from it the image, by a decoder that the attacker trains on public images that it
attacks in the same way.

Only noise on output gradients and on updates stands against this attack.
"""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor

from motte.audit.attacks.decoder import train_decoder
from motte.audit.attacks.image_metrics import psnr
from motte.audit.attacks.reconstruction import SHOWN, input_of, mean_image
from motte.audit.attacks.weight_delta_system import MAX_SYSTEM_VALUES, Solution, solve_input
from motte.audit.interface import (
    Attack,
    Context,
    Job,
    Knowledge,
    Metric,
    Outcome,
    Picture,
    Position,
    PublicData,
    Result,
    Scene,
    Scored,
    Truth,
    View,
    standard_job,
)
from motte.audit.intervals import of_mean
from motte.errors import SettingError
from motte.offload.weight_delta_bound import system_size

MOST_LAYERS: Final = 3
"""Layers of the full suite: those whose systems have most equations for an unknown."""
_NOTHING: Final = 1e-3
"""What the solution of an update that is only rounding may amount to, relative to what left."""
_COMPARED: Final = (
    "Errors are to what the plain model gives this layer; noise on residuals changes that, and counts as error."
)
_DECODED: Final = 48
"""Public images whose activations are solved for, to train the decoder, at most."""


def principal_part(view: View, layer: str, step: int) -> Solution | None:
    """Solve for what stayed inside of ``layer`` in training step ``step``; None where the view does not have it all.

    Raises:
        UnsupportedError, ResourceError: see :func:`solve_input`.
    """
    gradient = view.batch(layer, "gradient", step=step)
    seen = view.batch(layer, "activation", step=step)
    before, after = weight_at(view, layer, step), weight_at(view, layer, step + 1)
    rate, operation = view.learning_rate, view.operations.get(layer)
    if gradient is None or seen is None or before is None or after is None or rate is None or operation is None:
        return None
    own = torch.zeros(operation.weight_shape, dtype=torch.float64)
    for part in view.of(layer, "weight-gradient", step=step):
        own += part.double()
    whole = (before.double() - after.double()) / rate
    return solve_input(operation, gradient, seen.shape, whole - own)


def weight_at(view: View, layer: str, step: int) -> Tensor | None:
    """The weight that was in force when the layer met its first activation of training step ``step``; None where it met
    none. By the order in which frames crossed: a weight crosses ahead of its step, and only if it changed."""
    known: Tensor | None = None
    for each in view.sightings:
        if each.layer != layer:
            continue
        if each.kind == "weight":
            known = each.tensor
        elif each.kind == "activation" and each.step == step:
            return known
    return None


def steps_of(view: View, layer: str) -> tuple[int, ...]:
    """Steps in which the layer met activations, in order."""
    return tuple(
        dict.fromkeys(each.step for each in view.sightings if each.layer == layer and each.kind == "activation")
    )


class WeightDelta:
    """The attack on one layer: its input in the first step that was watched.

    Metrics: the relative error |a * found - true| / |true| of a sample's activation, a the best factor (so that noise
    which drowns it gives 1, like nothing); that of what left alone, for comparison; and PSNR of the images that a
    decoder makes of what was found.
    """

    name = "weight delta"
    reference = (
        "Niu, Ali, Avestimehr, 3LegRace: Privacy-Preserving DNN Training over TEEs and GPUs, PoPETs 2022(4): "
        "its backward pass; least squares as here"
    )
    metrics: tuple[Metric, ...] = (
        Metric("relative error", "1", higher_is_worse=False),
        Metric("relative error of what left alone", "1", higher_is_worse=False),
        Metric("psnr", "dB"),
    )
    knowledge: tuple[Knowledge, ...] = (
        Knowledge.RECORDING,
        Knowledge.WEIGHTS,
        Knowledge.PUBLIC_DATA,
        Knowledge.PIPELINE,
    )

    def __init__(self, layer: str) -> None:
        self.layer: str | None = layer
        self._public: PublicData | None = None

    def fit(self, public: PublicData, context: Context) -> None:
        """Keep the public images: what is learnt from them depends on the batch that is seen."""
        self._public = public

    def attack(self, view: View, context: Context) -> Result:
        """See :class:`motte.audit.interface.Attack`.

        Raises:
            SettingError: called before fit.
        """
        if self._public is None:
            raise SettingError("an attack is fitted before it attacks", where=self.name)
        layer = self.layer or ""
        steps = steps_of(view, layer)
        left = view.batch(layer, step=steps[0]) if steps else None
        if left is None:
            images = mean_image(self._public, 1)
            return Result({"images": images}, ("Nothing was seen: the guess is zero, and the mean public image.",))
        solution = principal_part(view, layer, steps[0])
        found, notes = self._whole(left, solution)
        images = self._images(found, context)
        return Result({"left": left.double(), "activation": found, "images": images}, notes)

    def score(self, result: Result, truth: Truth, context: Context) -> Scored:
        """See :class:`motte.audit.interface.Attack`."""
        found = result.values.get("activation")
        count = len(truth.images) if found is None else len(found)
        true = true_activation(truth, self.layer or "", count)
        guesses = (
            ("relative error", found),
            ("relative error of what left alone", result.values.get("left")),
        )
        brackets = {
            name: of_mean(_errors(torch.zeros_like(true) if guess is None else guess, true).tolist(), seed=context.seed)
            for name, guess in guesses
        }
        originals = truth.pixels()[:count].float()
        images = result.values["images"].float()
        if len(images) == 1 and count > 1:
            images = images.expand(count, -1, -1, -1)
        brackets["psnr"] = of_mean(psnr(images, originals).tolist(), seed=context.seed)
        rows = (("originals", originals[:SHOWN]), ("reconstructions", images[:SHOWN]))
        notes = () if found is None else (_COMPARED,)
        return Scored(brackets, pictures=(Picture(f"{self.name}, {self.layer}", rows),), notes=notes)

    def _whole(self, left: Tensor, solution: Solution | None) -> tuple[Tensor, tuple[str, ...]]:
        if solution is None:
            return left.double(), ("No two successive weights were seen: what left is all that was found.",)
        if solution.x.norm() < _NOTHING * left.double().norm():
            return left.double(), (f"{self.layer}: the update adds nothing to what left.",)
        size = solution.size
        state = "determined" if size.determined and solution.rank == size.unknowns else "underdetermined"
        note = (
            f"{self.layer}: {size.equations} equations for {size.unknowns} unknowns a channel, rank {solution.rank}, "
            f"{state}; {solution.misfit:.1e} of the update's energy is not explained."
        )
        return left.double() + solution.x, (note,)

    def _images(self, found: Tensor, context: Context) -> Tensor:
        """Attack public batches of the same size in the same way, learn from them, and decode."""
        if self._public is None:
            raise SettingError("an attack is fitted before it attacks", where=self.name)
        public, batch, layer = self._public, len(found), self.layer or ""
        steps = min(max(2, _DECODED // batch), len(public.images) // batch)
        if steps < 2:
            return mean_image(public, batch)
        images, labels = public.images[: steps * batch], public.labels[: steps * batch]
        view = public.pipeline.observe(images, labels, seed=context.seed, steps=steps, layers=(layer,))
        pairs: list[Tensor] = []
        pixels: list[Tensor] = []
        for number, step in enumerate(steps_of(view, layer)):
            left = view.batch(layer, step=step)
            solution = principal_part(view, layer, step)
            if context.out_of_time() and pairs:
                break
            if left is not None and solution is not None:
                pairs.append(left.double() + solution.x)
                pixels.append(public.pixels(images[number * batch : (number + 1) * batch]))
        if not pairs:
            return mean_image(public, batch)
        decoder = train_decoder(torch.cat(pairs).float(), torch.cat(pixels), context, purpose=f"{layer} solved")
        return decoder(found.float())


def true_activation(truth: Truth, layer: str, count: int) -> Tensor:
    """What ``layer`` was given in the first training step, over the first ``count`` private images, (count, ...)
    float64.

    Layers that draw random numbers in training (dropout) draw others here.
    """
    model = copy.deepcopy(truth.model).train()
    with torch.no_grad():
        return input_of(model, layer, truth.images[:count]).double()


def _errors(found: Tensor, true: Tensor) -> Tensor:
    a, b = found.double().flatten(1), true.flatten(1)
    factor = (a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True).clamp_min(1e-300)
    errors: Tensor = (factor * a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-12)
    return errors


def solvable(view: View) -> tuple[str, ...]:
    """Layers that can be attacked, best determined first."""
    sizes = []
    for layer in view.layers:
        operation, left = view.operations[layer], view.batch(layer)
        steps = steps_of(view, layer)
        first = view.batch(layer, step=steps[0]) if steps else None
        if left is None or first is None or operation.family == "conv_transpose":
            continue
        size = system_size(operation, first.shape)
        if size.equations * size.unknowns <= MAX_SYSTEM_VALUES:
            sizes.append((size.unknowns / size.equations, layer))
    return tuple(layer for _, layer in sorted(sizes))


class WeightDeltas:
    """Registered: the best determined of the layers outside; in the full suite the best :data:`MOST_LAYERS`."""

    def plan(self, scene: Scene) -> list[Job]:
        """See :class:`motte.audit.interface.Planned`."""
        if not scene.outside:
            return []
        return [self._job(scene, place) for place in range(1 if scene.suite == "quick" else MOST_LAYERS)]

    def _job(self, scene: Scene, place: int) -> Job:
        def run(context: Context) -> Outcome:
            # Shapes are public; how many records a step has is seen first at the ceiling.
            view = scene.subject(Position.CEILING, "training").view
            layers = [layer for layer in solvable(view) if layer in scene.outside]
            if place >= len(layers):
                return Outcome()
            layer = layers[place]

            def make() -> Attack:
                return WeightDelta(layer)

            return standard_job(f"weight delta, {layer}", make, scene, "training").run(context)

        return Job(f"weight delta, layer {place + 1} by determination", run)
