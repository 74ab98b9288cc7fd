"""What a protected model lets leave in spite of its scheme is said once, by name, before it leaves."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.cli.output import Output
from motte.offload.cautions import LOGGER, determined_samples, placement_cautions, unspoken
from motte.offload.layers import trace
from motte.offload.placement import place_all, place_listed
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

SOME = Mechanism(clip=1.0, noise_multiplier=1.0)
X, LABELS = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
# 48 * 9 equations for 64 positions a sample: determined up to 6 samples; 4 * 9 for 64 are never enough.
MOST = 6


def net() -> nn.Sequential:
    convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 48, 3, padding=1), nn.ReLU()]
    narrow = [nn.Conv2d(48, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, *narrow, nn.Flatten(), nn.Linear(256, 4))


def ends_in_a_convolution() -> nn.Sequential:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), *pooled)


def step(model: nn.Module, x: Tensor = X) -> None:
    nn.functional.cross_entropy(model(x), LABELS.repeat(4)[: len(x)]).backward()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def protected(model: nn.Module, **settings: object) -> nn.Module:
    return protect(model, Asymmetric(rank=Fixed(2), **settings), accelerator=InProcessAccelerator(), example_input=X)


def test_a_determined_step_is_said_before_its_gradients_leave_and_once(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = InProcessAccelerator()
    order: list[str] = []
    backward = accelerator.backward
    handler = logging.Handler()
    handler.emit = lambda record: order.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(LOGGER).addHandler(handler)
    accelerator.backward = lambda *a, **k: (order.append("backward"), backward(*a, **k))[1]  # type: ignore[method-assign]
    try:
        model = protect(net(), Asymmetric(noise=None, rank=Fixed(2)), accelerator=accelerator, example_input=X).train()
        step(model)
        step(model)
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)
    residuals, gradients, training, *rest = order
    assert gradients.startswith("training without noise on gradients: output gradients leave as they are, up to 4, and")
    assert residuals.startswith("noise none: what leaves of 2 split layers (2, 4) is a plain part")
    assert "a step on 4 samples gives away what stays inside of 1 of 2 split layers (2)" in training
    assert f"more than {MOST} samples a step" in training
    assert "trusted_layers" in training
    assert rest == ["backward"] * 4


def test_nothing_is_said_of_training_where_nothing_is_trained_or_determined(caplog: pytest.LogCaptureFixture) -> None:
    model = protected(net(), noise=None).eval()
    with torch.no_grad():
        model(X)
    model(X)  # a graph that nobody follows back
    frozen = protected(net().requires_grad_(False), noise=None).train()
    frozen(X)
    assert [text.partition(":")[0] for text in said(caplog)] == ["noise none"] * 2
    caplog.clear()
    step(protected(net(), noise=None).train(), X.repeat(2, 1, 1, 1)[: MOST + 1])
    assert [text.partition(":")[0] for text in said(caplog)] == ["noise none", "training without noise on gradients"]


@pytest.mark.parametrize(
    ("noise", "warned"),
    [
        (Gaussian(residual=SOME), ["gradients", "gradients and updates"]),
        (Gaussian(residual=SOME, gradient=SOME), []),
        (Gaussian(residual=SOME, update=SOME), ["gradients"]),
        (Gaussian(residual=SOME, gradient=SOME, update=SOME), []),
    ],
)
def test_noise_on_residuals_alone_silences_nothing(
    noise: Gaussian, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    # As tests/audit_attacks/test_attack_weight_delta.py and test_attack_gradient.py attack them.
    step(protected(net(), noise=noise).train())
    found = [text.partition(":")[0].removeprefix("training without noise on ") for text in said(caplog)]
    assert found == warned


def test_a_last_layer_that_was_named_tells_labels_and_a_first_one_the_input(caplog: pytest.LogCaptureFixture) -> None:
    model = protected(ends_in_a_convolution(), noise=None, offloaded_layers=("0", "2")).train()
    model(X)
    model(X)
    _, first, last = said(caplog)
    assert first.startswith("0 runs split on the raw input")
    assert last.startswith("2 runs last, and split")
    assert "label of every sample" in last
    caplog.clear()
    noise = Gaussian(residual=SOME, gradient=SOME, update=SOME)
    step(protected(ends_in_a_convolution(), noise=noise, offloaded_layers=("0", "2")).train())
    assert said(caplog) == []
    protected(ends_in_a_convolution(), noise=Gaussian(residual=SOME), trusted_layers=("0",)).eval()(X)
    assert said(caplog) == [], "no label is used where nothing is trained"


def test_a_plan_says_the_same_of_a_placement() -> None:
    seen = trace(net(), (X,))
    scheme = Asymmetric(noise=None, rank=Fixed(2))
    placement = place_all(seen.layers, scheme)
    assert placement.split == ("2", "4")
    layers = [layer for layer in seen.layers if layer.name in placement.split]
    assert determined_samples(layers) == {"2": MOST, "4": 0}
    residuals, gradients, training = placement_cautions(scheme, placement, seen.layers, batch=MOST)
    assert "label of every sample" in gradients
    assert "2 split layers (2, 4)" in residuals
    assert f"a step on {MOST} samples" in training
    assert len(placement_cautions(scheme, placement, seen.layers, batch=MOST + 1)) == 2
    assert placement_cautions(scheme, placement, seen.layers, batch=None) == (residuals,)
    quiet = Asymmetric(noise=Gaussian(residual=SOME, gradient=SOME, update=SOME), rank=Fixed(2))
    assert placement_cautions(quiet, placement, seen.layers, batch=1) == ()
    ends = trace(ends_in_a_convolution(), (X,))
    named = placement_cautions(scheme, place_listed(ends.layers, scheme, ("2",)), ends.layers, batch=64)
    assert [text.partition(" ")[0] for text in named] == ["noise", "2", "training"]


def test_the_command_line_shows_each_once_and_an_audit_none(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(quiet=True)
    with out.logging():
        for _ in range(2):
            protected(net(), noise=None)
        with unspoken():
            protected(ends_in_a_convolution(), noise=None)
    shown = capsys.readouterr().err
    assert shown.count("noise none: what leaves of 2 split layers") == 1
    assert "1 split layer" not in shown
