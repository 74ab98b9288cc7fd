"""Clipping and noise: the distribution, what it is derived from, the bound on every norm, and the grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from motte.errors import InputError, SettingError
from motte.offload import gaussians
from motte.offload.gaussians import CHUNK, REACH, Gaussians
from motte.offload.noise import CLIP_MARGIN, Kind, Noise, Released, _Grid
from motte.offload.settings import Mechanism
from motte.seal.keystream import Keystream

KEY = bytes(range(32))
UNIT = Mechanism(clip=1.0, noise_multiplier=1.0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def privatise(x: Tensor, mechanism: Mechanism = UNIT, **changed: object) -> Released:
    given: dict[str, object] = {"layer": "conv2", "kind": "residual", "step": 3}
    return Noise(KEY).privatise(x, mechanism, **(given | changed))  # type: ignore[arg-type]


class Quiet(Noise):
    """Everything but the noise: what comes back is the clipped value on the grid."""

    def _add_noise(self, work: Tensor, grid: _Grid, key: bytes) -> None:
        work.mul_(grid.step)


def clipped(x: Tensor, mechanism: Mechanism, *, per_sample: bool = True) -> Tensor:
    return Quiet(KEY).privatise(x, mechanism, layer="a", kind="residual", step=0, per_sample=per_sample).tensor.double()


# --- the distribution -----------------------------------------------------------------------------------------------
def test_noise_is_gaussian_with_the_stated_sigma() -> None:
    mechanism = Mechanism(clip=0.5, noise_multiplier=3.0)
    values = privatise(torch.zeros(4, 1 << 19), mechanism).tensor.double().numpy().ravel() / mechanism.sigma
    assert stats.kstest(values, "norm").pvalue > 1e-3
    count = len(values)
    assert abs(values.mean()) < 5 / math.sqrt(count)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * count)
    assert abs(stats.kurtosis(values)) < 5 * math.sqrt(24 / count)
    for beyond in (2.0, 3.0, 4.0, 4.5):
        expected = count * 2 * stats.norm.sf(beyond)
        assert abs((np.abs(values) > beyond).sum() - expected) < 5 * math.sqrt(expected)


def test_the_two_halves_of_a_pair_and_neighbours_are_uncorrelated() -> None:
    values = privatise(torch.zeros(1, 1 << 20)).tensor.ravel()
    half = CHUNK // 2
    chunks = values.view(-1, CHUNK)
    pairs = (chunks[:, :half].reshape(-1), chunks[:, half:].reshape(-1))
    for left, right in (pairs, (values[:-1], values[1:]), (values[:-CHUNK], values[CHUNK:])):
        both = torch.stack([left, right])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(len(left))
        assert abs(float(torch.corrcoef(both.square())[0, 1])) < 5 / math.sqrt(len(left))


def test_the_lowest_bits_of_the_noise_are_uniform() -> None:
    step = _Grid.for_samples(UNIT).step
    whole = (privatise(torch.zeros(1, 1 << 20)).tensor / step).to(torch.int64).ravel()
    for modulus in (2, 8, 256, 65_536):
        counts = torch.bincount(whole % modulus, minlength=modulus).numpy()
        assert stats.chisquare(counts).pvalue > 1e-3
    # Where float32 has the fewest bits to spare, too.
    tail = whole[whole.abs() > 2 * 2**20]
    assert stats.chisquare(torch.bincount(tail % 4, minlength=4).numpy()).pvalue > 1e-3


def test_the_fast_values_are_those_of_the_slow_formula() -> None:
    count, sigma, slot = 5001, 1e5, 3
    fast = Gaussians(Keystream(KEY)).draw(slot, count, sigma).double().numpy()
    pairs = (count + 1) // 2
    raw = bytearray(14 * pairs)
    Keystream(KEY).fill(memoryview(raw), offset=slot * CHUNK // 2 * 14)
    uniform = np.abs(np.frombuffer(raw, np.int64, pairs).astype(np.longdouble)) / np.longdouble(2) ** 63
    angle = np.frombuffer(raw, np.int32, pairs, offset=8 * pairs).astype(np.float64) / 2**31 * np.pi
    radius = np.sqrt(-2 * np.log(uniform)).astype(np.float64) * sigma
    uniform_part = np.frombuffer(raw, np.int8, offset=12 * pairs)
    slow = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]) + uniform_part
    assert np.abs(fast - slow[:count]).max() < 0.5 + 2e-6 * REACH * sigma
    assert np.array_equal(fast, fast.round())


@pytest.mark.parametrize("long", [0, 1, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("short", [0, -(2**31), 2**31 - 1, 2**30])
def test_the_ends_of_the_bits_give_finite_values_within_reach(
    monkeypatch: pytest.MonkeyPatch, long: int, short: int
) -> None:
    pairs = 8
    raw = np.full(pairs, long, np.int64).tobytes() + np.full(pairs, short, np.int32).tobytes() + bytes(2 * pairs)

    def planted(self: Keystream, into: memoryview, *, offset: int) -> None:
        into[:] = raw

    monkeypatch.setattr(gaussians.Keystream, "fill", planted)
    values = Gaussians(Keystream(KEY)).draw(0, 2 * pairs, 1e5)
    assert bool(torch.isfinite(values).all())
    assert float(values.abs().max()) < REACH * 1e5
    if abs(long) < 2:
        assert float(values.abs().max()) > 6.6e5


# --- what the noise is derived from -----------------------------------------------------------------------------------
def test_the_same_call_gives_the_same_bytes_and_is_a_retry() -> None:
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(1))
    first, second = privatise(x), privatise(x.clone())
    assert torch.equal(first.tensor, second.tensor)
    assert first.release_id == second.release_id
    assert len(first.release_id) == 16


def test_any_difference_gives_independent_noise() -> None:
    x = torch.zeros(2, 40_000)
    other = x.clone()
    other[1, 39_999] = 0.25
    tiny = Mechanism(clip=1.0, noise_multiplier=1.0 + 1e-12)
    released = [
        privatise(x),
        privatise(x, layer="conv3"),
        privatise(x, kind="gradient"),
        privatise(x, step=4),
        privatise(other),
        privatise(x, tiny),
        privatise(x.view(4, 20_000)),
        privatise(x.bfloat16()),
        privatise(x, per_sample=False),
        Noise(KEY[::-1]).privatise(x, UNIT, layer="conv2", kind="residual", step=3),
    ]
    assert len({each.release_id for each in released}) == len(released)
    for one, two in combinations(released, 2):
        both = torch.stack([one.tensor.reshape(-1).float(), two.tensor.reshape(-1).float()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(x.numel())


def test_averaging_retries_gains_nothing_and_other_bytes_are_another_release() -> None:
    x = torch.full((1, 4096), 0.01)
    retries = torch.stack([privatise(x).tensor for _ in range(5)])
    assert torch.equal(retries.amax(0), retries.amin(0))
    assert privatise(x + 1e-4).release_id != privatise(x).release_id


def test_the_result_does_not_depend_on_threads(threads: None) -> None:
    x = torch.randn(3, CHUNK + 12_345, generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(1)
    wanted, update = privatise(x), privatise(x, per_sample=False)
    single = privatise(x.double().view(1, -1))
    for inner, outer in ((2, 1), (3, 1), (1, 2), (3, 3)):
        torch.set_num_threads(inner)
        noise = Noise(KEY, threads=outer)
        found = noise.privatise(x, UNIT, layer="conv2", kind="residual", step=3)
        assert torch.equal(found.tensor, wanted.tensor)
        assert found.release_id == wanted.release_id
        again = noise.privatise(x, UNIT, layer="conv2", kind="residual", step=3, per_sample=False)
        assert torch.equal(again.tensor, update.tensor)
        wide = noise.privatise(x.double().view(1, -1), UNIT, layer="conv2", kind="residual", step=3)
        assert torch.equal(wide.tensor, single.tensor)


def test_the_generator_of_torch_is_neither_used_nor_moved() -> None:
    x = torch.ones(2, 100)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = privatise(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(privatise(x).tensor, first.tensor)


def test_surroundings_change_nothing() -> None:
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(3))
    wanted = privatise(x).tensor
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(privatise(x).tensor, wanted)
    with torch.inference_mode():
        assert torch.equal(privatise(x.clone()).tensor, wanted)
    found = privatise(x.clone().requires_grad_())
    assert not found.tensor.requires_grad
    assert torch.equal(found.tensor, wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(privatise(x).tensor, wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_strides_change_nothing_and_the_input_is_left_alone() -> None:
    x = torch.randn(2, 5, 7, 6, generator=torch.Generator().manual_seed(4))
    kept = x.clone()
    wanted = privatise(x)
    assert torch.equal(x, kept)
    for view in (
        x.to(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([x, -x], dim=-1)[..., 0],
    ):
        found = privatise(view)
        assert torch.equal(found.tensor, wanted.tensor)
        assert found.release_id == wanted.release_id


def test_overwriting_gives_the_same_in_the_memory_that_was_given() -> None:
    x = torch.randn(3, CHUNK + 9, generator=torch.Generator().manual_seed(7))
    wanted = privatise(x)
    found = privatise(given := x.clone(), overwrite=True)
    assert torch.equal(found.tensor, wanted.tensor)
    assert found.release_id == wanted.release_id
    assert found.tensor.data_ptr() == given.data_ptr()
    # Where it cannot be, it is not.
    for other in (x.double(), x.bfloat16(), x.t().contiguous().t()):
        kept = other.clone()
        assert torch.equal(privatise(other, overwrite=True).tensor, privatise(kept).tensor)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0), (0,), (5,), (1, 1), (2, CHUNK + 1), (CHUNK + 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for per_sample in (True, False):
        found = privatise(torch.ones(shape, dtype=dtype), per_sample=per_sample).tensor
        assert (found.shape, found.dtype) == (torch.Size(shape), dtype)
        assert bool(torch.isfinite(found).all())


# --- clipping ---------------------------------------------------------------------------------------------------------
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 3000),
    scale=st.floats(-44, 37),
    clip=st.floats(-18, 18),
    noise=st.floats(-2, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_no_norm_is_above_the_clip(
    rows: int, columns: int, scale: float, clip: float, noise: float, dtype: torch.dtype, seed: int
) -> None:
    mechanism = Mechanism(10.0**clip, 10.0**noise)
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = (values * 10.0**scale).clamp(-3e38, 3e38).to(dtype)
    found = clipped(x, mechanism) if dtype != torch.bfloat16 else clipped(x.float(), mechanism)
    largest = found.abs().amax(1, keepdim=True).clamp(min=1e-300)
    norms = torch.linalg.vector_norm(found / largest, dim=1) * largest[:, 0]
    assert bool((norms <= mechanism.clip).all())
    # What was inside keeps its value but for the grid, what was outside its direction and nearly all of its norm.
    step = _Grid.for_samples(mechanism).step
    exact = x.double()
    top = exact.abs().amax(1, keepdim=True).clamp(min=1e-300)
    before = torch.linalg.vector_norm(exact / top, dim=1, keepdim=True) * top
    wanted = exact * (mechanism.clip / before).clamp(max=1.0)
    assert float((found - wanted).abs().max()) <= 1.01 * step + 2 * CLIP_MARGIN * mechanism.clip


@pytest.mark.parametrize("value", [3e38, 1e20, 1e-20, 1e-40, 1e-45])
def test_huge_and_tiny_values(value: float) -> None:
    x = torch.full((2, 5000), value)
    x[1] = 0
    found = clipped(x, Mechanism(1.0, 0.1))
    assert float(torch.linalg.vector_norm(found[0])) <= 1.0
    assert float(torch.linalg.vector_norm(found[0])) == pytest.approx(min(1.0, value * math.sqrt(5000)), abs=1e-3)
    assert float(found[1].abs().max()) == 0.0


def test_constant_rows_which_sum_worst_in_float32_stay_within_the_clip() -> None:
    for value in (1.0, 1 / 3, 0.1, 1.0000001):
        found = clipped(torch.full((1, 1_000_003), value), UNIT)
        # The grid cuts each value by less than a step.
        lost = _Grid.for_samples(UNIT).step * math.sqrt(1_000_003)
        assert 1 - 2 * CLIP_MARGIN - lost < float(torch.linalg.vector_norm(found)) <= 1.0


def test_every_sample_is_clipped_by_itself() -> None:
    x = torch.randn(6, 40, 50, generator=torch.Generator().manual_seed(5)) * torch.tensor(
        [0.001, 0.01, 0.1, 1, 10, 100]
    ).view(6, 1, 1)
    together = clipped(x, UNIT)
    for index in range(6):
        assert torch.equal(together[index : index + 1], clipped(x[index : index + 1], UNIT))


# --- the grid ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("multiplier", [1e-3, 0.7, 1.0, 30.0, 1e4])
def test_everything_that_leaves_is_a_whole_number_of_steps(dtype: torch.dtype, multiplier: float) -> None:
    mechanism = Mechanism(0.3, multiplier)
    x = torch.randn(4, 3000, dtype=dtype, generator=torch.Generator().manual_seed(6))
    steps = privatise(x, mechanism).tensor.double() / _Grid.for_samples(mechanism).step
    assert torch.equal(steps, steps.round())
    assert float(steps.abs().max()) <= 2**24


def test_low_bits_of_a_float64_do_not_survive() -> None:
    x = torch.full((1, 64), 0.0625, dtype=torch.float64)
    low = x + 2.0**-50
    assert torch.equal(clipped(x, UNIT), clipped(low, UNIT))
    assert privatise(x).release_id == privatise(low).release_id


def test_the_grid_depends_on_nothing_but_the_mechanism() -> None:
    assert _Grid.for_samples(UNIT).step == 2.0**4 * 2.0**-24
    assert _Grid.for_samples(UNIT).sigma * _Grid.for_samples(UNIT).step == UNIT.sigma


# --- updates ----------------------------------------------------------------------------------------------------------
def test_an_update_is_noised_and_not_clipped() -> None:
    x = torch.full((64, 3, 3, 64), 50.0)
    noise = privatise(x, Mechanism(0.25, 2.0), kind="update", per_sample=False).tensor - x
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(noise.mean())) < 5 * 0.5 / math.sqrt(x.numel())
    assert stats.kstest(noise.ravel().numpy() / 0.5, "norm").pvalue > 1e-3


def test_an_update_is_noised_by_what_the_grid_adds_to_the_sensitivity() -> None:
    mechanism, values = Mechanism(1.0, 1e5), 1 << 40
    grid = _Grid.for_sum(mechanism, values=values)
    fine = grid.fine_sigma or 0.0
    sigma = math.hypot(grid.sigma, fine) * grid.step
    assert sigma == pytest.approx(mechanism.noise_multiplier * (1.0 + grid.step * math.sqrt(values)))
    assert sigma / mechanism.sigma - 1 < mechanism.noise_multiplier * math.sqrt(values) * 2.0**-32
    # Cutting moves two sums apart by at most a step in each value.
    one, two = torch.rand(1, 5000, dtype=torch.float64), torch.rand(1, 5000, dtype=torch.float64)
    cut = [clipped(each, UNIT, per_sample=False) for each in (one, two)]
    step = _Grid.for_sum(UNIT, values=5000).step
    assert float(((cut[0] - cut[1]) - (one - two)).abs().max()) <= step


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("per_sample", [True, False])
def test_what_is_not_finite_is_refused(bad: float, dtype: torch.dtype, per_sample: bool) -> None:
    x = torch.full((3, 5000), 0.123456, dtype=dtype)
    x[2, 4999] = bad
    with pytest.raises(InputError, match="not finite") as caught:
        privatise(x, per_sample=per_sample)
    assert "conv2" in str(caught.value)
    assert "0.123" not in str(caught.value)


def test_wrong_calls_are_refused() -> None:
    x = torch.zeros(2, 2)
    for wrong in (x.half(), x.long(), torch.zeros(()), x.to("meta")):
        with pytest.raises(InputError):
            privatise(wrong)
    for changed in ({"kind": "weights"}, {"step": -1}, {"step": True}, {"layer": "a" * 600}):
        with pytest.raises(SettingError):
            privatise(x, **changed)
    for mechanism in (Mechanism(1e-30, 1.0), Mechanism(1e30, 1.0)):
        with pytest.raises(SettingError):
            privatise(x, mechanism)
    for threads in (0, 257, True):
        with pytest.raises(SettingError):
            Noise(KEY, threads=threads)


# --- the key ----------------------------------------------------------------------------------------------------------
def test_the_key_is_kept_and_not_shown() -> None:
    noise = Noise(KEY)
    assert noise.key == KEY
    assert KEY.hex() not in repr(noise)
    assert repr(KEY)[2:-1] not in repr(noise)
    assert Noise.fresh().key != Noise.fresh().key
    for wrong in (b"", KEY[:31], KEY + b"\x00"):
        with pytest.raises(InputError):
            Noise(wrong)


def test_a_key_from_a_checkpoint_sends_what_was_sent() -> None:
    before = Noise.fresh()
    x = torch.ones(2, 9)
    kinds: tuple[Kind, ...] = ("residual", "gradient")
    for kind in kinds:
        first = before.privatise(x, UNIT, layer="a", kind=kind, step=7)
        second = Noise(before.key).privatise(x, UNIT, layer="a", kind=kind, step=7)
        assert torch.equal(first.tensor, second.tensor)
        assert first.release_id == second.release_id
