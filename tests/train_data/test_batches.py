"""Batches: one order for every way of making them, resumable anywhere, in shards, on threads, normalised."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from motte.errors import InputError, SettingError
from motte.train.augment import Draws, order
from motte.train.data import Batch, DataSet
from motte.train.datasets.batches import Batches


def gather(batches: Batches) -> list[Batch]:
    return list(batches)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_a_pass_is_the_slow_obvious_one(tiny_cifar: DataSet) -> None:
    torchvision_mean = torch.tensor(tiny_cifar.mean)[:, None, None]
    torchvision_std = torch.tensor(tiny_cifar.std)[:, None, None]
    batches = tiny_cifar.batches("train", batch_size=7, epoch=2)
    assert len(batches) == 6
    wanted_order = order(3, 2, 40)
    for number, (images, labels, indices) in enumerate(batches):
        wanted = wanted_order[7 * number : 7 * number + 7]
        assert indices.tolist() == wanted.tolist()
        assert labels.tolist() == tiny_cifar.train.labels[wanted].tolist()
        raw = torch.from_numpy(tiny_cifar.train.read(wanted, Draws(3, 2, wanted)))
        assert torch.equal(images, (raw.to(torch.float32) / 255 - torchvision_mean) / torchvision_std)
        assert (images.dtype, labels.dtype, indices.dtype) == (torch.float32, torch.int64, torch.int64)
        assert images.is_contiguous()
    assert number == 5
    assert len(labels) == 5


def test_every_record_once_and_the_test_split_as_it_is(tiny_cifar: DataSet) -> None:
    train = gather(tiny_cifar.batches("train", batch_size=16))
    assert sorted(index for batch in train for index in batch.indices.tolist()) == list(range(40))
    test = gather(tiny_cifar.batches("test", batch_size=3, epoch=5))
    assert [index for batch in test for index in batch.indices.tolist()] == list(range(8))
    assert same(test, gather(tiny_cifar.batches("test", batch_size=3, epoch=6)))


def test_epochs_and_seeds_differ_and_repeat(tiny_cifar: DataSet) -> None:
    first = gather(tiny_cifar.batches("train", batch_size=16, epoch=1))
    assert same(first, gather(tiny_cifar.batches("train", batch_size=16, epoch=1)))
    assert not same(first, gather(tiny_cifar.batches("train", batch_size=16, epoch=2)))


def test_nothing_of_torchs_or_numpys_generators_is_used(tiny_cifar: DataSet) -> None:
    first = gather(tiny_cifar.batches("train", batch_size=16))
    state, other = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(first, gather(tiny_cifar.batches("train", batch_size=16)))
    torch.random.set_rng_state(state)
    gather(tiny_cifar.batches("train", batch_size=16))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert other != np.random.get_state()[1].tolist()


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_goes_on_at_any_batch(tiny_cifar: DataSet, start: int, workers: int) -> None:
    whole = gather(tiny_cifar.batches("train", batch_size=7, epoch=1))
    rest = tiny_cifar.batches("train", batch_size=7, epoch=1, start=start, workers=workers)
    assert (len(rest), rest.position) == (6, start)
    assert same(gather(rest), whole[start:])
    assert rest.position == 6


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing_and_end(tiny_cifar: DataSet, workers: int) -> None:
    before = threading.active_count()
    plain = gather(tiny_cifar.batches("train", batch_size=4, epoch=3))
    assert same(plain, gather(tiny_cifar.batches("train", batch_size=4, epoch=3, workers=workers)))
    assert threading.active_count() == before
    with tiny_cifar.batches("train", batch_size=4, workers=workers) as left_early:
        next(left_early)
        assert threading.active_count() > before
    assert threading.active_count() == before
    assert list(left_early) == []


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_together_are_the_batch(tiny_cifar: DataSet, world: int) -> None:
    whole = gather(tiny_cifar.batches("train", batch_size=7, epoch=1))
    shards = [gather(tiny_cifar.batches("train", batch_size=7, epoch=1, shard=(rank, world))) for rank in range(world)]
    joined = [
        Batch(*(torch.cat([shard[number][field] for shard in shards]) for field in range(3)))
        for number in range(len(whole))
    ]
    assert same(joined, whole)
    assert max(len(batch.labels) for batch in shards[0]) - min(len(batch.labels) for batch in shards[0][:-1]) <= 1


def test_drop_last_and_no_augmentation(tiny_cifar: DataSet) -> None:
    dropped = gather(tiny_cifar.batches("train", batch_size=16, drop_last=True))
    assert [len(batch.labels) for batch in dropped] == [16, 16]
    plain = gather(tiny_cifar.batches("train", batch_size=16, augment=False))[0]
    raw = torch.from_numpy(tiny_cifar.train.read(plain.indices.numpy(), None)).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (tiny_cifar.mean, tiny_cifar.std))
    assert torch.equal(plain.images, (raw - mean) / std)
    assert not torch.equal(plain.images, dropped[0].images)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"batch_size": 2.0},
        {"start": -1},
        {"start": 11},
        {"workers": -1},
        {"workers": 1000},
        {"shard": (1, 1)},
        {"shard": (-1, 2)},
        {"shard": (0, 5)},
        {"epoch": -1},
    ],
)
def test_numbers_out_of_range_are_refused(tiny_cifar: DataSet, change: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        tiny_cifar.batches("train", **({"batch_size": 4} | change))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_record_ends_the_threads_and_not_the_pass(tiny_cifar: DataSet, workers: int) -> None:
    class Broken:
        broken = True

        shape, labels = tiny_cifar.shape, tiny_cifar.train.labels

        def __len__(self) -> int:
            return 40

        def read(self, indices: np.ndarray, draws: Draws | None) -> np.ndarray:
            if self.broken and len(set(indices.tolist()) & third) > 0:
                raise InputError("planted")
            return tiny_cifar.train.read(indices, draws)

    third = set(order(0, 0, 40)[8:12].tolist())
    before = threading.active_count()
    records = Broken()
    batches = Batches(
        records, mean=(0.5,) * 3, std=(0.5,) * 3, seed=0, epoch=0, batch_size=4, shuffle=True, augment=True,
        workers=workers,
    )  # fmt: skip
    next(batches)
    next(batches)
    for _ in range(2):
        with pytest.raises(InputError, match="planted"):
            next(batches)
        assert threading.active_count() == before
        assert batches.position == 2
    records.broken = False
    assert sum(len(batch.labels) for batch in batches) == 32, "the batch that failed is given, and all after it"
    assert threading.active_count() == before
