"""Models by name: torchvision's, keys and shapes included; stems, channels, widths, seeds; models of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from motte.errors import InputError, SettingError, UnsupportedError
from motte.train.models import build_model, model_names
from motte.zoo import vision_ops

OWN = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def rgb():
    return nn.Conv2d(3, 4, 3)

def wrong_count():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

def no_module():
    return 7
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN, encoding="utf-8")
    return path


def test_these_are_the_models() -> None:
    vggs = {f"vgg{depth}{ending}" for depth in (11, 13, 16, 19) for ending in ("", "_bn")}
    resnets = {f"resnet{depth}" for depth in (18, 20, 32, 34, 50, 101, 152)}
    assert set(model_names()) == vggs | resnets


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 48, 64)])
def test_every_model_takes_small_images_and_learns_in_every_parameter(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(name, classes=7, image_shape=shape, seed=0, width=0.1)
    assert model.training
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "vgg11", "vgg16_bn"])
def test_the_imagenet_form_has_torchvisions_names_shapes_and_answers(name: str) -> None:
    models = vision_ops.import_torchvision().models
    with torch.device("meta"):
        theirs = models.get_model(name, weights=None).state_dict()
        ours = build_model(name, classes=1000, image_shape=(3, 224, 224), seed=0).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_weights_give_torchvisions_answer(name: str) -> None:
    models = vision_ops.import_torchvision().models
    theirs = models.get_model(name, weights=None, num_classes=5).eval()
    ours = build_model(name, classes=5, image_shape=(3, 224, 224), seed=0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(ours.eval()(images), theirs(images))


def test_the_stem_follows_the_image_size_or_what_is_asked() -> None:
    def first(size: int, stem: str) -> object:
        model = build_model("resnet18", classes=2, image_shape=(3, size, size), seed=0, width=0.1, stem=stem)  # type: ignore[arg-type]
        return model.conv1.stride, type(model.maxpool).__name__

    assert first(64, "auto") == ((1, 1), "Identity")
    assert first(65, "auto") == ((2, 2), "MaxPool2d")
    assert first(224, "small") == ((1, 1), "Identity")
    assert first(32, "imagenet") == ((2, 2), "MaxPool2d")


def test_known_parameter_counts() -> None:
    def count(name: str, **shape: int) -> int:
        size = shape.get("size", 32)
        model = build_model(name, classes=10, image_shape=(shape.get("channels", 3), size, size), seed=0)
        return sum(value.numel() for value in model.parameters())

    assert count("resnet20", channels=1) == 272_186  # the shipped model's
    assert count("resnet18") == 11_173_962  # the usual CIFAR-10 ResNet-18
    assert count("vgg16_bn") == 14_728_266  # the usual CIFAR-10 VGG-16


def test_the_seed_decides_the_weights_and_nothing_else_changes() -> None:
    def build(seed: int) -> torch.Tensor:
        model = build_model("vgg11", classes=3, image_shape=(1, 28, 28), seed=seed, width=0.1)
        return torch.cat([value.detach().flatten() for value in model.parameters()])

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_narrow_net_keeps_its_depth() -> None:
    wide = build_model("resnet50", classes=4, image_shape=(3, 32, 32), seed=0, width=0.5)
    narrow = build_model("resnet50", classes=4, image_shape=(3, 32, 32), seed=0, width=0.05)
    assert list(wide.state_dict()) == list(narrow.state_dict())
    assert wide.conv1.out_channels == 32
    assert narrow.conv1.out_channels == 3


def test_a_model_of_ones_own_is_run_seeded_and_checked(own: Path) -> None:
    shape = (1, 28, 28)
    first = build_model(f"{own}:net", classes=3, image_shape=shape, seed=1)
    again = build_model(f"{own}:net", classes=3, image_shape=shape, seed=1)
    other = build_model(f"{own}:net", classes=3, image_shape=shape, seed=2)
    assert first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)
    assert int(first[1].num_batches_tracked) == 0, "the check must not count as training"
    assert torch.equal(first[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("rgb", "does not take images"),
        ("wrong_count", "does not fit the data"),
        ("no_module", "returned no nn.Module"),
        ("absent", "no factory of that name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_model_of_ones_own_that_does_not_fit_is_refused(own: Path, factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(f"{own}:{factory}", classes=3, image_shape=(1, 28, 28), seed=0)


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(InputError, match="no model of that name") as caught:
        build_model("resnet19", classes=3, image_shape=(1, 28, 28), seed=0)
    assert caught.value.expected is not None
    assert all(name in caught.value.expected for name in model_names())
    assert caught.value.hint is not None
    assert "resnet18" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 0},
        {"classes": True},
        {"image_shape": (1, 28)},
        {"image_shape": (0, 28, 28)},
        {"image_shape": (1, 28, 28.0)},
        {"seed": -1},
        {"seed": 1 << 63},
        {"width": 0.0},
        {"width": float("nan")},
        {"stem": "tiny"},
        {"name": "resnet20", "stem": "imagenet"},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object]) -> None:
    given = {"name": "resnet18", "classes": 3, "image_shape": (1, 28, 28), "seed": 0} | change
    with pytest.raises(SettingError):
        build_model(given.pop("name"), **given)  # type: ignore[arg-type]


def test_images_too_small_for_the_imagenet_vgg_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="too small"):
        build_model("vgg11", classes=3, image_shape=(3, 28, 28), seed=0, width=0.1, stem="imagenet")


def test_width_is_not_for_a_model_of_ones_own(own: Path) -> None:
    with pytest.raises(SettingError, match="known by name"):
        build_model(f"{own}:net", classes=3, image_shape=(1, 28, 28), seed=0, width=0.5)
