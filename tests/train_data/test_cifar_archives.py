"""CIFAR's binary archives: read as the format says, and every way in which an archive can be wrong."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motte.errors import InputError
from motte.train.data import open_data
from motte.train.datasets import cifar
from motte.train.datasets.cifar import LAYOUTS, read_cifar

CIFAR10 = LAYOUTS["cifar10"]
FIRST = "cifar-10-batches-bin/data_batch_1.bin"


def slow_records(data: bytes, label_bytes: int) -> list[tuple[int, np.ndarray]]:
    """Record by record, pixel by pixel."""
    found = []
    for start in range(0, len(data), label_bytes + 3072):
        image = np.zeros((3, 32, 32), dtype=np.uint8)
        for place in range(3072):
            image[place // 1024, place % 1024 // 32, place % 32] = data[start + label_bytes + place]
        found.append((data[start + label_bytes - 1], image))
    return found


def test_cifar10_in_the_order_of_its_files(tmp_path: Path, makers: Any) -> None:
    (images, labels), (test_images, test_labels) = read_cifar(makers.cifar10(tmp_path, each=3), CIFAR10)
    members = dict(makers.cifar10_members(3))
    wanted = [
        record for number in range(1, 6)
        for record in slow_records(members[f"cifar-10-batches-bin/data_batch_{number}.bin"], 1)
    ]  # fmt: skip
    assert labels.tolist() == [label for label, _ in wanted]
    assert np.array_equal(images, np.stack([image for _, image in wanted]))
    assert images.dtype == np.uint8
    wanted = slow_records(members["cifar-10-batches-bin/test_batch.bin"], 1)
    assert test_labels.tolist() == [label for label, _ in wanted]
    assert np.array_equal(test_images, np.stack([image for _, image in wanted]))


def test_cifar100_takes_the_fine_label(tmp_path: Path, makers: Any) -> None:
    data = open_data("cifar100", data_dir=makers.cifar100(tmp_path, 120).parent, seed=0)
    assert data.train.labels.tolist() == [number % 100 for number in range(120)]
    assert len(set(data.classes)) == 100
    wanted = slow_records(makers.cifar_records(120, label_bytes=2, classes=100, seed=0), 2)
    found = data.train.read(np.arange(120), None)
    assert np.array_equal(found, np.stack([image for _, image in wanted]))


def test_nothing_is_written_and_other_members_are_passed_over(tmp_path: Path, makers: Any) -> None:
    hostile = [("../outside", b"x"), ("/tmp/absolute-motte", b"x"), ("cifar-10-batches-bin/../../up", b"x")]
    path = makers.tar(tmp_path / "in" / "a.tar.gz", [*hostile, *makers.cifar10_members(1)])
    before = sorted(path for path in tmp_path.rglob("*"))
    (_, labels), _ = read_cifar(path, CIFAR10)
    assert len(labels) == 5
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert not Path("/tmp/absolute-motte").exists()


@pytest.mark.parametrize("name", ["./" + FIRST, "/" + FIRST, "x/../" + FIRST, "data_batch_1.bin"])
def test_a_name_that_is_not_exactly_the_published_one_does_not_count(tmp_path: Path, makers: Any, name: str) -> None:
    members = makers.cifar10_members(1)
    path = makers.tar(tmp_path / "a.tar.gz", [(name, members[0][1]), *members[1:]])
    with pytest.raises(InputError, match="missing from the archive") as caught:
        read_cifar(path, CIFAR10)
    assert caught.value.expected == FIRST


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_link_or_anything_else_than_a_file_is_refused(tmp_path: Path, makers: Any, kind: bytes) -> None:
    def change(info: tarfile.TarInfo) -> None:
        if info.name == FIRST:
            info.type, info.linkname = kind, "/etc/hostname"
            info.size = 0

    path = makers.tar(tmp_path / "a.tar.gz", makers.cifar10_members(1), change)
    with pytest.raises(InputError, match="not a regular file"):
        read_cifar(path, CIFAR10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole number of records"),
        (bytes(3072), "not a whole number of records"),
        (bytes(3074), "not a whole number of records"),
        (b"\x0a" + bytes(3072), "label is out of range"),
    ],
    ids=["empty", "short", "long", "label 10"],
)
def test_records_that_are_none_are_refused(tmp_path: Path, makers: Any, data: bytes, message: str) -> None:
    path = makers.tar(tmp_path / "a.tar.gz", [(FIRST, data), *makers.cifar10_members(1)[1:]])
    with pytest.raises(InputError, match=message):
        read_cifar(path, CIFAR10)


def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, makers: Any) -> None:
    members = makers.cifar10_members(1)
    with pytest.raises(InputError, match="twice"):
        read_cifar(makers.tar(tmp_path / "a.tar.gz", [members[0], *members]), CIFAR10)


def test_more_records_than_published_are_refused_before_they_are_read(tmp_path: Path, makers: Any) -> None:
    claimed = 10_001 * 3073

    def change(info: tarfile.TarInfo) -> None:
        if info.name == FIRST:
            info.size = claimed

    members = makers.cifar10_members(1)
    path = tmp_path / "a.tar.gz"
    info = tarfile.TarInfo(FIRST)
    info.size = claimed
    path.write_bytes(gzip.compress(info.tobuf() + members[0][1]))  # the header lies: hardly anything follows
    with pytest.raises(InputError, match="not a whole number of records") as caught:
        read_cifar(path, CIFAR10)
    assert caught.value.got == f"{claimed} bytes"


def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, makers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = makers.tar(tmp_path / "a.tar.gz", [("padding", bytes(3 << 20)), *makers.cifar10_members(1)])
    assert path.stat().st_size < 200_000, "a small file"
    read_cifar(path, CIFAR10)
    monkeypatch.setattr(cifar, "_MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(InputError, match="too large"):
        read_cifar(path, CIFAR10)


def test_a_huge_extended_header_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 7 << 30
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf() + bytes(2 << 20)))
    monkeypatch.setattr(cifar, "_MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(InputError, match="too large"):
        read_cifar(path, CIFAR10)


def test_too_many_members_are_refused(tmp_path: Path, makers: Any) -> None:
    members = [(f"x{number}", b"") for number in range(65)] + makers.cifar10_members(1)
    with pytest.raises(InputError, match="too many files"):
        read_cifar(makers.tar(tmp_path / "a.tar.gz", members), CIFAR10)


CUTS: list[Callable[[bytes], bytes]] = [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: b"",
    lambda data: gzip.compress(b"no tar" * 500),
    lambda data: b"not gzip" * 100,
    lambda data: data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :],
    lambda data: gzip.compress(gzip.decompress(data)[:5000]),
]


@pytest.mark.parametrize("cut", range(len(CUTS)))
def test_a_damaged_archive_is_one_clear_error(tmp_path: Path, makers: Any, cut: int) -> None:
    path = makers.cifar10(tmp_path)
    path.write_bytes(CUTS[cut](path.read_bytes()))
    with pytest.raises(InputError) as caught:
        read_cifar(path, CIFAR10)
    assert str(path) in str(caught.value.where)


def test_bytes_that_are_not_the_published_ones_are_said(tmp_path: Path, makers: Any) -> None:
    data = open_data("cifar10", data_dir=makers.cifar10(tmp_path).parent, seed=0)
    assert "NOT the published bytes" in data.provenance
