"""Input reconstruction by a paired decoder: learn, from public images run through the real pipeline, to turn what left
for a layer back into the image.

Dosovitskiy & Brox, "Inverting Visual Representations with Convolutional Networks" (CVPR 2016); as an attack on split
networks He, Zhang & Lee, "Model Inversion Attacks Against Collaborative Inference" (ACSAC 2019), the black-box case.
Here the decoder is a linear one in closed form (least squares over 3 x 3 neighbourhoods, which under noise is a Wiener
filter), refined by a small U-Net (Ronneberger, Fischer & Brox, MICCAI 2015). No adversary trains it: a decoder that
was only taught to be plausible (a GAN) says nothing of what a tensor gives away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.audit.attacks.image_metrics import Lpips
from motte.audit.attacks.reconstruction import Reconstruction, layers_to_attack, seen_of_public
from motte.audit.interface import Attack, Context, Job, Knowledge, PublicData, Scene, View, standard_job
from motte.errors import SettingError

BATCH: Final = 16
LEARNING_RATE: Final = 2e-3
WIDTH: Final = 16
_MOST_FEATURES: Final = 1600
"""Beyond it neighbourhoods are not used, and the closed form sees single positions."""
_LOOKING: Final = 0.4
"""Share of the budget's seconds for running public images through the pipeline."""
_MOST_ROWS: Final = 65_536
"""Positions that the closed form learns from, at most."""
_RIDGES: Final = (1e-5, 1e-3, 1e-1, 10.0)
"""Of the closed form, relative to the mean energy of a feature; which one is better, pairs held back tell."""
_HELD_BACK: Final = 8
"""One in so many public images is not trained on, and tells which of the decoders is better."""


def as_map(tensor: Tensor) -> Tensor:
    """A tensor of any layer as a map (N, C, h, w): tokens (N, T, D) as T positions, on a square where T, or T less a
    leading class token, is one; vectors (N, D) as one position; the depth of a volume among the channels."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    if tensor.dim() == 3:
        for tokens in (tensor, tensor[:, 1:]):
            side = math.isqrt(tokens.shape[1])
            if side > 0 and side * side == tokens.shape[1]:
                return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
        return tensor.transpose(1, 2).unsqueeze(2)
    return tensor.flatten(1, tensor.dim() - 3)


class LinearDecoder:
    """Least squares from neighbourhoods of a map to blocks of pixels, in closed form.

    Args:
        seen: (N, C, h, w). images: (N, c, H, W) pixels of the same inputs.
        held: pairs that are not learnt from, and decide how much the solution is shrunk; None: as little as possible.
    """

    def __init__(self, seen: Tensor, images: Tensor, held: tuple[Tensor, Tensor] | None = None) -> None:
        self._shape = tuple(images.shape[1:])
        self._scale = max(1, *(math.ceil(to / of) for to, of in zip(images.shape[2:], seen.shape[2:], strict=True)))
        self._wide = 9 * seen.shape[1] <= _MOST_FEATURES and max(seen.shape[2:]) > 1
        size = (seen.shape[2] * self._scale, seen.shape[3] * self._scale)
        whole = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        wanted = functional.pixel_unshuffle(whole, self._scale)
        gram: Tensor | None = None
        enough = max(4, math.ceil(_MOST_ROWS / (seen.shape[2] * seen.shape[3])))
        for part, to in zip(seen[:enough].split(BATCH), wanted[:enough].split(BATCH), strict=True):
            rows = self._rows(part)
            targets = to.permute(0, 2, 3, 1).reshape(len(rows), -1)
            both = (rows.T @ torch.cat((rows, targets), 1)).double()
            gram = both if gram is None else gram + both
        if gram is None:
            raise SettingError("a decoder learns from pairs, and there are none")
        square, right = gram[:, : len(gram)], gram[:, len(gram) :]
        solutions = [_ridge(square, right, each) for each in (_RIDGES[:1] if held is None else _RIDGES)]
        errors = []
        for self._weights in solutions:
            errors.append(0.0 if held is None else float((self(held[0]) - held[1]).square().mean()))
        self._weights = solutions[errors.index(min(errors))]

    def __call__(self, seen: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, c, H, W), not clamped."""
        blocks = (self._rows(seen) @ self._weights).reshape(len(seen), *seen.shape[2:], -1).permute(0, 3, 1, 2)
        images = functional.pixel_shuffle(blocks, self._scale)
        return functional.interpolate(images, size=self._shape[1:], mode="bilinear", align_corners=False)

    def _rows(self, seen: Tensor) -> Tensor:
        patches = functional.unfold(seen, 3, padding=1) if self._wide else seen.flatten(2)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        return torch.cat((rows, rows.new_ones(len(rows), 1)), 1)


def _ridge(square: Tensor, right: Tensor, ridge: float) -> Tensor:
    shrink = torch.full((len(square),), ridge * float(square.diagonal().mean()) + 1e-30, dtype=square.dtype)
    # The last feature is the constant: what is learnt of nothing is the mean.
    shrink[-1] = 1e-30
    solved: Tensor = torch.linalg.solve(square + shrink.diag(), right).float()
    return solved


class SmallUNet(nn.Module):
    """From a map (N, C, h, w) and a first guess (N, c, H, W) to what is to be added to the guess."""

    def __init__(self, channels: int, image: tuple[int, int, int], width: int = WIDTH) -> None:
        super().__init__()
        self.side = image[1:]
        self.narrow = nn.Conv2d(channels, width, 1)
        self.enter = nn.Conv2d(width + image[0], width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        # Maps of one position have no place for what lies where: a dense way gives them one.
        self.pool = 2
        self.bottom = (min(8, -(-image[1] // 2)), min(8, -(-image[2] // 2)))
        cells = self.bottom[0] * self.bottom[1]
        self.dense = nn.Linear(channels * self.pool**2, width * cells) if channels <= 256 else None
        self.join = nn.Conv2d(3 * width if self.dense is not None else 2 * width, 2 * width, 1)
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, image[0], 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        if self.leave.bias is not None:
            nn.init.zeros_(self.leave.bias)

    def forward(self, seen: Tensor, guess: Tensor) -> Tensor:
        """(N, C, h, w), (N, c, H, W) -> (N, c, H, W)."""
        narrow = functional.interpolate(self.narrow(seen), size=self.side, mode="bilinear", align_corners=False)
        top = torch.relu(self.enter(torch.cat((narrow, guess), 1)))
        low = torch.relu(self.down(top))
        low = torch.relu(self.deep(low))
        if self.dense is not None:
            pooled = functional.adaptive_avg_pool2d(seen, self.pool).flatten(1)
            spatial = torch.relu(self.dense(pooled)).reshape(len(seen), -1, *self.bottom)
            spatial = functional.interpolate(spatial, size=low.shape[2:], mode="bilinear", align_corners=False)
            low = torch.cat((low, spatial), 1)
        low = functional.interpolate(torch.relu(self.join(low)), size=self.side, mode="bilinear", align_corners=False)
        added: Tensor = self.leave(torch.relu(self.up(torch.cat((top, low), 1))))
        return added


@dataclass(frozen=True, slots=True)
class Decoder:
    """What pairs taught: standardisation, then the mean image, the closed form, or that and the network: whichever was
    best on pairs held back."""

    mean: Tensor
    std: Tensor
    average: Tensor
    linear: LinearDecoder | None
    net: SmallUNet | None

    @torch.no_grad()
    def __call__(self, seen: Tensor) -> Tensor:
        """Recorded tensors (N, ...) -> pixels (N, C, H, W) in [0, 1]."""
        standard = (as_map(seen.float()) - self.mean) / self.std
        if self.linear is None:
            return self.average.expand(len(seen), -1, -1, -1).clone()
        guess = self.linear(standard)
        if self.net is not None:
            guess = guess + self.net(standard, guess.clamp(0.0, 1.0))
        return guess.clamp(0.0, 1.0)


def train_decoder(seen: Tensor, images: Tensor, context: Context, *, purpose: str) -> Decoder:
    """Learn from pairs.

    Args:
        seen: (N, ...) recorded tensors of public images, N at least 2.
        images: (N, C, H, W) their pixels in [0, 1].
        purpose: keeps the random numbers of several decoders apart.
    """
    maps = as_map(seen.float())
    mean, std = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True)
    std = torch.where(std > 1e-8, std, torch.ones_like(std))
    maps = (maps - mean) / std
    held = max(1, len(maps) // _HELD_BACK)
    train, train_images = maps[held:], images[held:]
    linear = LinearDecoder(train, train_images, (maps[:held], images[:held]))
    net = _refine(linear, train, train_images, context, purpose)
    average = train_images.mean(0, keepdim=True)
    kinds: tuple[tuple[LinearDecoder | None, SmallUNet | None], ...] = ((None, None), (linear, None), (linear, net))
    decoders = [Decoder(mean, std, average, *kind) for kind in kinds]
    errors = [float((each(seen[:held]) - images[:held]).square().mean()) for each in decoders]
    return decoders[errors.index(min(errors))]


def _refine(linear: LinearDecoder, maps: Tensor, images: Tensor, context: Context, purpose: str) -> SmallUNet:
    shape = images.shape[1:]
    generator = context.generator(f"decoder {purpose}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        net = SmallUNet(maps.shape[1], (shape[0], shape[1], shape[2]))
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    steps = context.budget.steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.no_grad():
        guesses = torch.cat([linear(part) for part in maps.split(BATCH)])
    for step in range(steps):
        context.progress(step, steps, f"decoder, {purpose}")
        if context.out_of_time():
            break
        chosen = torch.randint(len(maps), (min(BATCH, len(maps)),), generator=generator)
        optimizer.zero_grad()
        added = net(maps[chosen], guesses[chosen].clamp(0.0, 1.0))
        (guesses[chosen] + added - images[chosen]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net.eval()


class PairedDecoder(Reconstruction):
    """The attack on one layer; see the module's text."""

    name = "reconstruction by a paired decoder"
    reference = (
        "Dosovitskiy, Brox, Inverting Visual Representations with Convolutional Networks, CVPR 2016; "
        "He, Zhang, Lee, Model Inversion Attacks Against Collaborative Inference, ACSAC 2019"
    )
    knowledge: tuple[Knowledge, ...] = (Knowledge.RECORDING, Knowledge.PUBLIC_DATA, Knowledge.PIPELINE)

    def __init__(self, layer: str, *, lpips: Lpips | None = None) -> None:
        super().__init__(layer, lpips=lpips)
        self._decoder: Decoder | None = None

    def fit(self, public: PublicData, context: Context) -> None:
        """Run the public images through the pipeline, and learn from what left."""
        self._public = public
        known = seen_of_public(public, self.layer or "", context, share=_LOOKING)
        if known is not None and len(known[1]) > 1:
            seen = known[1]
            pixels = public.pixels(public.images[: len(seen)])
            self._decoder = train_decoder(seen, pixels, context, purpose=self.layer or "")

    def guess(self, seen: Tensor, view: View, context: Context) -> Tensor:
        """See :class:`Reconstruction`."""
        if self._decoder is None:
            return super().guess(seen, view, context)
        return self._decoder(seen)


class PairedDecoders:
    """Registered: one job a layer; in the quick suite the first, the middle and the last layer that runs outside."""

    def __init__(self, lpips: Lpips | None = None) -> None:
        self._lpips = lpips

    def plan(self, scene: Scene) -> list[Job]:
        """See :class:`motte.audit.interface.Planned`."""

        def job(layer: str) -> Job:
            def make() -> Attack:
                return PairedDecoder(layer, lpips=self._lpips)

            return standard_job(f"paired decoder, {layer}", make, scene, "inference")

        return [job(layer) for layer in layers_to_attack(scene)]
