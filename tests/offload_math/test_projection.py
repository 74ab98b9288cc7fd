"""Operators with few channels, against the ordinary kernels; and random coefficients that nobody can foresee."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.offload import projection
from motte.offload.projection import (
    GRID,
    SPREAD,
    ChannelWeights,
    Geometry,
    draw,
    energies,
    few_channels,
    fourth_powers,
    mix,
    spread_maps,
)


@pytest.mark.parametrize("ordinary", [False, True])
def test_few_channels_equal_the_operator_and_its_transpose(
    cases: Any, monkeypatch: pytest.MonkeyPatch, ordinary: bool
) -> None:
    monkeypatch.setattr(projection, "_MOST_OFFSETS", 0 if ordinary else 10**9)
    monkeypatch.setattr(projection, "_WASTE", 10**9)
    monkeypatch.setattr(projection, "_FEW_PRODUCTS", 0)
    for case in cases(48, 4, batches=(1, 2)):
        operation, few = case.operation, 2
        if operation.family != "conv":
            continue
        geometry = Geometry.of(operation)
        groups, inputs = operation.groups, operation.in_channels // operation.groups
        x, _, _ = case.tensors()
        narrow = LinearOperation(
            "conv",
            operation.in_channels,
            groups * few,
            *(operation.kernel, operation.stride, operation.padding, operation.dilation, operation.output_padding),
            groups,
        )
        weight = torch.randn(narrow.weight_shape, dtype=torch.float64)
        y = compute.forward(narrow, x, weight)
        arranged = weight.view(groups, few, inputs, -1)
        got = few_channels(geometry, x, arranged, y.shape[2:], gathers=True)
        torch.testing.assert_close(got.reshape(y.shape), y)
        # The gradient to an input of ``few`` channels: the same geometry, the other way.
        backwards = LinearOperation(
            "conv",
            groups * few,
            operation.in_channels,
            *(operation.kernel, operation.stride, operation.padding, operation.dilation, operation.output_padding),
            groups,
        )
        kernel = torch.randn(backwards.weight_shape, dtype=torch.float64)
        gradient = torch.randn(backwards.output_shape((len(x), groups * few, *x.shape[2:])), dtype=torch.float64)
        want = compute.input_gradient(backwards, (len(x), groups * few, *x.shape[2:]), kernel, gradient)
        turned = kernel.view(groups, inputs, few, -1).transpose(1, 2)
        got = few_channels(geometry, gradient, turned, x.shape[2:], gathers=False)
        torch.testing.assert_close(got.reshape(want.shape), want)


def test_large_strides_and_few_products_take_the_ordinary_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    plain = projection.compute.forward

    def spy(operation: LinearOperation, *tensors: torch.Tensor) -> torch.Tensor:
        taken.append(operation.family)
        return plain(operation, *tensors)

    monkeypatch.setattr(projection.compute, "forward", spy)
    geometry = Geometry(1, (4, 4), (4, 4), (0, 0), (1, 1))
    monkeypatch.setattr(projection, "_FEW_PRODUCTS", 100)
    few_channels(geometry, torch.randn(1, 3, 8, 8), torch.randn(1, 2, 3, 16), (2, 2), gathers=True)
    few_channels(geometry, torch.randn(1, 3, 2, 2), torch.randn(1, 2, 3, 16), (8, 8), gathers=False)
    assert taken == ["conv"]
    # 2 * 3 * 16 weights at one position; a kernel of one offset is a matrix product either way.
    one = Geometry(1, (1, 1), (1, 1), (0, 0), (1, 1))
    few_channels(one, torch.randn(1, 3, 2, 2), torch.randn(1, 2, 3, 1), (2, 2), gathers=True)
    few_channels(geometry, torch.randn(1, 3, 4, 4), torch.randn(1, 2, 3, 16), (1, 1), gathers=True)
    assert taken == ["conv", "conv"]


def test_moved_maps_give_the_weight_gradient(cases: Any) -> None:
    for case in cases(48, 5, batches=(1, 2)):
        operation = case.operation
        if operation.family != "conv":
            continue
        x, _, gradient = case.tensors()
        want = compute.weight_gradient(operation, x, gradient)
        geometry, groups = Geometry.of(operation), operation.groups
        wide_x, wide_g = x.unflatten(1, (groups, -1)).flatten(3), gradient.unflatten(1, (groups, -1)).flatten(3)
        first = spread_maps(geometry, wide_x, x.shape[2:], gradient.shape[2:], gathers=True)
        second = spread_maps(geometry, wide_g, gradient.shape[2:], x.shape[2:], gathers=False)
        shape = (groups, *want.shape[:0], want.shape[0] // groups, want.shape[1], -1)
        one = torch.einsum("bgfl,bgml->gmf", first, wide_g).reshape(shape)
        two = torch.einsum("bgfl,bgcl->gfc", second, wide_x)
        two = two.view(groups, shape[1], geometry.offsets, shape[2]).transpose(2, 3)
        torch.testing.assert_close(one.reshape(want.shape), want)
        torch.testing.assert_close(two.reshape(want.shape), want)


def test_coefficients_are_exact_nonzero_and_not_torchs() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(4, 5000, torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert not torch.equal(draw(4, 5000, torch.float64), first)
    assert torch.equal(first.float().double(), first)
    assert float(first.abs().min()) >= GRID
    assert float(first.abs().max()) < 1
    assert torch.equal((first / GRID) % 2, torch.ones_like(first))
    assert float(first.std()) == pytest.approx(SPREAD, rel=0.05)
    assert abs(float(first.mean())) < 5 * SPREAD / math.sqrt(first.numel())


@pytest.mark.parametrize("errors", [[1.0], [1.0, 1.0], [1.0] * 50, [1.0, 0.1, 0.01], [100.0] + [1.0] * 99])
def test_small_projections_are_as_rare_as_balls_theorem_says(errors: list[float]) -> None:
    e = torch.tensor(errors, dtype=torch.float64)
    r = draw(40_000, len(e), torch.float64)
    projected = (r @ e).abs() / e.norm()
    for t in (0.5, 0.2, 0.05, 0.01):
        bound = math.sqrt(2) * t
        rate = float((projected <= t).double().mean())
        assert rate <= bound + 5 * math.sqrt(bound / len(r))


@pytest.mark.parametrize("block", [1 << 18, 4])
def test_energies_of_any_scale(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(projection, "_BLOCK", block)
    plain = torch.rand(3, 4, dtype=torch.float64)
    for near in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 4).transpose(2, 3), torch.zeros(2, 3, 4, 5)):
        want = (near.double().square() * plain.view(1, 3, 4, 1)).sum(2)
        torch.testing.assert_close(energies(near, ChannelWeights.of(plain)), want, rtol=1e-6, atol=0)
    maps = torch.randn(2, 3, 4, 5) * 10.0 ** torch.linspace(-30, 30, 4).view(1, 1, 4, 1)
    weights = 10.0 ** torch.linspace(60, -60, 4, dtype=torch.float64).expand(3, 4)
    want = (maps.double().square() * weights.view(1, 3, 4, 1)).sum(2)
    torch.testing.assert_close(energies(maps, ChannelWeights.of(weights)), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(energies(maps), maps.double().square().sum(2), rtol=1e-12, atol=0)
    assert energies(maps[:0]).shape == (0, 3, 5)


def test_mix() -> None:
    maps, r = torch.randn(2, 3, 4, 5), torch.randn(6, 4)
    torch.testing.assert_close(mix(r, maps), torch.einsum("fd,bgdl->bgfl", r, maps))


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_squares_are_the_same_in_blocks(
    monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(projection, "_BLOCK", block)
    maps, weights = torch.randn(3, 2, 4, 5, dtype=dtype), torch.rand(2, 4)
    room = projection.Room()
    for laid in (maps, maps.transpose(2, 3).contiguous().transpose(2, 3)):
        for rows in (None, weights):
            want = (maps.double().square() * (1 if rows is None else rows.double().view(1, 2, 4, 1))).sum(2)
            per_channel = None if rows is None else ChannelWeights.of(rows)
            torch.testing.assert_close(energies(laid, per_channel, room), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(fourth_powers(laid, room), maps.double().pow(4).sum((0, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("tokens", [False, True])
def test_positions_whose_squares_are_lost_in_float32_are_summed_again(share: float, tokens: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    maps = torch.randn(2, 2, 4, 30, generator=generator)
    odd = torch.rand(2, 2, 1, 30, generator=generator) < share
    for factor in (0.0, 1e-25, 1e25):
        scaled = torch.where(odd, maps * factor, maps)
        scaled = scaled.transpose(2, 3).contiguous().transpose(2, 3) if tokens else scaled
        for weights in (None, torch.rand(2, 4, generator=generator)):
            rows = 1 if weights is None else weights.double().view(1, 2, 4, 1)
            want = (scaled.double().square() * rows).sum(2)
            per_channel = None if weights is None else ChannelWeights.of(weights)
            torch.testing.assert_close(energies(scaled, per_channel), want, rtol=1e-6, atol=0)
    bad = maps.clone()
    bad[1, 0, 2, 3], bad[0, 1, 1, 7] = math.nan, math.inf
    sums = energies(bad)
    assert (~sums.isfinite()).nonzero().tolist() == [[0, 1, 7], [1, 0, 3]]
