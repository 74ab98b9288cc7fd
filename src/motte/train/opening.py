"""Before the first step: the data is opened, what does not fit is refused, what must not change is noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from motte.offload.settings import Asymmetric
from motte.offload.words import noise_text, rank_text
from motte.train.augment import Draws, order
from motte.train.data import DataKeys, DataSet, Records, ReleasedKeys, open_data
from motte.train.distributed import World
from motte.train.recipe import Recipe
from motte.train.schemes import resolved_threads
from motte.train.settings import TrainSettings
from motte.train.state import Fact
from motte.trusted.harden import harden

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from motte.train.datasets.records import Shape
    from motte.train.settings import Dtype

_SUBSET_EPOCH = 0
"""The draws that choose a subset are those of this epoch's order, over the whole split."""


@dataclass(frozen=True)
class Subset:
    """Some records of a split, in their order there."""

    records: Records
    chosen: NDArray[np.int64]

    @property
    def shape(self) -> Shape:
        """(C, H, W)."""
        return self.records.shape

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64."""
        found: NDArray[np.int64] = self.records.labels[self.chosen]
        return found

    def __len__(self) -> int:
        """Number of chosen records."""
        return len(self.chosen)

    def read(self, indices: NDArray[np.int64], draws: Draws | None) -> NDArray[np.uint8]:
        """(B,) places in the subset -> (B, C, H, W); see :class:`Records`."""
        return self.records.read(self.chosen[indices], draws)


@contextmanager
def open_training_data(settings: TrainSettings, released: ReleasedKeys | None = None) -> Iterator[DataSet]:
    """The data of a run, its subset taken; closed at the end of the block.

    For private data this process is hardened first: not dumpable, no core files, no new privileges.

    Args:
        released: of sealed data whose front was checked already; None: the keys of ``settings``.

    Raises:
        As :func:`motte.train.data.open_data`. ResourceError: the kernel refuses to harden this process.
    """
    keys: DataKeys | ReleasedKeys | None = released
    if keys is None and settings.data_key is not None and settings.data_signer is not None:
        harden()
        keys = DataKeys(settings.data_key, settings.data_signer, settings.data_min_release)
    with open_data(
        settings.data, data_dir=settings.data_dir, seed=settings.seed, image_size=settings.image_size, keys=keys
    ) as data:
        if settings.subset is None:
            yield data
        else:
            train, test = (_some(each, settings.subset, settings.seed) for each in (data.train, data.test))
            yield replace(data, train=train, test=test)


def _some(records: Records, count: int, seed: int) -> Subset:
    chosen = order(seed, _SUBSET_EPOCH, len(records))[:count]
    return Subset(records, np.sort(chosen))


def check_memory(settings: TrainSettings, model: nn.Module, data: DataSet, recipe: Recipe, world: World) -> None:
    """Refuse what does not fit ``settings.memory_bytes``; nothing where no limit was stated, or nothing is inside.

    Raises:
        ResourceError: it does not fit; says of what the need is made.
    """
    if settings.memory_bytes is None or settings.scheme == "accelerator":
        return
    from motte.offload.memory import refuse_above, training_memory

    scheme = settings.offload_scheme()
    batch = -(-min(recipe.batch_size, len(data.train)) // world.size)
    need = training_memory(
        model,
        scheme if isinstance(scheme, Asymmetric) else None,
        data.shape,
        batch,
        optimizer_states=1 if recipe.momentum else 0,
    )
    refuse_above(need, settings.memory_bytes)


def run_facts(settings: TrainSettings, data: DataSet, recipe: Recipe, dtype: Dtype, world: World) -> Mapping[str, Fact]:
    """Everything that decides the arithmetic of a run: whoever continues it must say the same.

    Not among them: threads (but under noise), workers, device, integrity, where files lie. They may change a rounding,
    no more.
    """
    facts: dict[str, Fact] = {
        "model": settings.model,
        "width": settings.width,
        # The place of a file or folder may change; the number of records and classes tells most mistakes.
        "data": settings.data.partition(":")[0],
        "train_records": len(data.train),
        "test_records": len(data.test),
        "classes": len(data.classes),
        "image_shape": "x".join(map(str, data.shape)),
        "seed": settings.seed,
        "subset": settings.subset,
        "input_noise": settings.input_noise,
        "scheme": settings.scheme,
        "dtype": dtype,
        "processes": world.size,
        **recipe.facts(),
    }
    scheme = settings.offload_scheme()
    if scheme is not None:
        facts |= {
            "rank": rank_text(scheme.rank),
            "iterations": scheme.iterations,
            "trusted_layers": _names(scheme.trusted_layers),
        }
        noise = getattr(scheme, "noise", None)
        facts["noise"] = noise_text(noise)
        if noise is not None:
            # Another number of threads rounds otherwise: other bytes get other noise, and are another release.
            facts["threads"] = resolved_threads(settings, world)
    if isinstance(scheme, Asymmetric):
        facts |= {
            "decomposition": scheme.decomposition,
            "residual_dtype": scheme.residual_dtype,
            "offload_layers": _names(scheme.offloaded_layers),
        }
    return facts


def _names(layers: tuple[str, ...] | None) -> str | None:
    return None if layers is None else ",".join(layers)
