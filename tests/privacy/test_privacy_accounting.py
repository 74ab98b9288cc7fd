"""What a training or inference run is said to promise: counts by hand, infinite where it must be, in plain words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from motte.errors import ResourceError, SettingError
from motte.offload.accounting import InferenceRun, TrainingRun
from motte.offload.analytic import epsilon_of
from motte.offload.settings import Gaussian, Mechanism

M = Mechanism(clip=0.5, noise_multiplier=20.0)
FULL = Gaussian(residual=M, gradient=M, update=M)
RUN = TrainingRun(
    records=10, batch_size=4, epochs=5, offloaded_layers=3, noise=FULL, trusted_parameters="frozen", delta=1e-6
)


def words(run: TrainingRun | InferenceRun) -> str:
    return "\n".join(run.statement(accountant="closed-form").sentences)


# --- counting ---------------------------------------------------------------------------------------------------------
def test_frozen_inside_a_record_is_in_one_batch_an_epoch() -> None:
    assert RUN.steps == 15
    found = RUN.statement(accountant="closed-form")
    assert [(each.releases, each.per_record, each.samples, each.sensitivity) for each in found.kinds] == [
        (45, 15, 1, 2.0)
    ] * 3
    assert found.epsilon == pytest.approx(epsilon_of(1e-6, 2 / 20 * math.sqrt(45)))
    assert found.forward_only_epsilon == pytest.approx(epsilon_of(1e-6, 2 / 20 * math.sqrt(15)))


def test_trained_inside_every_release_counts_with_every_row() -> None:
    found = replace(RUN, trusted_parameters="trained").statement(accountant="closed-form")
    assert [(each.per_record, each.samples, each.sensitivity) for each in found.kinds] == [
        (45, 4, 4.0),
        (45, 4, 4.0),
        (45, 4, 8.0),
    ]
    assert found.epsilon == pytest.approx(epsilon_of(1e-6, math.sqrt(45 * (16 + 16 + 64)) / 20))
    # The forward-only figure is the one that others print: as if nothing were learnt.
    assert found.forward_only_epsilon == RUN.statement(accountant="closed-form").forward_only_epsilon
    assert any("15 steps count for each record, not only the 5" in each for each in found.sentences)


def test_what_learns_inside_carries_a_record_into_releases_of_others() -> None:
    """Why ``trained`` counts every step: record A was in the first batch only, and B's residual tells of it."""

    def residual_of_b(a: Tensor, *, frozen: bool) -> Tensor:
        torch.manual_seed(0)
        inside, split = nn.Linear(4, 4), nn.Linear(4, 2)
        inside.requires_grad_(not frozen)
        split.bias.requires_grad_(False)
        private = [each for each in inside.parameters() if each.requires_grad]
        split(torch.tanh(inside(a))).square().sum().backward()
        # The split layer's own update is left out: it is privatised, and does not tell A from another.
        with torch.no_grad():
            for each in private:
                each -= 0.1 * (each.grad if each.grad is not None else 0)
        return torch.tanh(inside(torch.ones(1, 4))).detach()

    one, two = torch.full((1, 4), 0.3), torch.full((1, 4), -2.0)
    assert torch.equal(residual_of_b(one, frozen=True), residual_of_b(two, frozen=True))
    assert not torch.equal(residual_of_b(one, frozen=False), residual_of_b(two, frozen=False))


def test_batchnorm_couples_rows_by_their_root_and_sums_in_full() -> None:
    found = replace(RUN, coupled_samples=4).statement(accountant="closed-form")
    assert [each.sensitivity for each in found.kinds] == [4.0, 4.0, 8.0]
    assert found.epsilon > RUN.statement(accountant="closed-form").epsilon
    assert "One record changes every row of its batch" in words(replace(RUN, coupled_samples=4))


def test_batchnorm_lets_one_record_change_every_row() -> None:
    layer = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0] += 1
    assert bool((layer(x)[1:] != layer(other)[1:]).any(1).all())
    layer.eval()
    assert torch.equal(layer(x)[1:], layer(other)[1:])


def test_add_remove_halves_the_sensitivity_of_samples_that_do_not_meet() -> None:
    noise = Gaussian(residual=M, gradient=M, update=M, adjacency="add-remove")
    found = replace(RUN, noise=noise).statement(accountant="closed-form")
    assert [each.sensitivity for each in found.kinds] == [1.0, 1.0, 1.0]
    assert "its place left empty" in found.sentences[0]
    coupled = replace(RUN, noise=noise, coupled_samples=4).statement(accountant="closed-form")
    assert [each.sensitivity for each in coupled.kinds] == [math.sqrt(13), math.sqrt(13), 7.0]


def test_batches_smaller_than_the_data_set_do_not_amplify() -> None:
    one = replace(RUN, records=1000, batch_size=1)
    all_ = replace(RUN, records=1000, batch_size=1000)
    closed = "closed-form"
    assert one.statement(accountant=closed).epsilon == all_.statement(accountant=closed).epsilon  # type: ignore[arg-type]


def test_epsilon_so_far_grows_to_that_of_the_run_and_a_repetition_costs() -> None:
    found = [RUN.so_far(steps).epsilon for steps in range(RUN.steps + 1)]
    assert found[0] == 0
    assert found == sorted(found)
    # A started epoch counts in full: the record may have been in its first batch.
    assert found[1] == found[3] < found[4]
    assert found[-1] == RUN.statement(accountant="closed-form").epsilon
    again = RUN.so_far(3, repeated={"residual": 2})
    assert again.kinds[0].per_record == RUN.so_far(3).kinds[0].per_record + 2
    assert again.epsilon > found[3]


# --- dp-accounting ----------------------------------------------------------------------------------------------------
def test_dp_accounting_is_what_is_printed_and_bounds_the_closed_form() -> None:
    closed, found = RUN.statement(accountant="closed-form"), RUN.statement()
    assert found.accountant.startswith("dp-accounting ")
    assert "closed form" in closed.accountant
    assert closed.epsilon <= found.epsilon <= closed.epsilon * 1.002


@pytest.mark.parametrize("changed", [{}, {"trusted_parameters": "trained"}, {"coupled_samples": 4}])
def test_a_calibrated_run_keeps_to_its_budget(changed: dict[str, object]) -> None:
    made = replace(RUN, **changed).calibrated(2.0)  # type: ignore[arg-type]
    assert 1.998 < made.statement().epsilon <= 2.0
    assert made.noise is not None
    assert made.noise.residual.clip == 0.5
    queried = InferenceRun(queries=6, offloaded_layers=2, noise=FULL).calibrated(2.0)
    assert 1.998 < queried.statement().epsilon <= 2.0


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ResourceError) as caught:
        RUN.statement()
    assert "motte[privacy]" in str(caught.value.hint)
    assert RUN.so_far(3).epsilon > 0


def test_nothing_loads_dp_accounting_before_it_is_needed() -> None:
    script = (
        "import sys\nimport motte.offload.accounting as a, motte.cli.privacy, motte.offload.calibration as c\n"
        "c.gaussian(1.0, 1e-5, residual_clip=1.0)\n"
        "a.InferenceRun(queries=2, offloaded_layers=2, noise=None).statement(accountant='closed-form')\n"
        "print(*({'dp_accounting', 'scipy', 'torch', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


# --- infinite ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("noise", "why"),
    [
        (None, ("residuals", "output gradients", "weight updates")),
        (Gaussian(residual=M), ("output gradients", "weight updates")),
        (Gaussian(residual=M, gradient=M), ("weight updates",)),
        (Gaussian(residual=M, update=M), ("output gradients",)),
    ],
)
def test_what_is_not_privatised_makes_epsilon_infinite_with_the_reason(
    noise: Gaussian | None, why: tuple[str, ...]
) -> None:
    found = replace(RUN, noise=noise).statement()
    assert found.epsilon == math.inf
    assert found.infinite_because is not None
    every = ("residuals leave", "output gradients leave", "weight updates are")
    assert [each for each in every if each in found.infinite_because] == [
        each for each in every if each.startswith(why)
    ]
    assert found.sentences[0].startswith("Epsilon is infinite, so nothing is promised")
    if noise is not None:
        assert "determine the principal part" in found.infinite_because
        assert found.forward_only_epsilon == RUN.statement().forward_only_epsilon
    else:
        assert found.forward_only_epsilon == math.inf
    with pytest.raises(SettingError):
        replace(RUN, noise=noise).calibrated(1.0)


def test_inference_needs_no_noise_for_what_does_not_leave() -> None:
    found = InferenceRun(queries=10, offloaded_layers=13, noise=Gaussian(residual=M)).statement()
    assert [each.kind for each in found.kinds] == ["residual"]
    assert found.kinds[0].per_record == 130
    assert found.epsilon == pytest.approx(epsilon_of(1e-5, 2 / 20 * math.sqrt(130)), rel=2e-3)
    more = InferenceRun(queries=11, offloaded_layers=13, noise=Gaussian(residual=M)).statement()
    assert more.epsilon > found.epsilon
    without = InferenceRun(queries=1, offloaded_layers=1, noise=None)
    assert without.statement().epsilon == math.inf
    with pytest.raises(SettingError):
        without.calibrated(1.0)


# --- words ------------------------------------------------------------------------------------------------------------
def test_the_sentences_say_what_is_not_protected() -> None:
    said = words(RUN)
    for each in ("not per person", "the trained model", "the weights of split layers", "times", "gradient norm"):
        assert each in said
    assert "not below one over" not in said
    assert "not below one over" in words(replace(RUN, delta=0.1))
    assert "next to no promise" not in words(replace(RUN, noise=_with(1000.0)))
    assert "next to no promise" in words(replace(RUN, noise=_with(0.1)))
    assert "10 queries" in words(InferenceRun(queries=10, offloaded_layers=1, noise=FULL))


def _with(multiplier: float) -> Gaussian:
    each = Mechanism(1.0, multiplier)
    return Gaussian(residual=each, gradient=each, update=each)


def test_json_has_no_number_that_json_lacks() -> None:
    for noise in (FULL, None):
        document = replace(RUN, noise=noise).statement(accountant="closed-form").to_json()
        text = json.dumps(document, allow_nan=False)
        assert json.loads(text) == document
    assert document["epsilon"] == "infinite"
    assert document["releases"][2] == {
        "kind": "update",
        "clip": None,
        "noise_multiplier": None,
        "sigma": None,
        "releases": 45,
        "releases_per_record": 15,
        "rows_per_release": 1,
        "sensitivity_in_clips": 2.0,
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"records": 0},
        {"batch_size": True},
        {"epochs": 1.5},
        {"offloaded_layers": -1},
        {"coupled_samples": 5},
        {"trusted_parameters": "some"},
        {"delta": 0.0},
        {"delta": 1.0},
    ],
)
def test_wrong_runs_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        replace(RUN, **changed)  # type: ignore[arg-type]


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(SettingError):
        RUN.so_far(-1)
    with pytest.raises(SettingError):
        RUN.so_far(1, repeated={"update": -1})
    with pytest.raises(SettingError):
        RUN.so_far(1, accountant="guess")  # type: ignore[arg-type]
    with pytest.raises(SettingError):
        InferenceRun(queries=0, offloaded_layers=1, noise=None)
