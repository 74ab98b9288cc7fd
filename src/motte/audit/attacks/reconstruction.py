"""What the attacks that give images share: how they are scored, what they fall back to, and who runs where.

A guess is judged by PSNR and SSIM against the original, by whether the original is found again with it among all
private images (``matched``), and by whether the victim's own model gives it the original's label (``recognised``).
LPIPS is judged only where weights for it were given (``lpips=``).

Where nothing is seen, the best guess is the mean of the public images: it is the floor of every one of these metrics.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from motte.audit.attacks import image_metrics
from motte.audit.attacks.image_metrics import Lpips
from motte.audit.interface import (
    Bracket,
    Context,
    Metric,
    Picture,
    PublicData,
    Result,
    Scene,
    Scored,
    Truth,
    View,
)
from motte.audit.intervals import of_mean, of_share
from motte.errors import SettingError

METRICS: Final[tuple[Metric, ...]] = (
    Metric("psnr", "dB"),
    Metric("ssim", "1"),
    Metric("matched", "share"),
    Metric("recognised", "share"),
)
LPIPS_METRIC: Final = Metric("lpips", "1", higher_is_worse=False)
NO_LPIPS: Final = "LPIPS is not available: no weights were given for it."
_AT_A_TIME: Final = 64
SHOWN: Final = 8
"""Images of a row of a grid."""


def image_metrics_of(lpips: Lpips | None) -> tuple[Metric, ...]:
    """What images are judged by."""
    return METRICS if lpips is None else (*METRICS, LPIPS_METRIC)


def score_images(guesses: Tensor, truth: Truth, context: Context, *, lpips: Lpips | None, title: str) -> Scored:
    """Compare guessed pixels with the private images.

    Args:
        guesses: (n, C, H, W) in [0, 1], of the first n private images, in their order; n at least 1.
        title: of the picture.

    Raises:
        SettingError: more guesses than there are private images, or none.
    """
    count = len(guesses)
    if not 1 <= count <= len(truth.images):
        raise SettingError("not guesses of these images", expected=f"1 to {len(truth.images)}", got=str(count))
    guesses, originals = guesses.float().clamp(0.0, 1.0), truth.pixels()[:count].float()
    matches = image_metrics.matched(guesses, originals)
    brackets: dict[str, Bracket] = {
        "psnr": of_mean(image_metrics.psnr(guesses, originals).tolist(), seed=context.seed),
        "ssim": of_mean(image_metrics.ssim(guesses, originals).tolist(), seed=context.seed),
        "matched": _share(matches),
        "recognised": _share(image_metrics.recognised(guesses, truth.labels[:count], _Victim(truth))),
    }
    notes: tuple[str, ...] = (f"{count} private images.",)
    if lpips is not None:
        brackets["lpips"] = of_mean(lpips(guesses, originals).tolist(), seed=context.seed)
    else:
        notes = (*notes, NO_LPIPS)
    rows = (("originals", originals[:SHOWN]), ("reconstructions", guesses[:SHOWN]))
    return Scored(brackets, pictures=(Picture(title, rows),), notes=notes)


def _share(hits: Tensor) -> Bracket:
    """Shares with ties counted in part: the exact interval of the nearest whole number, widened to hold the value."""
    total = float(hits.sum())
    value = total / len(hits)
    near = of_share(min(len(hits), math.floor(total + 0.5)), len(hits))
    return Bracket(value, min(near.low, value), max(near.high, value))


class _Victim:
    """The victim's model on pixels, to recognise reconstructions with."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth

    def __call__(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(each).reshape(1, -1, 1, 1) for each in (self._truth.mean, self._truth.std))
        logits: Tensor = self._truth.model((pixels - mean) / std)
        return logits


def mean_image(public: PublicData, count: int) -> Tensor:
    """(count, C, H, W) pixels: the guess of who saw nothing."""
    pixels = public.pixels(public.images)
    return pixels.mean(0, keepdim=True).expand(count, -1, -1, -1).clone()


class Reconstruction:
    """The part of an attack that all of these share; :meth:`guess` is what tells them apart.

    Args:
        layer: whose recorded ``activation`` is looked at.
        lpips: a further metric.
    """

    name: str = ""
    reference: str = ""

    def __init__(self, layer: str, *, lpips: Lpips | None = None) -> None:
        self.layer: str | None = layer
        self.metrics = image_metrics_of(lpips)
        self._lpips = lpips
        self._public: PublicData | None = None

    def observed(self, view: View) -> Tensor | None:
        """What left for the layer, (N, ...) float32; None at the floor."""
        found = view.batch(self.layer or "")
        return None if found is None else found.float()

    def guess(self, seen: Tensor, view: View, context: Context) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] for the N tensors that were seen."""
        raise SettingError("an attack that gives images overrides guess", where=type(self).__name__)

    def attack(self, view: View, context: Context) -> Result:
        """See :class:`motte.audit.interface.Attack`.

        Raises:
            SettingError: called before fit.
        """
        public = self.public
        seen = self.observed(view)
        if seen is None:
            images = mean_image(public, context.budget.samples)
            return Result({"images": images}, ("Nothing was seen: the guess is the mean of the public images.",))
        return Result({"images": self.guess(seen[: context.budget.samples], view, context)})

    def score(self, result: Result, truth: Truth, context: Context) -> Scored:
        """See :class:`motte.audit.interface.Attack`."""
        guesses = result.values["images"][: len(truth.images)]
        return score_images(guesses, truth, context, lpips=self._lpips, title=f"{self.name}, {self.layer}")

    @property
    def public(self) -> PublicData:
        """What :meth:`fit` was given.

        Raises:
            SettingError: called before fit.
        """
        if self._public is None:
            raise SettingError("an attack is fitted before it attacks", where=self.name)
        return self._public


def architecture_of(model: nn.Module, *, seed: int) -> nn.Module:
    """A copy of ``model`` with fresh weights, in evaluation mode: what is public of it, and nothing else.

    Every parameter and buffer is drawn anew, also of modules that cannot reset themselves.
    """
    blank = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in blank.parameters():
            parameter.data.normal_(0.0, 0.02)
            parameter.grad = None
        for buffer in blank.buffers():
            buffer.data.zero_()
        for module in blank.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return blank.eval()


def put_weights(blank: nn.Module, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Put what is public into a :func:`architecture_of`, in place; the names that were put. Names and shapes that the
    architecture does not have are left out."""
    state, put = blank.state_dict(), set()
    for name, value in weights.items():
        if name in state and state[name].shape == value.shape:
            state[name].copy_(value)
            put.add(name)
    return frozenset(put)


class Reached(Exception):
    """A forward pass got to the layer that was asked for."""


def input_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What ``layer`` is given when ``model`` runs ``images``, with its graph; nothing after it is computed.

    Raises:
        SettingError: no such layer, or one that does not run.
    """
    known = dict(model.named_modules())
    if layer not in known:
        raise SettingError("no layer of that name", got=layer, expected=", ".join(known)[:400])
    met: list[Tensor] = []

    def stop(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        met.append(arguments[0])
        raise Reached

    hook = known[layer].register_forward_pre_hook(stop)
    try:
        model(images)
    except Reached:
        return met[0]
    finally:
        hook.remove()
    raise SettingError("this layer did not run", got=layer)


def parameters_before(model: nn.Module, layer: str, images: Tensor) -> frozenset[str]:
    """Names of the state (parameters and buffers) of every module that runs before ``layer``.

    Raises:
        SettingError: no such layer, or one that does not run.
    """
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        with torch.no_grad():
            input_of(model, layer, images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    prefixes = tuple(f"{name}." for name in ran)
    return frozenset(name for name in model.state_dict() if name.startswith(prefixes)) if prefixes else frozenset()


def spent(context: Context) -> float:
    """Share of the budget's seconds that is gone: an attack of several stages leaves time for the later ones."""
    return (time.monotonic() - context.started) / context.budget.seconds


def seen_of_public(public: PublicData, layer: str, context: Context, *, share: float) -> tuple[View, Tensor] | None:
    """Run public images through the pipeline, a few at a time, until ``share`` of the budget's seconds is gone.

    Returns:
        the view of the last few, and what left for ``layer`` of the first n public images, (n, ...) float32; None where
        nothing leaves.
    """
    images = public.images[: context.budget.public_samples]
    found: list[Tensor] = []
    view: View | None = None
    for part in images.split(_AT_A_TIME):
        context.progress(sum(map(len, found)), len(images), f"public images, {layer}")
        view = public.pipeline.observe(part, seed=context.seed, layers=(layer,), answers=False)
        seen = view.batch(layer)
        if seen is None:
            return None
        found.append(seen.float())
        if spent(context) > share:
            break
    return None if view is None else (view, torch.cat(found))


def spread_over(layers: Sequence[str], count: int) -> tuple[str, ...]:
    """At most ``count`` of ``layers``: the first, the last, and others evenly between."""
    if len(layers) <= count:
        return tuple(layers)
    if count == 1:
        return (layers[0],)
    places = [round(number * (len(layers) - 1) / (count - 1)) for number in range(count)]
    return tuple(layers[place] for place in dict.fromkeys(places))


def layers_to_attack(scene: Scene) -> tuple[str, ...]:
    """The layers whose residuals a suite looks at: in the quick one the first, the middle and the last."""
    return scene.outside if scene.suite == "full" else spread_over(scene.outside, 3)
