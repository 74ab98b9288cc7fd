"""What a run says of itself: where it is, after each batch, and what it found, at its end."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from motte.train.curves import Point
from motte.train.privacy import Spent
from motte.train.recipe import Recipe
from motte.train.settings import Dtype
from motte.train.state import EpochResult

if TYPE_CHECKING:
    from torch import nn

    from motte.offload.protect import LayerSide


Phase = Literal["train", "test", "epoch"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, after each batch. Counts are of what is done; ``loss`` (nats) and ``accuracy`` (0 to 1) are those
    of the epoch, or of the test split, so far."""

    phase: Phase
    epoch: int
    epochs: int
    batch: int
    batches: int
    step: int
    loss: float
    accuracy: float
    finished: EpochResult | None = None
    """The epoch that just ended (phase ``epoch``)."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run found.

    Attributes:
        model: the trained model in its plain form (scheme ``accelerator``: on the device). Secret for private data.
        processes, main: of the run; whether this is the one that writes.
        private: whether the data is; the figures below then tell about it.
        history: of every finished epoch, those before a resume included.
        steps: optimizer steps in all.
        test_loss, test_accuracy: of the final weights; None where the run was stopped.
        step_s: seconds of the latest steps of this process, reading data included, evaluation not.
        curve: of the steps since this process began.
        bytes_out, bytes_in: tensors that crossed the links since this process began, all processes together.
        spent: the privacy that the run cost.
        stopped: the signal that stopped it before its end.
        release: of its last checkpoint; None: none was written.
        charged: releases that its key broker has counted in all; None: no broker, or another process keeps the books.
    """

    model: nn.Module = field(repr=False)
    recipe: Recipe
    dtype: Dtype
    threads: int
    processes: int
    main: bool
    provenance: str
    private: bool
    history: tuple[EpochResult, ...]
    steps: int
    test_loss: float | None
    test_accuracy: float | None
    step_s: tuple[float, ...]
    curve: tuple[Point, ...]
    layers: tuple[LayerSide, ...]
    bytes_out: int
    bytes_in: int
    spent: Spent
    stopped: str | None
    release: int | None
    charged: int | None = None

    @property
    def median_step_s(self) -> float | None:
        """Median of :attr:`step_s`; None where there was no step."""
        return statistics.median(self.step_s) if self.step_s else None

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the last piece of the curve; None where there was no step."""
        return self.curve[-1].loss if self.curve else None
