"""The ten traps of the earlier systems, each with a test of its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.errors import TrustError
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism, Schedule
from motte.zoo import vision_ops  # noqa: F401  before torchvision

Distance = Callable[[Tensor, Tensor], float]


class Listening(InProcessAccelerator):
    """Keeps every tensor that it is given, as a curious accelerator would."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.inputs: dict[str, list[Tensor]] = {}
        self.gradients: list[Tensor] = []

    def put_weight(self, layer: str, weight: Tensor) -> None:
        self.weights.append(weight.clone())
        super().put_weight(layer, weight)

    def forward(self, layer: str, x: Tensor, *, step: int, hold: bool):
        self.inputs.setdefault(layer, []).append(x.clone())
        return super().forward(layer, x, step=step, hold=hold)

    def backward(self, layer: str, held: int, gradient: Tensor, *, step: int, need_input: bool, need_weight: bool):
        self.gradients.append(gradient.clone())
        return super().backward(layer, held, gradient, step=step, need_input=need_input, need_weight=need_weight)

    def everything(self) -> list[Tensor]:
        return [*self.weights, *(x for each in self.inputs.values() for x in each), *self.gradients]


def block(stride: int = 1, width: int = 8) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, conv1x1

    shortcut = nn.Sequential(conv1x1(8, width, stride), nn.BatchNorm2d(width)) if stride > 1 or width != 8 else None
    return BasicBlock(8, width, stride, shortcut)


def net(*middle: nn.Module, inputs: int = 3, width: int = 8, features: int = 8) -> nn.Sequential:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), *middle, *pool, nn.Linear(features, 5))


def step(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def same_step(
    model: nn.Module, distance: Distance, *, size: int = 9, batch: int = 3, inputs: int = 3
) -> InProcessAccelerator:
    """One training step, split and plain, in float64: loss, all gradients and running statistics agree."""
    model = model.double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, labels = torch.randn(batch, inputs, size, size, dtype=torch.float64), torch.arange(batch) % 5
    wanted, reference = step(model, x, labels)
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    accelerator = InProcessAccelerator()
    split = protect(model, Asymmetric(noise=None, rank=Fixed(2)), accelerator=accelerator)
    got, gradients = step(split, x, labels)
    assert abs(got - wanted) <= 1e-10 * abs(wanted)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        assert distance(gradient, reference[name]) <= 1e-9, name
    for name, value in split.state_dict().items():
        assert distance(value.double(), statistics[name].double()) <= 1e-10, name
    return accelerator


def test_trap_1_the_first_convolution_stays_inside() -> None:
    accelerator = Listening()
    model = net(nn.ReLU(), nn.Conv2d(8, 8, 3))
    split = protect(model, Asymmetric(noise=None, rank=Fixed(2)), accelerator=accelerator)
    x = torch.randn(2, 3, 9, 9)
    split(x).sum().backward()
    assert list(accelerator.inputs) == ["2"]
    assert not any(each.shape == x.shape for each in accelerator.everything())


def test_trap_1_nor_does_another_layer_meet_the_raw_image() -> None:
    class Backwards(nn.Module):
        """Registers its layers in another order than it runs them."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 5)
            self.second = nn.Conv2d(8, 8, 3)
            self.first = nn.Conv2d(3, 8, 3)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(2 * x)).mean((2, 3)))

    accelerator = Listening()
    split = protect(Backwards(), Asymmetric(noise=None, rank=Fixed(2)), accelerator=accelerator)
    split(torch.randn(2, 3, 9, 9))
    assert list(accelerator.inputs) == ["second"]


def test_trap_2_the_full_activation_never_leaves(distance: Distance) -> None:
    accelerator = Listening()
    model = net(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    seen: dict[str, Tensor] = {}
    split = protect(model, Asymmetric(noise=None, rank=Fixed(3)), accelerator=accelerator)
    for name, module in split.named_modules():
        module.register_forward_hook(lambda _m, a, y, name=name: seen.update({f"{name} in": a[0], f"{name} out": y}))
    split(torch.randn(2, 3, 9, 9)).sum().backward()
    outside = accelerator.inputs["3"][0]
    whole = seen["3 in"].detach()
    rest = (whole - outside).flatten(2)
    # What stayed is what is missing, of the rank that was asked for, and not nothing: X_main + X_res = X.
    assert torch.linalg.matrix_rank(rest).tolist() == [3, 3]
    assert rest.norm() > 0.3 * whole.norm()
    for private in seen.values():
        for tensor in accelerator.everything():
            assert tensor.shape != private.shape or distance(tensor, private.detach()) > 0.01


def test_trap_3_noise_is_added_inside_and_counted() -> None:
    clip = Mechanism(clip=0.5, noise_multiplier=2.0)
    noise = Gaussian(residual=clip, gradient=clip, update=clip)
    accelerator = Listening()
    split = protect(net(nn.ReLU(), nn.Conv2d(8, 8, 3)), Asymmetric(noise=noise, rank=Fixed(1)), accelerator=accelerator)
    x = torch.randn(16, 3, 17, 17)
    step(split, x, torch.arange(16) % 5)
    left = accelerator.inputs["2"][0]
    # Every sample's norm is at most 0.5 over 2312 values: what is seen is the noise, whose deviation is 1.
    assert left.std().item() == pytest.approx(1.0, abs=0.05)
    assert accelerator.gradients[0].std().item() == pytest.approx(1.0, abs=0.05)
    counts = split.motte_session.releases.counts
    assert {kind: (c.total, c.privatised) for (_, kind), c in counts.items()} == {
        "residual": (1, 1),
        "gradient": (1, 1),
        "update": (1, 1),
    }
    assert not split.motte_session.releases.unprotected


def test_trap_3_without_noise_the_books_say_so() -> None:
    split = protect(net(nn.ReLU(), nn.Conv2d(8, 8, 3)), Asymmetric(noise=None), accelerator=InProcessAccelerator())
    step(split, torch.randn(2, 3, 9, 9), torch.tensor([0, 1]))
    assert split.motte_session.releases.unprotected


def test_trap_4_the_last_layer_the_loss_and_the_labels_stay_inside(distance: Distance) -> None:
    accelerator = Listening()
    model = net(nn.ReLU(), nn.Conv2d(8, 8, 3))
    split = protect(model, Asymmetric(noise=None, rank=Fixed(2)), accelerator=accelerator)
    labels = torch.tensor([3, 1])
    output = split(torch.randn(2, 3, 9, 9))
    output.retain_grad()
    nn.functional.cross_entropy(output, labels).backward()
    tells = [output.grad, nn.functional.one_hot(labels, 5).float(), output.detach(), labels.float()]
    for tensor in accelerator.everything():
        for tell in tells:
            assert tensor.shape != tell.shape or distance(tensor, tell) > 0.01
    assert all(tensor.dim() == 4 for tensor in accelerator.everything())


def test_trap_4_a_split_layer_that_runs_last_is_refused_in_training() -> None:
    class Surprise(nn.Module):
        """Its last registered layer is not the one that runs last."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.last = nn.Conv2d(8, 5, 3)
            self.middle = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x))).mean((2, 3))

    x = torch.randn(2, 3, 9, 9)
    split = protect(Surprise(), Asymmetric(noise=None), accelerator=InProcessAccelerator())
    with pytest.raises(TrustError, match="labels"):
        split(x)
    sure = protect(Surprise(), Asymmetric(noise=None), accelerator=InProcessAccelerator(), example_input=x)
    sure(x).sum().backward()
    assert [each.name for each in sure.motte_layers if each.side == "split"] == ["middle"]


@pytest.mark.parametrize(("stride", "width"), [(1, 8), (1, 12), (2, 8), (2, 12)])
def test_trap_5_batchnorm_and_shortcuts_of_residual_blocks(stride: int, width: int, distance: Distance) -> None:
    accelerator = same_step(net(block(stride, width), features=width), distance)
    assert len(accelerator.stats()) == 2 + (stride > 1 or width != 8)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_trap_6_strides(stride: int, kernel: int, distance: Distance) -> None:
    same_step(net(nn.Conv2d(8, 8, kernel, stride=stride, padding=kernel // 2)), distance, size=11)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, padding=1),
        nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(4),
        nn.AdaptiveMaxPool2d((3, 5)),
    ],
    ids=str,
)
def test_trap_6_pooling(pool: nn.Module, distance: Distance) -> None:
    same_step(net(nn.Conv2d(8, 8, 3, padding=1), pool, nn.Conv2d(8, 8, 3, padding=1)), distance, size=10)


@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (2, 31), (33, 33), (5, 3)])
def test_trap_7_batches_and_channels_that_are_no_multiple_of_anything(
    batch: int, channels: int, distance: Distance
) -> None:
    layers = [nn.Conv2d(8, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 8, 3)]
    same_step(net(*layers), distance, batch=batch, size=7)


def test_trap_8_a_trained_model_is_carried_over(distance: Distance) -> None:
    model = net(nn.BatchNorm2d(8), block(2, 12), features=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, torch.randn(4, 3, 9, 9), torch.arange(4))
        optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    split = protect(model, Asymmetric(noise=None), accelerator=InProcessAccelerator())
    assert list(split.state_dict()) == list(state)
    assert all(torch.equal(split.state_dict()[name], value) for name, value in state.items())
    x = torch.randn(3, 3, 9, 9)
    assert distance(split.eval()(x), model.eval()(x)) <= 1e-5
    # The very parameters: an optimizer made before goes on.
    assert all(a is b for a, b in zip(split.parameters(), model.parameters(), strict=True))
    again = net(nn.BatchNorm2d(8), block(2, 12), features=12)
    again.load_state_dict(split.state_dict())


def test_trap_9_what_crosses_is_a_closed_list() -> None:
    accelerator = Listening()
    model = net(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    split = protect(model, Asymmetric(noise=None, rank=Fixed(2)), accelerator=accelerator)
    for _ in range(3):
        step(split, torch.randn(2, 3, 9, 9), torch.tensor([0, 1]))
    # One weight (it did not change), a residual and an output gradient for each step, and nothing else.
    assert [tuple(each.shape) for each in accelerator.weights] == [(8, 8, 3, 3)]
    assert {name: len(each) for name, each in accelerator.inputs.items()} == {"3": 3}
    assert [tuple(each.shape) for each in accelerator.gradients] == [(2, 8, 7, 7)] * 3
    (traffic,) = accelerator.stats().values()
    assert traffic.sent_bytes == sum(each.nbytes for each in accelerator.everything())


@pytest.mark.parametrize("iterations", [1, 3])
def test_trap_10_rank_and_iterations_are_two_settings(iterations: int) -> None:
    accelerator = InProcessAccelerator()
    model = net(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
    scheme = Asymmetric(noise=None, rank=Schedule(start=1, factor=2, cap=5), iterations=iterations)
    split = protect(model, scheme, accelerator=accelerator)
    split(torch.randn(2, 3, 9, 9))
    assert [layer.last_rank for layer in split.motte_session.layers.values()] == [1, 2, 4, 5]
