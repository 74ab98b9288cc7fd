"""A lying accelerator is caught, in every product that it answers; with integrity off it is not, and does harm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.errors import FrameError, IntegrityError
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Energy, Fixed

Lie = Callable[[Tensor], Tensor]


def one_element(y: Tensor) -> Tensor:
    y = y.clone()
    flat = y.view(-1)
    flat[flat.numel() // 2] += 0.05 * y.abs().max()
    return y


def one_sample(y: Tensor) -> Tensor:
    y = y.clone()
    y[0] = y[0] * 1.02
    return y


LIES: dict[str, Lie] = {
    "one wrong element": one_element,
    "one sample scaled": one_sample,
    "scaled": lambda y: y * 1.001,
    "signs flipped": lambda y: -y,
    "zeros": torch.zeros_like,
    "channels swapped": lambda y: y.flip(1),
    "not a number": lambda y: torch.full_like(y, float("nan")),
    "one infinity": lambda y: torch.where(y == y.max(), torch.full_like(y, float("inf")), y),
}


class Liar(InProcessAccelerator):
    """Honest until it has given ``after`` answers, then it lies in every one."""

    def __init__(self, lie: Lie, after: int) -> None:
        super().__init__()
        self.lie, self.after, self.given = lie, after, 0

    def answer(self, layer: str, y: Tensor) -> Tensor:
        self.given += 1
        return self.lie(y) if self.given > self.after else y


class Stale(InProcessAccelerator):
    """Answers with what was right one answer of the same shape ago: yesterday's result."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def answer(self, layer: str, y: Tensor) -> Tensor:
        key = (layer, tuple(y.shape))
        told = self.before.get(key, y)
        self.before[key] = y
        return told


def net() -> nn.Sequential:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), *pool, nn.Linear(8, 5))


def step(model: nn.Module) -> None:
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 9, 9)), torch.arange(4))
    loss.backward()


@pytest.mark.parametrize("answers", [0, 1, 2], ids=["forward", "to the input", "to the weight"])
@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_caught(lie: str, answers: int) -> None:
    caught = []
    for seed in range(6):
        torch.manual_seed(seed)
        split = protect(net(), Asymmetric(noise=None, rank=Fixed(2)), accelerator=Liar(LIES[lie], after=answers))
        try:
            step(split)
        except (IntegrityError, FrameError) as problem:
            caught.append(problem.where or "")
    # With two vectors one lie in some thousands passes by chance: six of six all but always, and never below five.
    assert len(caught) >= 5
    assert all("layer 2," in where and "step 1" in where for where in caught)


def test_yesterdays_result_is_caught() -> None:
    split = protect(net(), Asymmetric(noise=None, rank=Fixed(2)), accelerator=Stale())
    step(split)
    with pytest.raises(IntegrityError):
        step(split)


@pytest.mark.parametrize("seed", range(10))
def test_an_honest_accelerator_is_never_accused(seed: int) -> None:
    torch.manual_seed(seed)
    split = protect(net(), Asymmetric(noise=None, rank=Fixed(2)), accelerator=InProcessAccelerator())
    optimizer = torch.optim.SGD(split.parameters(), lr=0.5)
    for _ in range(5):
        step(split)
        optimizer.step()


def test_with_integrity_off_a_lie_goes_through_and_does_harm() -> None:
    model = net()
    wanted = model(x := torch.randn(2, 3, 9, 9))
    scheme = Asymmetric(noise=None, rank=Fixed(2), integrity="off")
    got = protect(model, scheme, accelerator=Liar(LIES["signs flipped"], after=0))(x)
    assert (got - wanted).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.parametrize(("integrity", "refused"), [("freivalds", True), ("off", False)])
def test_a_planted_answer_steers_the_next_release_unless_it_is_checked(integrity: str, refused: bool) -> None:
    # A large rank-1 answer fills the principal part of the next layer, and what should have stayed inside leaves.
    torch.manual_seed(0)
    left: list[Tensor] = []

    class Planting(InProcessAccelerator):
        def forward(self, layer: str, x: Tensor, *, step: int, hold: bool):
            left.append(x.clone())
            return super().forward(layer, x, step=step, hold=hold)

        def answer(self, layer: str, y: Tensor) -> Tensor:
            planted = torch.zeros_like(y)
            planted[:, 0] = 1000 * torch.rand(y.shape[2:])
            return planted if layer == "1" else y

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 5))
    scheme = Asymmetric(noise=None, rank=Energy(0.9), integrity=integrity)
    x = torch.randn(2, 3, 9, 9)
    secret = model[1](model[0](x)).detach()
    split = protect(model, scheme, accelerator=Planting())
    if refused:
        with pytest.raises(IntegrityError):
            split(x)
        assert len(left) == 1
    else:
        split(x)
        # Without the check the next residual is the secret half that stayed inside, nearly unhidden.
        first_half = secret - model[1](left[0]).detach() + model[1].bias.detach().reshape(-1, 1, 1)
        explained = torch.nn.functional.cosine_similarity(left[1][:, 1:].flatten(1), first_half[:, 1:].flatten(1)).abs()
        assert explained.min() > 0.9
