"""The other verbs of ``motte bench``: training steps, splitting, opening, starting, and the link."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motte.bench.bundles import Bundles
from motte.bench.case import Case
from motte.bench.inputs import make_inputs
from motte.bench.interleave import Silent
from motte.bench.lifecycle import _Lifecycle
from motte.bench.request import Request
from motte.bench.results import read_results
from motte.bench.subject import subject_of
from motte.bench.train_step import TrainWork
from motte.errors import SettingError, UnsupportedError

Bench = Callable[..., Any]


def spec(net: str, mode: str, batch: int = 2, **others: Any) -> dict[str, Any]:
    """What a peer is told for a training step."""
    train = {
        "mode": mode, "noise": "none", "rank": "fixed:2", "integrity": "freivalds",
        "layers": ["all-but-first-last"], "accelerator": "cpu", **others,
    }  # fmt: skip
    return {
        "job": "train", "model": net, "weights": {"file": None, "random_seed": None}, "input_shape": None,
        "engine": "torch", "inputs": [["x", "f32", [batch, 3, 8, 8]]], "seed": 0, "threads": 1, "device": "cpu",
        "outside": False, "folder": None, "train": train,
    }  # fmt: skip


def inputs(batch: int = 2) -> Any:
    from motte.bench.inputs import InputSpec

    return make_inputs([InputSpec("x", "f32", (batch, 3, 8, 8))], 0)


def test_a_split_step_learns_what_a_plain_one_does(net: str) -> None:
    import numpy as np

    plain, split = TrainWork(spec(net, "native"), inputs()), TrainWork(spec(net, "asymmetric"), inputs())
    try:
        before = plain.answer(inputs())[0]
        for work in (plain, split):
            for _ in range(3):
                work.run()
        one, other = plain.answer(inputs())[0], split.answer(inputs())[0]
        assert not np.allclose(one, before, atol=1e-6)
        assert np.allclose(one, other, atol=1e-4)
        books = split.books()
        assert books["split_layers"] == 1
        # The residual and the output gradient of the one layer, and its weight, which every step changes.
        assert books["bytes_out"] == 2 * (2 * 8 * 8 * 8 * 4) + 8 * 8 * 3 * 3 * 4
        assert books["outside_flops"] == 3 * 2 * 2 * 8 * 8 * 8 * 8 * 9
        told = plain.books()
        assert (told["bytes_out"], told["trusted_flops"]) == (0, 0)
        assert told["outside_flops"] > books["outside_flops"]
    finally:
        plain.close()
        split.close()


def test_layers_that_are_not_there_end_before_the_first_step(net: str) -> None:
    with pytest.raises(SettingError):
        TrainWork(spec(net, "asymmetric", layers=["fourth"]), inputs())


def test_training_is_refused_in_parts_and_on_other_engines(net: str) -> None:
    from motte.bench.train import bench_train

    for wrong in ({"parts": (2,)}, {"engines": ("onnxruntime",)}):
        with pytest.raises(SettingError):
            bench_train(Request(**{"verb": "train", "models": (net,), **wrong}), Silent())


def test_splitting_is_measured_by_part_count(run_bench: Bench, net: str, tmp_path: Path) -> None:
    words = ("--modes", "native,resident,asymmetric", "--parts", "1,4", "--repeats", "5", "--threads", "1")
    ran = run_bench("bench", "split", "--model", net, *words, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    found = read_results(tmp_path / "out")
    assert [(each.case.mode, each.case.parts) for each in found.cases] == [
        ("resident", 1), ("resident", 4), ("asymmetric", 1), ("asymmetric", 4),
    ]  # fmt: skip
    assert {len(plan.parts) for plan in found.plans.values()} == {1, 4}
    assert not found.simulated  # no worker ran
    assert [each["case"].split("-")[1] for each in found.run.asked["missing_cases"]] == ["native"]


def test_starting_and_opening_are_apart(net: str) -> None:
    request = Request(verb="open", models=(net,), repeats=5, threads=1)
    case = Case(model="own.net", mode="resident", parts=1, batch=1, engine="torch", enclave="process")
    with Bundles(request) as bundles:
        built, captured = bundles.built(net)
        subject = subject_of(captured.graph, built.name, "file", 1, {})
        bench = _Lifecycle(request, bundles, net, subject, Silent())
        took = bench._started(case, bundles.sealed(net, 1, "trusted"))
    segments = bench._segments[case]
    assert took == segments["open"] + segments["load"]
    assert segments["start"] > 0
    assert "build" not in segments


def test_a_batch_that_a_model_does_not_take(net: str) -> None:
    with Bundles(Request(verb="infer", models=(net,))) as bundles:
        _, captured = bundles.built(net)
    with pytest.raises(UnsupportedError):
        subject_of(captured.graph, "own.net", "file", 1025, {})
    with pytest.raises(SettingError, match="no such dynamic dimension"):
        subject_of(captured.graph, "own.net", "file", 1, {"sequence": 8})


def test_the_link_against_two_copies(run_bench: Bench) -> None:
    ran = run_bench("bench", "link", "--sizes", "4KiB", "--repeats", "5", "--threads", "1", "--json")
    assert ran.code == 0, ran.err
    native, linked = ran.json["cases"]
    assert (native["mode"], linked["mode"]) == ("native", "asymmetric")
    assert (linked["bytes_out"], linked["bytes_in"]) == (4096, 4096)
    assert native["missing"]["bytes_out"]
    assert run_bench("bench", "link", "--sizes", "100B").code == 2
    assert run_bench("bench", "link", "--sizes", "4KiB,4KiB").code == 2
