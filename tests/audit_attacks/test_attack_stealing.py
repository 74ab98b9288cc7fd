"""Theft: with all weights it is the victim, with none it is what queries teach; what is hidden counts in between."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from motte.audit.attacks.stealing import Stealing, accuracy, initial, judge, steal
from motte.audit.attacks.stealing_placements import (
    all_inside,
    all_outside,
    first_inside,
    largest_inside,
    last_inside,
    layers_outside,
    linear_outside,
    usual_placements,
)
from motte.audit.attacks.stealing_transfer import Ball, fgsm, pgd
from motte.audit.interface import Budget, Context, Position, Scored
from motte.errors import SettingError
from motte.offload.settings import Asymmetric

BUDGET = Budget(seconds=3600.0, steps=40, queries=120, public_samples=120)
BALL = Ball(0.1, (0.5,), (0.25,))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def records(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes, each a pattern under noise."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return (patterns[labels] + 1.2 * torch.randn(count, 1, 8, 8, generator=generator)).clamp(-2, 2), labels


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


@pytest.fixture(scope="module")
def victim() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net()
        images, labels = records(400, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for at in range(0, 400 * 6, 50):
            chosen = torch.arange(at, at + 50) % 400
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@dataclass
class SmallScene:
    """The parts of a scene that a theft asks for."""

    model: nn.Module
    scheme: Asymmetric | None = None
    everything_leaves: bool = False
    suite: str = "quick"
    audited: str = "asymmetric"
    outside: tuple[str, ...] = ("4", "7")
    kept: dict[tuple[str, str], Scored] = field(default_factory=dict)

    mean = (0.5,)
    std = (0.25,)

    def known_scores(self, job: str, position: Position) -> tuple[dict[tuple[str, str], Scored], tuple[str, str]]:
        seen = str(position)
        if position is Position.SCHEME and self.scheme is None:
            seen = "ceiling" if self.everything_leaves else "floor"
        return self.kept, (job, seen)

    def records(self, split: str, count: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
        if count > 300:
            raise SettingError("not so many records in the split")
        return records(count, 2)

    def subject(self, position: object, phase: str) -> SimpleNamespace:
        return SimpleNamespace(public=SimpleNamespace(images=records(BUDGET.public_samples, 3)[0]))


def test_with_all_weights_the_surrogate_is_the_victim_and_with_none_it_learns_from_answers(victim: nn.Module) -> None:
    (job,) = Stealing().plan(SmallScene(victim, scheme=Asymmetric(noise=None)))
    found = {each.metric: each for each in job.run(Context(0, BUDGET)).findings}
    images, labels = records(250, 2)
    theirs = accuracy(victim, images, labels)
    assert theirs > 0.85
    stolen = found["surrogate accuracy"]
    assert abs(stolen.ceiling.value - theirs) <= 0.01
    assert found["surrogate fidelity"].ceiling.value == 1
    assert stolen.powerful
    assert stolen.floor.value < theirs - 0.05
    assert found["surrogate fidelity"].floor.value <= found["surrogate fidelity"].scheme.value
    # White box at the ceiling: what fools the surrogate fools the victim.
    assert found["pgd transfer"].ceiling.value >= found["pgd transfer"].floor.value
    assert found["pgd transfer"].ceiling.value > 0.05
    said = " ".join(stolen.notes)
    assert "250 records" in said
    assert "100.0 % of the parameters visible" in said
    assert " 0.0 % of the parameters visible" in said


def test_without_learning_a_thief_at_the_floor_guesses(victim: nn.Module) -> None:
    images, labels = records(250, 2)
    guessing = [accuracy(initial(victim, victim, all_inside(), seed=seed), images, labels) for seed in range(6)]
    assert 0.1 < sum(guessing) / len(guessing) < 0.45


def test_all_inside_and_all_outside_stand_at_the_ends(victim: nn.Module) -> None:
    budget = replace(BUDGET, steps=3)
    for everything, position in ((False, 0), (True, 100)):
        (job,) = Stealing().plan(SmallScene(victim, everything_leaves=everything))
        found = {each.metric: each for each in job.run(Context(0, budget)).findings}["surrogate fidelity"]
        assert found.scheme == (found.ceiling if everything else found.floor)
        assert found.position_percent == pytest.approx(position)


def test_the_full_suite_judges_partial_shielding(victim: nn.Module) -> None:
    jobs = Stealing().plan(SmallScene(victim, scheme=Asymmetric(noise=None), suite="full"))
    assert [job.name for job in jobs[1:]] == [f"stealing ({each.name})" for each in usual_placements(victim)]
    assert len(jobs) >= 5
    outcome = jobs[-1].run(Context(0, replace(BUDGET, steps=2)))
    assert outcome.findings[0].audited == "partial shielding: every linear layer outside"


def test_the_same_seed_steals_the_same(victim: nn.Module) -> None:
    images, _ = records(60, 3)
    budget = replace(BUDGET, steps=5)
    one, two = (steal(victim, first_inside(victim, 1), images, Context(4, budget)) for _ in range(2))
    both = zip(one.surrogate.state_dict().values(), two.surrogate.state_dict().values(), strict=True)
    assert all(torch.equal(*each) for each in both)
    assert one.queries == 60
    assert one.agreement[1] >= one.agreement[0]
    with pytest.raises(SettingError):
        steal(victim, all_inside(), images[:1], Context(0, budget))


# --- what a placement shows -------------------------------------------------------------------------------------------
def visible(placement) -> set[str]:
    return {name for name, mask in placement.visible.items() if bool(mask.any())}


def test_what_each_placement_shows(victim: nn.Module) -> None:
    every = set(victim.state_dict())
    norm = {f"1.{each}" for each in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert visible(all_inside()) == set()
    assert all_inside().share(victim) == 0
    assert visible(all_outside(victim)) == every
    assert all_outside(victim).share(victim) == 1
    assert visible(layers_outside(victim, ["4"])) == {"4.weight"}
    assert visible(first_inside(victim, 1)) == every - {"0.weight"} - norm
    assert visible(last_inside(victim, 2)) == {"0.weight", "4.weight", "4.bias"} | norm
    assert visible(linear_outside(victim)) == {"0.weight", "4.weight", "7.weight", "9.weight"}
    for bad in (0, 5):
        with pytest.raises(SettingError):
            first_inside(victim, bad)
    with pytest.raises(SettingError):
        layers_outside(victim, ["no"])
    with pytest.raises(SettingError):
        largest_inside(victim, 1.0)


def test_the_largest_weights_are_the_hidden_ones(victim: nn.Module) -> None:
    placement = largest_inside(victim, 0.1)
    weight, mask = victim.state_dict()["7.weight"], placement.visible["7.weight"]
    assert int((~mask).sum()) == round(0.1 * weight.numel())
    assert float(weight[~mask].abs().min()) >= float(weight[mask].abs().max())
    assert 0.88 < placement.share(victim) < 0.95


def test_a_surrogate_starts_with_the_visible_numbers_and_no_other(victim: nn.Module) -> None:
    placement = largest_inside(victim, 0.3)
    made, secret = initial(victim, victim, placement, seed=1).state_dict(), victim.state_dict()
    for name, mask in placement.visible.items():
        assert torch.equal(made[name][mask], secret[name][mask])
        assert not bool((made[name][~mask] == secret[name][~mask]).any())
    nothing = initial(victim, victim, all_inside(), seed=1).state_dict()
    assert not torch.equal(nothing["0.weight"], secret["0.weight"])


# --- adversarial examples ---------------------------------------------------------------------------------------------
def test_adversarial_examples_stay_in_the_ball_and_hurt_more_than_noise(victim: nn.Module) -> None:
    images, labels = records(120, 5)
    made = {
        "fgsm": fgsm(victim, images, labels, BALL),
        "pgd": pgd(victim, images, labels, BALL, steps=8, generator=torch.Generator().manual_seed(0)),
        "noise": images + 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign(),
    }
    for name in ("fgsm", "pgd"):
        assert float((made[name] - images).abs().max()) <= 0.1 / 0.25 + 1e-5
        assert float(made[name].min()) >= -2 - 1e-5  # black
        assert float(made[name].max()) <= 2 + 1e-5
        assert made[name].grad_fn is None
    losses = {name: float(nn.functional.cross_entropy(victim(each), labels).detach()) for name, each in made.items()}
    assert losses["pgd"] >= losses["fgsm"] > losses["noise"]
    assert all(parameter.grad is None or not parameter.grad.abs().sum() for parameter in fresh(victim))


def fresh(model: nn.Module) -> list[nn.Parameter]:
    for parameter in model.parameters():
        parameter.grad = None
    return list(model.parameters())


def test_a_victim_that_is_always_wrong_cannot_be_judged(victim: nn.Module) -> None:
    images, _ = records(20, 5)
    loot = steal(victim, all_outside(victim), images, Context(0, replace(BUDGET, steps=1)))
    wrong = (victim(images).argmax(1) + 1) % 4
    with pytest.raises(SettingError, match="right"):
        judge(loot, victim, images, wrong, BALL, Context(0, BUDGET))
    with pytest.raises(SettingError):
        Ball(0.0, (0.5,), (0.25,))
