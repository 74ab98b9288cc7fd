"""What one layer tells, layer by layer: the tables of docs/findings.md that no single audit prints.

    python benchmarks/bench_leakage.py depth       # images from each split layer's residual
    python benchmarks/bench_leakage.py boundary    # the same where more first layers are trusted
    python benchmarks/bench_leakage.py labels      # labels from output gradients, before and after training
    python benchmarks/bench_leakage.py delta       # weight delta, with noise on some of what leaves
    python benchmarks/bench_leakage.py determined  # at which batch a step of a classic model is determined

The attacks are those of ``motte audit``, at the scheme's position alone; floor and ceiling stand in its tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import motte.zoo.vision_ops  # noqa: F401  before torchvision
from motte.audit import views
from motte.audit.attacks.decoder import PairedDecoder
from motte.audit.attacks.labels import LabelRecovery
from motte.audit.attacks.weight_delta import principal_part, steps_of
from motte.audit.finding import Budget
from motte.audit.interface import Context, Position
from motte.audit.measures.exposure import exposure
from motte.audit.scene import Audited, SchemeScene, make_stage, scenes_of
from motte.offload.cautions import determined_samples, unspoken
from motte.offload.layers import trace
from motte.offload.placement import place_all
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism
from motte.train.data import open_data
from motte.zoo import WeightsChoice, build

if TYPE_CHECKING:
    from motte.audit.interface import Scored

MODEL, DATA = "resnet20-fashion-mnist", "fashion-mnist"
CLASSICS = (MODEL, "resnet18", "vgg11", "alexnet", "squeezenet1_1", "mobilenet_v3_small")
SOME = Mechanism(clip=1.0, noise_multiplier=0.5)
NOISES: Mapping[str, Gaussian | None] = {
    "none": None,
    "residual": Gaussian(residual=SOME),
    "residual, gradient": Gaussian(residual=SOME, gradient=SOME),
    "residual, update": Gaussian(residual=SOME, update=SOME),
    "residual, gradient, update": Gaussian(residual=SOME, gradient=SOME, update=SOME),
}
RECONSTRUCTION = Budget(seconds=60.0, steps=150, samples=16, public_samples=384)


def scene(scheme: Asymmetric, budget: Budget, *, trained: bool = True) -> SchemeScene:
    """The shipped model, or its architecture with fresh weights, under ``scheme``."""
    built = build(MODEL, weights=WeightsChoice(random_seed=None if trained else 0))
    stage = make_stage(built, open_data(DATA, seed=0), suite="quick", budget=budget, seed=0)
    (found,) = scenes_of(stage, [Audited("asymmetric", scheme)])
    return found


def reconstructed(of: SchemeScene, layer: str) -> str:
    """A row: what left of ``layer``, and what a decoder makes of it."""
    budget, subject, truth = of.stage.budget, of.subject(Position.SCHEME, "inference"), of.truth("inference")
    sent = subject.view.batch(layer)
    if sent is None:
        raise SystemExit(f"nothing left of {layer}")
    share = exposure(sent, truth.activations[layer], layer=layer).energy
    attack, context = PairedDecoder(layer), Context(0, budget)
    attack.fit(subject.public, context)
    scored: Scored = attack.score(attack.attack(subject.view, context), truth, context)
    figures = ", ".join(f"{name} {found.value:.3g}" for name, found in scored.brackets.items())
    return f"{layer} {tuple(sent.shape[1:])}: {share:.1%} of the energy left; {figures}"


def depth() -> Iterator[str]:
    """Every split layer under the default placement."""
    found = scene(Asymmetric(noise=None), RECONSTRUCTION)
    for layer in found.outside:
        yield reconstructed(found, layer)


def boundary() -> Iterator[str]:
    """The first two layers that are still split, with more and more of the first ones trusted."""
    order = list(scene(Asymmetric(noise=None), RECONSTRUCTION).outside)
    for count in (3, 6, 12, 16):
        trusted = ("stem.0", *order[:count], "classifier")
        found = scene(Asymmetric(noise=None, trusted_layers=trusted), RECONSTRUCTION)
        for layer in found.outside[:2]:
            yield f"{count} more layers trusted: {reconstructed(found, layer)}"


def labels() -> Iterator[str]:
    """64 private records, 512 of the attacker's own; one layer outside, so that no other can tell."""
    budget = Budget(seconds=60.0, samples=64, public_samples=512)
    for trained in (False, True):
        for layer in ("stage1.1.conv1", "stage2.0.conv2", "stage3.0.conv2", "stage3.2.conv2"):
            for name in ("none", "residual", "residual, gradient"):
                scheme = Asymmetric(noise=NOISES[name], rank=Fixed(2), offloaded_layers=(layer,))
                of = scene(scheme, budget, trained=trained)
                subject, context, attack = of.subject(Position.SCHEME, "training"), Context(0, budget), LabelRecovery()
                attack.fit(subject.public, context)
                scored = attack.score(attack.attack(subject.view, context), of.truth("training"), context)
                weights = "trained" if trained else "fresh"
                yield f"{weights} weights, {layer}, noise on {name}: {scored.brackets['accuracy'].value:.1%} of labels"


def delta() -> Iterator[str]:
    """The principal part that is solved for, against what the layer was really given, in a step on 8 records."""
    layer, given = "stage3.0.conv2", list[Tensor]()

    def watched(*arguments: object, **settings: object) -> nn.Module:
        model = protect(*arguments, **settings)  # type: ignore[arg-type]
        model.get_submodule(layer).register_forward_pre_hook(
            lambda module, inputs: given.append(inputs[0].detach().double()) if module.training else None
        )
        return model

    for name, noise in NOISES.items():
        given.clear()
        plain, views.protect = views.protect, watched  # type: ignore[assignment]
        try:
            view = scene(Asymmetric(noise=noise), Budget()).subject(Position.SCHEME, "training").view
        finally:
            views.protect = plain
        found = principal_part(view, layer, steps_of(view, layer)[0])
        if found is None:
            raise SystemExit("no two weights were seen")
        x, true = found.x.flatten(1), given[0].flatten(1)
        best = (x * true).sum(1, keepdim=True) / x.square().sum(1, keepdim=True).clamp_min(1e-300)
        error = ((best * x - true).norm(dim=1) / true.norm(dim=1)).mean().item()
        yield f"noise on {name}: relative error {error:.2g} ({found.size.equations} for {found.size.unknowns})"


def determined() -> Iterator[str]:
    """By shapes alone, at the size of image that a model was made for."""
    for name in CLASSICS:
        built = build(name, weights=WeightsChoice(random_seed=0))
        seen = trace(built.model, built.example_args)
        split = place_all(seen.layers, Asymmetric(noise=None)).split
        most = determined_samples([layer for layer in seen.layers if layer.name in split])
        counts = ", ".join(f"{sum(each >= batch for each in most.values())} at {batch}" for batch in (1, 8, 32))
        last = max(most, key=lambda layer: most[layer])
        yield f"{name}: {len(split)} split layers, determined {counts}; the last of them, {last}, up to {most[last]}"


TABLES: Mapping[str, Callable[[], Iterator[str]]] = {
    "depth": depth,
    "boundary": boundary,
    "labels": labels,
    "delta": delta,
    "determined": determined,
}


def main() -> None:
    """Print the tables that the command line names; all of them where it names none."""
    if unknown := set(sys.argv[1:]) - set(TABLES):
        raise SystemExit(f"error: no such table: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    torch.set_num_threads(1)
    with unspoken():
        for name in sys.argv[1:] or TABLES:
            for line in TABLES[name]():
                sys.stdout.write(f"{name}: {line}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
