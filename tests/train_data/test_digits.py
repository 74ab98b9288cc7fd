"""MNIST and Fashion-MNIST from IDX files: tiny ones, wrong ones, and Debian's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motte.errors import InputError, SettingError
from motte.train.data import open_data
from motte.train.datasets import published
from motte.train.datasets.digits import read_digits

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_debian = pytest.mark.skipif(
    not (DEBIAN / "train-images-idx3-ubyte.gz").is_file(), reason=f"no {DEBIAN} (Debian: dataset-fashion-mnist)"
)


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
def test_the_files_are_found_where_others_put_them(tmp_path: Path, makers: Any, place: str) -> None:
    makers.digits(tmp_path / place)
    data = open_data("mnist", data_dir=tmp_path, seed=0)
    assert (len(data.train), len(data.test), data.shape) == (40, 12, (1, 28, 28))
    assert data.train.labels.tolist() == [number % 10 for number in range(40)]
    wanted = np.random.default_rng(1).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    assert np.array_equal(data.train.read(np.arange(40), None)[:, 0], wanted)
    assert "NOT the published bytes" in data.provenance


def test_digits_are_not_mirrored_and_clothes_are(tmp_path: Path, makers: Any) -> None:
    makers.digits(tmp_path)
    assert not open_data("mnist", data_dir=tmp_path, seed=0).flip
    assert open_data("fashion-mnist", data_dir=tmp_path, seed=0).flip


@pytest.mark.parametrize("size", [28, 32, 36, 20, 64])
def test_another_image_size_pads_or_resizes(tmp_path: Path, makers: Any, size: int) -> None:
    from PIL import Image

    makers.digits(tmp_path)
    native = open_data("mnist", data_dir=tmp_path, seed=0).test.read(np.arange(3), None)
    data = open_data("mnist", data_dir=tmp_path, seed=0, image_size=size)
    found = data.test.read(np.arange(3), None)
    assert data.shape == (1, size, size)
    assert found.shape == (3, 1, size, size)
    if 28 <= size <= 36:
        edge = (size - 28) // 2
        assert np.array_equal(found[:, :, edge : edge + 28, edge : edge + 28], native)
        assert int(found.astype(np.int64).sum()) == int(native.astype(np.int64).sum())
    else:
        wanted = Image.fromarray(native[1, 0]).resize((size, size), Image.Resampling.BILINEAR)
        assert np.array_equal(found[1, 0], np.asarray(wanted))


def test_a_missing_file_is_said_with_all_names(tmp_path: Path, makers: Any) -> None:
    makers.digits(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="not all there") as caught:
        open_data("fashion-mnist", data_dir=tmp_path, seed=0)
    assert "t10k-labels-idx1-ubyte.gz" in str(caught.value.expected)


def test_images_and_labels_must_fit(tmp_path: Path, makers: Any) -> None:
    def refuse(name: str, values: np.ndarray, message: str) -> None:
        makers.digits(tmp_path)
        makers.idx(tmp_path / name, values)
        with pytest.raises(InputError, match=message):
            read_digits(tmp_path)

    refuse("train-labels-idx1-ubyte.gz", np.zeros(39, np.uint8), "one label for each")
    refuse("train-labels-idx1-ubyte.gz", np.zeros((40, 1), np.uint8), "one label for each")
    refuse("t10k-labels-idx1-ubyte.gz", np.full(12, 10, np.uint8), "out of range")
    refuse("train-images-idx3-ubyte.gz", np.zeros((40, 28, 27), np.uint8), "not images of this set")
    refuse("train-images-idx3-ubyte.gz", np.zeros((0, 28, 28), np.uint8), "not images of this set")
    refuse("train-images-idx3-ubyte.gz", np.zeros(28 * 28, np.uint8), "not images of this set")


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer", "plain"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, makers: Any, damage: str) -> None:
    makers.digits(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    changed = {
        "cut": data[: len(data) // 2],
        "flipped": data[:5000] + bytes([data[5000] ^ 255]) + data[5001:],
        "longer": data + b"more",
        "plain": b"\0\0\x08\x03",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(InputError) as caught:
        read_digits(tmp_path)
    assert caught.value.where == str(path)


@needs_debian
def test_debians_fashion_mnist_is_the_published_one() -> None:
    data = open_data("fashion-mnist", seed=0)
    assert data.provenance == f"fashion-mnist from {DEBIAN}: the published bytes"
    assert (len(data.train), len(data.test), data.shape) == (60_000, 10_000, (1, 28, 28))
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    # The figures that everybody normalises with are those of the training images.
    pixels = data.train.read(np.arange(60_000), None).astype(np.float32) / 255
    assert data.mean[0] == pytest.approx(float(pixels.mean()), abs=5e-4)
    assert data.std[0] == pytest.approx(float(pixels.std()), abs=5e-4)


@needs_debian
def test_one_changed_byte_is_not_the_published_set(tmp_path: Path) -> None:
    import gzip
    import shutil

    for file in published.SETS["fashion-mnist"].files:
        shutil.copy(DEBIAN / file.name, tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] = (content[-1] + 1) % 10
    path.write_bytes(gzip.compress(bytes(content)))
    assert "NOT the published bytes" in open_data("fashion-mnist", data_dir=tmp_path, seed=0).provenance


@pytest.mark.parametrize(
    "change",
    [
        {"name": "cifar"},
        {"name": "folder:"},
        {"name": "mnist:/somewhere"},
        {"name": "folder"},
        {"name": ""},
        {"seed": -1},
        {"image_size": 0},
        {"image_size": 5000},
        {"memory_bytes": -1},
        {"name": "folder:/x", "data_dir": Path("/y")},
        {"name": "sealed:/x"},
        {"keys": object()},
    ],
)
def test_what_is_no_data_set_or_setting_is_refused(change: dict[str, Any]) -> None:
    given = {"name": "mnist", "seed": 0} | change
    with pytest.raises(SettingError):
        open_data(given.pop("name"), **given)
