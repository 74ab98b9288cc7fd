"""``motte seal --scheme``, ``inspect --key`` and ``run --accelerator``: what they print, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motte.cli import main
from motte.errors import SettingError
from motte.offload.settings import Energy, Entropy, Fixed, Schedule
from motte.offload.words import parse_noise, parse_rank

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))

def net():
    torch.manual_seed(1)
    return Net()
"""
SCHEME = ("--scheme", "asymmetric", "--noise", "none", "--public-weights", "all-but-first-last")


@pytest.fixture
def motte(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs a command here; gives its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def command(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def place(motte, tmp_path: Path) -> Any:
    """A folder with a model and keys; gives the words that every ``seal`` here begins with."""
    (tmp_path / "model.py").write_text(MODEL)
    for name, kind in (("alice", "recipient"), ("owner", "signer")):
        assert motte("keys", "new", name, "--kind", kind, "--folder", tmp_path)[0] == 0
    words = ("seal", f"{tmp_path}/model.py:net", "--random-weights", "--input-shape", "3,8,8", "--lower", "off")
    keys = ("--recipient", tmp_path / "alice.pub", "--signer-key", tmp_path / "owner.key")
    return (*words, *keys, "-o", tmp_path / "net.motte")


def test_from_seal_to_an_answer(motte, place, tmp_path: Path) -> None:
    code, out, err = motte(*place, "--parts", "2", *SCHEME, "--rank", "fixed:2")
    assert code == 0, err
    assert "2 of 4 layers may run split" in out
    assert "NO NOISE on what leaves" in out
    assert "--accelerator ADDRESS" in err
    seen = json.loads(motte("inspect", tmp_path / "net.motte", "--json")[1])
    assert seen["public_weights"] == ["second.weight", "third.weight"]
    assert "offload" not in seen
    code, out, _ = motte("inspect", tmp_path / "net.motte", "--key", tmp_path / "alice.key", "--json")
    section = json.loads(out)["offload"]
    assert section["rank"] == ["fixed", 2]
    assert [(each["name"], each["side"]) for each in section["layers"]] == [
        ("first", "inside"), ("second", "split"), ("third", "split"), ("head", "inside"),
    ]  # fmt: skip
    shown = motte("inspect", tmp_path / "net.motte", "--key", tmp_path / "alice.key")[1]
    assert "no layer before it" in shown

    np.save(tmp_path / "x.npy", np.random.default_rng(3).random((1, 3, 8, 8), dtype=np.float32))
    keys = ("--key", tmp_path / "alice.key", "--signer", tmp_path / "owner.pub")
    run = ("run", tmp_path / "net.motte", *keys, "--input", tmp_path / "x.npy", "--threads", "1", "--repeat", "1")
    code, out, err = motte(*run, "--accelerator", "local")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("outside: "))
    assert line.startswith("outside: 2 layers (second, third) on local accelerator on cpu, pid ")
    assert "; integrity on; NO NOISE; out: " in line
    code, out, err = motte(*run)
    assert code == 0
    assert "inside: all; the 2 layers that may leave did not" in out
    assert "everything runs inside, and nothing leaves" in err


def test_a_plan_with_a_scheme_needs_its_weights_marked(motte, place, tmp_path: Path) -> None:
    from motte.offload.graph_layers import choose_layers
    from motte.offload.placement import to_plan
    from motte.offload.settings import Asymmetric

    code, _, err = motte("plan", *place[1:5], "--parts", "2", "-o", tmp_path / "plan.txt")
    assert code == 0, err
    from dataclasses import replace

    from motte.plan.text import dumps, loads
    from motte.zoo import WeightsChoice, build
    from motte.zoo.models import capture_built

    weights = WeightsChoice(file=None, random_seed=0, published=None)
    graph = capture_built(build(place[1], weights=weights, input_shape="3,8,8")).graph
    section = to_plan(Asymmetric(noise=None), choose_layers(graph, ["second"]))
    text = dumps(replace(loads((tmp_path / "plan.txt").read_text()), offload=section))
    (tmp_path / "plan.txt").write_text(text)
    plan = ("--plan", tmp_path / "plan.txt")
    code, _, err = motte(*place, *plan)
    assert code == 1
    assert "does not mark public" in err
    assert not (tmp_path / "net.motte").exists()
    code, _, err = motte(*place, *plan, *SCHEME)
    assert code == 2
    assert "the plan holds a scheme already" in err
    code, out, err = motte(*place, *plan, "--public-weights", "second", "--json")
    assert code == 0, err
    assert json.loads(out)["public_weights"] == ["second.weight"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scheme", "asymmetric", "--public-weights", "second"), "say whether what leaves is noised"),
        (("--scheme", "asymmetric", "--noise", "none"), "none is marked public"),
        (("--noise", "none"), "a setting of a scheme without a scheme"),
        ((*SCHEME[:-1], "third,head"), "has to stay inside"),
        ((*SCHEME[:-1], "fourth"), "no such convolution or linear layer"),
        (("--public-weights", "fourth"), "no such weight to mark as public"),
    ],
)
def test_what_seal_refuses(motte, place, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, out, err = motte(*place, "--parts", "1", "--skip-check", *words)
    assert code == 2
    assert message in err
    assert out == ""
    assert not (tmp_path / "net.motte").exists()


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("fixed:0", Fixed(0)),
        ("fixed:7", Fixed(7)),
        ("schedule", Schedule()),
        ("schedule:1,3,9", Schedule(1, 3, 9)),
        ("energy:0.9", Energy(0.9)),
        ("energy:0.9,5", Energy(0.9, 5)),
        ("entropy", Entropy()),
        ("entropy:8", Entropy(8)),
    ],
)
def test_rank_rules(text: str, rank: object) -> None:
    assert parse_rank(text) == rank


@pytest.mark.parametrize(
    "text", ["", "fixed", "fixed:", "fixed:1,2", "fixed:x", "schedule:1", "energy", "energy:2", "energy:.5,", "full:1"]
)
def test_what_is_no_rank_rule(text: str) -> None:
    with pytest.raises(SettingError):
        parse_rank(text)


def test_noise() -> None:
    assert parse_noise("none") is None
    found = parse_noise("gaussian:1.5,0.25")
    assert found is not None
    assert (found.residual.clip, found.residual.noise_multiplier, found.gradient) == (1.5, 0.25, None)
    for text in (
        "",
        "none:1",
        "gaussian",
        "gaussian:1",
        "gaussian:1,2,3",
        "gaussian:1,0",
        "gaussian:1,nan",
        "laplace:1,1",
    ):
        with pytest.raises(SettingError):
            parse_noise(text)
