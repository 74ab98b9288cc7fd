"""Epsilon, delta and noise of Gaussian releases, against the published formula in 60 digits and dp-accounting."""

from __future__ import annotations

import math
import sys

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import ResourceError, SettingError
from motte.offload.accountant import GaussianReleases, composed_epsilon, composed_mu
from motte.offload.analytic import delta_of, epsilon_of, noise_multiplier
from motte.offload.calibration import gaussian, multiplier_for, sensitivity

CASES = [(0.01, 1e-5), (0.5, 1e-6), (1.0, 1e-5), (8.0, 1e-5), (8.0, 1e-12), (60.0, 1e-5), (900.0, 1e-9)]


def slow_delta(epsilon: float, mu: float) -> mpmath.mpf:
    """Theorem 8 of Balle and Wang as it is printed, with enough digits for its cancellation."""
    digits = 60 + int(epsilon)
    with mpmath.workdps(digits):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


@given(epsilon=st.floats(1e-3, 200), share=st.floats(-6, 3))
def test_delta_is_that_of_the_published_formula(epsilon: float, share: float) -> None:
    # mu around the root of twice epsilon, where delta goes from nothing to one.
    mu = math.sqrt(2 * epsilon) * 2.0**share
    expected = slow_delta(epsilon, mu)
    if expected < 1e-300:
        assert delta_of(epsilon, mu) < 1e-290
    else:
        assert delta_of(epsilon, mu) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize(("epsilon", "mu"), [(0.0, 1e-9), (0.0, 3.0), (5.0, 0.0), (1e6, 1e4), (1e-9, 1e-3)])
def test_the_ends_of_the_formula(epsilon: float, mu: float) -> None:
    expected = 0.0 if mu == 0 else 2 * 0.5 * math.erf(mu / 2 / math.sqrt(2)) if epsilon == 0 else None
    found = delta_of(epsilon, mu)
    assert 0 <= found <= 1
    assert expected is None or found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("epsilon", "delta"), CASES)
@pytest.mark.parametrize("moved", [1.0, 2.0, 64.0])
def test_the_noise_is_the_smallest(epsilon: float, delta: float, moved: float) -> None:
    multiplier = noise_multiplier(epsilon, delta, moved)
    assert float(slow_delta(epsilon, moved / multiplier)) <= delta * (1 + 1e-8)
    assert float(slow_delta(epsilon, moved / multiplier * (1 + 1e-6))) > delta
    assert epsilon_of(delta, moved / multiplier) == pytest.approx(epsilon, rel=1e-9)


def test_it_needs_less_noise_than_the_classical_bound() -> None:
    classical = 2 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.9
    assert noise_multiplier(0.9, 1e-5, 2.0) < 0.85 * classical


def test_a_known_value() -> None:
    # As the authors' own implementation gives it (BorjaBalle/analytic-gaussian-mechanism).
    assert noise_multiplier(1.0, 1e-5, 1.0) == pytest.approx(3.730632, abs=1e-6)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_no_noise_for_what_is_no_budget(epsilon: float, delta: float) -> None:
    with pytest.raises(SettingError):
        noise_multiplier(epsilon, delta, 1.0)
    with pytest.raises(SettingError):
        gaussian(epsilon, delta, residual_clip=1.0)


# --- sensitivity ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_no_record_moves_a_release_further_than_the_sensitivity(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)

    def batch() -> torch.Tensor:
        made = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        return made / made.norm(dim=1, keepdim=True)

    reached = dict.fromkeys(("replace", "update", "empty", "empty update"), 0.0)
    for _ in range(300):
        one, two = batch(), batch()
        for other in (two, -one):
            empty = other.clone()
            empty[0] = 0
            for name, moved in (
                ("replace", (one - other).norm()),
                ("update", (one - other).sum(0).norm()),
                ("empty", (one - empty).norm()),
                ("empty update", (one - empty).sum(0).norm()),
            ):
                reached[name] = max(reached[name], float(moved))
    together = torch.eye(3, dtype=torch.float64)[:1].repeat(rows, 1)
    reached["update"] = max(reached["update"], float((2 * together).sum(0).norm()))
    bound = {
        "replace": sensitivity("residual", "replace", samples=rows),
        "update": sensitivity("update", "replace", samples=rows),
        "empty": sensitivity("gradient", "add-remove", samples=rows),
        "empty update": sensitivity("update", "add-remove", samples=rows),
    }
    for name, most in reached.items():
        assert most <= bound[name] * (1 + 1e-12)
    # The bound is reached: no smaller one would do.
    assert reached["replace"] == pytest.approx(bound["replace"])
    assert reached["update"] == pytest.approx(bound["update"])
    assert reached["empty"] == pytest.approx(bound["empty"])


def test_sensitivities_by_hand() -> None:
    assert [sensitivity(kind, "replace") for kind in ("residual", "gradient", "update")] == [2, 2, 2]
    assert [sensitivity(kind, "add-remove") for kind in ("residual", "gradient", "update")] == [1, 1, 1]
    assert sensitivity("residual", "replace", samples=16) == 8
    assert sensitivity("update", "replace", samples=16) == 32
    with pytest.raises(SettingError):
        sensitivity("residual", "replace", samples=0)


# --- composition ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epsilon", [0.05, 1.0, 8.0, 300.0, 2e4])
def test_dp_accounting_bounds_the_closed_form_closely(epsilon: float) -> None:
    unit = noise_multiplier(epsilon, 1e-5, 1.0)
    parts = [
        GaussianReleases(unit * math.sqrt(3 * 7) * 2, 2.0, 7),
        GaussianReleases(unit * math.sqrt(3 * 50), 1.0, 50),
        GaussianReleases(unit * math.sqrt(3), 1.0, 1),
    ]
    exact = epsilon_of(1e-5, composed_mu(parts))
    assert exact == pytest.approx(epsilon, rel=1e-9)
    found = composed_epsilon(parts, 1e-5)
    assert exact * (1 - 1e-9) <= found <= exact * 1.002


def test_the_renyi_accountant_agrees_that_it_is_enough() -> None:
    import dp_accounting

    parts = [GaussianReleases(40.0, 2.0, 300), GaussianReleases(55.0, 1.0, 1000)]
    accountant = dp_accounting.rdp.RdpAccountant()
    for each in parts:
        accountant.compose(dp_accounting.GaussianDpEvent(each.noise_multiplier / each.sensitivity), each.count)
    found = composed_epsilon(parts, 1e-6)
    assert found <= accountant.get_epsilon(1e-6) <= 1.2 * found


def test_nothing_released_and_too_much_released() -> None:
    assert composed_epsilon([], 1e-5) == 0
    assert composed_epsilon([GaussianReleases(1.0, 2.0, 0)], 1e-5) == 0
    assert composed_epsilon([GaussianReleases(1.0, 1e5, 1000)], 1e-5) > 1e12


@pytest.mark.parametrize("releases", [1, 39, 60_957])
@pytest.mark.parametrize("epsilon", [0.1, 8.0])
def test_a_run_keeps_to_what_it_was_calibrated_to(releases: int, epsilon: float) -> None:
    made = gaussian(
        epsilon, 1e-5, residual_clip=1.0, gradient_clip=0.1, update_clip=3.0, releases=releases, coupled_samples=4
    )
    assert made.gradient is not None
    assert made.update is not None
    assert made.residual.noise_multiplier == made.gradient.noise_multiplier == made.update.noise_multiplier
    assert (made.residual.clip, made.gradient.clip, made.update.clip) == (1.0, 0.1, 3.0)

    def parts(multiplier: float) -> list[GaussianReleases]:
        return [GaussianReleases(multiplier, moved, releases) for moved in (4.0, 4.0, 8.0)]

    assert 0.999 * epsilon < composed_epsilon(parts(made.residual.noise_multiplier), 1e-5) <= epsilon


def test_one_release_is_calibrated_exactly_and_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    made = gaussian(1.0, 1e-5, residual_clip=2.0, adjacency="add-remove")
    assert made.residual.noise_multiplier == noise_multiplier(1.0, 1e-5, 1.0)
    assert (made.gradient, made.update, made.adjacency) == (None, None, "add-remove")
    with pytest.raises(ResourceError) as caught:
        gaussian(1.0, 1e-5, residual_clip=2.0, releases=2)
    assert "motte[privacy]" in str(caught.value.hint)


def test_wrong_calibrations_are_refused() -> None:
    for releases in (0, -1, True):
        with pytest.raises(SettingError):
            gaussian(1.0, 1e-5, residual_clip=1.0, releases=releases)
    with pytest.raises(SettingError):
        gaussian(1.0, 1e-5, residual_clip=0.0)
    with pytest.raises(SettingError, match="nothing is released"):
        multiplier_for(1.0, 1e-5, lambda tried: [])
