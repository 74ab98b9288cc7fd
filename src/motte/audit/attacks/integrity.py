"""The malicious accelerator: which lies pass, and what they do.

Freivalds, "Probabilistic Machines Can Use Less Running Time" (IFIP 1977), is the check that they meet
(:mod:`motte.offload.integrity`); Tramer, Boneh, "Slalom" (ICLR 2019) uses it so. Lies go through the real pipeline: the
model is protected, the accelerator answers in real frames, and only one product's numbers are wrong.

Between two ends: where nobody outside answers no lie exists (floor); where answers are not checked every lie passes
(ceiling). One lie is as small as the check's statement allows, against which the stated bound is held: a pass rate
that is surely above it would refute claim F9, and that is an error of ours.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.audit.attacks.integrity_lies import (
    LIES,
    Liar,
    Lie,
    Product,
    added,
    at_the_stated_magnitude,
    average_norm,
)
from motte.audit.interface import Bracket, Check, Context, Finding, Job, Knowledge, Metric, Outcome, Position, Scored
from motte.audit.statistics import clopper_pearson, lower_limit
from motte.errors import ContradictionError, FrameError, IntegrityError
from motte.offload.integrity import escape_probability
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Fixed

if TYPE_CHECKING:
    from motte.audit.interface import Scene

REFERENCE: Final = (
    "Freivalds, Probabilistic Machines Can Use Less Running Time, IFIP 1977; Tramer and Boneh, Slalom, 2019"
)
KNOWLEDGE: Final = (Knowledge.ANSWERS, Knowledge.WEIGHTS, Knowledge.RECORDING, Knowledge.PUBLIC_DATA)
METRICS: Final = (
    Metric("lies accepted", "share"),
    Metric("lies at the stated magnitude accepted", "share"),
    Metric("answers changed", "share"),
    Metric("answers steered to a chosen class", "share"),
)
SURE: Final = 0.9999
"""Confidence at which the stated bound counts as refuted: one honest audit in ten thousand."""
_LAYERS: Final = 3
_RECORDS: Final = 4
_STRENGTH: Final = 10.0
"""Norm of the steering error at most, in norms of an average honest answer. Unchecked, a liar has no limit at all."""
_STEERING_STEPS: Final = 20


# --- one trial --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One run against a liar: whether a lie was told and refused, and the logits (N, classes) of an accepted one."""

    told: bool
    refused: bool
    logits: Tensor | None


def attempt(
    model: nn.Module,
    scheme: Asymmetric,
    images: Tensor,
    lie: Lie | None,
    layer: str,
    *,
    product: Product = Product.OUTPUT,
    labels: Tensor | None = None,
    before: Tensor | None = None,
    noise_key: bytes | None = None,
    seed: int = 0,
) -> Trial:
    """Run ``images`` (N, C, H, W) against an accelerator that lies once, in ``layer``.

    Args:
        lie: None: honest.
        labels: (N,); with them the run is a training step, else inference.
        before: images that run first, honestly, so that there is something stale.
        noise_key: 32 bytes; None: fresh ones. Runs under one key differ by the lie, not by the noise.
    """
    # One piece: so a layer gives one answer of each kind in a step.
    scheme = replace(scheme, pieces=1)
    liar = Liar(layer, product, vectors=scheme.integrity_vectors if scheme.integrity != "off" else 0, seed=seed)
    split = protect(model, scheme, accelerator=liar, example_input=images[:1], noise_key=noise_key)
    training = labels is not None
    split.train(training)
    try:
        if before is not None:
            _run(split, before, labels)
        liar.lie = lie
        logits = _run(split, images, labels)
    except (IntegrityError, FrameError):
        return Trial(liar.told > 0, refused=True, logits=None)
    finally:
        liar.close()
    return Trial(liar.told > 0, refused=False, logits=logits)


def _run(split: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        with torch.no_grad():
            return torch.as_tensor(split(images))
    with torch.enable_grad():
        logits: Tensor = split(images)
        functional.cross_entropy(logits, labels).backward()
    return logits.detach()


# --- a series of trials -----------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Tally:
    """What a series came to: counts of lies and of answers."""

    lies: int = 0
    accepted: int = 0
    borderline: int = 0
    borderline_accepted: int = 0
    records: int = 0
    changed: int = 0
    steerable: int = 0
    steered: int = 0

    def brackets(self) -> dict[str, Bracket]:
        """Of :data:`METRICS`, exact intervals."""
        pairs = (
            (self.accepted, self.lies),
            (self.borderline_accepted, self.borderline),
            (self.changed, self.records),
            (self.steered, self.steerable),
        )
        return {
            metric.name: clopper_pearson(hits, max(1, tries))
            for metric, (hits, tries) in zip(METRICS, pairs, strict=True)
        }


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """What the series is played on.

    Attributes:
        model: plain, in evaluation mode, never changed.
        layers: outside, of which the liar lies.
        images, labels: (N, C, H, W) and (N,), the victim's. public: (M, C, H, W) of the liar's own, M at least N.
        steering: an error for the last of ``layers`` and the class that it leads to.
    """

    model: nn.Module
    layers: tuple[str, ...]
    images: Tensor
    labels: Tensor
    public: Tensor
    steering: tuple[Tensor, int]


def series(ground: Ground, scheme: Asymmetric, context: Context, *, borderline: int) -> Tally:
    """Every lie in every layer and product, ``borderline`` lies at the stated magnitude, and steering."""
    tally = Tally()
    key = _noise_key(context)
    # Under the same noise, so that only the lie makes a difference; the second of two runs has noise of its own.
    honest = {
        again: _classes(
            attempt(ground.model, scheme, ground.images, None, ground.layers[0], before=before, noise_key=key)
        )
        for again, before in ((False, None), (True, ground.public[: len(ground.images)]))
    }
    total = len(LIES) * len(ground.layers) * len(Product) + borderline + 1
    seeds = iter(range(context.seed, context.seed + 10 * total))
    error, target = ground.steering
    trial = attempt(
        ground.model, scheme, ground.images, added(error), ground.layers[-1], noise_key=key, seed=next(seeds)
    )
    free = honest[False] != target
    tally.steerable = int(free.sum())
    if trial.logits is not None:
        tally.steered = int((trial.logits.argmax(1)[free] == target).sum())
    for done in range(borderline):
        if _late(context, 0.5):
            break
        layer = ground.layers[done % len(ground.layers)]
        trial = attempt(ground.model, scheme, ground.images[:1], at_the_stated_magnitude, layer, seed=next(seeds))
        context.progress(done, total, "lies")
        tally.borderline += trial.told
        tally.borderline_accepted += trial.told and not trial.refused
    plans = [(layer, name, product) for layer in ground.layers for name in LIES for product in Product]
    # In no order, so that what a budget cuts off is like what was tried.
    for done, at in enumerate(torch.randperm(len(plans), generator=context.generator("order of lies")).tolist()):
        if _late(context, 1.0):
            break
        layer, name, product = plans[at]
        again = name == "stale"
        trial = _one(ground, scheme, LIES[name], layer, product, again=again, noise_key=key, seed=next(seeds))
        context.progress(borderline + done + 1, total, "lies")
        if not trial.told:
            continue
        tally.lies += 1
        tally.accepted += not trial.refused
        if product is Product.OUTPUT:
            tally.records += len(ground.images)
            tally.changed += _changed(trial, honest[again])
    return tally


def _late(context: Context, share: float) -> bool:
    """Whether ``share`` of the budget's seconds is spent."""
    return time.monotonic() - context.started > share * context.budget.seconds


def _one(
    ground: Ground,
    scheme: Asymmetric,
    lie: Lie,
    layer: str,
    product: Product,
    *,
    again: bool,
    noise_key: bytes,
    seed: int,
) -> Trial:
    count = _RECORDS if product is not Product.OUTPUT else len(ground.images)
    images = ground.images[:count]
    labels = None if product is Product.OUTPUT else ground.labels[:count]
    before = ground.public[: len(images)] if again else None
    return attempt(
        ground.model if labels is None else _trainable(ground.model),
        scheme,
        images,
        lie,
        layer,
        product=product,
        labels=labels,
        before=before,
        noise_key=noise_key,
        seed=seed,
    )


def _noise_key(context: Context) -> bytes:
    return bytes(torch.randint(256, (32,), generator=context.generator("noise key")).tolist())


def _classes(trial: Trial) -> Tensor:
    """The classes (N,) that an honest run says.

    Raises:
        ContradictionError: it was refused.
    """
    if trial.logits is None:
        raise ContradictionError(
            "an honest accelerator was accused", where="integrity", hint="the integrity check is wrong: report it"
        )
    return trial.logits.argmax(1)


def _trainable(model: nn.Module) -> nn.Module:
    """A copy, whose running statistics and gradients may change."""
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made


def _changed(trial: Trial, honest: Tensor) -> int:
    return 0 if trial.logits is None else int((trial.logits.argmax(1) != honest).sum())


# --- steering ---------------------------------------------------------------------------------------------------------
def steering_error(model: nn.Module, layer: str, images: Tensor, target: int, *, strength: float = _STRENGTH) -> Tensor:
    """One error for the output of ``layer`` that leads answers to ``target``, (M, *spatial) or (*, M).

    Steps along the mean gradient of the target's log-probability over ``images``, by a liar who knows all weights; its
    norm is at most ``strength`` times that of an average honest output.
    """
    outputs: list[Tensor] = []
    error: list[Tensor] = []

    def hook(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        outputs[:] = [output.detach()]
        return output.detach() + error[0] if error else output

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        with torch.no_grad():
            model(images)
        size = average_norm(outputs[0])
        found = torch.zeros_like(outputs[0][0])
        for _ in range(_STEERING_STEPS):
            error[:] = [found.requires_grad_()]
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(model(images).log_softmax(1)[:, target].sum(), found)
            step = gradient / gradient.norm().clamp_min(1e-30)
            found = found.detach() + step * (strength * size / _STEERING_STEPS)
    finally:
        handle.remove()
    return found


# --- the planned attack -----------------------------------------------------------------------------------------------
class Lying:
    """The planned attack: one job, at floor, scheme and ceiling."""

    def plan(self, scene: Scene) -> Sequence[Job]:
        """One job, where the model has a layer that can run outside."""
        return [Job("integrity", partial(run, scene))] if scene.outside else ()


def run(scene: Scene, context: Context) -> Outcome:
    """Play every lie at the three positions.

    Raises:
        ContradictionError: lies at the stated magnitude surely pass more often than claim F9 says.
    """
    ground = _ground(scene, context)
    base = scene.scheme or Asymmetric(noise=None, rank=Fixed(2), offloaded_layers=scene.outside)
    vectors = base.integrity_vectors
    kept, key = scene.known_scores("integrity", Position.CEILING)
    if key not in kept:
        # What a liar may do where nothing is checked; where nobody can lie, none of it.
        free = series(ground, replace(base, integrity="off"), _half(context), borderline=8)
        nobody = replace(free, accepted=0, borderline_accepted=0, changed=0, steered=0)
        kept[key] = Scored(free.brackets())
        floors, floor = scene.known_scores("integrity", Position.FLOOR)
        floors[floor] = Scored(nobody.brackets())
    floors, floor = scene.known_scores("integrity", Position.FLOOR)
    found = {Position.FLOOR: floors[floor].brackets, Position.CEILING: kept[key].brackets}
    tally = Tally()
    if scene.everything_leaves or (scene.scheme is not None and scene.scheme.integrity == "off"):
        found[Position.SCHEME] = found[Position.CEILING]
    elif scene.scheme is None:
        found[Position.SCHEME] = found[Position.FLOOR]
    else:
        tally = series(ground, scene.scheme, _half(context), borderline=64 if scene.suite == "quick" else 512)
        require_bound(tally, vectors)
        found[Position.SCHEME] = tally.brackets()
    notes = _notes(scene, ground, tally, vectors)
    findings = tuple(
        Finding(
            attack="integrity",
            audited=scene.audited,
            metric=metric.name,
            unit=metric.unit,
            higher_is_worse=metric.higher_is_worse,
            layer=None,
            scheme=found[Position.SCHEME][metric.name],
            floor=found[Position.FLOOR][metric.name],
            ceiling=found[Position.CEILING][metric.name],
            knowledge=KNOWLEDGE,
            budget=context.budget,
            seed=context.seed,
            notes=notes,
        )
        for metric in METRICS
    )
    checks = (_never_accused(ground, scene.scheme, context),) if scene.scheme is not None else ()
    return Outcome(findings, checks=checks)


def _half(context: Context) -> Context:
    share = replace(context.budget, seconds=context.budget.seconds / 2)
    return Context(context.seed, share, context.progress)


def require_bound(tally: Tally, vectors: int, *, confidence: float = SURE) -> None:
    """Nothing, unless lies at the stated magnitude surely pass more often than stated.

    Raises:
        ContradictionError: they do.
    """
    stated = escape_probability(vectors)
    if not tally.borderline:
        return
    surely = lower_limit(tally.borderline_accepted, tally.borderline, confidence)
    if surely > stated:
        raise ContradictionError(
            "lies at the stated magnitude pass more often than stated",
            where=f"integrity, {vectors} vectors",
            expected=f"at most {stated:.3g}",
            got=f"{tally.borderline_accepted} of {tally.borderline}: surely above {surely:.3g}",
            hint="the integrity check is wrong: believe no answer of an accelerator of this version, and report it",
        )


def _ground(scene: Scene, context: Context) -> Ground:
    truth = scene.truth("inference")
    public = scene.subject(Position.SCHEME, "inference").public
    layers = tuple(dict.fromkeys((scene.outside[0], scene.outside[len(scene.outside) // 2], scene.outside[-1])))[
        :_LAYERS
    ]
    count = min(len(truth.images), len(public.images))
    images, labels = truth.images[:count], truth.labels[:count]
    target = int(torch.randint(scene.classes, (1,), generator=context.generator("target of the liar")))
    error = steering_error(scene.model, layers[-1], public.images[:64], target)
    return Ground(scene.model, layers, images, labels, public.images, (error, target))


def _never_accused(ground: Ground, scheme: Asymmetric | None, context: Context) -> Check:
    """An honest accelerator, in inference and in a training step."""
    runs = refused = 0
    for seed in range(5):
        for labels in (None, ground.labels[:_RECORDS]):
            model = ground.model if labels is None else _trainable(ground.model)
            images = ground.images if labels is None else ground.images[:_RECORDS]
            if scheme is None:
                continue
            trial = attempt(model, scheme, images, None, ground.layers[0], labels=labels, seed=context.seed + seed)
            runs += 1
            refused += trial.refused
    return Check("an honest accelerator is accused of nothing", "F9", refused == 0, f"{refused} of {runs} runs refused")


def _notes(scene: Scene, ground: Ground, tally: Tally, vectors: int) -> tuple[str, ...]:
    said = [
        f"Lies in {', '.join(ground.layers)}: {', '.join(LIES)}; in outputs and in both gradients of a training step.",
        "Answers changed and steered are counted over records that ran together: they are not independent.",
        f"Steering: one error for all inputs, of at most {_STRENGTH:g} times the norm of an honest answer, by a liar"
        " who knows all weights.",
        "The floor is no measurement: where nothing runs outside, nobody can lie.",
    ]
    if scene.scheme is not None and scene.scheme.integrity != "off":
        said.append(
            f"Stated: at most {escape_probability(vectors):.3g} of lies at the stated magnitude pass, with {vectors}"
            f" vectors; {tally.borderline_accepted} of {tally.borderline} did. Below that magnitude a lie may pass."
        )
    return tuple(said)
