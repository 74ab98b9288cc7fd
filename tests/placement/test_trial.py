"""A tiny real trial, without a word on how long anything took; and who may run one."""

from __future__ import annotations

import ast
import math
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import motte
from motte.accelerator.in_process import InProcessAccelerator
from motte.errors import IntegrityError, UnsupportedError
from motte.offload.decide import Budget
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism, Schedule
from motte.offload.trial import run_trial

SOURCE = Path(motte.__file__).parent
NOISE = Gaussian(residual=Mechanism(1.0, 1.0), gradient=Mechanism(1.0, 1.0), update=Mechanism(1.0, 1.0))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.Flatten(2),
        nn.Linear(9, 9),
        nn.Flatten(),
        nn.Linear(54, 4),
    ).train()


@pytest.mark.parametrize(
    ("scheme", "training"),
    [
        (Asymmetric(noise=None, rank=Schedule(start=1)), False),
        (Asymmetric(noise=NOISE, rank=Fixed(2), residual_dtype="bfloat16"), True),
    ],
)
def test_a_trial_measures_every_layer_and_leaves_the_model_alone(scheme: Asymmetric, training: bool) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked: list[str] = []
    x = torch.randn(2, 3, 8, 8)
    found = run_trial(
        model,
        (x,),
        scheme,
        InProcessAccelerator(),
        Budget("layers", 2),
        training=training,
        repeats=5,
        on_layer=asked.append,
    )
    assert [each.name for each in found.placement.layers] == ["0", "2", "4", "6", "8"]
    assert set(found.measured) == {"2", "4", "6"} <= set(asked)
    assert len(found.placement.split) <= 2
    for name, each in found.measured.items():
        assert (each.times.backward is not None) == training
        for phase in (each.times.forward, each.times.backward):
            if phase is not None:
                values = {one.name: getattr(phase, one.name) for one in fields(phase)}
                assert all(math.isfinite(value) and value >= 0 for value in values.values()), (name, values)
                assert phase.whole > 0
                assert phase.check > 0
                assert (phase.noise > 0) == (scheme.noise is not None)
        assert 0 < each.energy < 1
    size = 2 if scheme.residual_dtype == "bfloat16" else 4
    gradient = 4 * 2 * 8 * 8 * 8 if training else 0
    # The circular padding is put on inside, and so is part of what leaves.
    assert found.measured["2"].bytes_out == size * 2 * 8 * 10 * 10 + gradient
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_rank_of_the_last_trial_is_that_of_the_placement() -> None:
    scheme = Asymmetric(noise=None, rank=Schedule(start=1, factor=2, cap=8))
    found = run_trial(net(), (torch.randn(2, 3, 8, 8),), scheme, InProcessAccelerator(), Budget("layers", 0), repeats=5)
    assert found.placement.split == ()
    assert dict(found.ranks) == {"2": 1, "4": 2, "6": 4}


def test_a_lying_accelerator_ends_a_trial() -> None:
    class Liar(InProcessAccelerator):
        def answer(self, layer: str, y: Tensor) -> Tensor:
            return y + 1.0

    with pytest.raises(IntegrityError):
        run_trial(net(), (torch.randn(2, 3, 8, 8),), Asymmetric(noise=None), Liar(), Budget("layers", 2), repeats=5)


def test_a_model_that_cannot_be_traced_is_not_tried() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError):
        run_trial(Branch(), (torch.randn(2, 3),), Asymmetric(noise=None), InProcessAccelerator(), Budget("layers", 2))


# --- a running enclave never decides by times ----------------------------------------------------------------------
def imports_of(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def imports() -> dict[str, set[str]]:
    files = sorted(SOURCE.rglob("*.py"))
    return {path.relative_to(SOURCE).as_posix(): imports_of(path.read_text(encoding="utf-8")) for path in files}


def those_that_import(module: str) -> set[str]:
    return {path for path, found in imports().items() if module in found}


def test_only_the_owners_command_line_may_run_a_trial() -> None:
    assert those_that_import("motte.offload.trial") == {"cli/placing.py"}
    assert those_that_import("motte.offload.decide") == {"cli/placing.py", "offload/trial.py"}
    assert those_that_import("motte.cli.placing") == {"cli/plan.py"}


def test_an_import_is_found_however_it_is_written() -> None:
    for text in (
        "import motte.offload.trial",
        "def f():\n  from motte.offload import trial",
        "from motte.offload.trial import x",
    ):
        assert "motte.offload.trial" in imports_of(text)
