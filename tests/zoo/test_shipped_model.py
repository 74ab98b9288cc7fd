"""The shipped model: its files, its ten real images, and the path from a photo to a label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from motte import zoo
from motte.capture.graph import Size, TensorType, Value
from motte.capture.signature import ImagePreprocessing, from_json, to_json
from motte.errors import FormatError, ResourceError
from motte.run.answers import read_answers
from motte.run.inputs import read_inputs
from motte.zoo import shipped_models
from motte.zoo.resnet20 import ResNet20
from motte.zoo.weights import WeightsChoice, load_state, read_state

PIXELS = [Value("x", TensorType("f32", (Size("batch"), 1, 28, 28)))]


def test_the_facts_state_what_was_asked() -> None:
    facts = shipped_models.facts()
    assert facts.accuracy >= 0.92
    assert facts.test_images == 10_000
    assert len(facts.classes) == 10


def test_the_built_model_is_the_shipped_one() -> None:
    built = zoo.build("resnet20-fashion-mnist")
    assert built.signature.weights_origin == "shipped"
    assert built.signature.labels == shipped_models.facts().classes
    assert built.parameters == zoo.find("resnet20-fashion-mnist").parameters
    assert from_json(to_json(built.signature)) == built.signature
    assert not built.model.training
    assert built.signature.preprocessing == ImagePreprocessing("grey", 28, 28, "bilinear", (0.286,), (0.353,))
    reference = ResNet20().eval()
    file = shipped_models.folder() / "resnet20_fashion_mnist.safetensors"
    load_state(reference, read_state(file), where=str(file))
    with torch.inference_mode():
        assert torch.equal(built.model(*built.example_args), reference(*built.example_args))


def test_random_weights_say_so_and_differ() -> None:
    built = zoo.build("resnet20-fashion-mnist", weights=WeightsChoice(random_seed=3))
    assert built.signature.weights_origin == "random"
    shipped = zoo.build("resnet20-fashion-mnist").model.state_dict()
    assert not torch.equal(built.model.state_dict()["classifier.weight"], shipped["classifier.weight"])


def test_the_ten_images_are_real_test_images_one_of_each_class() -> None:
    images = shipped_models.images()
    assert [image.label for image in images] == list(range(10))
    assert [image.label_name for image in images] == list(shipped_models.facts().classes)
    for image in images:
        with Image.open(image.path) as opened:
            assert (opened.mode, opened.size) == ("L", (28, 28))


def test_photos_become_the_right_labels() -> None:
    built = zoo.build("resnet20-fashion-mnist")
    images = shipped_models.images()
    items = read_inputs([image.path for image in images], built.signature, PIXELS)
    arrays = [torch.from_numpy(item.arrays[0]) for item in items]
    with torch.inference_mode():
        logits = built.model(torch.cat(arrays)).numpy()
    answers = read_answers([logits], built.signature, [item.name for item in items], topk=3)
    right = [answer.top[0].index == image.label for answer, image in zip(answers, images, strict=True)]
    # The images were chosen before anyone looked at the answers: all ten need not be right, most must be.
    assert sum(right) >= 9


def test_a_folder_without_the_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_models, "folder", lambda: tmp_path)
    with pytest.raises(ResourceError, match="missing from this installation"):
        shipped_models.facts()
    (tmp_path / "resnet20_fashion_mnist.json").write_text('{"accuracy": 1}')
    with pytest.raises(FormatError, match="missing field"):
        shipped_models.facts()
