"""Findings are made of three results, or not at all; intervals mean what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from motte.audit.attacks import registry
from motte.audit.interface import (
    Bracket,
    Budget,
    Context,
    Finding,
    Knowledge,
    Position,
    Scored,
    Truth,
    bracketed,
    standard_job,
)
from motte.audit.intervals import of_mean, of_share
from motte.audit.scene import Audited, SchemeScene, make_stage, scenes_of
from motte.errors import SettingError
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism


def bracket(value: float, spread: float = 0.0) -> Bracket:
    return Bracket(value, value - spread, value + spread)


GIVEN: dict[str, Any] = {
    "attack": "a",
    "audited": "asymmetric",
    "metric": "psnr",
    "unit": "dB",
    "higher_is_worse": True,
    "layer": None,
    "scheme": bracket(15.0, 1.0),
    "floor": bracket(10.0, 1.0),
    "ceiling": bracket(30.0, 1.0),
    "knowledge": (Knowledge.RECORDING,),
    "budget": Budget(),
    "seed": 0,
}


@pytest.mark.parametrize("missing", ["scheme", "floor", "ceiling"])
def test_a_finding_without_all_three_brackets_cannot_be_constructed(missing: str) -> None:
    with pytest.raises(TypeError):
        Finding(**{name: value for name, value in GIVEN.items() if name != missing})
    with pytest.raises(SettingError, match="all three brackets"):
        Finding(**{**GIVEN, missing: None})
    with pytest.raises(SettingError, match="all three brackets"):
        Finding(**{**GIVEN, missing: 12.0})
    with pytest.raises(SettingError, match="all three brackets"):
        replace(Finding(**GIVEN), **{missing: None})


def test_where_a_finding_stands() -> None:
    finding = Finding(**GIVEN)
    assert finding.position_percent == pytest.approx(25.0)
    assert finding.powerful
    assert finding.above_floor
    weak = replace(finding, ceiling=bracket(11.5, 1.0))
    assert weak.position_percent is None, "an attack that tells nothing from everything by no margin says nothing"
    assert not replace(finding, scheme=bracket(11.5, 1.0)).above_floor
    lower = replace(finding, higher_is_worse=False, floor=bracket(0.9), scheme=bracket(0.4), ceiling=bracket(0.1))
    assert lower.above_floor
    assert lower.position_percent == pytest.approx(62.5)
    with pytest.raises(SettingError, match="what the attacker has"):
        replace(finding, knowledge=())


@pytest.mark.parametrize(
    "values", [(1.0, 2.0, 3.0), (1.0, 0.0, 0.5), (float("inf"), 0.0, 1.0), (1.0, float("nan"), 2.0)]
)
def test_brackets_hold_their_value(values: tuple[float, float, float]) -> None:
    with pytest.raises(SettingError):
        Bracket(*values)


def test_budgets() -> None:
    half = Budget(steps=100, seconds=10.0, queries=3).scaled(0.5)
    assert (half.steps, half.seconds, half.queries, half.samples) == (50, 5.0, 2, Budget().samples)
    for wrong in ({"steps": 0}, {"samples": True}, {"seconds": float("inf")}):
        with pytest.raises(SettingError):
            Budget(**wrong)
    with pytest.raises(SettingError):
        Budget().scaled(0.0)


def test_intervals() -> None:
    for hits, tries in ((0, 10), (5, 10), (10, 10), (3, 1000)):
        found, exact = of_share(hits, tries), binomtest(hits, tries).proportion_ci(method="exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    generator = np.random.default_rng(0)
    covered = sum(
        interval.low <= 3.0 <= interval.high
        for interval in (of_mean(list(3.0 + generator.standard_normal(60)), seed=each) for each in range(60))
    )
    assert covered >= 50, "a 95 % interval covers the mean nearly always"
    for wrong in ([], [1.0]):
        with pytest.raises(SettingError):
            of_mean(wrong, seed=0)
    with pytest.raises(SettingError):
        of_share(3, 2)


def test_the_registry() -> None:
    with pytest.raises(SettingError, match="no attack of that name"):
        registry.load("nothing")
    for name in registry.attack_names():
        assert callable(registry.load(name).plan)


def test_generators_differ_by_purpose_and_repeat_by_seed() -> None:
    context = Context(3, Budget())
    first, again, other = (torch.rand(4, generator=context.generator(each)) for each in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- the whole of one attack ----------------------------------------------------------------------------------------
def scenes(bars: Any) -> tuple[SchemeScene, ...]:
    noise = Gaussian(residual=Mechanism(1.0, 4.0))
    stage = make_stage(
        bars.built(), bars.data_set(), suite="quick", budget=Budget(samples=8, public_samples=40), seed=0
    )
    audited = [
        Audited("trusted"),
        Audited("asymmetric", Asymmetric(noise=None, rank=Fixed(2))),
        Audited("asymmetric", Asymmetric(noise=noise, rank=Fixed(2))),
        Audited("accelerator"),
    ]
    return scenes_of(stage, audited)


def test_a_reconstruction_stands_between_floor_and_ceiling_and_what_is_known_is_not_run_again(bars: Any) -> None:
    found = scenes(bars)
    assert [each.outside for each in found] == [("3", "5")] * 4
    before = bars.Peek.fitted
    outcomes = [
        standard_job("peek at 3", lambda: bars.Peek("3"), scene, "inference").run(Context(0, scene.stage.budget))
        for scene in found
    ]
    assert bars.Peek.fitted - before == 4, "floor, ceiling and two schemes: not three for each of four"
    psnr = [outcome.findings[0] for outcome in outcomes]
    trusted, plain, noised, open_ = psnr
    assert trusted.position_percent == 0.0
    assert open_.position_percent == 100.0
    assert all(each.floor == trusted.floor and each.ceiling == open_.ceiling for each in psnr)
    assert trusted.powerful
    assert plain.position_percent is not None
    assert noised.position_percent is not None
    assert plain.position_percent > noised.position_percent + 10
    assert not noised.above_floor, "behind that much noise nothing is seen"
    assert "floor: saw nothing" in plain.notes
    assert [each.metric for each in outcomes[1].findings] == ["psnr", "error"]
    assert {each.position for each in outcomes[1].pictures} == set(Position)


def test_what_does_not_fit_together_is_refused(bars: Any) -> None:
    _, scene, *_ = scenes(bars)
    floor, middle, ceiling = (scene.subject(each, "inference") for each in Position)

    def run(*subjects: Any, make: Any = lambda: bars.Peek("3")) -> None:
        bracketed(make, *subjects, scene.truth("inference"), seed=0, budget=scene.stage.budget)

    with pytest.raises(SettingError, match="another position"):
        run(middle, floor, ceiling)

    class Silent(bars.Peek):
        def score(self, result: Any, truth: Truth, context: Context) -> Scored:
            return Scored({"psnr": bracket(1.0)})

    with pytest.raises(SettingError, match="gave no result for its metric"):
        run(floor, middle, ceiling, make=lambda: Silent("3"))
