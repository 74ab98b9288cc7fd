"""Tiny data sets in the published formats, written here byte by byte, and keys to seal them with."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motte.errors import MotteError
from motte.seal import RecipientPrivateKey, SignerPrivateKey
from motte.train.data import DataKeys, DataSet, open_data

Member = tuple[str, bytes]


class Makers:
    """Writers of small files; every one is seeded, so that two calls give the same bytes."""

    def idx(self, path: Path, values: np.ndarray[Any, Any]) -> None:
        header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))

    def digits(self, folder: Path, train: int = 40, test: int = 12, side: int = 28) -> None:
        rng = np.random.default_rng(1)
        for name, count in (("train", train), ("t10k", test)):
            images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
            self.idx(folder / f"{name}-images-idx3-ubyte.gz", images)
            self.idx(folder / f"{name}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))

    def cifar_records(self, count: int, *, label_bytes: int = 1, classes: int = 10, seed: int = 0) -> bytes:
        rng = np.random.default_rng(seed)
        table = rng.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
        table[:, label_bytes - 1] = np.arange(count) % classes
        return table.tobytes()

    def cifar10_members(self, each: int = 8) -> list[Member]:
        folder = "cifar-10-batches-bin/"
        members = [
            (f"{folder}data_batch_{number}.bin", self.cifar_records(each, seed=number)) for number in range(1, 6)
        ]
        return [
            *members,
            (f"{folder}test_batch.bin", self.cifar_records(each, seed=9)),
            (f"{folder}readme.html", b"hi"),
        ]

    def cifar10(self, folder: Path, each: int = 8) -> Path:
        return self.tar(folder / "cifar-10-binary.tar.gz", self.cifar10_members(each))

    def cifar100(self, folder: Path, count: int = 20) -> Path:
        members = [
            (f"cifar-100-binary/{name}.bin", self.cifar_records(count, label_bytes=2, classes=100, seed=seed))
            for seed, name in enumerate(("train", "test"))
        ]
        return self.tar(folder / "cifar-100-binary.tar.gz", members)

    def tar(self, path: Path, members: list[Member], change: Callable[[tarfile.TarInfo], None] | None = None) -> Path:
        """A .tar.gz; ``change`` may alter each header before it is written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(path, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if change is not None:
                    change(info)
                archive.addfile(info, io.BytesIO(data))
        return path

    def png(self, path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        bands = 1 if mode == "L" else len(mode)
        values = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
        Image.fromarray(values[..., 0] if bands == 1 else values).save(path)

    def photos(self, folder: Path, splits: dict[str, int], *, width: int = 10, height: int = 10) -> Path:
        """``splits``: name of the split ("" for none) -> photos of each of the classes cat, dog and owl."""
        for place, (split, count) in enumerate(splits.items()):
            for label, name in enumerate(("cat", "dog", "owl")):
                for number in range(count):
                    seed = 1000 * place + 100 * label + number
                    self.png(folder / split / name / f"{number:03}.png", width, height, seed)
        return folder


@dataclass(frozen=True)
class Keys:
    """An owner, whose data it is, and somebody else."""

    signer: SignerPrivateKey
    owner: RecipientPrivateKey
    stranger: RecipientPrivateKey

    def opening(self, **changes: Any) -> DataKeys:
        return DataKeys(**{"recipient": self.owner, "signer": self.signer.public, **changes})


@pytest.fixture
def makers() -> Makers:
    return Makers()


@pytest.fixture
def keys() -> Keys:
    return Keys(SignerPrivateKey.new(), RecipientPrivateKey.new(), RecipientPrivateKey.new())


@pytest.fixture
def tiny_cifar(tmp_path: Path, makers: Makers) -> DataSet:
    """40 training and 8 test images."""
    makers.cifar10(tmp_path / "tiny")
    return open_data("cifar10", data_dir=tmp_path / "tiny", seed=3)


@pytest.fixture
def refused() -> Callable[..., MotteError]:
    """Call something that must be refused; the error, whose text must fit a pattern."""

    def call(error: type[MotteError], match: str, function: Callable[..., Any], *args: Any, **named: Any) -> MotteError:
        with pytest.raises(error, match=match) as caught:
            function(*args, **named)
        return caught.value

    return call
