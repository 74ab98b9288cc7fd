"""docs/zoo.md and docs/model_card.md say what the code does: the table, the example, the figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from motte import zoo
from motte.capture.signature import ImagePreprocessing
from motte.limits import MAX_IMAGE_PIXELS
from motte.zoo import shipped_models

DOCS = Path(__file__).resolve().parents[2] / "docs"
ZOO = (DOCS / "zoo.md").read_text(encoding="utf-8")
CARD = (DOCS / "model_card.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", ZOO, re.DOTALL)


def test_the_table_is_the_registry() -> None:
    rows = [
        f"| `{e.name}` | {e.family} | {e.parameters:,} | {e.input} | {e.weights} |"
        for e in zoo.list_models()
        if e.parameters is not None
    ]
    assert len(rows) == len(zoo.list_models())
    assert "\n".join(rows) in ZOO


def test_the_example_builds_captures_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, door = blocks("python")
    (tmp_path / "my_model.py").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(door, "docs/zoo.md", "exec"), names)
    built, captured = names["built"], names["captured"]
    assert isinstance(built, zoo.BuiltModel)
    assert built.signature.labels == ("cat", "dog", "neither")
    assert isinstance(built.signature.preprocessing, ImagePreprocessing)
    assert built.signature.preprocessing.crop == 32
    (dim,) = captured.graph.dims  # type: ignore[attr-defined]
    assert (dim.name, dim.low, dim.high) == ("batch", 1, 64)
    with torch.inference_mode():
        assert built.model(*built.example_args).shape == (2, 3)


def test_the_example_loads_the_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(blocks("python")[0], encoding="utf-8")
    name = f"{tmp_path / 'my_model.py'}:make"
    state = zoo.build(name, weights=zoo.WeightsChoice(random_seed=1)).model.state_dict()
    torch.save(state, tmp_path / "my_weights.pt")
    again = zoo.build(name)
    assert again.signature.weights_origin == "file"
    assert torch.equal(again.model.state_dict()["classifier.weight"], state["classifier.weight"])


def test_the_documented_text_preprocessing_is_accepted(tmp_path: Path) -> None:
    (text,) = re.findall(r'`(\{"kind": "text".*?\})`', ZOO)
    code = f"import torch\nTEXT = '{{}}'\npreprocessing = {text}\ndef make(): return torch.nn.Linear(2, 2)\n"
    (tmp_path / "own.py").write_text(code)
    built = zoo.build(f"{tmp_path / 'own.py'}:make", input_shape="2")
    assert built.signature.preprocessing is not None
    assert built.signature.preprocessing.max_tokens == 256  # type: ignore[union-attr]


def test_the_bound_on_pixels_is_the_real_one() -> None:
    assert f"more than {MAX_IMAGE_PIXELS:,} pixels" in ZOO


def test_the_model_card_states_the_recorded_facts() -> None:
    facts = shipped_models.facts()
    assert (
        f"**{100 * facts.accuracy:.2f} %** ({round(facts.accuracy * facts.test_images)} of {facts.test_images:,}"
        in CARD
    )
    assert f"--epochs {facts.epochs} --seed {facts.seed}" in CARD
    assert f"torch {facts.torch}" in CARD
    assert f"batch {facts.batch_size}" in CARD
    assert f"minus {facts.mean:.4f}, divided by {facts.std:.4f}" in CARD
    assert ", ".join(facts.classes) in CARD
    parameters = zoo.find("resnet20-fashion-mnist").parameters
    assert parameters is not None
    assert f"{parameters:,}, float32" in CARD
    assert (shipped_models.folder() / "LICENSE-fashion-mnist.txt").is_file()
