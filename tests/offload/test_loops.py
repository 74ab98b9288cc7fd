"""A protected model in the loops that people write: schedulers, AMP, accumulation, checkpointing, sharing, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motte.accelerator.in_process import InProcessAccelerator
from motte.errors import SettingError, UnsupportedError
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Energy, Fixed, Gaussian, LowRank, Mechanism, Residual

Distance = Callable[[Tensor, Tensor], float]
SCHEME = Asymmetric(noise=None, rank=Fixed(2))
SOME = Mechanism(clip=1.0, noise_multiplier=1.0)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    )


def data(count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8, dtype=dtype), torch.arange(count) % 5


def train(model: nn.Module, steps: int, *, accumulate: int = 1) -> list[float]:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            x, labels = data()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("accumulate", [1, 3])
def test_optimizer_scheduler_and_accumulation(accumulate: int, accelerator: InProcessAccelerator) -> None:
    model = small().double()
    twin = copy.deepcopy(model)
    wanted = train(model, 6, accumulate=accumulate)
    split = protect(twin, SCHEME, accelerator=accelerator)
    assert train(split, 6, accumulate=accumulate) == pytest.approx(wanted, rel=1e-9)


def test_weights_are_sent_only_when_they_changed(accelerator: InProcessAccelerator) -> None:
    split = protect(small().double(), SCHEME, accelerator=accelerator)
    weight = split[3].weight
    x, _ = data()

    def frames() -> int:
        return accelerator.stats()["3"].sent_frames

    split(x)
    first = frames()
    split(x)
    assert frames() == first + 1
    # Written past the version counter: a stale weight outside would make an honest accelerator look like a liar.
    weight.data.mul_(2)
    split(x)
    assert frames() == first + 3


def test_evaluation_and_back(accelerator: InProcessAccelerator, distance: Distance) -> None:
    model = small().double()
    split = protect(model, SCHEME, accelerator=accelerator)
    x, _ = data()
    split(x)
    split.eval()
    with torch.no_grad():
        assert distance(split(x), model.eval()(x)) <= 1e-10
    assert not torch.equal(split.train()(x), split(x)), "dropout is on again"


def test_autocast_to_bfloat16(accelerator: InProcessAccelerator, distance: Distance) -> None:
    model = small().eval().float()
    split = protect(model, SCHEME, accelerator=accelerator)
    x, labels = data(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = split(x)
        assert output.dtype == model(x).dtype == torch.bfloat16
        loss = nn.functional.cross_entropy(output.float(), labels)
    loss.backward()
    got = split[3].weight.grad.clone()
    split.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    assert got.dtype == torch.float32
    assert distance(got, model[3].weight.grad) <= 0.05


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("noise", [None, Gaussian(residual=SOME, gradient=SOME, update=SOME)], ids=["plain", "noise"])
def test_checkpointing_releases_the_same_bytes_twice(reentrant: bool, noise: Gaussian | None) -> None:
    sent: list[Tensor] = []

    class Listening(InProcessAccelerator):
        def forward(self, layer: str, x: Tensor, *, step: int, hold: bool):
            sent.append(x.clone())
            return super().forward(layer, x, step=step, hold=hold)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
            self.on = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = checkpoint(self.middle, x, use_reentrant=reentrant) if self.on else self.middle(x)
            return self.last(x.mean((2, 3)))

    model = Checkpointed().double()
    split = protect(model, Asymmetric(noise=noise, rank=Fixed(2)), accelerator=Listening())
    x, labels = data()
    nn.functional.cross_entropy(split(x), labels).backward()
    assert len(sent) == 2
    assert torch.equal(sent[0], sent[1])
    if noise is None:
        gradient = split.middle.weight.grad.clone()
        model.on = False
        model.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        assert torch.allclose(gradient, model.middle.weight.grad)
    else:
        counts = split.motte_session.releases.counts
        assert counts["middle", "residual"].total == 1, "a retry is no new release"


def test_a_module_and_a_weight_at_two_places(accelerator: InProcessAccelerator, distance: Distance) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.twice = nn.Conv2d(8, 8, 3, padding=1)
            self.other = nn.Conv2d(8, 8, 3, padding=1)
            self.other.weight = self.twice.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.other(self.twice(torch.relu(self.twice(self.first(x)))))
            return self.last(x.mean((2, 3)))

    model = Shared().double()
    x, labels = data()
    nn.functional.cross_entropy(model(x), labels).backward()
    wanted = model.twice.weight.grad.clone()
    model.zero_grad()
    split = protect(model, SCHEME, accelerator=accelerator)
    assert split.twice.weight is split.other.weight
    nn.functional.cross_entropy(split(x), labels).backward()
    assert distance(split.twice.weight.grad, wanted) <= 1e-10


def test_a_weight_shared_with_a_trusted_layer_has_no_private_updates(accelerator: InProcessAccelerator) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    model[0].weight = model[1].weight
    protect(model, SCHEME, accelerator=accelerator)
    noise = Gaussian(residual=SOME, gradient=SOME, update=SOME)
    with pytest.raises(SettingError, match="shared"):
        protect(model, Asymmetric(noise=noise), accelerator=accelerator)


def test_nothing_stays_at_the_accelerator(accelerator: InProcessAccelerator) -> None:
    split = protect(small().double(), SCHEME, accelerator=accelerator)
    held = accelerator.calculator._held
    for _ in range(3):
        x, labels = data()
        loss = nn.functional.cross_entropy(split(x), labels)
        assert len(held) == 2
        loss.backward()
    del loss
    split(x)  # a forward pass that nobody asks a gradient of
    with torch.no_grad():
        split(x)
    split.motte_session.release_forgotten()
    assert not held


def test_copies_share_the_session_and_nothing_is_pickled(accelerator: InProcessAccelerator, distance: Distance) -> None:
    split = protect(small().double().eval(), SCHEME, accelerator=accelerator)
    average = copy.deepcopy(split)
    with torch.no_grad():
        average[3].weight.mul_(0.5)
    x, _ = data()
    assert distance(average(x), split(x)) > 1e-3
    assert average.motte_session is split.motte_session
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(split.motte_session)


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        (Asymmetric(noise=None, trusted_layers=("nope",)), "no layer"),
        (Asymmetric(noise=None, offloaded_layers=("1",)), "no layer"),
        (Asymmetric(noise=None, trusted_layers=("3",), offloaded_layers=("3",)), "both"),
    ],
)
def test_placements_that_cannot_be(scheme: Asymmetric, what: str, accelerator: InProcessAccelerator) -> None:
    with pytest.raises(SettingError, match=what):
        protect(small(), scheme, accelerator=accelerator)


def test_what_protect_refuses(accelerator: InProcessAccelerator) -> None:
    with pytest.raises(SettingError, match="needs an accelerator"):
        protect(small(), SCHEME)
    with pytest.raises(SettingError, match="takes no accelerator"):
        protect(small(), LowRank(), accelerator=accelerator)
    with pytest.raises(SettingError, match="already"):
        protect(protect(small(), SCHEME, accelerator=accelerator), SCHEME, accelerator=accelerator)
    with pytest.raises(UnsupportedError, match="no shape"):
        protect(nn.Sequential(nn.LazyConv2d(3, 3)), SCHEME, accelerator=accelerator)
    with pytest.raises(SettingError, match="unknown scheme"):
        protect(small(), "asymmetric", accelerator=accelerator)
    with pytest.raises(UnsupportedError, match="trusted memory"):
        protect(small().to("meta"), SCHEME, accelerator=accelerator)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3},
        {"iterations": 0},
        {"noise": "none"},
        {"integrity": "on"},
        {"residual_dtype": "int8"},
        {"decomposition": "svd"},
        {"integrity_vectors": 0},
        {"trusted_layers": "0"},
    ],
    ids=str,
)
def test_settings_are_validated(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        Asymmetric(**{"noise": None, **settings})
    with pytest.raises(TypeError):
        Asymmetric()
    with pytest.raises(TypeError):
        Asymmetric(noise=None, ranks=Fixed(2))


def test_subclasses_and_unknown_modules_stay_inside(accelerator: InProcessAccelerator) -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Own(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(5))
    model(torch.randn(1, 3, 8, 8))
    split = protect(model, SCHEME, accelerator=accelerator)
    split(torch.randn(1, 3, 8, 8))
    assert list(accelerator.stats()) == ["2"]
    assert {each.name: each.side for each in split.motte_layers} == {
        "0": "inside",
        "1": "inside",
        "2": "split",
        "4": "inside",
    }


def test_the_research_modes_see_one_half_each(distance: Distance) -> None:
    model = small().double().eval()
    x, labels = data()
    half = protect(model, LowRank(rank=Fixed(64)))
    assert distance(half(x), model(x)) <= 1e-10, "of full rank nothing is missing"
    rest = protect(model, Residual(noise=None, rank=Fixed(0)))
    assert distance(rest(x), model(x)) <= 1e-10, "of rank 0 nothing is taken away"
    for scheme in (LowRank(rank=Energy(0.5)), Residual(noise=None, rank=Fixed(2))):
        split = protect(model, scheme)
        model.zero_grad()
        loss = nn.functional.cross_entropy(split(x), labels)
        loss.backward()
        assert distance(split(x), model(x)) > 1e-3
        assert all(each.grad.isfinite().all() for each in split.parameters())
        assert split.motte_session is None


def test_both_halves_of_one_convolution_sum_to_the_whole(one_layer: type[nn.Module], distance: Distance) -> None:
    plain = one_layer(nn.Conv2d(8, 6, 3, bias=False)).double()
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    principal = protect(plain, LowRank(rank=Fixed(3), trusted_layers=()))(x)
    residual = protect(plain, Residual(noise=None, rank=Fixed(3), trusted_layers=()))(x)
    assert distance(principal + residual, plain(x)) <= 1e-10
