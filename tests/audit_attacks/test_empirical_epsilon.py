"""Exact limits, ROC curves, and lower bounds on epsilon: honest mechanisms are never accused, broken ones are."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from motte.audit.attacks.membership_releases import (
    Privatise,
    ReleaseGames,
    audit_mechanism,
    audit_pipeline,
    mechanism_scores,
)
from motte.audit.epsilon import (
    Counts,
    EmpiricalEpsilon,
    beside,
    bound_from_scores,
    gaussian_bound,
    hypothesis_test_bound,
    one_run_bound,
    require_all_consistent,
)
from motte.audit.interface import Budget, Context
from motte.audit.statistics import binomial_tail, clopper_pearson, lower_limit, roc, upper_limit
from motte.errors import ContradictionError, MeasureError, SettingError
from motte.offload.analytic import epsilon_of
from motte.offload.noise import KINDS, Kind, Noise, Released
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

DELTA = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- statistics -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trials", [1, 2, 10, 137, 5000, 100_000])
def test_clopper_pearson_is_the_textbook_interval(trials: int) -> None:
    for hits, confidence in itertools.product({0, 1, trials // 7, trials // 2, trials - 1, trials}, (0.5, 0.95, 0.999)):
        found = clopper_pearson(hits, trials, confidence)
        wanted = stats.binomtest(hits, trials).proportion_ci(confidence, "exact")
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-10)
        assert found.low <= found.value <= found.high


def test_the_rule_of_three_and_the_empty_ends() -> None:
    # No success in n: the upper limit is 1 - alpha^(1/n).
    assert upper_limit(0, 100, 0.95) == pytest.approx(1 - 0.05**0.01)
    assert lower_limit(0, 100) == 0
    assert upper_limit(100, 100) == 1
    assert binomial_tail(0, 5, 0.3) == 1
    assert binomial_tail(6, 5, 0.3) == 0
    for bad in ((0, 0), (-1, 3), (4, 3)):
        with pytest.raises(SettingError):
            lower_limit(*bad)


@pytest.mark.parametrize(("trials", "rate"), list(itertools.product((5, 300, 10**6), (1e-5, 0.3, 0.99))))
def test_binomial_tails(trials: int, rate: float) -> None:
    for hits in (1, trials // 3, trials // 2, trials - 1):
        assert binomial_tail(hits, trials, rate) == pytest.approx(
            stats.binom.sf(hits - 1, trials, rate), rel=1e-8, abs=1e-280
        )


def test_roc_with_ties_is_the_reference_and_its_rates_are_counts() -> None:
    generator = np.random.default_rng(0)
    yes, no = generator.normal(1, 1, 300).round(1), generator.normal(0, 1, 500).round(1)
    curve = roc(yes, no)
    assert curve.auc == pytest.approx(roc_auc_score([1] * 300 + [0] * 500, np.r_[yes, no]))
    for fpr in (0.001, 0.01, 0.2, 1.0):
        wanted = max((yes >= cut).mean() for cut in (*no, *yes, np.inf) if (no >= cut).mean() <= fpr)
        assert curve.tpr_at(fpr).value == pytest.approx(wanted)
    points = curve.points(20)
    assert points[0] == (0, 0)
    assert points[-1] == (1, 1)
    assert len(points) <= 20
    with pytest.raises(MeasureError):
        roc([1.0], [])
    with pytest.raises(MeasureError):
        roc([float("nan")], [1.0])


def test_the_interval_of_an_area_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    held = 0
    for _ in range(200):
        found = roc(generator.normal(1, 1, 60), generator.normal(0, 1, 40)).auc_interval()
        held += found.low <= truth <= found.high
    assert 180 <= held <= 200
    assert roc([1, 2], [0, 0]).auc_interval().low < 0.9  # perfect, and from four scores only
    assert roc([0], [1]).auc_interval().high > 0.1


# --- bounds -----------------------------------------------------------------------------------------------------------
def test_bounds_of_counts_are_the_formulas() -> None:
    counts = Counts(90, 100, 5, 100)
    hit, alarm = lower_limit(90, 100, 0.975), upper_limit(5, 100, 0.975)
    assert hypothesis_test_bound(counts, delta=DELTA) == pytest.approx(math.log((hit - DELTA) / alarm))
    mu = stats.norm.ppf(hit) - stats.norm.ppf(alarm)
    assert gaussian_bound(counts, delta=DELTA) == pytest.approx(epsilon_of(DELTA, mu))
    assert hypothesis_test_bound(Counts(0, 100, 0, 100), delta=DELTA) == 0
    assert gaussian_bound(Counts(5, 100, 90, 100), delta=DELTA) == 0
    assert gaussian_bound(Counts(5, 100, 90, 100).exchanged, delta=DELTA) == 0
    assert Counts(90, 100, 5, 100).exchanged == Counts(95, 100, 10, 100)
    with pytest.raises(SettingError):
        Counts(3, 2, 0, 5)
    with pytest.raises(SettingError):
        Counts(1, 2, 0, 0)


def reference_one_run(canaries: int, guesses: int, correct: int, delta: float, chance: float) -> float:
    """The code of the paper's appendix D, on scipy."""

    def p_value(epsilon: float) -> float:
        q = 1 / (1 + math.exp(-epsilon))
        beta, alpha, total = stats.binom.sf(correct - 1, guesses, q), 0.0, 0.0
        for i, chance in enumerate(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, q), start=1):
            total += chance
            alpha = max(alpha, total / i)
        return min(1.0, beta + alpha * delta * 2 * canaries)

    low, high = 0.0, 1.0
    while p_value(high) < chance:
        high += 1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) < chance else (low, middle)
    return low


@pytest.mark.parametrize("counts", [(1000, 100, 100), (1000, 400, 300), (200, 200, 130), (50, 20, 10)])
@pytest.mark.parametrize("delta", [1e-18, 1e-5, 1e-3])
def test_one_run_is_the_papers(counts: tuple[int, int, int], delta: float) -> None:
    canaries, guesses, correct = counts
    found = one_run_bound(correct, guesses, canaries, delta=delta)
    assert found == pytest.approx(reference_one_run(canaries, guesses, correct, delta, 0.05), abs=1e-6)


def test_randomised_response_is_never_accused_and_a_weaker_one_is() -> None:
    # For this one the bound of one run is tight: a coin, told truthfully with probability e^eps / (1 + e^eps).
    generator = np.random.default_rng(2)
    for claimed in (0.5, 1.0, 2.0):
        above = 0
        for _ in range(60):
            right = generator.binomial(400, 1 / (1 + math.exp(-claimed)))
            above += one_run_bound(int(right), 400, 400, delta=DELTA) > claimed
        assert above <= 8  # one in twenty may be
        assert one_run_bound(int(400 / (1 + math.exp(-claimed - 1))), 400, 400, delta=DELTA) > claimed


def gaussian_games(mu: float, games: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(mu, 1, games), generator.normal(0, 1, games)


@pytest.mark.parametrize("method", ["hypothesis test", "gaussian"])
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 3.0])
def test_an_honest_gaussian_mechanism_is_not_accused(method: str, mu: float) -> None:
    upper = epsilon_of(DELTA, mu)
    above = 0
    for seed in range(40):
        bound = bound_from_scores(*gaussian_games(mu, 400, seed), delta=DELTA, seed=seed, method=method)
        above += bound.epsilon > upper
    assert above <= 6  # 2 expected at most


@pytest.mark.parametrize("method", ["hypothesis test", "gaussian"])
def test_games_from_the_other_side_prove_as_much(method: str) -> None:
    yes, no = gaussian_games(3.0, 400, 0)
    found = bound_from_scores(yes, no, delta=DELTA, seed=0, method=method)
    assert found.epsilon > 1.5
    turned = bound_from_scores(-no, -yes, delta=DELTA, seed=0, method=method)
    assert turned.epsilon == pytest.approx(found.epsilon, rel=0.4)


def test_a_contradiction_is_an_error_of_its_own() -> None:
    bound = bound_from_scores(*gaussian_games(4.0, 1000, 0), delta=DELTA, seed=0, method="gaussian")
    assert bound.epsilon > epsilon_of(DELTA, 3.0)
    facts = {
        "upper_because": "closed form",
        "delta": DELTA,
        "adjacency": "replace",
        "method": "gaussian",
        "trials": 2000,
    }
    honest = beside(bound, upper=epsilon_of(DELTA, 4.0), **facts)
    honest.require_consistent()
    assert not honest.contradiction
    wrong = beside(bound, upper=epsilon_of(DELTA, 1.0), **facts)
    with pytest.raises(ContradictionError, match="larger epsilon") as found:
        require_all_consistent({"honest": honest, "wrong": wrong})
    assert "gaussian" in (found.value.where or "")
    assert wrong.to_json()["contradiction"] is True
    nothing = beside(bound, upper=math.inf, **facts)
    nothing.require_consistent()
    assert nothing.to_json()["upper"] == "infinite"
    assert "infinite" in str(nothing)


def test_too_few_games_prove_nothing_and_say_so() -> None:
    with pytest.raises(MeasureError, match="too few"):
        bound_from_scores([1.0] * 3, [0.0] * 30, delta=DELTA, seed=0)
    with pytest.raises(MeasureError, match="not a number"):
        bound_from_scores([float("nan")] * 30, [0.0] * 30, delta=DELTA, seed=0)
    with pytest.raises(SettingError):
        bound_from_scores([1.0] * 30, [0.0] * 30, delta=2.0, seed=0)
    with pytest.raises(SettingError):
        one_run_bound(3, 2, 5, delta=DELTA)
    assert EmpiricalEpsilon.__dataclass_params__.frozen


# --- the mechanism and the pipeline themselves ------------------------------------------------------------------------
KEY = bytes(range(32))
LOOSE = Mechanism(2.0, 4.0)
"""Epsilon about 2 for one release: a refutation needs few games."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjacency", ["replace", "add-remove"])
def test_the_projects_own_noise_is_not_accused_and_the_attack_gets_near(kind: Kind, adjacency: str) -> None:
    facts = {"games": 4000, "seed": 1, "adjacency": adjacency, "privatise": Noise(KEY).privatise}
    found = audit_mechanism(Mechanism(2.0, 1.0), kind, **facts)
    found.require_consistent()
    # The tightest game there is: about half of what is stated is proven by so few games at that confidence.
    assert 0.45 * found.upper < found.lower
    both = audit_mechanism(Mechanism(2.0, 1.0), kind, releases=3, **facts)
    both.require_consistent()
    assert both.lower > found.lower  # releases add up


def planted(change: str) -> Privatise:
    """A broken mechanism behind the interface of the real one."""
    honest = Noise(KEY)

    def privatise(
        x: Tensor, mechanism: Mechanism, *, layer: str, kind: Kind, step: int, per_sample: bool = True
    ) -> Released:
        given = mechanism
        if change == "a quarter of the noise":
            given = Mechanism(mechanism.clip, mechanism.noise_multiplier / 4)
        if change == "not clipped":
            given, per_sample = Mechanism(mechanism.clip * 6, mechanism.noise_multiplier / 6), True
            x = x * 6
        made = honest.privatise(x, given, layer=layer, kind=kind, step=step, per_sample=per_sample)
        if change == "noise that is averaged":
            more = [honest.privatise(x, given, layer=f"{layer}{i}", kind=kind, step=step) for i in range(24)]
            return replace(made, tensor=torch.stack([each.tensor for each in more]).mean(0))
        return made

    return privatise


@pytest.mark.parametrize("change", ["a quarter of the noise", "not clipped", "noise that is averaged"])
def test_a_planted_broken_mechanism_is_found(change: str) -> None:
    found = audit_mechanism(LOOSE, "residual", games=2000, seed=0, privatise=planted(change))
    assert found.contradiction
    with pytest.raises(ContradictionError):
        found.require_consistent()


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *body, nn.Flatten(), nn.Linear(144, 3)).eval()


def test_the_pipeline_is_not_accused_and_its_layers_add_up() -> None:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheme = Asymmetric(noise=Gaussian(residual=Mechanism(0.5, 0.4)), rank=Fixed(1))
    found = audit_pipeline(net(), scheme, images, games=200, seed=0)
    found.require_consistent()
    assert "2 split layers" in found.upper_because
    assert found.lower > 0.5
    one = replace(scheme, offloaded_layers=("2",))
    assert "1 split layers" in audit_pipeline(net(), one, images, games=8, seed=0).upper_because


def test_a_pipeline_that_forgets_most_of_its_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Noise.privatise

    def weak(self: Noise, x: Tensor, mechanism: Mechanism, **facts: Any) -> Released:
        return plain(self, x, Mechanism(mechanism.clip, mechanism.noise_multiplier / 10), **facts)

    monkeypatch.setattr(Noise, "privatise", weak)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheme = Asymmetric(noise=Gaussian(residual=Mechanism(0.5, 4.0)), rank=Fixed(1))
    (job,) = ReleaseGames().plan(SmallScene(net(), scheme, images))
    outcome = job.run(Context(0, Budget()))
    assert any(each.contradiction for each in outcome.epsilons)
    assert outcome.epsilons[-1].contradiction  # the pipeline's own


def test_the_planned_games_are_played_where_there_is_noise_only() -> None:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mechanism = Mechanism(0.5, 1.0)
    noise = Gaussian(residual=mechanism, gradient=mechanism, update=mechanism)
    scene = SmallScene(net(), Asymmetric(noise=noise, rank=Fixed(1)), images)
    (job,) = ReleaseGames().plan(scene)
    outcome = job.run(Context(0, Budget()))
    require_all_consistent({str(at): each for at, each in enumerate(outcome.epsilons)})
    assert len(outcome.epsilons) == 7
    (finding,) = outcome.findings
    assert finding.floor.value == 0 <= finding.scheme.value <= finding.ceiling.value
    assert finding.powerful
    assert ReleaseGames().plan(SmallScene(net(), Asymmetric(noise=None), images)) == ()
    assert ReleaseGames().plan(SmallScene(net(), None, images)) == ()
    with pytest.raises(SettingError):
        audit_pipeline(net(), Asymmetric(noise=None), images, games=8, seed=0)
    with pytest.raises(SettingError):
        mechanism_scores(mechanism, "residual", games=0, seed=0)


@dataclass
class SmallScene:
    """The parts of a scene that these games ask for."""

    model: nn.Module
    scheme: Asymmetric | None
    images: Tensor
    suite: str = "quick"
    audited: str = "asymmetric"

    def subject(self, position: object, phase: str) -> SimpleNamespace:
        return SimpleNamespace(public=SimpleNamespace(images=self.images))
