"""Weights from files: what loads, what is refused, and that nothing in a file ever runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from motte.errors import InputError, SettingError
from motte.zoo.weights import WeightsChoice, load_state, read_state, seeded


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)


def small(seed: int = 0) -> nn.Sequential:
    with seeded(seed):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "nested", "parallel", "legacy"])
def test_every_accepted_form_loads_the_same_tensors(tmp_path: Path, form: str) -> None:
    source, path = small(1), tmp_path / "weights"
    state = source.state_dict()
    if form == "safetensors":
        save_file(state, path)
    elif form == "state_dict":
        torch.save(state, path)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path)
    elif form == "parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    target = small(2)
    assert not same(source, target)
    load_state(target, read_state(path), where=str(path))
    assert same(source, target)


class Planted:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["torch", "plain pickle"])
def test_a_planted_pickle_does_not_run(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    if form == "torch":
        torch.save({"weight": torch.zeros(1), "other": Planted(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Planted(marker)))
    with pytest.raises(InputError, match="without running code") as caught:
        read_state(path)
    assert not marker.exists()
    assert caught.value.hint is not None
    assert "safetensors" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"PK\x03\x04broken",
        (2).to_bytes(8, "little") + b"{",
        (9).to_bytes(8, "little") + b"{" + b"x" * 20,
    ],
    ids=["empty", "text", "broken zip", "short", "broken header"],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="safetensors"):
        read_state(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the weights"):
        read_state(tmp_path / "none.pth")


@pytest.mark.parametrize("content", [{}, {"a": 1}, {1: torch.zeros(1)}, [torch.zeros(1)], torch.zeros(1)])
def test_anything_but_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(InputError):
        read_state(path)


def test_the_difference_is_told_in_names_and_shapes() -> None:
    state = dict(small(1).state_dict())
    state["0.weight"] = torch.zeros(5, 3)
    del state["0.bias"]
    state["2.extra"] = torch.zeros(1)
    target = small(2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(InputError, match="do not fit the model") as caught:
        load_state(target, state, where="w.pth")
    text = str(caught.value)
    assert "0.weight has shape [5, 3] instead of [4, 3]" in text
    assert "0.bias is missing" in text
    assert "2.extra is not in the model" in text
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items()), "half loaded"


def test_a_long_difference_is_cut() -> None:
    with pytest.raises(InputError, match="and 1 more"):
        load_state(small(), {f"x{index}": torch.zeros(1) for index in range(1)}, where="w")


def test_element_types_may_widen_but_never_narrow() -> None:
    state = {
        name: value.half() if value.is_floating_point() else value for name, value in small(1).state_dict().items()
    }
    target = small(2)
    load_state(target, state, where="w")
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, state["0.weight"].float())
    wide = {
        name: value.double() if value.is_floating_point() else value for name, value in small(1).state_dict().items()
    }
    with pytest.raises(InputError, match="float64, which float32 cannot hold"):
        load_state(target, wide, where="w")


def test_tied_names_and_the_step_counter_may_be_missing() -> None:
    source, target = Tied(), Tied()
    state = {n: v for n, v in source.state_dict().items() if n not in ("head.weight", "norm.num_batches_tracked")}
    load_state(target, state, where="w")
    assert torch.equal(target.head.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight
    del state["norm.running_mean"]
    with pytest.raises(InputError, match=r"norm\.running_mean is missing"):
        load_state(target, state, where="w")


def test_weights_are_chosen_once() -> None:
    with pytest.raises(SettingError, match="given twice"):
        WeightsChoice(file=Path("w.pth"), random_seed=0)


def test_a_seeded_block_repeats_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert same(small(3), small(3))
    assert not same(small(3), small(4))
    assert torch.equal(torch.get_rng_state(), before)
