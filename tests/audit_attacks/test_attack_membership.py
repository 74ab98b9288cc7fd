"""Membership attacks: they find the members of a net that fits its records by heart, and guess at the floor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from motte.audit.attacks.lira import Lira, LiraMembership
from motte.audit.attacks.membership import (
    METRICS,
    Candidates,
    Membership,
    MembershipAttack,
    Threshold,
    guessed,
    one_run,
    play,
    score,
    trainer,
)
from motte.audit.attacks.membership_models import confidence, fresh_like, half_scheme, losses
from motte.audit.attacks.shadow import Shadow, ShadowMembership
from motte.audit.interface import Budget, Context, Outcome, Position, Scored
from motte.errors import SettingError
from motte.offload.settings import Asymmetric, Fixed, LowRank, Residual

SMALL = Budget(seconds=36000.0, steps=240, public_samples=96, repeats=2)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )


def records(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose labels are half noise: what is right about them can only be learnt by heart."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(0, 10, (count,), generator=generator)


@dataclass
class SmallScene:
    """The parts of a scene that these attacks ask for."""

    scheme: Asymmetric | None = None
    everything_leaves: bool = False
    suite: str = "quick"
    audited: str = "trusted"
    model: nn.Module = None  # type: ignore[assignment]
    kept: dict[tuple[str, str], Scored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.model or net().eval()

    def known_scores(self, job: str, position: Position) -> tuple[dict[tuple[str, str], Scored], tuple[str, str]]:
        return self.kept, (job, str(position))

    def records(self, split: str, count: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
        return records(count, seed=start + (split == "test"))


def findings(outcome: Outcome) -> dict[str, object]:
    return {each.metric: each for each in outcome.findings}


@pytest.mark.parametrize("make", [Threshold, Shadow, Lira])
def test_an_overfitted_net_gives_its_members_away_and_a_guess_does_not(make: type) -> None:
    candidates = Candidates(*records(96))
    context = Context(0, SMALL)
    plain = trainer(net(), candidates, context)
    train = {Position.FLOOR: None, Position.SCHEME: plain, Position.CEILING: plain}
    outcome = play(make, candidates, train, audited="plain", context=context)
    found = findings(outcome)
    assert set(found) == {metric.name for metric in METRICS}
    area = found["auc"]
    assert area.ceiling.value > 0.8
    assert area.floor.low <= 0.5 <= area.floor.high
    assert found["accuracy"].floor.low <= 0.5 <= found["accuracy"].floor.high
    assert found["accuracy"].ceiling.low > 0.6
    assert area.powerful
    assert area.position_percent == pytest.approx(100)
    assert found["tpr at 1 % fpr"].ceiling.value > 0.1
    # The same coins, models and scores: one target serves both positions.
    assert area.scheme == area.ceiling
    assert found["epsilon proven"].ceiling.value > 0.1
    assert [each.method for each in outcome.epsilons] == ["one run"]
    assert any("false-positive rate below 1 / 48" in note for note in area.notes)
    assert [curve.position for curve in outcome.curves] == list(Position)
    assert all(curve.log_axes and curve.points[-1] == (1, 1) for curve in outcome.curves)


def test_a_net_that_learnt_nothing_gives_nobody_away() -> None:
    candidates = Candidates(*records(160))
    context = Context(0, replace(SMALL, steps=1))
    once = trainer(net(), candidates, context)
    train = {Position.FLOOR: None, Position.SCHEME: once, Position.CEILING: once}
    found = findings(play(Threshold, candidates, train, audited="untrained", context=context))
    assert found["auc"].ceiling.low < 0.6
    assert found["auc"].position_percent is None


def test_on_a_split_model_it_runs_in_residual_and_in_lowrank_mode() -> None:
    scheme = Asymmetric(noise=None, rank=Fixed(2))
    scene = SmallScene(scheme=scheme, audited="asymmetric")
    jobs = Membership().plan(scene)
    assert [job.name for job in jobs] == ["membership-threshold-residual", "membership-threshold-lowrank"]
    told: list[int] = []
    context = Context(0, SMALL, progress=lambda done, total, what: told.append(done))
    for job in jobs:
        found = findings(job.run(context))["auc"]
        assert found.ceiling.value > 0.8
        assert found.scheme.value > 0.6  # labels learnt by heart are learnt from either half
        assert "mode" in found.audited
    assert max(told) == 160
    assert told.count(160) == 3  # the plain target serves both
    assert set(scene.kept) == {
        ("membership-threshold", "floor"),
        ("membership-threshold", "ceiling"),
        ("membership-threshold-residual", "scheme"),
        ("membership-threshold-lowrank", "scheme"),
    }


def test_a_residual_of_next_to_nothing_makes_no_target_diverge() -> None:
    # As many principal channels as there are: what is left is rounding, which every norm blows up.
    blocks = [
        each for _ in range(8) for each in (nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    ]
    deep = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(6 * 64, 10))
    candidates = Candidates(*records(32))
    half = half_scheme(deep, Asymmetric(noise=None, rank=Fixed(6)), "residual")
    member = candidates.draw(torch.Generator().manual_seed(0))
    trained = trainer(deep, candidates, Context(0, replace(SMALL, steps=12)), half=half)(member, 0)
    assert trained.steps == 12
    assert bool(torch.isfinite(trained.logits(candidates.images)).all())


def test_where_nothing_leaves_the_attacker_guesses_and_where_everything_does_it_is_the_ceiling() -> None:
    context = Context(0, SMALL)
    (trusted,) = Membership().plan(SmallScene())
    found = findings(trusted.run(context))["auc"]
    assert not found.above_floor
    (open_job,) = Membership().plan(SmallScene(everything_leaves=True, audited="accelerator"))
    assert findings(open_job.run(context))["auc"].position_percent == pytest.approx(100)


def test_models_of_the_attackers_own_are_for_the_full_suite_only() -> None:
    for kind, name in ((ShadowMembership, "membership-shadow"), (LiraMembership, "membership-lira")):
        assert kind().plan(SmallScene()) == ()
        assert [job.name for job in kind().plan(SmallScene(suite="full"))] == [name]


def test_the_same_seed_gives_the_same_figures() -> None:
    (job,) = Membership().plan(SmallScene(everything_leaves=True))
    small = replace(SMALL, steps=20)
    one, two = (findings(job.run(Context(7, small))) for _ in range(2))
    assert {name: each.ceiling for name, each in one.items()} == {name: each.ceiling for name, each in two.items()}


# --- parts ------------------------------------------------------------------------------------------------------------
def test_one_of_each_pair_is_a_member() -> None:
    candidates = Candidates(*records(400))
    member = candidates.draw(torch.Generator().manual_seed(1)).view(-1, 2)
    assert bool((member.sum(1) == 1).all())
    assert 60 < int(member[:, 0].sum()) < 140
    for bad in (3, 2):
        with pytest.raises(SettingError):
            Candidates(*records(bad))


def test_confidence_is_the_logit_of_the_probability() -> None:
    logits, labels = torch.randn(50, 10, dtype=torch.float64), torch.randint(0, 10, (50,))
    own = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    assert torch.allclose(confidence(logits, labels), torch.log(own / (1 - own)))
    assert torch.allclose(losses(logits, labels), -own.log())
    extreme = torch.tensor([[1e4, 0.0, 0.0]])
    assert torch.isfinite(confidence(extreme, torch.tensor([0]))).all()  # where p rounds to 1


def test_lira_is_the_ratio_of_two_gaussians() -> None:
    lira, generator = Lira(), torch.Generator().manual_seed(0)
    lira._member = torch.rand(100, 30, generator=generator) < 0.5
    lira._seen = torch.randn(100, 30, generator=generator, dtype=torch.float64) + 3.0 * lira._member
    observed = torch.randn(30, dtype=torch.float64, generator=generator)
    wanted = []
    for record in range(30):
        both = []
        for chosen in (lira._member[:, record], ~lira._member[:, record]):
            values = lira._seen[chosen, record]
            both.append(torch.distributions.Normal(values.mean(), values.std()).log_prob(observed[record]))
        wanted.append(both[0] - both[1])
    assert torch.allclose(lira.ratio(observed), torch.stack(wanted))


def test_scores_become_exact_rates_and_one_run_a_bound() -> None:
    member = torch.tensor([True, False] * 500)
    perfect, threshold = member.double(), 0.5
    brackets = score(perfect, threshold, member).brackets
    assert brackets["tpr at 0.1 % fpr"].value == 1
    assert brackets["accuracy"].value == 1
    proven = one_run(perfect, member)
    assert proven.counted == "50 of 50 guesses about 500 pairs right"
    assert 2 < proven.epsilon < 3  # (1 + e^-eps)^-50 = 0.05
    useless = one_run(torch.from_numpy(np.random.default_rng(0).random(1000)), member)
    assert useless.epsilon < 0.8


def test_a_guess_is_within_its_interval_and_the_floor_is_what_guesses_come_to() -> None:
    candidates = Candidates(*records(400))
    held = 0
    for seed in range(20):
        member = candidates.draw(torch.Generator().manual_seed(seed))
        guess = torch.rand(400, generator=torch.Generator().manual_seed(1000 + seed)).double()
        found = score(guess, 0.5, member).brackets
        held += all(found[name].low <= 0.5 <= found[name].high for name in ("auc", "accuracy"))
    assert held >= 15  # 18 expected
    floor = guessed(member).brackets
    assert {name: each.value for name, each in floor.items()} == {
        "tpr at 0.1 % fpr": 0.001,
        "tpr at 1 % fpr": 0.01,
        "auc": 0.5,
        "accuracy": 0.5,
        "epsilon proven": 0.0,
    }
    assert floor["auc"].low < 0.47 < 0.53 < floor["auc"].high


def test_a_fresh_copy_shares_no_number_with_the_model() -> None:
    model = nn.Sequential(net(), nn.BatchNorm1d(10), nn.TransformerEncoderLayer(10, 2, 16))
    model.register_parameter("token", nn.Parameter(torch.ones(1, 10)))
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    state = torch.get_rng_state()
    made = fresh_like(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(bool((parameter == 7).any()) for parameter in made.parameters())
    again = fresh_like(model, 3)
    assert all(torch.equal(*both) for both in zip(made.parameters(), again.parameters(), strict=True))


def test_a_research_mode_splits_what_the_scheme_splits() -> None:
    named = Asymmetric(noise=None, rank=Fixed(3), offloaded_layers=("3",))
    assert half_scheme(net(), named, "residual") == Residual(noise=None, rank=Fixed(3), trusted_layers=("0", "6"))
    assert half_scheme(net(), Asymmetric(noise=None), "lowrank") == LowRank(trusted_layers=None)
    with pytest.raises(SettingError):
        half_scheme(net(), named, "plain")


def test_every_attack_follows_the_one_interface() -> None:
    made: list[MembershipAttack] = [Threshold(), Shadow(), Lira()]
    assert len({each.name for each in made}) == 3
    assert all("20" in each.reference for each in made)
