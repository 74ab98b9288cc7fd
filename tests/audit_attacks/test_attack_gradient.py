"""Gradients give images and labels away where they leave whole, and nothing where they do not leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from motte.audit.attacks.first_step import seen_in_first_steps
from motte.audit.attacks.gradient_leakage import (
    GradientLeakage,
    Target,
    distance,
    gradients_of,
    in_order_of,
    invert_gradients,
    targets_of,
)
from motte.audit.attacks.image_metrics import psnr
from motte.audit.attacks.labels import (
    GradientClassifier,
    LabelRecovery,
    labels_of_softmax_gradient,
    labels_of_weight_gradient,
    last_with_gradient,
)
from motte.audit.attacks.reconstruction import architecture_of
from motte.audit.attacks.registry import ATTACKS, load
from motte.audit.interface import Attack, Budget, Context, Position, PublicData, Subject, Truth, bracketed
from motte.audit.views import pipeline_of
from motte.errors import InputError, SettingError
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

CLASSES = 10


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[start : start + count], dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target[start : start + count], dtype=torch.int64)


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, padding=1, stride=2), nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, CLASSES))
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def target_of(net: nn.Module, images: Tensor, labels: Tensor, source: str) -> Target:
    names = ("0", "2", "5")
    probe = Target(source, {name: torch.zeros(1) for name in names})
    found = gradients_of(net, images, labels, probe)
    return Target(source, {name: each.detach() for name, each in found.items()})


@pytest.mark.parametrize("source", ["weights", "outputs"])
def test_the_image_and_its_label_follow_from_its_gradients(source: str) -> None:
    net, (image, label) = smooth_net(), digits(1)
    start = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    context = Context(0, Budget(steps=250, seconds=120.0))
    target = target_of(net, image, label, source)
    found, labels, left = invert_gradients(
        net, target, start, None, context, method="dlg", bounds=None, classes=CLASSES
    )
    assert psnr(found, image).item() > 25
    assert labels.tolist() == label.tolist()
    assert left < 1e-4


def test_cosine_and_total_variation_see_a_batch_whose_labels_are_known() -> None:
    net, (images, labels) = smooth_net(), digits(2)
    start = torch.full((2, 1, 8, 8), 0.5)
    context = Context(0, Budget(steps=150, seconds=120.0))
    bounds = (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    target = target_of(net, images, labels, "weights")
    found, _, left = invert_gradients(
        net, target, start, labels, context, method="inverting", bounds=bounds, classes=CLASSES
    )
    assert psnr(found, images).mean() > psnr(start, images).mean() + 5
    assert left < float(distance(gradients_of(net, start, labels, target), target, "inverting").detach())
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_sum_of_gradients_has_no_order() -> None:
    images = digits(5)[0]
    assert torch.equal(in_order_of(images[[3, 0, 4, 1, 2]], images), images)


# --- labels -----------------------------------------------------------------------------------------------------------
def test_a_softmax_gradient_tells_every_label_and_nothing_else_is_taken_for_one() -> None:
    logits = (3 * torch.randn(200, CLASSES, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    labels = torch.arange(200) % CLASSES
    nn.functional.cross_entropy(logits, labels).backward()
    found = labels_of_softmax_gradient(logits.grad)
    assert found is not None
    assert torch.equal(found, labels)
    noisy = logits.grad + 0.01 * torch.randn(200, CLASSES, generator=torch.Generator().manual_seed(1))
    assert labels_of_softmax_gradient(noisy) is None
    assert labels_of_softmax_gradient(torch.zeros(3, CLASSES)) is None
    assert labels_of_softmax_gradient(torch.zeros(0, CLASSES)) is None


def test_a_last_layers_weight_gradient_tells_labels_that_differ() -> None:
    torch.manual_seed(0)
    features, labels = torch.rand(4, 20), torch.tensor([7, 2, 9, 4])
    layer = nn.Linear(20, CLASSES)
    nn.functional.cross_entropy(layer(features), labels).backward()
    assert labels_of_weight_gradient(layer.weight.grad, 4).tolist() == [2, 4, 7, 9]
    with pytest.raises(InputError):
        labels_of_weight_gradient(layer.weight.grad, 11)


def test_directions_of_gradients_can_be_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (120,), generator=generator)
    maps = torch.eye(3)[labels][:, :, None, None] + 0.2 * torch.randn(120, 3, 4, 4, generator=generator)
    scaled = maps * torch.rand(120, 1, 1, 1, generator=generator)
    learnt = GradientClassifier(scaled[:80], labels[:80], 3)
    assert (learnt(scaled[80:]) == labels[80:]).float().mean() > 0.9


def victim() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES)).eval()


def watched(position: Position, count: int) -> Subject:
    pipeline = pipeline_of(
        Asymmetric(noise=None, rank=Fixed(1)),
        everything_leaves=False,
        position=position,
        model=victim(),
        audited="for a test",
        input_shape=(1, 8, 8),
        classes=CLASSES,
    )
    return Subject(pipeline.observe(*digits(count)), PublicData(*digits(200, 400), (0.0,), (1.0,), pipeline))


def test_labels_through_the_real_pipeline_all_of_them_at_the_ceiling_and_none_at_the_floor() -> None:
    def make() -> Attack:
        return LabelRecovery()

    subjects = [watched(position, 40) for position in Position]
    truth = Truth(*digits(40), (0.0,), (1.0,), victim())
    budget = Budget(samples=40, public_samples=200)
    (finding,) = bracketed(make, *subjects, truth, seed=0, budget=budget).findings
    assert finding.ceiling.value == 1.0, "an exposed softmax gradient gives every label away"
    assert finding.floor.low <= 1 / CLASSES <= finding.floor.high, "nothing seen: guessing"
    assert finding.above_floor, "output gradients of a layer in the middle point where the label lies"
    assert any("gradient of the softmax left, for 5" in note for note in finding.notes)
    with pytest.raises(SettingError, match="fitted"):
        LabelRecovery().attack(subjects[0].view, Context(0, budget))


def test_a_model_that_has_learnt_nothing_tells_labels_by_a_layer_in_the_middle_unless_gradients_have_noise() -> None:
    torch.manual_seed(0)
    front = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1), nn.ReLU()]
    fresh = nn.Sequential(*front, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)).eval()
    some, budget = Mechanism(clip=1.0, noise_multiplier=0.5), Budget(samples=40, public_samples=200)

    def recovered(noise: Gaussian | None) -> float:
        pipeline = pipeline_of(
            Asymmetric(noise=noise, rank=Fixed(1)),
            everything_leaves=False,
            position=Position.SCHEME,
            model=fresh,
            audited="for a test",
            input_shape=(1, 8, 8),
            classes=CLASSES,
        )
        attack, context = LabelRecovery(), Context(0, budget)
        attack.fit(PublicData(*digits(200, 400), (0.0,), (1.0,), pipeline), context)
        result = attack.attack(pipeline.observe(*digits(40)), context)
        return attack.score(result, Truth(*digits(40), (0.0,), (1.0,), fresh), context).brackets["accuracy"].value

    assert recovered(None) > 0.9
    assert recovered(Gaussian(residual=some)) > 0.9, "noise on residuals hides no gradient"
    assert recovered(Gaussian(residual=some, gradient=some)) < 0.4


def test_groups_see_what_one_step_over_all_would(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits(10)
    pipeline = pipeline_of(
        None,
        everything_leaves=True,
        position=Position.CEILING,
        model=smooth_net().eval(),
        audited="for a test",
        input_shape=(1, 8, 8),
        classes=CLASSES,
    )
    public = PublicData(images, labels, (0.0,), (1.0,), pipeline)
    seen = {}
    for group in (100, 4):
        monkeypatch.setattr("motte.audit.attacks.first_step.GROUP", group)
        seen[group] = seen_in_first_steps(public, images, labels, last_with_gradient, "gradient", seed=0)
    whole, parts = seen[100], seen[4]
    assert whole is not None
    assert parts is not None
    assert (whole.layer, whole.classes) == (parts.layer, parts.classes) == ("5", CLASSES)
    # The loss is the mean over a step's records, so that a gradient's length differs, and its direction does not.
    assert torch.allclose(*(nn.functional.normalize(each.values, dim=1) for each in (whole, parts)), atol=1e-5)
    assert seen_in_first_steps(public, images, labels, lambda _view: None, "gradient", seed=0) is None


def test_what_the_view_holds_is_the_gradient_of_the_step() -> None:
    view, model = watched(Position.CEILING, 6).view, victim().train()
    images, labels = (each[:3] for each in digits(6))
    for source in ("weights", "outputs"):
        target = targets_of(view, source, 1)
        assert target is not None
        assert set(target.gradients) == {"0", "2", "5"}
        assert target.records == (3 if source == "outputs" else None)
        own = gradients_of(model, images, labels, target)
        assert float(distance(own, target, "dlg").detach()) < 1e-4, "found from frames, as autograd has it"
    assert targets_of(watched(Position.FLOOR, 6).view, "weights", 1) is None


@pytest.mark.parametrize("from_residual", [False, True])
def test_leakage_through_the_real_pipeline(from_residual: bool) -> None:
    def make() -> Attack:
        return GradientLeakage(architecture_of(victim(), seed=5), "weights", from_residual=from_residual)

    subjects = [watched(position, 4) for position in Position]
    truth = Truth(*digits(2), (0.0,), (1.0,), victim())
    budget = Budget(steps=60, samples=2, public_samples=32, seconds=120.0)
    psnr_found = bracketed(make, *subjects, truth, seed=0, budget=budget).findings[0]
    assert psnr_found.ceiling.value > psnr_found.floor.value + 5
    assert psnr_found.scheme.value < psnr_found.ceiling.value
    assert any("read off the softmax gradient" in note for note in psnr_found.notes)


def test_every_attack_of_the_registry_can_be_loaded() -> None:
    assert {"paired-decoder", "optimisation", "gan-prior", "weight-delta", "labels"} <= set(ATTACKS)
    assert all(callable(load(name).plan) for name in ATTACKS)
