"""Input reconstruction with a generative prior: the image that a generator can make whose exposed tensor is what left.

Zhang, Jia, Pei, Wang, Li & Song, "The Secret Revealer: Generative Model-Inversion Attacks Against Deep Neural
Networks" (CVPR 2020). The generator is a small DCGAN (Radford, Metz & Chintala, ICLR 2016) trained on the public images
alone; the way from an image to what leaves is that of :mod:`motte.audit.attacks.optimisation`. Full suite only, and
never the only judge of a layer: a prior makes plausible images of anything, so it can look like success where nothing
was learnt.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.audit.attacks.decoder import as_map
from motte.audit.attacks.optimisation import ByOptimisation, Forward
from motte.audit.attacks.reconstruction import architecture_of, layers_to_attack, spent
from motte.audit.interface import Attack, Context, Job, PublicData, Scene, View, standard_job

LATENT: Final = 48
RESTARTS: Final = 4
_WIDTH: Final = 24
_BATCH: Final = 32
_PRIOR: Final = 1e-3
_TRAINED_BY: Final = 0.7
"""Share of the budget's seconds that is gone when the generator stops learning."""


class Generator(nn.Module):
    """(N, LATENT) standard normal -> (N, c, H, W) in [0, 1]."""

    def __init__(self, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.side = image[1:]
        self.low = (-(-image[1] // 4), -(-image[2] // 4))
        self.enter = nn.Linear(LATENT, 2 * _WIDTH * self.low[0] * self.low[1])
        self.first = nn.Conv2d(2 * _WIDTH, 2 * _WIDTH, 3, padding=1)
        self.second = nn.Conv2d(2 * _WIDTH, _WIDTH, 3, padding=1)
        self.last = nn.Conv2d(_WIDTH, image[0], 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in (2 * _WIDTH, 2 * _WIDTH, _WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = torch.relu(self.norms[0](self.enter(z).reshape(len(z), -1, *self.low)))
        x = torch.relu(self.norms[1](self.first(functional.interpolate(x, scale_factor=2))))
        x = torch.relu(self.norms[2](self.second(functional.interpolate(x, size=self.side))))
        return torch.sigmoid(self.last(x))


class Critic(nn.Module):
    """(N, c, H, W) -> (N,) logits: real or made."""

    def __init__(self, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.first = nn.Conv2d(image[0], _WIDTH, 4, stride=2, padding=1)
        self.second = nn.Conv2d(_WIDTH, 2 * _WIDTH, 4, stride=2, padding=1)
        self.last = nn.Linear(2 * _WIDTH * (image[1] // 4) * (image[2] // 4), 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = functional.leaky_relu(self.first(x), 0.2)
        logits: Tensor = self.last(functional.leaky_relu(self.second(x), 0.2).flatten(1))
        return logits.squeeze(1)


def train_generator(pixels: Tensor, context: Context) -> Generator:
    """A generator of images like ``pixels`` (N, c, H, W) in [0, 1], H and W at least 4; ``budget.steps`` steps."""
    image = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    random = context.generator("gan")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=random)))
        maker, critic = Generator(image), Critic(image)
    makes = torch.optim.Adam(maker.parameters(), lr=1e-3, betas=(0.5, 0.99))
    judges = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.99))
    for step in range(context.budget.steps):
        context.progress(step, context.budget.steps, "generator")
        if spent(context) > _TRAINED_BY:
            break
        real = pixels[torch.randint(len(pixels), (_BATCH,), generator=random)]
        made = maker(torch.randn(_BATCH, LATENT, generator=random))
        judges.zero_grad()
        (functional.softplus(-critic(real)) + functional.softplus(critic(made.detach()))).mean().backward()
        judges.step()
        makes.zero_grad()
        functional.softplus(-critic(made)).mean().backward()
        makes.step()
    for parameter in maker.parameters():
        parameter.requires_grad_(False)
    return maker.eval()


def invert_latent(
    maker: Generator, forward: Forward, seen: Tensor, context: Context, *, what: str
) -> tuple[Tensor, Tensor]:
    """The best of :data:`RESTARTS` starts for each sample: pixels (N, c, H, W), and the misfit (N,) relative to the
    energy of ``seen`` (N, C, h, w)."""
    count = len(seen)
    z = torch.randn(RESTARTS * count, LATENT, generator=context.generator("latent")).requires_grad_(True)
    wanted = seen.repeat(RESTARTS, 1, 1, 1)
    energy = wanted.square().flatten(1).sum(1).clamp_min(1e-12)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for step in range(context.budget.steps):
        context.progress(step, context.budget.steps, what)
        if context.out_of_time():
            break
        optimizer.zero_grad()
        misfit = (forward.run(maker(z)) - wanted).square().flatten(1).sum(1) / energy
        (misfit + _PRIOR * z.square().mean(1)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        images = maker(z)
        misfit = (forward.run(images) - wanted).square().flatten(1).sum(1) / energy
    best = misfit.reshape(RESTARTS, count).argmin(0) * count + torch.arange(count)
    return images[best], misfit[best]


class WithGanPrior(ByOptimisation):
    """The attack on one layer; see the module's text."""

    name = "reconstruction with a generative prior"
    reference = "Zhang, Jia, Pei, Wang, Li, Song, The Secret Revealer, CVPR 2020"

    fitting = 0.3

    def fit(self, public: PublicData, context: Context) -> None:
        """As by optimisation, and train the generator where something was seen."""
        super().fit(public, context)
        self._maker: Generator | None = None
        if self.forward is not None:
            self._maker = train_generator(public.pixels(public.images[: context.budget.public_samples]), context)

    def guess(self, seen: Tensor, view: View, context: Context) -> Tensor:
        """See :class:`motte.audit.attacks.reconstruction.Reconstruction`."""
        if self._maker is None or self.forward is None:
            return super().guess(seen, view, context)
        return invert_latent(self._maker, self.forward, as_map(seen), context, what=f"latent, {self.layer}")[0]


class WithGanPriors:
    """Registered: the first layer outside, in the full suite."""

    def plan(self, scene: Scene) -> list[Job]:
        """See :class:`motte.audit.interface.Planned`."""
        if scene.suite != "full":
            return []

        def job(layer: str) -> Job:
            def make() -> Attack:
                return WithGanPrior(layer, architecture_of(scene.model, seed=0))

            return standard_job(f"generative prior, {layer}", make, scene, "inference")

        return [job(layer) for layer in layers_to_attack(scene)[:1]]
