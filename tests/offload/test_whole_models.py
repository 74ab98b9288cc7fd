"""Whole networks, split and plain: the losses of a training run, and one step of the mobile families."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Schedule
from motte.train.models import build_model
from motte.zoo import vision_ops  # noqa: F401  before torchvision

Distance = Callable[[Tensor, Tensor], float]


def losses(model: nn.Module, steps: int, dtype: torch.dtype, batch: int) -> list[float]:
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for _ in range(steps):
        x, labels = torch.randn(batch, 3, 32, 32, dtype=dtype), torch.randint(10, (batch,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg16", "vgg16_bn"])
@pytest.mark.parametrize(
    ("dtype", "steps", "batch", "bound"), [(torch.float64, 50, 3, 1e-8), (torch.float32, 10, 16, 1e-4)], ids=str
)
def test_the_losses_of_a_training_run(name: str, dtype: torch.dtype, steps: int, batch: int, bound: float) -> None:
    # In float32 a norm over a handful of values would amplify any rounding, the plain run's own as well: hence 16.
    plain = build_model(name, classes=10, image_shape=(3, 32, 32), seed=1, width=0.125).to(dtype)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    split = protect(
        copy.deepcopy(plain), Asymmetric(noise=None, rank=Schedule(cap=4)), accelerator=InProcessAccelerator()
    )
    wanted, got = losses(plain, steps, dtype, batch), losses(split, steps, dtype, batch)
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= bound
    assert len(set(wanted)) == steps
    assert len(split.motte_session.layers) >= 10


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_the_mobile_families(name: str) -> None:
    import torchvision

    plain = torchvision.models.get_model(name, num_classes=5).double()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 4])
    split = protect(copy.deepcopy(plain), Asymmetric(noise=None), accelerator=InProcessAccelerator())
    for model in (plain, split):
        nn.functional.cross_entropy(model(x), labels).backward()
    # Some gradients are nothing but rounding (a bias before a norm), so all are held against the largest.
    scale = max(each.grad.abs().max() for each in plain.parameters())
    for (key, a), (_, b) in zip(split.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-8 * scale, key
    for (key, a), (_, b) in zip(split.named_buffers(), plain.named_buffers(), strict=True):
        assert (a.double() - b.double()).abs().max() <= 1e-8, key


def test_a_transformer_splits_over_tokens(distance: Distance) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    plain = nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )
    plain = plain.double()
    accelerator = InProcessAccelerator()
    split = protect(copy.deepcopy(plain), Asymmetric(noise=None), accelerator=accelerator)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    for model in (plain, split):
        model(x).square().sum().backward()
    for (key, a), (_, b) in zip(split.named_parameters(), plain.named_parameters(), strict=True):
        assert distance(a.grad, b.grad) <= 1e-9, key
    assert [name.rsplit(".", 1)[1] for name in accelerator.stats()] == ["linear1", "linear2"] * 2
