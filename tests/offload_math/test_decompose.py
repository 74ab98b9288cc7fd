"""Decomposition: the parts add up, whatever the shape; the rank rules choose what they say; nothing turns into NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from motte.errors import InputError, SettingError
from motte.offload.decompose import (
    Principal,
    decompose,
    decompose_multiply_adds,
    energy_shares,
    entropy_multiply_adds,
    entropy_rank,
    residual,
)
from motte.offload.settings import Decomposition, Energy, Entropy, Fixed, Schedule

METHODS: tuple[Decomposition, ...] = ("als", "range-finder")
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def matrices(count: int, rows: int, cols: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Samples with decaying singular values, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    inner = min(rows, cols)
    decay = torch.arange(1, inner + 1, dtype=torch.float64) ** -1.0
    left = torch.randn(count, rows, inner, generator=generator, dtype=torch.float64)
    return (left * decay @ torch.randn(count, inner, cols, generator=generator, dtype=torch.float64)).to(dtype)


def best_share(x: Tensor, rank: int) -> float:
    """Share of the energy that the best approximation of ``rank`` leaves, worst sample."""
    squares = torch.linalg.svdvals(x.double()).square()
    return float((squares[:, rank:].sum(1) / squares.sum(1)).max())


def left_share(x: Tensor, principal: Principal) -> float:
    rest = x.double() - principal.left.double() @ principal.right.double()
    return float((rest.square().sum((1, 2)) / x.double().square().sum((1, 2))).max())


@given(
    count=st.integers(0, 4),
    rows=st.sampled_from([1, 2, 3, 31, 33]),
    cols=st.sampled_from([1, 2, 7, 40]),
    rank=st.integers(0, 40),
    iterations=st.integers(1, 3),
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_the_parts_add_up(
    count: int,
    rows: int,
    cols: int,
    rank: int,
    iterations: int,
    method: Decomposition,
    dtype: torch.dtype,
    seed: int,
) -> None:
    x = matrices(count, rows, cols, dtype, seed)
    before = x.clone()
    principal = decompose(x, Fixed(rank), iterations=iterations, method=method)
    kept = min(rank, rows, cols) if count else 0
    assert principal.left.shape == (count, rows, kept)
    assert principal.right.shape == (count, kept, cols)
    assert principal.left.dtype == principal.right.dtype == dtype
    rest = residual(x, principal)
    assert torch.equal(x, before)
    assert rest.dtype == dtype
    whole = principal.left.double() @ principal.right.double() + rest.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(whole, x.double(), rtol=0, atol=8 * eps * float(x.abs().max()) if count else 0)
    if count and kept == min(rows, cols):
        assert left_share(x, principal) < ROUNDING[dtype] ** 2


@pytest.mark.parametrize("method", METHODS)
def test_close_to_the_best_low_rank_part(method: Decomposition) -> None:
    x = matrices(3, 32, 100)
    once, often = (left_share(x, decompose(x, Fixed(4), iterations=each, method=method)) for each in (1, 8))
    assert best_share(x, 4) <= often * (1 + 1e-9)
    assert often < 1.2 * best_share(x, 4)
    assert often <= once < 3 * best_share(x, 4)


@pytest.mark.parametrize("method", METHODS)
def test_the_energies_add_up_and_are_reported(method: Decomposition) -> None:
    x = matrices(3, 16, 50)
    x[1] = 0
    principal = decompose(x, Fixed(3), method=method)
    shares = energy_shares(x, principal, residual(x, principal))
    torch.testing.assert_close(shares.main + shares.residual, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert shares.residual[0] == pytest.approx(left_share(x[:1], decompose(x[:1], Fixed(3), method=method)))


def test_columns_of_left_are_orthogonal_and_the_residual_is_orthogonal_to_them() -> None:
    x = matrices(2, 20, 30)
    principal = decompose(x, Fixed(6), iterations=2)
    gram = principal.left.mT @ principal.left
    assert float((gram - torch.diag_embed(torch.diagonal(gram, dim1=1, dim2=2))).abs().max()) < 1e-12
    assert float((principal.left.mT @ residual(x, principal)).abs().max()) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_energy_holds_in_the_worst_sample_and_takes_no_term_too_many(
    method: Decomposition, dtype: torch.dtype, share: float
) -> None:
    x = torch.cat(
        [matrices(1, 24, 40, dtype), torch.randn(1, 24, 40, generator=torch.Generator().manual_seed(1)).to(dtype)]
    )
    principal = decompose(x, Energy(share), method=method)
    assert principal.rank > 0
    assert left_share(x, principal) <= (1 - share) * (1 + 20 * torch.finfo(dtype).eps)
    fewer = decompose(x, Fixed(principal.rank - 1), method=method) if method == "als" else None
    if fewer is not None:
        assert left_share(x, fewer) > (1 - share) * (1 - 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", METHODS)
def test_energy_stops_at_the_rank_of_the_data_and_at_its_cap(method: Decomposition) -> None:
    x = matrices(2, 20, 3) @ matrices(2, 3, 30, seed=1)
    # A random probe of three columns can be ill-conditioned; one more term then takes what rounding left.
    assert decompose(x, Energy(1.0), method=method).rank in ((3,) if method == "als" else (3, 4))
    assert decompose(x, Energy(1.0, cap=2), method=method).rank == 2
    assert decompose(torch.zeros(2, 4, 5), Energy(0.9), method=method).rank == 0
    assert decompose(matrices(2, 4, 5), Energy(1.0), method=method).rank == 4


def test_schedule_counts_positions() -> None:
    x = matrices(1, 40, 40)
    ranks = [decompose(x, Schedule(start=2, factor=2, cap=16), position=each).rank for each in range(6)]
    assert ranks == [2, 4, 8, 16, 16, 16]


@pytest.mark.parametrize("shape", [(2, 12, 40), (3, 40, 12)])
def test_entropy_is_that_of_the_singular_values(shape: tuple[int, int, int]) -> None:
    x = matrices(*shape)
    s = torch.linalg.svdvals(x)
    shares = s / s.sum(1, keepdim=True)
    mu = -torch.log2(shares.square().sum(1))
    expected = max(math.ceil(2 ** float(each)) for each in mu)
    assert entropy_rank(x) == decompose(x, Entropy()).rank == expected
    assert decompose(x, Entropy(cap=1)).rank == 1


def test_entropy_of_flat_spectra_and_of_zeros() -> None:
    flat = torch.zeros(1, 8, 9, dtype=torch.float64)
    flat[0, range(5), range(5)] = 2.0
    assert entropy_rank(flat) == 5
    assert entropy_rank(torch.cat([flat, torch.zeros_like(flat)])) == 5
    assert decompose(torch.zeros(2, 3, 4), Entropy()).rank == 0
    assert decompose(torch.zeros(0, 3, 4), Entropy()).rank == 0
    assert entropy_rank(flat.float() * 1e-30) == 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-12, 1e12, 1e30, 1e37])
def test_any_magnitude_decomposes_and_zero_samples_stay_zero(method: Decomposition, size: float) -> None:
    x = matrices(3, 8, 20, torch.float32)
    x = (x / x.abs().amax((1, 2), keepdim=True) * size).contiguous()
    x[1] = 0
    principal = decompose(x, Fixed(8), method=method)
    assert bool(principal.left.isfinite().all())
    assert bool(principal.right.isfinite().all())
    rest = residual(x, principal)
    assert not rest[1].any()
    if size > 1e-36:
        assert float(rest.double().norm() / x.double().norm()) < 1e-5


def test_constant_and_repeated_rows_leave_nothing_after_their_rank() -> None:
    x = torch.ones(2, 6, 9)
    x[1, 3:] = 5.0
    for method in METHODS:
        principal = decompose(x, Fixed(4), method=method)
        assert bool(principal.left.isfinite().all() and principal.right.isfinite().all())
        assert float(residual(x, principal).abs().max()) < 1e-5


def test_residual_into_a_buffer_and_in_place() -> None:
    x = matrices(2, 5, 7, torch.float32)
    principal = decompose(x, Fixed(2))
    expected = residual(x, principal)
    buffer = torch.empty_like(x)
    assert residual(x, principal, out=buffer) is buffer
    assert torch.equal(buffer, expected)
    inside = x.clone()
    residual(inside, principal, out=inside)
    assert torch.equal(inside, expected)


def test_the_same_batch_gives_the_same_parts_and_no_generator_is_touched() -> None:
    x = matrices(2, 9, 11, torch.float32)
    state = torch.get_rng_state()
    first, second = (decompose(x, Fixed(3), method="range-finder") for _ in range(2))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_does_not_reach_in() -> None:
    x = matrices(2, 9, 11, torch.float32)
    plain = residual(x, decompose(x, Fixed(3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = residual(x, decompose(x, Fixed(3)))
        main = decompose(x, Fixed(3)).restore()
    assert cast.dtype == main.dtype == torch.float32
    assert torch.equal(cast, plain)


def test_bad_requests() -> None:
    with pytest.raises(InputError):
        decompose(torch.zeros(3, 4), Fixed(1))
    with pytest.raises(InputError):
        decompose(torch.zeros(1, 3, 4, dtype=torch.int32), Fixed(1))
    with pytest.raises(SettingError):
        decompose(torch.zeros(1, 3, 4), Fixed(1), iterations=17)
    with pytest.raises(SettingError):
        decompose(torch.zeros(1, 3, 4), Fixed(1), method="svd")  # type: ignore[arg-type]


def test_costs() -> None:
    assert decompose_multiply_adds(4, 10, 1, 1, "als") == 40 * 4
    assert decompose_multiply_adds(4, 10, 3, 2, "als") == 40 * (3 * 6 + 2)
    assert decompose_multiply_adds(4, 10, 99, 1, "als") == decompose_multiply_adds(4, 10, 4, 1, "als")
    assert decompose_multiply_adds(4, 10, 0, 1, "als") == decompose_multiply_adds(4, 10, 0, 3, "range-finder") == 0
    assert decompose_multiply_adds(64, 1000, 2, 1, "range-finder") == 64 * 1000 * 2 * 3 + 2 * 64 * 4
    assert entropy_multiply_adds(4, 10) == entropy_multiply_adds(10, 4) == 160 + 4 * 64 // 3


def test_pieces_of_the_batch_are_decomposed_as_the_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 6, 20) * 10.0 ** torch.tensor([0, 30, -30, 0, 2]).view(5, 1, 1)
    x[3] = 0
    whole = decompose(x, Fixed(3))
    monkeypatch.setattr("motte.offload.decompose._PIECE", 240)
    pieces = decompose(x, Fixed(3))
    for want, got in ((whole.left, pieces.left), (whole.right, pieces.right)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["als", "range-finder"])
def test_where_every_direction_is_kept_nothing_is_left_over(
    shape: tuple[int, int, int], dtype: torch.dtype, method: str
) -> None:
    # A decomposition would leave its rounding outside, and that still depends on the input.
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 1e3).to(dtype)
    for rank in (Fixed(min(shape[1:])), Fixed(64), Schedule(64, 2, 64)):
        principal = decompose(x, rank, method=method)
        assert principal.rank == min(shape[1:])
        assert torch.equal(principal.left @ principal.right, x)
        assert not residual(x, principal).any()
    assert residual(x, decompose(x, Fixed(min(shape[1:]) - 1), method=method)).any()
