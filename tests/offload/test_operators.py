"""Every operator and parameter, split and plain: outputs and all gradients, with noise off."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.link.calls import Op
from motte.link.recording import Recording
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Energy, Entropy, Fixed, Gaussian, Mechanism, Rank, Schedule

Distance = Callable[[Tensor, Tensor], float]
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    layer: type[nn.Module]
    arguments: tuple[Any, ...]
    settings: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    rank: Rank

    def __str__(self) -> str:
        settings = ",".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.layer.__name__}{self.arguments}({settings}) {self.shape} {self.rank}"


def conv(
    layer: type[nn.Module], inputs: int, outputs: int, kernel: Any, shape: Any, rank: Rank, **settings: Any
) -> Case:
    return Case(layer, (inputs, outputs, kernel), tuple(settings.items()), shape, rank)


def cases() -> list[Case]:
    found = []
    # Every channel count with every stride and some padding; ranks in turn.
    ranks = itertools.cycle([Fixed(0), Fixed(1), Fixed(2), Fixed(7), Fixed(64), Schedule(), Energy(0.9), Entropy()])
    for channels, stride, batch in itertools.product((1, 3, 31, 33), (1, 2, 3), (1, 3)):
        padding = (stride + channels) % 3
        found.append(
            conv(nn.Conv2d, channels, 5, 3, (batch, channels, 9, 8), next(ranks), stride=stride, padding=padding)
        )
    for dilation, groups, bias in itertools.product((1, 2), (1, 2, 6), (True, False)):
        settings = {"dilation": dilation, "groups": groups, "bias": bias, "padding": 1}
        found.append(conv(nn.Conv2d, 6, 12, (3, 2), (2, 6, 8, 7), next(ranks), **settings))
    found += [
        conv(nn.Conv2d, 4, 6, 3, (2, 4, 7, 6), next(ranks), padding=(1, 2), padding_mode=mode)
        for mode in ("reflect", "replicate", "circular")
    ]
    found += [conv(nn.Conv2d, 4, 6, kernel, (2, 4, 7, 6), next(ranks), padding="same") for kernel in (3, 4, (2, 5))]
    found.append(conv(nn.Conv2d, 4, 6, 3, (2, 4, 7, 6), Fixed(2), padding="valid"))
    found.append(conv(nn.Conv2d, 4, 6, 1, (2, 4, 7, 6), Fixed(2), stride=2))
    for groups in (1, 3):
        found.append(conv(nn.Conv1d, 3, 9, 5, (2, 3, 17), next(ranks), stride=2, padding=2, groups=groups))
        found.append(conv(nn.Conv3d, 3, 6, (2, 3, 2), (2, 3, 4, 6, 5), next(ranks), padding=1, groups=groups))
        transposed = {"stride": 2, "padding": 1, "output_padding": 1, "groups": groups}
        found.append(conv(nn.ConvTranspose1d, 6, 9, 4, (2, 6, 7), next(ranks), **transposed))
        found.append(conv(nn.ConvTranspose2d, 6, 9, 3, (2, 6, 5, 4), next(ranks), **transposed))
        found.append(conv(nn.ConvTranspose3d, 6, 3, 3, (2, 6, 3, 4, 3), next(ranks), **transposed))
    found.append(conv(nn.ConvTranspose2d, 4, 6, 3, (2, 4, 5, 4), Fixed(2), stride=3, dilation=2))
    found.append(conv(nn.Conv2d, 4, 4, 3, (4, 7, 6), Fixed(2), padding=1))  # no batch dimension
    found += [Case(nn.Linear, (10, 6), (), shape, next(ranks)) for shape in ((2, 7, 10), (1, 5, 10), (2, 3, 4, 10))]
    found.append(Case(nn.Linear, (10, 6), (("bias", False),), (3, 1, 10), Fixed(1)))
    found.append(Case(nn.Linear, (10, 6), (), (3, 10), Fixed(1)))
    found.append(conv(nn.Conv2d, 4, 6, 3, (2, 4, 3, 3), Fixed(1)))
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_split_equals_plain(
    case: Case, dtype: torch.dtype, accelerator: InProcessAccelerator, distance: Distance, one_layer: type[nn.Module]
) -> None:
    plain = one_layer(case.layer(*case.arguments, **dict(case.settings))).to(dtype)
    split = protect(plain, Asymmetric(noise=None, rank=case.rank, offloaded_layers=("layer",)), accelerator=accelerator)
    x = torch.randn(case.shape, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = plain(theirs)
    gradient = torch.randn_like(wanted)
    wanted.backward(gradient)
    reference = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
    plain.zero_grad()
    got = split(ours)
    got.backward(gradient)
    bound = BOUNDS[dtype]
    assert distance(got, wanted) <= bound
    assert distance(ours.grad, theirs.grad) <= bound
    for name, parameter in split.named_parameters():
        assert distance(parameter.grad, reference[name]) <= bound, name
    left = split.motte_session.accelerator.stats()
    vector = case.layer is nn.Linear and (len(case.shape) == 2 or case.shape[1] == 1)
    assert bool(left) is not vector, "split where it can be, inside where there is nothing to decompose"


@pytest.mark.parametrize("shape", [(0, 4, 6, 6)])
def test_a_batch_of_nothing(
    shape: tuple[int, ...], accelerator: InProcessAccelerator, distance: Distance, one_layer: type[nn.Module]
) -> None:
    plain = one_layer(nn.Conv2d(4, 6, 3))
    split = protect(plain, Asymmetric(noise=None, offloaded_layers=("layer",)), accelerator=accelerator)
    x = torch.randn(shape, requires_grad=True)
    y = split(x)
    y.sum().backward()
    assert y.shape == plain(x).shape
    assert x.grad.shape == shape
    assert plain.layer.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("method", ["als", "range-finder"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_every_way_to_decompose_gives_the_same_result(
    method: str, iterations: int, accelerator: InProcessAccelerator, distance: Distance, one_layer: type[nn.Module]
) -> None:
    plain = one_layer(nn.Conv2d(8, 6, 3, padding=1)).double()
    scheme = Asymmetric(
        noise=None, rank=Fixed(3), decomposition=method, iterations=iterations, offloaded_layers=("layer",)
    )
    split = protect(plain, scheme, accelerator=accelerator)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64)
    assert distance(split(x), plain(x)) <= 1e-10


def test_a_frozen_weight_and_an_input_without_gradient(
    accelerator: InProcessAccelerator, distance: Distance, one_layer: type[nn.Module]
) -> None:
    plain = one_layer(nn.Conv2d(4, 6, 3))
    scheme = Asymmetric(noise=None, rank=Fixed(2), offloaded_layers=("layer",))
    split = protect(plain, scheme, accelerator=accelerator)
    x = torch.randn(2, 4, 6, 6)
    split(x).sum().backward()
    wanted = torch.autograd.grad(plain(x).sum(), plain.layer.weight)[0]
    assert distance(plain.layer.weight.grad, wanted) <= 1e-5
    plain.layer.weight.requires_grad_(False)
    x.requires_grad_()
    split(x).sum().backward()
    assert distance(x.grad, torch.autograd.grad(plain(x).sum(), x)[0]) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rounded_residual_costs_only_its_rounding(
    dtype: str, accelerator: InProcessAccelerator, distance: Distance, one_layer: type[nn.Module]
) -> None:
    plain = one_layer(nn.Conv2d(16, 8, 3))
    scheme = Asymmetric(noise=None, rank=Fixed(8), residual_dtype=dtype, offloaded_layers=("layer",))
    split = protect(plain, scheme, accelerator=accelerator)
    x = torch.randn(2, 16, 9, 9)
    far = distance(split(x), plain(x))
    assert far <= (1e-5 if dtype == "float32" else 1e-2)
    assert (far > 1e-5) is (dtype == "bfloat16")


@pytest.mark.parametrize("pieces", [2, 3, 16])
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noise"])
def test_a_batch_in_pieces_gives_the_same_result(
    pieces: int, noisy: bool, distance: Distance, one_layer: type[nn.Module]
) -> None:
    # Clips that nothing reaches, and little noise: what is left is the sum over the pieces.
    tiny = Mechanism(clip=1e3, noise_multiplier=1e-5)
    noise = Gaussian(residual=tiny, gradient=tiny, update=tiny) if noisy else None
    bound = 0.05 if noisy else 1e-10
    recording = Recording()
    plain = one_layer(nn.Conv2d(6, 4, 3, padding=1)).double()
    scheme = Asymmetric(noise=noise, rank=Fixed(2), pieces=pieces, offloaded_layers=("layer",))
    split = protect(plain, scheme, accelerator=InProcessAccelerator(recorder=recording))
    x = torch.randn(5, 6, 7, 8, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradient = torch.randn(5, 4, 7, 8, dtype=torch.float64)
    plain(theirs).backward(gradient)
    wanted = plain.layer.weight.grad.clone()
    plain.zero_grad()
    split(ours).backward(gradient)
    assert distance(split(ours), plain(theirs)) <= bound
    assert distance(ours.grad, theirs.grad) <= bound
    assert distance(plain.layer.weight.grad, wanted) <= bound
    sent = [frame.described[0].shape[0] for frame in recording.sent() if frame.op is Op.BACKWARD]
    assert sent == {2: [3, 2], 3: [2, 2, 1], 16: [1, 1, 1, 1, 1]}[pieces]
    counts = split.motte_session.releases.counts
    assert {kind: count.total for (_, kind), count in counts.items()} == {"residual": 2, "gradient": 1, "update": 1}
