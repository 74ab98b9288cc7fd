"""A user's own file: what the protocol reads from it, and how its mistakes are told."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file

from motte import zoo
from motte.capture.graph import Dim
from motte.capture.signature import ImagePreprocessing
from motte.errors import InputError, MotteError
from motte.zoo.own_models import is_path, parse_shape
from motte.zoo.weights import WeightsChoice

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)
        def forward(self, x, scale=None):
            y = self.fc(x)
            return y if scale is None else y * scale

    def make():
        return Net()
"""


def write(folder: Path, text: str, base: str = MODEL) -> str:
    path = folder / "mine.py"
    path.write_text(dedent(base) + dedent(text))
    return f"{path}:make"


def test_the_smallest_file_with_a_shape(tmp_path: Path) -> None:
    built = zoo.build(write(tmp_path, ""), input_shape="6")
    assert built.name == "mine.make"
    assert not built.model.training
    assert built.signature.weights_origin == "file"
    assert built.signature.labels == ()
    assert built.signature.preprocessing is None
    assert [tuple(value.shape) for value in built.example_args] == [(2, 6)]
    assert built.dims == {"x": {0: Dim("batch", 1, 1024)}}
    assert not built.example_kwargs


def test_all_companions_are_read(tmp_path: Path) -> None:
    text = """
    labels = ["a", "b", "c"]
    preprocessing = {"kind": "image", "colour": "grey", "resize": 0, "crop": 6, "interpolation": "bilinear",
                     "mean": (0.5,), "std": [0.25]}
    dims = {"x": {0: "rows"}}
    dim_ranges = {"rows": [1, 9]}
    def example_inputs():
        return torch.ones(4, 6), torch.full((1,), 2.0)
    """
    built = zoo.build(write(tmp_path, text))
    assert built.signature.labels == ("a", "b", "c")
    assert built.signature.preprocessing == ImagePreprocessing("grey", 0, 6, "bilinear", (0.5,), (0.25,))
    assert built.dims == {"x": {0: Dim("rows", 1, 9)}}
    assert [tuple(value.shape) for value in built.example_args] == [(4, 6), (1,)]


def test_inputs_by_name(tmp_path: Path) -> None:
    text = "def example_inputs():\n    return {'scale': torch.ones(3, 1), 'x': torch.ones(3, 6)}\n"
    built = zoo.build(write(tmp_path, text))
    assert built.example_args == ()
    assert list(built.example_kwargs) == ["scale", "x"]
    assert set(built.dims) == {"x", "scale"}


@pytest.mark.parametrize(
    ("text", "shapes", "dynamic"),
    [
        ("def example_inputs(): return torch.ones(1, 6)", [(1, 6)], {"x"}),
        ("def example_inputs(): return torch.ones(5, 6)", [(5, 6)], {"x"}),
        ("def example_inputs(): return torch.ones(1, 6), torch.ones(1, 1)", [(1, 6), (1, 1)], {"x", "scale"}),
        ("def example_inputs(): return torch.ones(3, 6), torch.ones(2, 1)", [(3, 6), (2, 1)], set()),
        ("def example_inputs(): return torch.ones(3, 6), torch.tensor(2.0)", [(3, 6), ()], set()),
        ("dims = {}\ndef example_inputs(): return torch.ones(1, 6)", [(1, 6)], set()),
    ],
)
def test_the_batch_is_the_first_axis_where_all_inputs_share_it(
    tmp_path: Path, text: str, shapes: list[tuple[int, ...]], dynamic: set[str]
) -> None:
    built = zoo.build(write(tmp_path, text))
    assert [tuple(value.shape) for value in built.example_args] == shapes
    assert set(built.dims) == dynamic


def test_an_image_preprocessing_is_an_example(tmp_path: Path) -> None:
    base = MODEL + "    preprocessing = dict(kind='image', colour='rgb', resize=9, crop=8, interpolation='bicubic',"
    name = write(tmp_path, "", base + " mean=[0, 0, 0], std=[1, 1, 1])\n")
    assert [tuple(value.shape) for value in zoo.build(name).example_args] == [(2, 3, 8, 8)]


def test_weights_file_and_random_seed(tmp_path: Path) -> None:
    name = write(tmp_path, "")
    first = zoo.build(name, input_shape=(6,), weights=WeightsChoice(random_seed=1))
    again = zoo.build(name, input_shape=(6,), weights=WeightsChoice(random_seed=1))
    other = zoo.build(name, input_shape=(6,), weights=WeightsChoice(random_seed=2))
    assert first.signature.weights_origin == "random"
    assert torch.equal(first.model.fc.weight, again.model.fc.weight)  # type: ignore[union-attr]
    assert not torch.equal(first.model.fc.weight, other.model.fc.weight)  # type: ignore[union-attr]
    path = tmp_path / "w.safetensors"
    save_file(other.model.state_dict(), path)
    loaded = zoo.build(name, input_shape=(6,), weights=WeightsChoice(file=path))
    assert loaded.signature.weights_origin == "file"
    assert torch.equal(loaded.model.fc.weight, other.model.fc.weight)  # type: ignore[union-attr]


def test_neighbours_are_importable_and_the_path_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("SIZE = 6\n")
    text = "import neighbour_of_mine\ndef example_inputs(): return torch.ones(2, neighbour_of_mine.SIZE)\n"
    before = list(sys.path)
    assert zoo.build(write(tmp_path, text)).example_args[0].shape == (2, 6)
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def make(): raise KeyError('gone')", ["own code failed", "KeyError", "mine.py:15"]),
        ("import a_package_that_does_not_exist", ["own code failed", "ModuleNotFoundError", "mine.py:15"]),
        ("def broken(:", ["own code failed", "SyntaxError", "mine.py:15"]),
        ("raise SystemExit(3)", ["own code failed", "SystemExit"]),
        ("def make(): return 3", ["returned no nn.Module", "int"]),
        ("make = Net()", ["no factory", "Net"]),
        ("del make", ["no factory", "nothing"]),
        ("def make(x): return Net()", ["own code failed", "TypeError"]),
        ("example_inputs = 3", ["example_inputs is no function"]),
        ("def example_inputs(): return [1, 2]", ["example_inputs() returned something else", "int"]),
        ("def example_inputs(): return {}", ["example_inputs() returned something else"]),
        ("def example_inputs(): return {'z': torch.ones(2)}", ["do not fit forward()", "x, scale"]),
        ("def example_inputs(): return (torch.ones(2),) * 3", ["do not fit forward()"]),
        ("labels = 'abc'", ["labels is no list"]),
        ("labels = [1]", ["labels is no list"]),
        ("preprocessing = 'image'", ["preprocessing is no dict"]),
        ("preprocessing = {'kind': 'image'}", ["preprocessing", "colour"]),
        ("preprocessing = {'kind': 'sound'}", ["preprocessing", "image or text", "sound"]),
        ("", ["no example of an input"]),
        ("dims = 3\ndef example_inputs(): return torch.ones(2, 6)", ["dims is no dict"]),
        ("dims = {'y': {0: 'batch'}}\ndef example_inputs(): return torch.ones(2, 6)", ["dims names no input"]),
        ("dims = {'x': {2: 'batch'}}\ndef example_inputs(): return torch.ones(2, 6)", ["dims names no axis", "0 to 1"]),
        ("dims = {'x': {0: 'a b'}}\ndef example_inputs(): return torch.ones(2, 6)", ["not the name of a dimension"]),
        ("dim_ranges = {'n': (5, 2)}\ndef example_inputs(): return torch.ones(2, 6)", ["not the range of a dimension"]),
        ("dim_ranges = 3\ndef example_inputs(): return torch.ones(2, 6)", ["dim_ranges is no dict"]),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        zoo.build(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_two_examples_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two examples"):
        zoo.build(write(tmp_path, "def example_inputs(): return torch.ones(2, 6)"), input_shape=(6,))


def test_a_motte_error_of_the_users_code_passes_through(tmp_path: Path) -> None:
    text = "from motte.errors import ResourceError\ndef make(): raise ResourceError('no disk')\n"
    with pytest.raises(MotteError, match="no disk"):
        zoo.build(write(tmp_path, text))


@pytest.mark.parametrize("name", ["missing.py:make", "mine.py", "mine.py:", "mine.py:a-b", "mine.txt.py:1x"])
def test_names_that_are_no_model(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_path(name)
    with pytest.raises(InputError):
        zoo.build(name, input_shape=(1,))


@pytest.mark.parametrize(("text", "shape"), [("3,224,224", (3, 224, 224)), (" 7 ", (7,)), ("1, 2", (1, 2))])
def test_shapes_are_read(text: str, shape: tuple[int, ...]) -> None:
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "3,", "0", "-1", "3x4", "1e3", "²", "9" * 30, ",".join("1" * 16)])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_shape(text)
