"""Photos in folders: classes, splits, sizes, what is refused, and the transforms against torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motte.errors import InputError, MotteError
from motte.limits import MAX_IMAGE_PIXELS
from motte.train.augment import Draws
from motte.train.data import open_data
from motte.train.datasets.folder import read_folder


def test_train_and_val_folders(tmp_path: Path, makers: Any) -> None:
    makers.photos(tmp_path, {"train": 3, "val": 2})
    data = open_data(f"folder:{tmp_path}", seed=0)
    assert data.classes == ("cat", "dog", "owl")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.shape == (3, 10, 10), "small squares all alike are taken as they are"
    assert not data.private
    with Image.open(tmp_path / "val" / "dog" / "001.png") as photo:
        wanted = np.asarray(photo).transpose(2, 0, 1)
    assert np.array_equal(data.test.read(np.array([3]), None)[0], wanted)


def test_a_split_by_the_seed_is_of_each_class_and_repeatable(tmp_path: Path, makers: Any) -> None:
    makers.photos(tmp_path, {"": 20})
    first, again = (read_folder(tmp_path, seed=4, need_splits=False) for _ in range(2))
    other = read_folder(tmp_path, seed=5, need_splits=False)
    assert np.bincount(first.test.labels).tolist() == [2, 2, 2]
    assert np.bincount(first.train.labels).tolist() == [18, 18, 18]
    assert first.test.names == again.test.names
    assert first.test.names != other.test.names
    both = [photos.where(row) for photos in (first.train, first.test) for row in range(len(photos.names))]
    assert sorted(both) == sorted(str(path) for path in tmp_path.rglob("*.png"))


def test_photos_of_different_sizes_train_at_224_unless_asked(tmp_path: Path, makers: Any) -> None:
    makers.photos(tmp_path, {"train": 2, "val": 1}, width=30, height=20)
    assert open_data(f"folder:{tmp_path}", seed=0).shape == (3, 224, 224)
    assert open_data(f"folder:{tmp_path}", seed=0, image_size=16).shape == (3, 16, 16)
    makers.photos(tmp_path / "imagenet", {"train": 1, "val": 1})
    assert open_data(f"imagenet:{tmp_path / 'imagenet'}", seed=0).shape == (3, 224, 224)


@pytest.mark.parametrize(("size", "width", "height"), [(80, 100, 130), (80, 60, 60), (24, 50, 31), (32, 32, 32)])
def test_evaluation_is_resize_and_centre_crop_as_torchvision_does_it(
    tmp_path: Path, makers: Any, size: int, width: int, height: int
) -> None:
    from motte.zoo import vision_ops

    vision_ops.import_torchvision()
    from torchvision.transforms import InterpolationMode, functional

    makers.photos(tmp_path, {"train": 1, "val": 1}, width=width, height=height)
    data = open_data(f"folder:{tmp_path}", seed=0, image_size=size)
    with Image.open(tmp_path / "val" / "cat" / "000.png") as photo:
        short = round(size * 256 / 224) if size > 64 else size
        resized = functional.resize(photo, short, InterpolationMode.BILINEAR)
        wanted = np.asarray(functional.center_crop(resized, [size, size])).transpose(2, 0, 1)
    assert np.array_equal(data.test.read(np.array([0]), None)[0], wanted)


def test_training_photos_are_augmented_by_seed_epoch_and_index_alone(tmp_path: Path, makers: Any) -> None:
    makers.photos(tmp_path, {"train": 4, "val": 1}, width=90, height=80)
    for size in (70, 24):
        train = open_data(f"folder:{tmp_path}", seed=0, image_size=size).train
        every = np.arange(12)
        together = train.read(every, Draws(1, 0, every))
        alone = np.concatenate([train.read(every[[row]], Draws(1, 0, every[[row]])) for row in range(12)])
        assert np.array_equal(together, alone)
        assert not np.array_equal(together, train.read(every, Draws(1, 1, every)))
        assert not np.array_equal(together, train.read(every, None))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_colours_become_rgb(tmp_path: Path, makers: Any, mode: str) -> None:
    makers.photos(tmp_path, {"train": 1, "val": 1})
    with Image.open(tmp_path / "val" / "cat" / "000.png") as photo:
        changed = photo.convert(mode)
    changed.save(tmp_path / "val" / "cat" / "000.png")
    data = open_data(f"folder:{tmp_path}", seed=0)
    assert np.array_equal(data.test.read(np.array([0]), None)[0], np.asarray(changed.convert("RGB")).transpose(2, 0, 1))


def refusal(path: Path, kind: str = "folder") -> MotteError:
    with pytest.raises(InputError) as caught:
        open_data(f"{kind}:{path}", seed=0)
    return caught.value


def test_what_is_no_data_set_is_refused(tmp_path: Path, makers: Any) -> None:
    assert "no such folder" in refusal(tmp_path / "absent").message
    (tmp_path / "empty").mkdir()
    assert "no folders of classes" in refusal(tmp_path / "empty").message
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    assert "no photos" in refusal(tmp_path / "hollow").message
    makers.photos(tmp_path / "one", {"": 1})
    assert "too few photos" in refusal(tmp_path / "one").message
    makers.photos(tmp_path / "trained", {"train": 1})
    assert "without val/" in refusal(tmp_path / "trained").message
    makers.photos(tmp_path / "three", {"train": 1, "val": 1, "test": 1})
    assert "both val/ and test/" in refusal(tmp_path / "three").message
    makers.photos(tmp_path / "flat", {"": 3})
    assert "ImageNet's layout" in refusal(tmp_path / "flat", "imagenet").message


def test_strays_are_refused_and_hidden_files_passed_over(tmp_path: Path, makers: Any) -> None:
    root = makers.photos(tmp_path / "set", {"train": 2, "val": 1})
    (root / "train" / ".DS_Store").write_text("x")
    (root / "train" / "cat" / ".thumbnail.png").write_text("x")
    assert len(open_data(f"folder:{root}", seed=0).train) == 6
    (root / "train" / "cat" / "notes.txt").write_text("x")
    assert "not a photo" in refusal(root).message
    (root / "train" / "cat" / "notes.txt").unlink()
    (root / "train" / "stray.png").write_text("x")
    assert "not a folder of a class" in refusal(root).message
    (root / "train" / "stray.png").unlink()
    makers.png(root / "val" / "newt" / "000.png", 8, 8, 0)
    problem = refusal(root)
    assert "training has not" in problem.message
    assert problem.got == "newt"


def test_a_class_that_is_not_tested_is_no_error(tmp_path: Path, makers: Any) -> None:
    import shutil

    root = makers.photos(tmp_path, {"train": 2, "val": 1})
    shutil.rmtree(root / "val" / "dog")
    assert open_data(f"folder:{root}", seed=0).test.labels.tolist() == [0, 2]


def test_photos_that_are_none_are_refused_by_name(tmp_path: Path, makers: Any) -> None:
    root = makers.photos(tmp_path, {"train": 40, "val": 1})
    broken = root / "train" / "owl" / "039.png"
    data = open_data(f"folder:{root}", seed=0)
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match="not a readable photo") as caught:
        data.train.read(np.array([119]), None)
    assert caught.value.where == str(broken)
    broken.unlink()
    with pytest.raises(InputError, match="cannot read the photo"):
        data.train.read(np.array([119]), None)


def test_a_photo_beyond_the_pixel_bound_is_refused_before_it_is_decoded(tmp_path: Path, makers: Any) -> None:
    import struct
    import zlib

    root = makers.photos(tmp_path, {"train": 40, "val": 1})
    side = 1 << 14
    assert side * side > MAX_IMAGE_PIXELS
    pieces = [b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    chunks = [struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece)) for piece in pieces]
    (root / "train" / "owl" / "039.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(InputError, match="photo too large"):
        open_data(f"folder:{root}", seed=0).train.read(np.array([119]), None)


def test_the_folder_says_that_the_host_reads_it(tmp_path: Path, makers: Any) -> None:
    makers.photos(tmp_path, {"train": 1, "val": 1})
    assert "private data is sealed first" in open_data(f"folder:{tmp_path}", seed=0).provenance
