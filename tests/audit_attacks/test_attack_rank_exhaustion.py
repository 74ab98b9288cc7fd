"""Planted answers drive the secret out where nobody checks, and are refused where somebody does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from motte.audit.attacks.rank_exhaustion import (
    RankExhaustion,
    RankExhaustions,
    explained_share,
    plant,
    planted_rank,
)
from motte.audit.interface import Attack, Budget, Context, Outcome, Position, PublicData, Subject, Truth, bracketed
from motte.audit.scene import activations
from motte.audit.views import VictimAccess, pipeline_of
from motte.offload.settings import Asymmetric, Energy, Entropy, Fixed, Rank, Schedule


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def victim() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval()


def private() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def subject(position: Position, scheme: Asymmetric, model: nn.Module) -> Subject:
    pipeline = pipeline_of(
        scheme,
        everything_leaves=False,
        position=position,
        model=model,
        audited="for a test",
        input_shape=(1, 8, 8),
        classes=4,
    )
    images, labels = private(), torch.zeros(6, dtype=torch.int64)
    public = PublicData(images, labels, (0.0,), (1.0,), pipeline)
    return Subject(pipeline.observe(images), public, VictimAccess(pipeline, images, None, 10))


def attacked(rank: Rank, integrity: str) -> Outcome:
    model, scheme = victim(), Asymmetric(noise=None, rank=rank, integrity=integrity)
    subjects = [subject(position, scheme, model) for position in Position]
    truth = Truth(private(), torch.zeros(6, dtype=torch.int64), (0.0,), (1.0,), model, activations(model, private()))

    def make() -> Attack:
        return RankExhaustion("2", "4", planted_rank(rank, 1))

    return bracketed(make, *subjects, truth, seed=0, budget=Budget())


@pytest.mark.parametrize("rank", [Energy(0.9), Fixed(8)], ids=["energy", "fixed"])
def test_where_nobody_checks_the_secret_leaves(rank: Rank) -> None:
    planted, honest = attacked(rank, "off").findings
    assert planted.scheme.low > honest.scheme.high, "more leaves than to an honest accelerator"
    assert planted.floor.value == honest.floor.value == 0.0
    assert planted.ceiling.value == pytest.approx(1.0)
    assert any("nobody noticed" in note for note in planted.notes)


def test_where_somebody_checks_nothing_more_leaves() -> None:
    planted, honest = attacked(Energy(0.9), "freivalds").findings
    assert planted.scheme == honest.scheme
    assert any(note.startswith("scheme: The planted answer of 2 was refused") for note in planted.notes)


def test_what_is_planted_is_positive_of_the_rank_and_far_stronger() -> None:
    y = torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    added = plant(y, 2, torch.Generator().manual_seed(1)).double() - y
    assert (added > 0).all()
    assert torch.linalg.matrix_rank(added.flatten(2), rtol=1e-4).tolist() == [2] * 3
    assert added.norm() > 100 * y.norm()
    tokens = torch.randn(2, 7, 5)
    assert plant(tokens, 1, torch.Generator()).shape == tokens.shape


def test_how_much_a_guess_explains() -> None:
    secret = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert explained_share(-2 * secret + 5, secret).tolist() == pytest.approx([1.0] * 4)
    assert explained_share(torch.ones_like(secret), secret).tolist() == [0.0] * 4
    assert explained_share(secret.flip(0), secret).max() < 0.2


def test_the_rank_to_plant_follows_from_public_settings() -> None:
    assert planted_rank(Fixed(5), 3) == 5
    assert planted_rank(Schedule(), 2) == 8
    assert planted_rank(Energy(0.5), 0) == planted_rank(Entropy(), 1) == 1


@dataclass
class Stand:
    """As much of a scene as planning and running this attack needs."""

    scheme: Asymmetric | None
    suite: str = "quick"
    outside: tuple[str, ...] = ("2", "4")
    input_shape: tuple[int, ...] = (1, 8, 8)
    classes: int = 4
    audited: str = "for a test"

    def __post_init__(self) -> None:
        self.model = victim()
        self.kept: dict[tuple[str, str], object] = {}

    def subject(self, position: Position, phase: str) -> Subject:
        return subject(position, self.scheme or Asymmetric(noise=None), self.model)

    def truth(self, phase: str) -> Truth:
        labels = torch.zeros(6, dtype=torch.int64)
        return Truth(private(), labels, (0.0,), (1.0,), self.model, activations(self.model, private()))

    def known_scores(self, job: str, position: Position) -> tuple[dict[tuple[str, str], object], tuple[str, str]]:
        return self.kept, (job, str(position))


def test_both_kinds_of_integrity_are_judged() -> None:
    scheme = Asymmetric(noise=None, rank=Energy(0.9))
    jobs = RankExhaustions().plan(Stand(scheme))
    assert len(jobs) == 2
    findings = [job.run(Context(0, Budget())).findings[0] for job in jobs]
    assert findings[1].audited == "for a test, integrity off"
    assert findings[1].scheme.value > findings[0].scheme.value
    assert len(RankExhaustions().plan(Stand(None))) == 1
    assert RankExhaustions().plan(Stand(scheme, outside=("2",))) == []
