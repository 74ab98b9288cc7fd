"""``motte plan --offload``: the table, the section in the plan, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from motte.capture.graph import Dim, Graph, Node, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.capture.text import digest
from motte.cli import main
from motte.errors import PlanError
from motte.offload.placement import Placed, Placement, from_plan, to_plan
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism
from motte.plan.plan import Plan
from motte.plan.rules import check_plan
from motte.plan.text import loads

MODEL = """
import torch
from torch import nn

labels = ["cat", "dog"]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        return self.head(x.mean((2, 3)))

def net():
    torch.manual_seed(1)
    return Net()

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    forward = Net.forward

def deep():
    torch.manual_seed(1)
    return Deep()
"""
OFFLOAD = ("--random-weights", "--input-shape", "3,8,8", "--noise", "none")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def motte(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> Ran:
        code = main(list(words))
        caught = capsys.readouterr()
        return Ran(code, caught.out, caught.err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return str(file)


def test_all_is_shown_and_frozen_into_the_plan(motte: Callable[..., Ran], model: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.txt"
    noise = ("--noise", "gaussian:2.0,0.5", "--rank", "fixed:3", "--integrity-vectors", "1")
    ran = motte("plan", f"{model}:deep", *OFFLOAD[:3], *noise, "--offload", "all", "--batch", "4", "-o", str(plan))
    assert ran.code == 0, ran.err
    assert "% of the multiply-adds inside as published (a)" in ran.out
    assert "times faster than everything inside" in ran.out
    assert "Trusted memory for training" in ran.out
    (row,) = (line for line in ran.out.splitlines() if line.startswith("second"))
    assert row.split()[1:3] == ["split", "3"]
    read = loads(plan.read_text())
    assert (read.parts, read.dims) == (1, (("batch", 4),))
    assert read.offload is not None
    scheme, placement = from_plan(read.offload)
    assert scheme == Asymmetric(
        noise=Gaussian(residual=Mechanism(2.0, 0.5)),
        rank=Fixed(3),
        integrity_vectors=1,
        trusted_layers=("first", "head"),
        offloaded_layers=("second", "third"),
    )
    assert placement["first"].reason == "it meets the raw input"


def test_as_json(motte: Callable[..., Ran], model: str) -> None:
    ran = motte("plan", f"{model}:deep", *OFFLOAD, "--offload", "third", "--parts", "2", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    sides = {each["name"]: each["side"] for each in found["offload"]["layers"]}
    assert sides == {"first": "inside", "second": "inside", "third": "split", "head": "inside"}
    work = found["work"]
    assert work["totals"]["forward"]["bound"] == pytest.approx(1 / work["totals"]["forward"]["share"])
    assert work["traffic"]["forward_out"] == 4 * 8 * 64
    assert found["memory"]["training"]["total"] > found["memory"]["training"]["residuals"] == 4 * 8 * 64
    assert loads(found["plan"]).parts == 2
    assert "trial" not in found


def test_auto_measures_and_prints_why(motte: Callable[..., Ran], model: str) -> None:
    words = ("--offload", "auto", "--exposure", "layers=1", "--threads", "1", "--training", "--json")
    ran = motte("plan", f"{model}:deep", *OFFLOAD, *words)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    reasons = {each["name"]: (each["side"], each["reason"]) for each in found["offload"]["layers"]}
    for name in ("second", "third"):
        side, reason = reasons[name]
        assert reason.startswith("faster: " if side == "split" else ("not faster: ", "beyond layers=1: "))
        assert found["trial"]["layers"][name]["times"]["backward"]["whole"] > 0
    assert sum(side == "split" for side, _ in reasons.values()) <= 1
    assert "sees residuals" in ran.err


def test_layers_that_share_a_weight_stay_inside(motte: Callable[..., Ran], model: str) -> None:
    ran = motte("plan", f"{model}:net", *OFFLOAD, "--offload", "all", "--json")
    assert ran.code == 0, ran.err
    layers = {each["name"]: each for each in json.loads(ran.out)["offload"]["layers"]}
    assert {layers["second"]["side"], layers["third"]["side"]} == {"inside"}
    assert "share" in layers["third"]["reason"]
    assert "share" in layers["second"]["reason"]


def test_a_tiled_layer_stays_inside(motte: Callable[..., Ran], model: str) -> None:
    ran = motte("plan", f"{model}:deep", *OFFLOAD, "--offload", "all", "--max-part-memory", "4600", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    tiled = {each["node"] for each in found["tiles"]}
    reasons = {each["name"]: each["reason"] for each in found["offload"]["layers"]}
    assert tiled & {"second", "third"}
    assert all(reasons[name] == "the plan tiles it" for name in tiled & {"second", "third"})


def refused(*words: str) -> Any:
    return pytest.param(words, id=" ".join(words[-3:]))


@pytest.mark.parametrize(
    "words",
    [
        refused("--offload", "all"),
        refused("--noise", "none"),
        refused("--scheme", "asymmetric", "--noise", "none", "--parts", "1"),
        refused("--noise", "none", "--offload", "nowhere"),
        refused("--noise", "none", "--offload", ","),
        refused("--noise", "none", "--offload", "auto"),
        refused("--noise", "none", "--offload", "auto", "--exposure", "much"),
        refused("--noise", "none", "--offload", "all", "--exposure", "layers=1"),
        refused("--noise", "none", "--offload", "all", "--threads", "1"),
        refused("--noise", "none", "--offload", "all", "--training"),
        refused("--noise", "none", "--parts", "1", "--accelerator", "unix:/nowhere"),
        refused("--noise", "some", "--offload", "all"),
    ],
)
def test_what_makes_no_sense_is_refused(motte: Callable[..., Ran], model: str, words: tuple[str, ...]) -> None:
    ran = motte("plan", f"{model}:deep", *OFFLOAD[:3], *words)
    assert ran.code == 2, ran.err
    assert "error:" in ran.err
    assert ran.out == ""


def test_a_layer_inside_may_be_any_product_and_a_split_one_not() -> None:
    weight = Weight("table.weight", "f32", (9, 4), (0, 1))
    type_ = TensorType("f32", (Size("batch"), 4))
    nodes = (
        Node(
            "table",
            "aten.embedding.default",
            (WeightRef("table.weight"), Ref("x")),
            outputs=(Value("table", type_),),
        ),
    )
    inputs = (Value("x", TensorType("i64", (Size("batch"),))),)
    graph = Graph("g", (Dim("batch", 1, 8),), inputs, {"table.weight": weight}, nodes, ("table",), ("output",))
    placement = Placement((Placed("table", "inside", "an embedding"),))
    plan = Plan(digest(graph), "chosen", (("batch", 1),), (), offload=to_plan(Asymmetric(noise=None), placement))
    check_plan(plan, graph)
    split = Placement((Placed("table", "split", "why"),))
    with pytest.raises(PlanError, match="no convolution"):
        check_plan(replace(plan, offload=to_plan(Asymmetric(noise=None), split)), graph)
