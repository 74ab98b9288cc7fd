"""Gradient leakage: the images of a training step from its gradients, by making up images that give the same ones.

``dlg``: squared distance, image and label together, L-BFGS: Zhu, Liu & Han, "Deep Leakage from Gradients" (NeurIPS
2019).
``inverting``: cosine distance with total variation, signed Adam: Geiping, Bauermeister, Droege & Moeller, "Inverting
Gradients" (NeurIPS 2020). Labels are recovered first where they can be (:mod:`motte.audit.attacks.labels`), as in iDLG.

Two sources: ``weights`` (the change of each weight over a step of plain SGD, divided by the learning rate) and
``outputs`` (the output gradients that cross for every layer outside). Layers whose weights are not public have fresh
random ones in the attacker's model, which is why a scheme that keeps the first and the last layer inside stands well
against this attack; the start may be the image that a paired decoder makes of the leaked residual.

Written here because the library for it, ``breaching`` 0.1.2, is not maintained since 2022 and brings its own models,
data sets and configuration system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.audit.attacks.decoder import Decoder, train_decoder
from motte.audit.attacks.first_step import seen_in_first_steps
from motte.audit.attacks.labels import labels_of_softmax_gradient, labels_of_weight_gradient
from motte.audit.attacks.optimisation import total_variation
from motte.audit.attacks.reconstruction import (
    METRICS,
    architecture_of,
    mean_image,
    put_weights,
    score_images,
)
from motte.audit.attacks.weight_delta import weight_at
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
from motte.errors import SettingError

Source = Literal["weights", "outputs"]
Method = Literal["dlg", "inverting"]
_STEP: Final = 0.05
_SMOOTH: Final = 1e-3
_LBFGS_STEPS: Final = 10
"""Evaluations of one step of L-BFGS."""


@dataclass(frozen=True, slots=True)
class Target:
    """What made-up images have to give: by layer, the gradient to its weight, or to its output for each record."""

    source: Source
    gradients: Mapping[str, Tensor]

    @property
    def records(self) -> int | None:
        """How many records there were, if the source tells."""
        if self.source == "weights":
            return None
        return len(next(iter(self.gradients.values())))


def targets_of(view: View, source: Source, step: int) -> Target | None:
    """What the view holds of that source in training step ``step``; None where it holds nothing."""
    gradients: dict[str, Tensor] = {}
    for layer in view.layers:
        if source == "outputs":
            found = view.batch(layer, "gradient", step=step)
            if found is not None:
                gradients[layer] = found.float()
            continue
        before, after = weight_at(view, layer, step), weight_at(view, layer, step + 1)
        if before is not None and after is not None and view.learning_rate is not None:
            change = before.double() - after.double()
            gradients[layer] = (change / view.learning_rate).float()
    return Target(source, gradients) if gradients else None


def gradients_of(model: nn.Module, images: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
    """The same gradients of ``images`` (N, C, H, W) and ``labels`` ((N,) int64, or (N, K) shares), with their graph."""
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    hooks = []
    if target.source == "outputs":

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
                outputs[name] = output
                # What follows may change its input in place.
                return output.clone()

            return hook

        hooks = [modules[name].register_forward_hook(keep(name)) for name in target.gradients]
    try:
        loss = functional.cross_entropy(model(images), labels)
    finally:
        for hook in hooks:
            hook.remove()
    names = list(target.gradients)
    wanted = [outputs[name] if target.source == "outputs" else modules[name].get_parameter("weight") for name in names]
    found = torch.autograd.grad(loss, wanted, create_graph=True)
    return dict(zip(names, found, strict=True))


def distance(given: Mapping[str, Tensor], target: Target, method: Method) -> Tensor:
    """Between made-up and seen gradients: relative squared error (dlg), or 1 less the cosine (inverting); a scalar."""
    dot = given[next(iter(given))].new_zeros(())
    own, other, error = dot.clone(), dot.clone(), dot.clone()
    for name, seen in target.gradients.items():
        made = given[name]
        dot = dot + (made * seen).sum()
        own = own + made.square().sum()
        other = other + seen.square().sum()
        error = error + (made - seen).square().sum()
    if method == "dlg":
        return error / other.clamp_min(1e-30)
    return 1 - dot / (own * other).sqrt().clamp_min(1e-30)


def invert_gradients(
    model: nn.Module,
    target: Target,
    start: Tensor,
    labels: Tensor | None,
    context: Context,
    *,
    method: Method,
    bounds: tuple[Tensor, Tensor] | None,
    classes: int,
) -> tuple[Tensor, Tensor, float]:
    """Images (N, C, H, W), labels (N,) and the distance that is left.

    Args:
        model: with what is public of its weights; in the mode in which the victim trained.
        start: (N, C, H, W), normalised.
        labels: (N,) int64; None: found together with the images.
        bounds: least and largest value of each channel, (1, C, 1, 1); None: any.
    """
    images = start.clone().requires_grad_(True)
    made_up = None if labels is not None else torch.zeros(len(start), classes).requires_grad_(True)
    variables = [images] if made_up is None else [images, made_up]

    def wanted() -> Tensor:
        if labels is not None:
            return labels
        return functional.softmax(made_up if made_up is not None else start, 1)

    def loss() -> Tensor:
        away = distance(gradients_of(model, images, wanted(), target), target, method)
        return away if method == "dlg" else away + _SMOOTH * total_variation(images).mean()

    _minimise(loss, variables, context, method, bounds)
    with torch.enable_grad():
        left = float(distance(gradients_of(model, images, wanted(), target), target, method).detach())
    found = labels if labels is not None else wanted().argmax(1)
    return images.detach(), found.detach(), left


def _minimise(
    loss: Callable[[], Tensor],
    variables: list[Tensor],
    context: Context,
    method: Method,
    bounds: tuple[Tensor, Tensor] | None,
) -> None:
    steps = context.budget.steps
    optimizer: torch.optim.Optimizer = torch.optim.Adam(variables, lr=_STEP)
    if method == "dlg":
        optimizer = torch.optim.LBFGS(variables, max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe")
        steps = max(1, steps // _LBFGS_STEPS)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if method == "inverting" else None

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        gradients = torch.autograd.grad(value, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            # Adam on the sign alone, as Inverting Gradients has it.
            variable.grad = gradient.sign() if method == "inverting" else gradient
        return value

    for step in range(steps):
        context.progress(step, steps, f"gradient leakage, {method}")
        if context.out_of_time():
            break
        optimizer.step(evaluate)  # type: ignore[arg-type]
        if rates is not None:
            rates.step()
        if bounds is not None:
            with torch.no_grad():
                variables[0].copy_(torch.minimum(torch.maximum(variables[0], bounds[0]), bounds[1]))


def in_order_of(found: Tensor, originals: Tensor) -> Tensor:
    """``found`` (N, C, H, W) put beside the originals that they are nearest to, each once: a sum of gradients does not
    tell which record was first. For scoring only."""
    far = torch.cdist(found.double().flatten(1), originals.double().flatten(1))
    order = torch.zeros(len(found), dtype=torch.int64)
    for _ in range(len(found)):
        place = int(far.argmin())
        row, column = divmod(place, far.shape[1])
        order[column] = row
        far[row], far[:, column] = torch.inf, torch.inf
    return found[order]


class GradientLeakage:
    """The attack on the first step that was watched.

    Args:
        blank: the architecture with fresh weights; it is changed.
        source: weight gradients or output gradients.
        from_residual: start at what a paired decoder makes of the leaked residual, not at the mean public image.
        method: see the module's text.
    """

    reference = (
        "Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019; "
        "Geiping, Bauermeister, Droege, Moeller, Inverting Gradients, NeurIPS 2020"
    )
    metrics: tuple[Metric, ...] = METRICS
    knowledge: tuple[Knowledge, ...] = (
        Knowledge.RECORDING,
        Knowledge.ARCHITECTURE,
        Knowledge.WEIGHTS,
        Knowledge.PUBLIC_DATA,
        Knowledge.PIPELINE,
    )
    layer: str | None = None

    def __init__(
        self, blank: nn.Module, source: Source, *, from_residual: bool = False, method: Method = "inverting"
    ) -> None:
        self.name = f"gradient leakage from {source}" + (", started from the residual" if from_residual else "")
        self._blank = blank
        self._source: Source = source
        self._from_residual = from_residual
        self._method: Method = method
        self._public: PublicData | None = None
        self._decoder: tuple[str, Decoder] | None = None

    def fit(self, public: PublicData, context: Context) -> None:
        """Train the decoder that gives the start, where that is asked for."""
        self._public = public
        if not self._from_residual:
            return
        images, labels = (each[: context.budget.public_samples] for each in (public.images, public.labels))
        first = seen_in_first_steps(
            public, images, labels, lambda view: next(iter(view.layers), None), "activation", seed=context.seed
        )
        if first is not None:
            told = f"{first.layer} start"
            self._decoder = (first.layer, train_decoder(first.values, public.pixels(images), context, purpose=told))

    def attack(self, view: View, context: Context) -> Result:
        """See :class:`motte.audit.interface.Attack`.

        Raises:
            SettingError: called before fit.
        """
        public = self._public
        if public is None:
            raise SettingError("an attack is fitted before it attacks", where=self.name)
        step = next((each.step for each in view.sightings if each.kind == "activation"), 0)
        target = targets_of(view, self._source, step)
        first = view.batch(view.layers[0], step=step) if target is not None else None
        if target is None or first is None:
            guess = mean_image(public, context.budget.samples)
            return Result({"images": guess}, ("Nothing was seen: the guess is the mean of the public images.",))
        put_weights(self._blank, view.weights)
        for layer in view.layers:
            # What left last is the weight of a later step.
            weight = weight_at(view, layer, step)
            put_weights(self._blank, {} if weight is None else {f"{layer}.weight": weight})
        labels, told = self._labels(view, step, len(first))
        mean, std = (torch.tensor(each).reshape(1, -1, 1, 1) for each in (public.mean, public.std))
        start = (self._start(view, step, len(first), context) - mean) / std
        images, found, left = invert_gradients(
            self._blank.train(),
            target,
            start,
            labels,
            context,
            method=self._method,
            bounds=((0 - mean) / std, (1 - mean) / std),
            classes=view.classes,
        )
        notes = (f"Labels were {told}.", f"Distance of the gradients at the end: {left:.3g}.")
        return Result({"images": public.pixels(images), "labels": found}, notes)

    def score(self, result: Result, truth: Truth, context: Context) -> Scored:
        """See :class:`motte.audit.interface.Attack`."""
        images = result.values["images"][: len(truth.images)].float()
        ordered = in_order_of(images, truth.pixels()[: len(images)])
        return score_images(ordered, truth, context, lpips=None, title=self.name)

    def _labels(self, view: View, step: int, count: int) -> tuple[Tensor | None, str]:
        for layer, operation in view.operations.items():
            if operation.out_channels != view.classes or operation.family != "linear":
                continue
            gradients = view.batch(layer, "gradient", step=step)
            exact = None if gradients is None else labels_of_softmax_gradient(gradients)
            if exact is not None:
                return exact, "read off the softmax gradient"
            target = targets_of(view, "weights", step)
            if target is not None and layer in target.gradients and count <= view.classes:
                return labels_of_weight_gradient(target.gradients[layer], count), "read off the last weight's gradient"
        return None, "found together with the images"

    def _start(self, view: View, step: int, count: int, context: Context) -> Tensor:
        public = self._public
        if public is None:
            raise SettingError("an attack is fitted before it attacks", where=self.name)
        if self._decoder is not None:
            layer, decoder = self._decoder
            seen = view.batch(layer, step=step)
            if seen is not None:
                return decoder(seen)
        noise = torch.rand(count, *view.input_shape, generator=context.generator("start")) - 0.5
        return (mean_image(public, count) + 0.1 * noise).clamp(0.0, 1.0)


class GradientLeakages:
    """Registered: from weight gradients; in the full suite also from output gradients, and from the leaked residual."""

    def plan(self, scene: Scene) -> list[Job]:
        """See :class:`motte.audit.interface.Planned`."""
        if not scene.outside:
            return []
        kinds: tuple[tuple[Source, bool], ...] = (("weights", False),)
        if scene.suite == "full":
            kinds = (("weights", False), ("outputs", False), ("weights", True))

        def job(source: Source, from_residual: bool) -> Job:
            def make() -> Attack:
                blank = architecture_of(scene.model, seed=0)
                return GradientLeakage(blank, source, from_residual=from_residual)

            return standard_job(make().name, make, scene, "training")

        return [job(*each) for each in kinds]
