"""Sealed data: the same batches as plain data, nothing of it in the file, and every way in which a file is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motte.errors import (
    BundleError,
    DecryptError,
    InputError,
    KeyAccessError,
    MotteError,
    RollbackError,
    SettingError,
    SignatureError,
)
from motte.limits import CHUNK_BYTES
from motte.seal import BytesPart, open_bundle, write_bundle
from motte.seal.manifest import loads as load_model
from motte.train.data import DataSet, open_data
from motte.train.datasets import sealed_layout
from motte.train.datasets.sealed_layout import SplitIndex, dumps, loads, read_index, secret_places
from motte.train.datasets.sealing import seal_data

SHARD = 1 * CHUNK_BYTES


def seal(path: Path, data: DataSet, keys: Any, **options: Any) -> Path:
    given = {"release": 4, "recipients": [keys.owner.public], "signer": keys.signer} | options
    seal_data(path, data, **given)
    return path


def open_sealed(path: Path, keys: Any, *, memory_bytes: int = 1 << 30, **more: Any) -> DataSet:
    opening = keys.opening(**{name: more.pop(name) for name in list(more) if name in KEY_OPTIONS})
    return open_data(f"sealed:{path}", seed=3, keys=opening, memory_bytes=memory_bytes, **more)


KEY_OPTIONS = {"recipient", "signer", "min_release", "verify_digests"}


def same_batches(first: DataSet, second: DataSet, **options: Any) -> bool:
    pairs = [
        (one, two)
        for split in ("train", "test")
        for one, two in zip(
            first.batches(split, batch_size=7, epoch=2, **options),  # type: ignore[arg-type]
            second.batches(split, batch_size=7, epoch=2, **options),  # type: ignore[arg-type]
            strict=True,
        )
    ]
    return len(pairs) > 2 and all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


@pytest.fixture
def big_cifar(tmp_path: Path, makers: Any) -> DataSet:
    """900 training images: 2.6 MiB, three shards of a chunk each."""
    makers.cifar10(tmp_path / "big", each=180)
    return open_data("cifar10", data_dir=tmp_path / "big", seed=3)


@pytest.fixture
def photos(tmp_path: Path, makers: Any) -> DataSet:
    """120 photos of 90 x 100: about 3 MiB; a third of them crosses no chunk, others do."""
    makers.photos(tmp_path / "photos", {"train": 40, "val": 2}, width=90, height=100)
    return open_data(f"folder:{tmp_path / 'photos'}", seed=3, image_size=24)


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
@pytest.mark.parametrize("shard_bytes", [SHARD, 32 << 30])
def test_pixels_give_the_same_batches_as_plain_data(
    tmp_path: Path, big_cifar: DataSet, keys: Any, memory_bytes: int, shard_bytes: int
) -> None:
    path = seal(tmp_path / "c.motte", big_cifar, keys, shard_bytes=shard_bytes, threads=2)
    with open_sealed(path, keys, memory_bytes=memory_bytes) as sealed:
        assert sealed.private
        assert (sealed.classes, sealed.shape, sealed.mean, sealed.std) == (
            big_cifar.classes, big_cifar.shape, big_cifar.mean, big_cifar.std,
        )  # fmt: skip
        assert same_batches(big_cifar, sealed)
        assert same_batches(big_cifar, sealed, workers=3)


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
@pytest.mark.parametrize("image_size", [24, 70])
def test_photos_give_the_same_batches_as_the_folder(
    tmp_path: Path, photos: DataSet, keys: Any, memory_bytes: int, image_size: int
) -> None:
    path = seal(tmp_path / "p.motte", photos, keys, shard_bytes=SHARD)
    plain = open_data(photos.name, seed=3, image_size=image_size)
    with open_sealed(path, keys, memory_bytes=memory_bytes, image_size=image_size) as sealed:
        assert same_batches(plain, sealed)
    with open_sealed(path, keys) as sealed:
        assert sealed.shape == (3, 24, 24), "what it was trained at when it was sealed"


def test_digits_and_their_padding_survive(tmp_path: Path, makers: Any, keys: Any) -> None:
    makers.digits(tmp_path / "d")
    plain = open_data("mnist", data_dir=tmp_path / "d", seed=3)
    path = seal(tmp_path / "m.motte", plain, keys)
    with open_sealed(path, keys) as sealed:
        assert (sealed.padding, sealed.flip) == (2, False)
        assert same_batches(plain, sealed)
    with open_sealed(path, keys, image_size=32) as sealed:
        assert same_batches(open_data("mnist", data_dir=tmp_path / "d", seed=3, image_size=32), sealed)


def test_nothing_of_the_plaintext_is_in_the_file(tmp_path: Path, makers: Any, keys: Any) -> None:
    root = makers.photos(tmp_path / "set", {"train": 3, "val": 2})
    (root / "train" / "owl").rename(root / "train" / "plantedclassname")
    (root / "val" / "owl").rename(root / "val" / "plantedclassname")
    data = open_data(f"folder:{root}", seed=3)
    content = seal(tmp_path / "s.motte", data, keys).read_bytes()
    for path in root.rglob("*.png"):
        photo = path.read_bytes()
        assert not any(photo[start : start + 12] in content for start in range(0, len(photo) - 12, 12))
    for planted in (b"plantedclassname", b"folder", b"photos", b"cat", b"PNG", b"IDAT", str(root).encode()):
        assert planted not in content
    cifar = makers.cifar10(tmp_path / "tiny")
    plain = open_data("cifar10", data_dir=cifar.parent, seed=3)
    content = seal(tmp_path / "t.motte", plain, keys).read_bytes()
    every = plain.train.read(np.arange(40), None)
    assert not any(every[row].tobytes()[:16] in content for row in range(40))
    assert plain.train.labels.astype("<u4").tobytes()[:16] not in content
    assert b"airplane" not in content


def test_the_order_in_the_file_is_secret_and_new_every_time(tmp_path: Path, big_cifar: DataSet, keys: Any) -> None:
    orders = []
    for name in ("a", "b"):
        path = seal(tmp_path / name, big_cifar, keys)
        with open_sealed(path, keys) as sealed:
            orders.append(sealed.train.pixels._places.tolist())  # type: ignore[attr-defined]
    assert sorted(orders[0]) == list(range(900))
    assert orders[0] != orders[1]
    # By class in the folder, mixed in the file: neighbours are of one class about one time in ten.
    by_place = big_cifar.train.labels[np.argsort(orders[0])]
    assert (by_place[1:] == by_place[:-1]).mean() < 0.2
    counts = np.zeros((4, 4))
    for _ in range(4000):
        counts[np.arange(4), secret_places(4)] += 1
    assert counts.min() > 800, "1,000 expected, standard deviation 27"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
def test_an_altered_byte_anywhere_is_refused(tmp_path: Path, big_cifar: DataSet, keys: Any, memory_bytes: int) -> None:
    path = seal(tmp_path / "c.motte", big_cifar, keys, shard_bytes=SHARD)
    good = path.read_bytes()
    with open_bundle(path, signer=keys.signer.public) as signed:
        starts = list(signed._offsets)
    for place in (9, 100, starts[0] - 1, *starts[:-1], *(start - 1 for start in starts[1:])):
        path.write_bytes(good)
        flip(path, place)
        with pytest.raises((BundleError, DecryptError, SignatureError)):
            read_everything(path, keys, memory_bytes)
    path.write_bytes(good[:-1])
    with pytest.raises(BundleError, match="cut off"):
        read_everything(path, keys, memory_bytes)
    path.write_bytes(good)
    read_everything(path, keys, memory_bytes)


def read_everything(path: Path, keys: Any, memory_bytes: int, **options: Any) -> None:
    with open_sealed(path, keys, memory_bytes=memory_bytes, **options) as sealed:
        for split in ("train", "test"):
            for _ in sealed.batches(split, batch_size=50):  # type: ignore[arg-type]
                pass


def test_altered_while_it_is_read(tmp_path: Path, big_cifar: DataSet, keys: Any) -> None:
    path = seal(tmp_path / "c.motte", big_cifar, keys, shard_bytes=SHARD)
    with open_sealed(path, keys, memory_bytes=0) as sealed, sealed.batches("train", batch_size=900) as batches:
        with open_bundle(path, signer=keys.signer.public) as signed:
            flip(path, signed._offsets[3] + 17)
        with pytest.raises(DecryptError) as caught:
            next(batches)
    assert caught.value.where is not None
    assert caught.value.where.startswith("part 3, chunk 0")


def test_a_recipient_who_forges_is_caught_only_when_digests_are_verified(
    tmp_path: Path, tiny_cifar: DataSet, keys: Any
) -> None:
    from motte.seal import primitives

    people = [keys.owner.public, keys.stranger.public]
    path = seal(tmp_path / "c.motte", tiny_cifar, keys, recipients=people)
    with open_bundle(path, signer=keys.signer.public) as signed:
        data_key = signed.data_keys(signed.unwrap(keys.stranger))[2]
        cipher = primitives.SectionCipher(data_key, bundle_id=signed.header.bundle_id, section=2)
        size, offset = signed.header.sections[2].plaintext_bytes, signed._offsets[2]
    forged = bytearray(size + primitives.TAG_BYTES)
    cipher.seal(0, True, memoryview(bytearray(size)), memoryview(forged))
    data = bytearray(path.read_bytes())
    data[offset : offset + len(forged)] = forged
    path.write_bytes(data)
    with open_sealed(path, keys) as sealed:
        assert not sealed.train.read(np.arange(40), None).any(), "the forgery opens"
    for memory_bytes in (1 << 30, 0):
        with pytest.raises(SignatureError):
            read_everything(path, keys, memory_bytes, verify_digests=True)


def test_other_keys_signers_and_releases_are_refused(tmp_path: Path, tiny_cifar: DataSet, keys: Any) -> None:
    from motte.seal import SignerPrivateKey

    path = seal(tmp_path / "c.motte", tiny_cifar, keys)
    with pytest.raises(SignatureError):
        open_sealed(path, keys, signer=SignerPrivateKey.new().public)
    with pytest.raises(KeyAccessError):
        open_sealed(path, keys, recipient=keys.stranger)
    with pytest.raises(RollbackError):
        open_sealed(path, keys, min_release=5)
    open_sealed(path, keys, min_release=4).close()
    with pytest.raises(SettingError, match="needs a key"):
        open_data(f"sealed:{path}", seed=0)
    with pytest.raises(InputError):
        open_sealed(tmp_path / "absent.motte", keys)


def test_a_model_is_refused_as_data_and_data_as_a_model(tmp_path: Path, tiny_cifar: DataSet, keys: Any) -> None:
    path = seal(tmp_path / "c.motte", tiny_cifar, keys)
    with open_bundle(path, signer=keys.signer.public) as signed:
        manifest = signed.unlock(signed.unwrap(keys.owner)).manifest()
    with pytest.raises(BundleError, match="holds something else") as caught:
        load_model(manifest)
    assert caught.value.check == "K-1"
    assert (caught.value.expected, caught.value.got) == ("a model", "a data set")
    assert caught.value.hint is not None
    assert "--data sealed:FILE" in caught.value.hint

    model = tmp_path / "model.motte"
    sealed_as(model, keys, b'{"graph":"","plan":"","signature":{},"version":1}')
    with pytest.raises(BundleError, match="holds something else") as caught:
        open_sealed(model, keys)
    assert (caught.value.expected, caught.value.got) == ("a data set", "a model")
    sealed_as(model, keys, b'{"kind":"checkpoint"}')
    with pytest.raises(BundleError, match="holds something else"):
        open_sealed(model, keys)
    sealed_as(model, keys, b'{"kind":["data"]}')
    with pytest.raises(BundleError, match="holds something else"):
        open_sealed(model, keys)


def test_a_worker_refuses_data_as_a_model(tmp_path: Path, tiny_cifar: DataSet, keys: Any) -> None:
    import motte

    path = seal(tmp_path / "c.motte", tiny_cifar, keys)
    with pytest.raises(MotteError, match="the sealed file holds something else"):
        motte.load(path, keys=keys.owner, signer=keys.signer.public)


def sealed_as(path: Path, keys: Any, manifest: bytes, parts: tuple[bytes, ...] = (b"x",)) -> None:
    write_bundle(
        path,
        release=1,
        manifest=manifest,
        parts=[BytesPart(each) for each in parts],
        recipients=[keys.owner.public],
        signer=keys.signer,
        overwrite=True,
    )


CHANGES: list[tuple[str, Any]] = [
    ("version", 2),
    ("form", "pickle"),
    ("shape", [3, 32]),
    ("shape", [3, 0, 32]),
    ("shape", [1, 32, 32]),
    ("mean", [0.1]),
    ("std", [0.1, 0.1, 0.0]),
    ("std", [0.1, 0.1, "0.1"]),
    ("std", []),
    ("shard_bytes", CHUNK_BYTES + 1),
    ("shard_bytes", 0),
    ("classes", []),
    ("classes", ["a\nb"]),
    ("classes", [1]),
    ("padding", -1),
    ("flip", 1),
    ("name", 5),
    ("splits", {"train": {"records": 40, "stored_bytes": 40 * 3072}}),
    ("splits", {"train": {"records": 0, "stored_bytes": 1}, "test": {"records": 1, "stored_bytes": 3072}}),
    ("splits", {"train": {"records": 41, "stored_bytes": 40 * 3072}, "test": {"records": 1, "stored_bytes": 3072}}),
    ("extra", 1),
]


@pytest.mark.parametrize(("field", "value"), CHANGES)
def test_a_manifest_that_breaks_a_rule_is_refused(
    tmp_path: Path, tiny_cifar: DataSet, keys: Any, field: str, value: Any
) -> None:
    import json

    path = seal(tmp_path / "c.motte", tiny_cifar, keys)
    with open_bundle(path, signer=keys.signer.public) as signed:
        manifest = signed.unlock(signed.unwrap(keys.owner)).manifest()
    assert dumps(loads(manifest)) == manifest
    changed = json.dumps(json.loads(manifest) | {field: value}).encode()
    with pytest.raises(BundleError) as caught:
        loads(changed)
    assert caught.value.check == "D-1"


@pytest.mark.parametrize("sizes", [(), (1,), (320, 40 * 3072), (320, 40 * 3072, 64, 8 * 3072 + 1)])
def test_parts_of_another_size_than_the_manifest_says_are_refused(
    tmp_path: Path, tiny_cifar: DataSet, keys: Any, sizes: tuple[int, ...]
) -> None:
    path = seal(tmp_path / "c.motte", tiny_cifar, keys)
    with open_bundle(path, signer=keys.signer.public) as signed:
        manifest = signed.unlock(signed.unwrap(keys.owner)).manifest()
    sealed_as(path, keys, manifest, tuple(bytes(size) for size in sizes) or (b"",))
    with pytest.raises(BundleError) as caught:
        open_sealed(path, keys)
    assert caught.value.check == "D-2"


def changed_index(change: Callable[[SplitIndex], None], photos: bool) -> bytes:
    offsets = np.array([0, 3, 3, 9], dtype=np.int64) if photos else None
    index = SplitIndex(np.array([0, 1, 1]), np.array([2, 0, 1]), offsets)
    change(index)
    return index.encode()


@pytest.mark.parametrize(
    ("photos", "change"),
    [
        (False, lambda index: index.labels.__setitem__(0, 2)),
        (False, lambda index: index.places.__setitem__(0, 1)),
        (False, lambda index: index.places.__setitem__(0, 3)),
        (True, lambda index: index.offsets.__setitem__(0, 1)),
        (True, lambda index: index.offsets.__setitem__(1, 4)),
        (True, lambda index: index.offsets.__setitem__(3, 8)),
        (True, lambda index: index.offsets.__setitem__(2, -1)),
    ],
)
def test_an_index_that_breaks_a_rule_is_refused(photos: bool, change: Callable[[SplitIndex], None]) -> None:
    split = sealed_layout.SplitLayout(3, 9)
    form: sealed_layout.Form = "photos" if photos else "pixels"
    manifest = sealed_layout.DataManifest(
        "x", ("a", "b"), form, (3, 1, 1), (0.0,) * 3, (1.0,) * 3, 0, False, SHARD, split, split
    )
    good = read_index(changed_index(lambda index: None, photos), manifest, split, where="here")
    assert good.labels.tolist() == [0, 1, 1]
    assert good.places.tolist() == [2, 0, 1]
    with pytest.raises(BundleError) as caught:
        read_index(changed_index(change, photos), manifest, split, where="here")
    assert caught.value.check == "D-3"


def test_nothing_half_written_remains(tmp_path: Path, photos: DataSet, keys: Any) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    last = max((tmp_path / "photos" / "train").rglob("*.png"))
    last.write_bytes(b"not a photo" + last.read_bytes()[11:])
    with pytest.raises(InputError, match="not a readable photo") as caught:
        seal(folder / "p.motte", photos, keys)
    assert caught.value.where == str(last)
    last.unlink()
    with pytest.raises(InputError, match="cannot read the photo"):
        seal(folder / "p.motte", photos, keys)
    makers_bytes = (tmp_path / "photos" / "train" / "cat" / "000.png").read_bytes()
    last.write_bytes(makers_bytes)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal(folder / "p.motte", photos, keys, progress=interrupt)
    assert list(folder.iterdir()) == []
    path = seal(folder / "p.motte", photos, keys)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        seal(path, photos, keys)
    with pytest.raises(KeyboardInterrupt):
        seal(path, photos, keys, overwrite=True, progress=interrupt)
    assert path.read_bytes() == before
    assert list(folder.iterdir()) == [path]


def test_a_photo_that_changes_while_it_is_sealed_is_refused(tmp_path: Path, photos: DataSet, keys: Any) -> None:
    grown = sorted((tmp_path / "photos" / "train").rglob("*.png"))[7]

    def grow(count: int) -> None:
        with grown.open("ab") as file:
            file.write(b"more")

    with pytest.raises(InputError, match="changed while it was sealed"):
        seal(tmp_path / "p.motte", photos, keys, progress=grow, threads=1)


def test_what_cannot_be_sealed_is_refused(tmp_path: Path, tiny_cifar: DataSet, keys: Any) -> None:
    path = seal(tmp_path / "c.motte", tiny_cifar, keys)
    with open_sealed(path, keys) as sealed, pytest.raises(InputError, match="sealed already"):
        seal(tmp_path / "again.motte", sealed, keys)
    resized = open_data("cifar10", data_dir=tmp_path / "tiny", seed=3, image_size=64)
    with pytest.raises(InputError, match="resized data"):
        seal(tmp_path / "r.motte", resized, keys)
    with pytest.raises(SettingError, match="size of shards"):
        seal(tmp_path / "s.motte", tiny_cifar, keys, shard_bytes=CHUNK_BYTES + 1)
    with pytest.raises(InputError, match="recipients"):
        seal(tmp_path / "n.motte", tiny_cifar, keys, recipients=[])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c.motte", "tiny"]


def test_memory_stays_bounded_when_the_data_does_not_fit(tmp_path: Path, makers: Any, keys: Any) -> None:
    makers.cifar10(tmp_path / "big", each=1400)  # 20.5 MiB of training images
    path = seal(tmp_path / "c.motte", open_data("cifar10", data_dir=tmp_path / "big", seed=3), keys)

    def peak(memory_bytes: int) -> int:
        tracemalloc.start()
        with open_sealed(path, keys, memory_bytes=memory_bytes) as sealed:
            for number, _ in enumerate(sealed.batches("train", batch_size=32)):
                if number == 10:
                    break
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(6 * CHUNK_BYTES) < 10 * CHUNK_BYTES
    assert peak(1 << 30) > 20 * CHUNK_BYTES


def test_only_the_chunks_that_are_asked_for_are_opened(
    tmp_path: Path, big_cifar: DataSet, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motte.seal.reader import UnlockedBundle

    opened: list[tuple[int, int]] = []
    plain = UnlockedBundle.open_part_chunk

    def watched(self: UnlockedBundle, index: int, chunk: int) -> bytes:
        opened.append((index, chunk))
        return plain(self, index, chunk)

    monkeypatch.setattr(UnlockedBundle, "open_part_chunk", watched)
    path = seal(tmp_path / "c.motte", big_cifar, keys, shard_bytes=SHARD)
    with open_sealed(path, keys, memory_bytes=0) as sealed:
        assert opened == []
        sealed.train.read(np.arange(1), None)
        assert 1 <= len(opened) <= 2
        opened.clear()
        sealed.train.read(np.arange(900), None)
        assert sorted(set(opened)) == sorted(opened), "each once: records are read in the order of their places"
        assert {index for index, _ in opened} <= {1, 2, 3}


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
def test_closed_data_gives_nothing(tmp_path: Path, big_cifar: DataSet, keys: Any, memory_bytes: int) -> None:
    path = seal(tmp_path / "c.motte", big_cifar, keys)
    sealed = open_sealed(path, keys, memory_bytes=memory_bytes)
    sealed.train.read(np.arange(3), None)
    sealed.close()
    sealed.close()
    with pytest.raises(InputError, match="closed"):
        sealed.train.read(np.arange(3), None)


def test_parts_are_opened_by_chunk_as_they_are_opened_whole(tmp_path: Path, keys: Any) -> None:
    rng = np.random.default_rng(0)
    parts = (rng.bytes(2 * CHUNK_BYTES + 5), b"", rng.bytes(CHUNK_BYTES))
    path = tmp_path / "x.motte"
    sealed_as(path, keys, b"{}", parts)
    with open_bundle(path, signer=keys.signer.public) as signed:
        bundle = signed.unlock(signed.unwrap(keys.owner))
        for index, part in enumerate(parts):
            chunks = range(max(1, -(-len(part) // CHUNK_BYTES)))
            assert b"".join(bundle.open_part_chunk(index, chunk) for chunk in chunks) == part
            with pytest.raises(InputError, match="no such chunk"):
                bundle.open_part_chunk(index, len(chunks))
        with pytest.raises(InputError, match="no such part"):
            bundle.open_part_chunk(3, 0)
        with pytest.raises(InputError, match="no such chunk"):
            bundle.open_part_chunk(0, -1)
