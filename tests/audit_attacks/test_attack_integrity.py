"""Lies of an accelerator: with checks they are refused at the stated rate, without them they pass and do harm."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from motte.audit.attacks.integrity import (
    Ground,
    Lying,
    Tally,
    attempt,
    require_bound,
    series,
    steering_error,
)
from motte.audit.attacks.integrity_lies import LIES, Liar, Product, at_the_stated_magnitude, negated
from motte.audit.interface import Budget, Context, Position, Scored
from motte.errors import ContradictionError
from motte.offload import integrity as checks
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

CHECKED = Asymmetric(noise=None, rank=Fixed(2))
OPEN = replace(CHECKED, integrity="off")
FEW = Budget(seconds=3600.0, samples=4, public_samples=8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(72, 5, bias=False),
        )
        return model.eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 9, 9, generator=torch.Generator().manual_seed(seed))


@dataclass
class SmallScene:
    """The parts of a scene that this attack asks for."""

    scheme: Asymmetric | None = CHECKED
    everything_leaves: bool = False
    suite: str = "quick"
    audited: str = "asymmetric"
    model: nn.Module = field(default_factory=net)
    outside: tuple[str, ...] = ("2", "5")
    classes: int = 5
    kept: dict[tuple[str, str], Scored] = field(default_factory=dict)

    def known_scores(self, job: str, position: Position) -> tuple[dict[tuple[str, str], Scored], tuple[str, str]]:
        seen = str(position)
        if position is Position.SCHEME and self.scheme is None:
            seen = "ceiling" if self.everything_leaves else "floor"
        return self.kept, (job, seen)

    def truth(self, phase: str) -> SimpleNamespace:
        return SimpleNamespace(images=images(4), labels=torch.arange(4))

    def subject(self, position: object, phase: str) -> SimpleNamespace:
        return SimpleNamespace(public=SimpleNamespace(images=images(8, seed=2)))


def test_with_checks_lies_are_refused_and_without_them_they_do_what_they_like() -> None:
    scene = SmallScene()
    (job,) = Lying().plan(scene)
    before = {name: each.clone() for name, each in scene.model.state_dict().items()}
    outcome = job.run(Context(0, FEW))
    found = {each.metric: each for each in outcome.findings}
    accepted = found["lies accepted"]
    assert accepted.scheme.value <= 0.05
    assert accepted.ceiling.value == 1
    assert accepted.floor.value == 0
    assert accepted.powerful
    border = found["lies at the stated magnitude accepted"]
    assert border.scheme.low <= checks.escape_probability(2)
    assert border.ceiling.value == 1
    assert found["answers steered to a chosen class"].ceiling.value == 1
    assert found["answers steered to a chosen class"].scheme.value == 0
    assert found["answers changed"].ceiling.value > 0.1
    assert found["answers changed"].scheme.value <= 0.05
    assert [check.held for check in outcome.checks] == [True]
    assert all(torch.equal(each, before[name]) for name, each in scene.model.state_dict().items())
    assert all(parameter.grad is None for parameter in scene.model.parameters())


def test_floor_and_ceiling_are_where_nothing_or_everything_is_outside() -> None:
    for scene, percent in (
        (SmallScene(scheme=None, outside=("5",)), 0),
        (SmallScene(scheme=None, outside=("5",), everything_leaves=True), 100),
        (SmallScene(scheme=OPEN, outside=("5",)), 100),
    ):
        (job,) = Lying().plan(scene)
        found = {each.metric: each for each in job.run(Context(0, FEW)).findings}["lies accepted"]
        assert found.position_percent == pytest.approx(percent)
    assert Lying().plan(SmallScene(outside=())) == ()


def test_noise_changes_no_count_of_honest_answers() -> None:
    noisy = replace(CHECKED, noise=Gaussian(residual=Mechanism(5.0, 0.05)))
    model = net()
    error = (steering_error(model, "5", images(8, 2), 1), 1)
    ground = Ground(model, ("5",), images(4), torch.arange(4), images(8, 2), error)
    assert series(ground, noisy, Context(0, FEW), borderline=2).changed == 0


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("product", list(Product))
def test_each_lie_is_told_in_each_product_and_changes_it(lie: str, product: Product) -> None:
    labels = None if product is Product.OUTPUT else torch.arange(4)
    before = images(4, seed=9) if lie == "stale" else None
    facts = {"product": product, "labels": labels, "before": before}
    trial = attempt(net(), CHECKED, images(4), LIES[lie], "2", **facts)
    assert trial.told
    assert trial.refused
    trial = attempt(net(), OPEN, images(4), LIES[lie], "2", **facts)
    assert trial.told
    assert not trial.refused


def test_the_borderline_lie_is_above_what_is_stated_by_a_hair() -> None:
    caught = dict.fromkeys((1, 2), 0)
    sizes: list[float] = []

    class Measuring(Liar):
        def answer(self, layer: str, y: Tensor) -> Tensor:
            told = super().answer(layer, y)
            if layer == "2" and self.lie is not None and not torch.equal(told, y):
                error = (told.double() - y.double())[0].flatten(1).norm(dim=0)
                assert int((error > 0).sum()) == 1  # one position
                weight, sent = self._weight, self._sent
                limits = checks.forward_tolerance(self._operation, sent, weight, told, vectors=1)
                sizes.append(float(error.max()) / float(checks.detectable(limits, 8).max()))
            return told

    from motte.offload.protect import protect

    for vectors in caught:
        for seed in range(24):
            scheme = replace(CHECKED, integrity_vectors=vectors)
            trial = attempt(net(), scheme, images(1), at_the_stated_magnitude, "2", seed=seed)
            caught[vectors] += trial.refused
    assert caught[1] >= 18  # 22.5 expected at least
    assert caught[2] >= 22
    liar = Measuring("2", Product.OUTPUT, vectors=1, seed=0)
    split = protect(net(), OPEN, accelerator=liar).eval()
    liar.lie = at_the_stated_magnitude
    with torch.no_grad():
        split(images(2))
    assert sizes
    assert 1.0 <= sizes[0] <= 1.02


def test_a_check_that_lets_too_much_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # A planted error in the check: it compares with ten times the tolerance that it states.
    plain = checks._judge

    def lax(deviation: Tensor, tolerance: object, *rest: object) -> None:
        plain(deviation / 30, tolerance, *rest)

    monkeypatch.setattr(checks, "_judge", lax)
    (job,) = Lying().plan(SmallScene(outside=("5",)))
    with pytest.raises(ContradictionError, match="more often than stated"):
        job.run(Context(0, FEW))


def test_the_bound_is_refuted_by_sure_counts_only() -> None:
    require_bound(Tally(borderline=64, borderline_accepted=1), 2)
    require_bound(Tally(borderline=0), 2)
    with pytest.raises(ContradictionError):
        require_bound(Tally(borderline=64, borderline_accepted=20), 2)


def test_an_accelerator_accused_wrongly_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checks._judge
    monkeypatch.setattr(checks, "_judge", lambda deviation, *rest: plain(deviation + 1e9, *rest))
    (job,) = Lying().plan(SmallScene())
    with pytest.raises(ContradictionError, match="accused"):
        job.run(Context(0, FEW))
    assert attempt(net(), CHECKED, images(2), None, "2").refused
    assert not attempt(net(), OPEN, images(2), negated, "2").refused
