"""Batches in an order that follows from (seed, epoch) alone, from any batch on, on any number of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from motte.errors import SettingError
from motte.train.augment import Draws, order
from motte.train.datasets.records import Records

if TYPE_CHECKING:
    from torch import Tensor

MAX_WORKERS: Final = 256
MAX_BATCH: Final = 1 << 20


class Batch(NamedTuple):
    """One batch.

    ``images`` (B, C, H, W) float32, normalised; ``labels`` (B,) int64; ``indices`` (B,) int64, places in the split.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Batches:
    """The batches of one pass over a split, once. Batch ``k`` is the same wherever the pass starts.

    ``len()`` is the number of batches in the whole pass; ``position`` the number of the next one. With ``shard`` (rank,
    world) each process gets its own piece of every batch, and the pieces of a batch together are the batch. Use it in
    a ``with`` block, or :meth:`close` it, when a pass with ``workers`` is left early.

    Args:
        batch_size: of the whole batch, all shards together.
        shuffle: in the order of (seed, epoch); else in the order of the split.
        augment: with the draws of (seed, epoch, index).
        start: number of the first batch that is given.
        workers: threads that prepare batches ahead, at most two each; 0: none, everything happens in ``next()``.
        drop_last: leave out a last batch that is not full.

    Raises:
        SettingError: a number out of its range.
    """

    def __init__(
        self,
        records: Records,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        epoch: int,
        batch_size: int,
        shuffle: bool,
        augment: bool,
        start: int = 0,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> None:
        rank, world = shard
        _check_range("batch_size", batch_size, 1, MAX_BATCH)
        _check_range("workers", workers, 0, MAX_WORKERS)
        _check_range("world of a shard", world, 1, batch_size)
        _check_range("rank of a shard", rank, 0, world - 1)
        self._records, self._seed, self._epoch, self._augment = records, seed, epoch, augment
        self._batch_size, self._shard = batch_size, shard
        self._order = order(seed, epoch, len(records)) if shuffle else np.arange(len(records), dtype=np.int64)
        self._count = len(records) // batch_size if drop_last else -(-len(records) // batch_size)
        _check_range("start", start, 0, self._count)
        self._table = normalisation_table(mean, std)
        self.position = start
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[Batch]] = deque()
        self._asked = start

    def __len__(self) -> int:
        """Batches in the whole pass."""
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        """Itself: a pass is made once."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        if self.position >= self._count:
            self.close()
            raise StopIteration
        batch = self._make(self.position) if not self._workers else self._prefetched()
        self.position += 1
        return batch

    def _prefetched(self) -> Batch:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="motte-data")
        try:
            while self._asked < min(self._count, self.position + 2 * self._workers):
                self._ahead.append(self._pool.submit(self._make, self._asked))
                self._asked += 1
            return self._ahead.popleft().result()
        except BaseException:
            self._end_threads()  # the position stays: the same batch is tried again if it is asked for again
            raise

    def _make(self, number: int) -> Batch:
        import torch

        first, last = number * self._batch_size, min((number + 1) * self._batch_size, len(self._order))
        rank, world = self._shard
        low, high = first + (last - first) * rank // world, first + (last - first) * (rank + 1) // world
        indices = self._order[low:high]
        draws = Draws(self._seed, self._epoch, indices) if self._augment else None
        images = normalise(self._records.read(indices, draws), self._table)
        labels = self._records.labels[indices]
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(indices.copy()))

    def close(self) -> None:
        """End the threads, if there are any. No batch is given afterwards."""
        self.position = self._count
        self._end_threads()

    def _end_threads(self) -> None:
        pool, self._pool = self._pool, None
        self._ahead.clear()
        self._asked = self.position
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def normalisation_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """(C, 256) float32: what each pixel value becomes, (v / 255 - mean) / std in float32 as torchvision computes it."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    centre = np.asarray(mean, dtype=np.float32)[:, None]
    return (values[None] - centre) / np.asarray(std, dtype=np.float32)[:, None]


def normalise(images: NDArray[np.uint8], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, C, H, W) uint8 -> float32, by the (C, 256) table."""
    found = np.empty(images.shape, dtype=np.float32)
    for channel in range(images.shape[1]):
        found[:, channel] = table[channel][images[:, channel]]
    return found


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise SettingError(f"{what} out of range", expected=f"{low} to {high}", got=repr(value)[:80])
