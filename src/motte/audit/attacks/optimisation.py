"""Input reconstruction by optimisation: the image of least total variation whose exposed tensor is what left.

Mahendran & Vedaldi, "Understanding Deep Image Representations by Inverting Them" (CVPR 2015). It needs to know how an
image becomes what leaves. Where every weight before the layer is public and nothing is taken off (accelerator-only),
that is the model itself, which the attack finds out by trying it on its own images. Elsewhere it learns a substitute
from public images run through the real pipeline, decomposition included (He, Zhang & Lee, ACSAC 2019, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.audit.attacks.decoder import as_map
from motte.audit.attacks.image_metrics import Lpips
from motte.audit.attacks.reconstruction import (
    Reconstruction,
    architecture_of,
    input_of,
    parameters_before,
    put_weights,
    seen_of_public,
    spent,
)
from motte.audit.interface import Attack, Context, Job, Knowledge, PublicData, Scene, View, standard_job

BATCH: Final = 16
EXACT: Final = 1e-4
"""Relative squared error below which a model is taken for the one that ran: above what rounding makes of it."""
_SMOOTH: Final = 0.02
"""Weight of the total variation against a misfit as large as the forward model's own error."""
_STEP: Final = 0.05
_TRIED: Final = 4
"""Public images on which an inversion is tried."""
_WIDTH: Final = 16
_KNOWN_ERROR: Final = 1e-3
"""Least misfit that is aimed at: below it the optimisation, not the model, is what limits."""


@dataclass(frozen=True, slots=True)
class Forward:
    """How an image becomes a map.

    Attributes:
        run: pixels (N, c, H, W) in [0, 1] -> map (N, C, h, w), with its graph.
        error: of ``run`` on public images that it was not made from: squared error over energy.
        exact: whether it is the model itself.
    """

    run: Callable[[Tensor], Tensor]
    error: float
    exact: bool


class Substitute(nn.Module):
    """A small network in the place of what runs inside: pixels (N, c, H, W) -> map (N, C, h, w)."""

    def __init__(self, channels: int, target: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = target[1:]
        self.first = nn.Conv2d(channels, _WIDTH, 3, padding=1)
        self.second = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)
        self.third = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)
        self.last = nn.Conv2d(_WIDTH + channels, target[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = functional.leaky_relu(self.first(x), 0.1)
        y = functional.adaptive_avg_pool2d(functional.leaky_relu(self.second(y), 0.1), self.size)
        y = functional.leaky_relu(self.third(y), 0.1)
        out: Tensor = self.last(torch.cat((y, functional.adaptive_avg_pool2d(x, self.size)), 1))
        return out


def total_variation(images: Tensor) -> Tensor:
    """Sum of squared differences of neighbours, a pixel's mean, (N,) (Mahendran & Vedaldi with beta = 2)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).square().flatten(1).sum(1)
    right = (images[:, :, :, 1:] - images[:, :, :, :-1]).square().flatten(1).sum(1)
    return (down + right) / images[0].numel()


def known_forward(blank: nn.Module, layer: str, public: PublicData, view: View, seen: Tensor) -> Forward | None:
    """The model itself up to ``layer``, if every weight before it is public and it gives what was seen; else None.

    Args:
        blank: the architecture; its weights are overwritten.
        view: of the public images. seen: (N, ...) what left of the first N of them.
    """
    if not parameters_before(blank, layer, public.images[:1]) <= put_weights(blank, view.weights):
        return None
    for parameter in blank.parameters():
        parameter.requires_grad_(False)
    mean, std = (torch.tensor(each).reshape(1, -1, 1, 1) for each in (public.mean, public.std))

    def run(pixels: Tensor) -> Tensor:
        return as_map(input_of(blank, layer, (pixels - mean) / std))

    few = min(8, len(seen))
    with torch.no_grad():
        given = run(public.pixels(public.images[:few]))
    wanted = as_map(seen[:few].float())
    if given.shape != wanted.shape:
        return None
    error = _relative(given, wanted)
    return Forward(run, error, exact=True) if error <= EXACT else None


def learnt_forward(seen: Tensor, pixels: Tensor, context: Context, *, purpose: str, share: float = 0.5) -> Forward:
    """A substitute from pairs: (N, ...) what left, (N, c, H, W) pixels of the same public images.

    Args:
        share: of the budget's seconds after which training stops.
    """
    maps = as_map(seen.float())
    mean, std = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True).clamp_min(1e-8)
    wanted = (maps - mean) / std
    held = max(1, len(maps) // 8)
    generator = context.generator(f"substitute {purpose}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        net = Substitute(pixels.shape[1], (maps.shape[1], maps.shape[2], maps.shape[3]))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(context.budget.steps):
        context.progress(step, context.budget.steps, f"substitute, {purpose}")
        if spent(context) > share:
            break
        chosen = held + torch.randint(max(len(maps) - held, 1), (BATCH,), generator=generator)
        chosen = chosen.clamp_max(len(maps) - 1)
        optimizer.zero_grad()
        (net(pixels[chosen]) - wanted[chosen]).square().mean().backward()
        optimizer.step()
    for parameter in net.parameters():
        parameter.requires_grad_(False)

    def run(images: Tensor) -> Tensor:
        made: Tensor = net(images)
        return made * std + mean

    with torch.no_grad():
        error = _relative(run(pixels[:held]), maps[:held])
    return Forward(run, error, exact=False)


def invert(forward: Forward, seen: Tensor, start: Tensor, context: Context, *, what: str) -> Tensor:
    """Pixels (N, c, H, W) in [0, 1] of least total variation that ``forward`` takes to ``seen`` (N, C, h, w)."""
    images = start.clone().requires_grad_(True)
    energy = seen.square().flatten(1).sum(1).clamp_min(1e-12)
    aim = max(forward.error, _KNOWN_ERROR)
    optimizer = torch.optim.Adam([images], lr=_STEP)
    steps = context.budget.steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        context.progress(step, steps, what)
        if context.out_of_time():
            break
        optimizer.zero_grad()
        misfit = (forward.run(images) - seen).square().flatten(1).sum(1) / energy
        (misfit / aim + _SMOOTH * total_variation(images) * images[0].numel() ** 0.5).sum().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0.0, 1.0)
    return images.detach()


class ByOptimisation(Reconstruction):
    """The attack on one layer; see the module's text.

    Args:
        blank: the architecture with fresh weights (:func:`architecture_of`); it is changed.
    """

    name = "reconstruction by optimisation"
    reference = "Mahendran, Vedaldi, Understanding Deep Image Representations by Inverting Them, CVPR 2015"
    knowledge: tuple[Knowledge, ...] = (
        Knowledge.RECORDING,
        Knowledge.ARCHITECTURE,
        Knowledge.WEIGHTS,
        Knowledge.PUBLIC_DATA,
        Knowledge.PIPELINE,
    )

    fitting = 0.5
    """Share of the budget's seconds for learning a substitute."""

    def __init__(self, layer: str, blank: nn.Module, *, lpips: Lpips | None = None) -> None:
        super().__init__(layer, lpips=lpips)
        self._blank = blank
        self._forward: Forward | None = None
        self._tried: tuple[Tensor, Tensor] | None = None

    def fit(self, public: PublicData, context: Context) -> None:
        """Find out how an image becomes what leaves."""
        self._public = public
        layer = self.layer or ""
        known = seen_of_public(public, layer, context, share=self.fitting / 2)
        if known is None:
            return
        view, seen = known
        self._forward = known_forward(self._blank, layer, public, view, seen)
        if self._forward is None:
            pixels = public.pixels(public.images[: len(seen)])
            self._forward = learnt_forward(seen, pixels, context, purpose=layer, share=self.fitting)
        # The first ones were held back from learning.
        few = min(_TRIED, len(seen))
        self._tried = (as_map(seen[:few]), public.pixels(public.images[:few]))

    @property
    def forward(self) -> Forward | None:
        """What :meth:`fit` found; None at the floor."""
        return self._forward

    def guess(self, seen: Tensor, view: View, context: Context) -> Tensor:
        """See :class:`Reconstruction`."""
        if self._forward is None:
            return super().guess(seen, view, context)
        mean = self.public.pixels(self.public.images).mean(0, keepdim=True)
        maps, originals = self._tried if self._tried is not None else (as_map(seen)[:0], seen[:0])
        both = torch.cat((maps, as_map(seen)))
        start = mean.expand(len(both), -1, -1, -1)
        found = invert(self._forward, both, start, context, what=f"inversion, {self.layer}") - mean
        # How much of what was found is to be believed, the attacker learns from public images.
        tried, guesses = found[: len(maps)], found[len(maps) :]
        if not len(tried):
            return guesses + mean
        belief = float((tried * (originals - mean)).sum() / tried.square().sum().clamp_min(1e-12))
        return (mean + min(max(belief, 0.0), 1.0) * guesses).clamp(0.0, 1.0)


class ByOptimisations:
    """Registered: the first layer outside; in the full suite every one."""

    def __init__(self, lpips: Lpips | None = None) -> None:
        self._lpips = lpips

    def plan(self, scene: Scene) -> list[Job]:
        """See :class:`motte.audit.interface.Planned`."""

        def job(layer: str) -> Job:
            def make() -> Attack:
                return ByOptimisation(layer, architecture_of(scene.model, seed=0), lpips=self._lpips)

            return standard_job(f"optimisation, {layer}", make, scene, "inference")

        return [job(layer) for layer in (scene.outside if scene.suite == "full" else scene.outside[:1])]


def _relative(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12))
