"""Two successive weights give the principal part away: exactly where the system is determined, and not beyond."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from motte.audit.attacks.weight_delta import WeightDelta, principal_part, solvable, steps_of, true_activation
from motte.audit.attacks.weight_delta_system import solve_input
from motte.audit.interface import Attack, Budget, Outcome, Position, PublicData, Subject, Truth, View, bracketed
from motte.audit.views import pipeline_of
from motte.errors import ResourceError, UnsupportedError
from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism
from motte.offload.weight_delta_bound import SystemSize, determined_up_to, system_size

LAYER = "3"
BATCH = 4
SOME = Mechanism(clip=1.0, noise_multiplier=1.0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conv(inputs: int, outputs: int, kernel: tuple[int, ...], **changed: object) -> LinearOperation:
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    geometry = {"stride": ones, "padding": zeros, "dilation": ones, "output_padding": zeros, "groups": 1} | changed
    return LinearOperation("conv", inputs, outputs, kernel, **geometry)


OPERATORS = {
    "plain": (conv(3, 40, (3, 3), padding=(1, 1)), (2, 3, 5, 6)),
    "strided, dilated, grouped": (
        conv(4, 80, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        (2, 4, 7, 6),
    ),
    "one dimension": (conv(2, 30, (5,), padding=(1,)), (3, 2, 10)),
    "three dimensions": (conv(2, 12, (2, 2, 2)), (1, 2, 3, 4, 3)),
    "no padding": (conv(2, 60, (3, 3)), (1, 2, 5, 5)),
    "tokens": (LinearOperation("linear", 5, 30), (2, 4, 5)),
    "vectors": (LinearOperation("linear", 5, 8), (3, 5)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_determined_system_gives_the_input_of_any_operator(name: str) -> None:
    operation, shape = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(operation.output_shape(shape), generator=generator, dtype=torch.float64)
    found = solve_input(operation, gradient, shape, compute.weight_gradient(operation, x, gradient))
    assert found.size.determined
    assert found.rank == found.size.unknowns
    assert (found.x - x).norm() / x.norm() < 1e-9
    assert found.misfit < 1e-12


def step_in_float32(batch: int, side: int, outputs: int) -> tuple[float, SystemSize]:
    """Relative error of the principal part after one step of plain SGD in float32, as the benchmark measures it."""
    generator = torch.Generator().manual_seed(0)
    operation = conv(8, outputs, (3, 3), padding=(1, 1))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    main = (draw(batch, 8, 2) @ draw(batch, 2, side * side)).reshape(batch, 8, side, side)
    left, gradient = 0.3 * draw(batch, 8, side, side), draw(batch, outputs, side, side) / batch
    weight, rate = draw(*operation.weight_shape) / math.sqrt(72), 0.1
    own = compute.weight_gradient(operation, left, gradient)
    after = weight - rate * (compute.weight_gradient(operation, main, gradient) + own)
    update = (weight.double() - after.double()) / rate - own.double()
    found = solve_input(operation, gradient, main.shape, update)
    return float((found.x - main).norm() / main.norm()), found.size


def test_it_is_exact_up_to_as_many_unknowns_as_equations_and_not_beyond() -> None:
    error, size = step_in_float32(8, 7, 64)
    assert size == SystemSize(equations=576, unknowns=392)
    assert error < 1e-5
    error, size = step_in_float32(16, 7, 64)
    assert size == SystemSize(equations=576, unknowns=784)
    assert not size.determined
    # The solution of least norm holds the share of directions that the equations see.
    assert error == pytest.approx(math.sqrt(1 - 576 / 784), abs=0.05)
    operation = conv(8, 64, (3, 3), padding=(1, 1))
    most = determined_up_to(operation, (16, 8, 7, 7))
    assert [system_size(operation, (batch, 8, 7, 7)).determined for batch in (most, most + 1)] == [True, False]


def test_noise_is_told_from_signal_and_never_makes_it_worse_than_knowing_nothing() -> None:
    operation, shape = conv(2, 60, (3, 3), padding=(1, 1)), (2, 2, 5, 5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(operation.output_shape(shape), generator=generator, dtype=torch.float64)
    clean = compute.weight_gradient(operation, x, gradient)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64) * clean.std()
    errors = [
        float((solve_input(operation, gradient, shape, clean + size * noise).x - x).norm() / x.norm())
        for size in (0.0, 0.1, 100.0)
    ]
    assert errors[0] < errors[1] < errors[2]
    assert errors[1] < 0.2
    assert errors[2] == pytest.approx(1.0, abs=0.05)


def test_what_cannot_be_solved_is_refused() -> None:
    transposed = LinearOperation("conv_transpose", 2, 2, (3, 3), (1, 1), (0, 0), (1, 1), (0, 0))
    with pytest.raises(UnsupportedError):
        solve_input(transposed, torch.zeros(1, 2, 5, 5), (1, 2, 3, 3), torch.zeros(2, 2, 3, 3))
    large = conv(1, 4096, (3, 3), padding=(1, 1))
    assert system_size(large, (64, 1, 56, 56)).unknowns == 64 * 56 * 56
    with pytest.raises(ResourceError, match="too large"):
        solve_input(large, torch.zeros(1), (64, 1, 56, 56), torch.zeros(1))


# --- through the real pipeline ----------------------------------------------------------------------------------------
def victim() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    last = [nn.Conv2d(8, 48, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 64, 4)]
    return nn.Sequential(*first, *last).eval()


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(count, 1, 4, 4, generator=generator)
    pixels = nn.functional.interpolate(smooth, size=(8, 8), mode="bilinear", align_corners=False)
    return pixels, torch.randint(4, (count,), generator=generator)


def watched(position: Position, noise: Gaussian | None) -> Subject:
    pipeline = pipeline_of(
        Asymmetric(noise=noise, rank=Fixed(2)),
        everything_leaves=False,
        position=position,
        model=victim(),
        audited="for a test",
        input_shape=(1, 8, 8),
        classes=4,
    )
    view = pipeline.observe(*images(2 * BATCH, 1))
    return Subject(view, PublicData(*images(48, 2), (0.0,), (1.0,), pipeline))


def attacked(noise: Gaussian | None) -> Outcome:
    def make() -> Attack:
        return WeightDelta(LAYER)

    subjects = [watched(position, noise) for position in Position]
    truth = Truth(*images(2 * BATCH, 1), (0.0,), (1.0,), victim())
    return bracketed(make, *subjects, truth, seed=0, budget=Budget(steps=1, seconds=60.0))


def test_without_noise_training_gives_the_activation_away() -> None:
    error, alone, psnr = attacked(None).findings
    assert error.scheme.value < 1e-2, "the whole activation, to two digits and more"
    assert alone.scheme.value > 0.5, "of which little had left"
    assert error.floor.value == 1.0
    assert error.ceiling.value < 1e-6
    assert error.position_percent == pytest.approx(100, abs=1)
    assert psnr.scheme.value > psnr.floor.value + 3, "and with it the image"
    assert any("determined" in note for note in error.notes)


def test_noise_on_all_that_leaves_stands_against_it() -> None:
    error, alone, _ = attacked(Gaussian(residual=SOME, gradient=SOME, update=SOME)).findings
    assert error.scheme.value > 0.8
    assert error.scheme.value >= alone.scheme.value - 0.1, "and the attack adds nothing to what left"


def test_noise_on_residuals_alone_cancels_and_noise_on_gradients_or_updates_does_not() -> None:
    true = true_activation(Truth(*images(2 * BATCH, 1), (0.0,), (1.0,), victim()), LAYER, BATCH)
    left = watched(Position.SCHEME, None).view.batch(LAYER, step=1)
    assert left is not None
    # The principal part does not depend on noise: it is what a residual without noise lacks.
    wanted = true - left.double()

    def error(noise: Gaussian) -> float:
        view = watched(Position.SCHEME, noise).view
        found = principal_part(view, LAYER, steps_of(view, LAYER)[0])
        assert found is not None
        return float((found.x - wanted).norm() / wanted.norm())

    assert error(Gaussian(residual=SOME)) < 0.05
    assert error(Gaussian(residual=SOME, gradient=SOME)) > 0.9
    assert error(Gaussian(residual=SOME, update=SOME)) > 0.9
    assert error(Gaussian(residual=SOME, gradient=SOME, update=SOME)) > 0.9


def test_a_view_without_two_weights_has_no_system() -> None:
    view = watched(Position.SCHEME, None).view
    last = steps_of(view, LAYER)[-1]
    assert principal_part(view, LAYER, last) is None, "no weight was seen after the last step"
    assert solvable(view) == (LAYER,)
    nothing = View("x", Position.FLOOR, "training", (), {}, {}, (1, 8, 8), 4)
    assert solvable(nothing) == ()
    assert principal_part(nothing, LAYER, 1) is None
