"""Settings: the words of the command line read back, and what is unknown, out of range or contradictory is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import MotteError, SettingError
from motte.offload.settings import Asymmetric, Energy, Entropy, Fixed, Gaussian, LowRank, Mechanism, Residual, Schedule
from motte.offload.words import noise_text, parse_noise, parse_rank, rank_text
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.train.recipe import Recipe, published, resolve
from motte.train.settings import TrainSettings

Make = Callable[..., TrainSettings]
WHOLE = st.integers(1, 65_536)
POSITIVE = st.floats(1e-3, 1e3)
KEY = RecipientPrivateKey.new()
SIGNER = SignerPrivateKey.new()


@given(
    st.one_of(
        st.builds(Fixed, st.integers(0, 65_536)),
        st.builds(Schedule, WHOLE, st.integers(1, 64), WHOLE),
        st.builds(Energy, st.floats(1e-3, 1.0), WHOLE),
        st.builds(Entropy, WHOLE),
    )
)
def test_a_rank_rule_reads_back(rank: Any) -> None:
    assert parse_rank(rank_text(rank)) == rank


MECHANISM = st.builds(Mechanism, POSITIVE, POSITIVE)


@given(
    st.none()
    | st.builds(
        Gaussian,
        residual=MECHANISM,
        gradient=st.none() | MECHANISM,
        update=st.none() | MECHANISM,
        adjacency=st.sampled_from(["replace", "add-remove"]),
    )
)
def test_a_noise_reads_back(noise: Any) -> None:
    assert parse_noise(noise_text(noise)) == noise


def test_words_as_people_type_them() -> None:
    assert parse_rank("schedule") == Schedule() == parse_rank("schedule:2,2,32")
    assert parse_rank("energy:0.9") == Energy(0.9)
    assert parse_rank("entropy") == Entropy()
    assert parse_noise("gaussian:2,0.5") == Gaussian(residual=Mechanism(2.0, 0.5))
    full = parse_noise("gaussian:residual=1.0/0.5,gradient=1e-2/2,update=3/4,adjacency=add-remove")
    assert full == Gaussian(
        residual=Mechanism(1.0, 0.5),
        gradient=Mechanism(0.01, 2.0),
        update=Mechanism(3.0, 4.0),
        adjacency="add-remove",
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fixed",
        "fixed:",
        "fixed:-1",
        "fixed:8,9",
        "schedule:2,2",
        "schedule:",
        "energy",
        "energy:x",
        "energy:1.5",
        "energy:nan",
        "entropy:0",
        "svd:3",
        "fixed:1e3",
        "fixed:٣",
    ],
)
def test_what_is_no_rank_rule_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        parse_rank(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "None",
        "none:",
        "gaussian",
        "gaussian:",
        "gaussian:1",
        "gaussian:residual=1",
        "gaussian:gradient=1/1",
        "gaussian:residual=0/1",
        "gaussian:residual=1/1,residual=1/1",
        "gaussian:residual=1/1,weights=1/1",
        "gaussian:residual=1/0",
        "gaussian:residual=inf/1",
        "gaussian:residual=1/nan",
        "gaussian:residual=-1/1",
        "gaussian:residual=1/1,adjacency=other",
        "gaussian:residual=1/1,",
        "laplace:residual=1/1",
    ],
)
def test_what_is_no_noise_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        parse_noise(text)


def test_the_scheme_that_goes_to_protect(make: Make) -> None:
    noise = Gaussian(residual=Mechanism(1.0, 1.0))
    asymmetric = make(noise=noise, rank=Fixed(3), iterations=2, offload_layers=("a",), integrity="off").offload_scheme()
    assert asymmetric == Asymmetric(noise=noise, rank=Fixed(3), iterations=2, offloaded_layers=("a",), integrity="off")
    assert make(scheme="lowrank", rank=Fixed(3)).offload_scheme() == LowRank(rank=Fixed(3))
    assert make(scheme="residual", noise=noise).offload_scheme() == Residual(noise=noise)
    assert make(scheme="trusted").offload_scheme() is None is make(scheme="accelerator").offload_scheme()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"scheme": "other"}, "scheme"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": -0.1}, "lr"),
        ({"width": 0.0}, "width"),
        ({"momentum": 1.1}, "momentum"),
        ({"workers": 1000}, "workers"),
        ({"scheduler": "linear"}, "scheduler"),
        ({"scheduler": "cos", "lr_decay": 0.1}, "scheduler"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "fp16"}, "dtype"),
        ({"scheme": "trusted", "noise": None}, "noise"),
        ({"scheme": "lowrank", "noise": None}, "noise"),
        ({"scheme": "trusted", "rank": Fixed(1)}, "rank"),
        ({"scheme": "trusted", "integrity": "off"}, "integrity"),
        ({"scheme": "lowrank", "offload_layers": ("a",)}, "offload_layers"),
        ({"scheme": "residual", "residual_dtype": "bfloat16"}, "residual_dtype"),
        ({"scheme": "trusted", "evaluate": "split"}, "evaluate"),
        ({"scheme": "trusted", "device": "cuda"}, "device"),
        ({"scheme": "trusted", "accelerator": "unix:/a"}, "accelerator"),
        ({"accelerator": "unix:/a", "device": "cuda"}, "device"),
        ({"accelerator_pin": "sha256:00"}, "accelerator_pin"),
        ({"profile": True}, "profile"),
        ({"profile": True, "log_dir": Path("x"), "scheme": "trusted"}, "profile"),
        ({"data_key": KEY}, "data_key, data_signer"),
        ({"data_min_release": 3}, "data_min_release"),
        ({"resume": True}, "checkpoint_dir"),
        ({"checkpoint_every": 3}, "checkpoint_dir"),
        ({"checkpoint_key": KEY}, "checkpoint_dir"),
        ({"min_release": 3}, "checkpoint_dir"),
        ({"checkpoint_dir": Path("x")}, "checkpoint_key"),
        (
            {"checkpoint_dir": Path("x"), "checkpoint_key": KEY, "insecure_plaintext_checkpoint": True},
            "insecure_plaintext_checkpoint",
        ),
        (
            {
                "checkpoint_dir": Path("x"),
                "data_key": KEY,
                "data_signer": SIGNER.public,
                "insecure_plaintext_checkpoint": True,
            },
            "insecure_plaintext_checkpoint",
        ),
        (
            {
                "checkpoint_dir": Path("x"),
                "noise": Gaussian(residual=Mechanism(1.0, 1.0)),
                "insecure_plaintext_checkpoint": True,
            },
            "insecure_plaintext_checkpoint",
        ),
        ({"data_key": KEY, "data_signer": SIGNER.public, "evaluate": "split"}, "evaluate"),
    ],
)
def test_what_contradicts_is_refused_and_named(make: Make, change: dict[str, Any], where: str) -> None:
    with pytest.raises(SettingError) as caught:
        make(**change)
    assert caught.value.where == where


@pytest.mark.parametrize("scheme", ["asymmetric", "residual"])
def test_nobody_trains_without_noise_unknowingly(scheme: Any) -> None:
    with pytest.raises(SettingError, match="needs a word about noise"):
        TrainSettings(model="resnet20", data="mnist", scheme=scheme)


def test_keys_are_not_shown(make: Make) -> None:
    settings = make(checkpoint_dir=Path("x"), checkpoint_key=KEY, checkpoint_signer=SIGNER)
    assert KEY.secret.hex() not in repr(settings)
    assert "checkpoint_key" not in repr(settings)
    assert "checkpoint_signer" not in repr(settings)


def test_the_published_recipes() -> None:
    cifar = published("resnet18", (3, 32, 32))
    assert (cifar.lr, cifar.momentum, cifar.weight_decay, cifar.scheduler) == (0.1, 0.9, 5e-4, "cos")
    assert published("vgg16_bn", (3, 32, 32)).lr == 0.05
    large = published("resnet50", (3, 224, 224))
    assert (large.batch_size, large.epochs, large.scheduler, large.decay_period) == (256, 90, "step", 30)


def test_the_learning_rate_follows_from_the_epoch() -> None:
    torch = pytest.importorskip("torch")
    for recipe in (
        Recipe(batch_size=1, epochs=7, lr=0.3, scheduler="cos"),
        Recipe(batch_size=1, epochs=7, lr=0.3, scheduler="step", lr_decay=0.2, decay_period=3),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        if recipe.scheduler == "cos":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
        else:
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.2)
        for epoch in range(7):
            assert recipe.lr_at(epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
            optimizer.step()
            schedule.step()


def test_what_the_user_chose_takes_the_recipes_place(make: Make) -> None:
    settings = replace(make(model="resnet20"), lr=0.7, epochs=3, batch_size=None)
    recipe = resolve(settings, (3, 32, 32))
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.7, 3, 128)
    with pytest.raises(MotteError, match="step scheduler"):
        resolve(replace(settings, lr_decay=0.5), (3, 32, 32))


def test_settings_and_recipes_need_no_torch() -> None:
    script = "import sys, motte.train.settings, motte.train.recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
