"""One run in progress, in one process: steps, evaluation, snapshots. :mod:`motte.train.loop` prepares it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.errors import FormatError, MeasureError
from motte.train.augment import Draws
from motte.train.booked_checkpoint import BookedCheckpoints
from motte.train.books import Charges
from motte.train.checkpoint import CheckpointStore
from motte.train.curves import Curve
from motte.train.data import Batch, DataSet
from motte.train.distributed import World
from motte.train.interrupt import StopWish
from motte.train.logs import TrainLog
from motte.train.privacy import Spent, spent_privacy
from motte.train.recipe import Recipe
from motte.train.result import Phase, Progress, TrainResult
from motte.train.schemes import Placed
from motte.train.settings import Dtype, TrainSettings
from motte.train.state import EpochResult, Fact, Position, Snapshot, Tally

_INPUT_NOISE: Final = 100
"""The purpose of the draws of input noise (:class:`motte.train.augment.Purpose` numbers the others)."""
AGAIN: Final = (
    "steps after this checkpoint may have been released before: identical bytes are no new release, but where answers "
    "of the accelerator differ in rounding they are, and the epsilon counts each step once"
)
_LOG = logging.getLogger("motte")
_MAX_STEP_SAMPLES: Final = 10_000
"""Durations of the latest steps that are kept for the median."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What was settled before the first step."""

    settings: TrainSettings
    recipe: Recipe
    facts: Mapping[str, Fact]
    dtype: Dtype
    threads: int
    run_id: bytes


class Run:
    """Trains the placed model on the data, and knows at every batch where it stands.

    Args:
        store: None: no checkpoints are written by this process.
        charges: what may leave, as a key broker counts it; None: nobody does.
    """

    def __init__(
        self,
        plan: RunPlan,
        data: DataSet,
        place: Placed,
        world: World,
        store: CheckpointStore | BookedCheckpoints | None,
        log: TrainLog,
        charges: Charges | None = None,
    ) -> None:
        self.plan, self.data, self.place, self.world, self.store, self.log = plan, data, place, world, store, log
        self._charges = charges
        if charges is not None and place.session is not None:
            charges.watch(place.session)
        recipe = plan.recipe
        self._optimizer = torch.optim.SGD(
            place.plain.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self._batch_samples = min(recipe.batch_size, len(data.train))
        self._position, self._tally = Position(), Tally()
        self._saved: Position | None = None
        self._evaluated: Tally | None = None
        self._history: tuple[EpochResult, ...] = ()
        self._best: float | None = None
        self._release: int | None = None
        self._stopping = False
        self._curve = Curve()
        self._step_s: list[float] = []
        self._ranks: dict[str, list[int]] = {}
        self._wish = StopWish()
        self._tell: Callable[[Progress], None] | None = None

    def go(self, wish: StopWish, progress: Callable[[Progress], None] | None) -> TrainResult:
        """Train to the end, or until somebody wishes to stop."""
        self._wish, self._tell = wish, progress
        if self._saved is None:
            self._save(best=False)
        while self._position.epoch < self.plan.recipe.epochs and not self._limit_reached():
            if not self._train_epoch() or not self._evaluate():
                break
            self._finish_epoch()
        self._log_ranks()
        if self._saved != self._position:
            self._save(best=False)
        if not self._stopping and self._evaluated is None and self._evaluate():
            self._log_test(self._evaluated)
        return self._result()

    # --- training -------------------------------------------------------------------------------------------------
    def _train_epoch(self) -> bool:
        """Train on what is left of the epoch; False if it was left early."""
        recipe, epoch = self.plan.recipe, self._position.epoch
        self.place.training.train()
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch)
        with self.data.batches(
            "train",
            batch_size=recipe.batch_size,
            epoch=epoch,
            start=self._position.batch,
            workers=self.plan.settings.workers,
            shard=(self.world.rank, self.world.size),
            drop_last=len(self.data.train) >= recipe.batch_size,
        ) as batches:
            count, began = len(batches), time.perf_counter()
            for batch in batches:
                loss = self._train_step(batch)
                ended = time.perf_counter()
                self._note_step(loss, ended - began, count)
                began = ended
                if self._stopping or (self._limit_reached() and self._position.batch < count):
                    return False
        return True

    def _train_step(self, batch: Batch) -> float:
        """One optimizer step; the mean loss of the whole batch, all processes together."""
        if self._charges is not None and self.place.session is not None:
            self._charges.begin_step(self.place.session, self._steps_left())
        images, labels = self._on_device(batch, noisy=True)
        logits = self._logits(self.place.training, images)
        total = functional.cross_entropy(logits, labels, reduction="sum")
        self._optimizer.zero_grad(set_to_none=True)
        with self.world.faults():
            # DistributedDataParallel takes the mean over processes: their number makes it the mean over the batch.
            (total * (self.world.size / self._batch_samples)).backward()
        correct = int((logits.detach().argmax(1) == labels).sum())
        wish = float(self._wish.signal is not None)
        sums = self.world.total([float(total.detach()), correct, len(labels), wish])
        loss = sums[0] / self._batch_samples
        if not math.isfinite(loss):
            raise MeasureError(
                "the loss is not finite any more: the run diverged",
                where=f"epoch {self._position.epoch}, batch {self._position.batch}",
                got=repr(loss),
                hint="a smaller learning rate, or less noise; the last checkpoint is from before",
            )
        self._optimizer.step()
        position = self._position
        self._position = Position(position.epoch, position.batch + 1, position.step + 1)
        self._tally = self._tally.plus(sums[0], round(sums[1]), round(sums[2]))
        self._stopping = sums[3] > 0
        self._evaluated = None
        return loss

    def _note_step(self, loss: float, seconds: float, batches: int) -> None:
        step, session = self._position.step, self.place.session
        self._curve.add(step, loss)
        self._step_s.append(seconds)
        if len(self._step_s) > 2 * _MAX_STEP_SAMPLES:
            del self._step_s[:-_MAX_STEP_SAMPLES]
        rate = float(self._optimizer.param_groups[0]["lr"])
        self.log.scalars(step, {"loss/train_step": loss, "lr": rate, "seconds/step": seconds})
        if session is not None:
            for name, layer in session.layers.items():
                if layer.last_rank is not None:
                    self._ranks.setdefault(name, []).append(layer.last_rank)
            if self.plan.settings.profile:
                self.log.profile(step, session.timeline.spans, self.place.traffic())
            session.timeline.clear()
        every = self.plan.settings.checkpoint_every
        if every is not None and step % every == 0:
            self._save(best=False)
        self._report("train", self._position.batch, batches, self._tally)

    def _steps_left(self) -> int:
        """Steps to the end of the run, the next one included."""
        recipe, position = self.plan.recipe, self._position
        an_epoch = max(1, len(self.data.train) // recipe.batch_size)
        left = (recipe.epochs - position.epoch) * an_epoch - position.batch
        limit = self.plan.settings.max_steps
        return left if limit is None else min(left, limit - position.step)

    def _limit_reached(self) -> bool:
        limit = self.plan.settings.max_steps
        return limit is not None and self._position.step >= limit

    def _on_device(self, batch: Batch, *, noisy: bool) -> tuple[Tensor, Tensor]:
        images, sigma = batch.images, self.plan.settings.input_noise
        if noisy and sigma > 0.0:
            images = with_input_noise(images, batch.indices, sigma, self.plan.settings.seed, self._position.epoch)
        return images.to(self.place.device), batch.labels.to(self.place.device)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(self.place.device.type, dtype=torch.bfloat16, enabled=self.plan.dtype == "bf16"):
            logits: Tensor = model(images)
        return logits.float() if logits.dtype != torch.float64 else logits

    # --- evaluation -----------------------------------------------------------------------------------------------
    def _evaluate(self) -> bool:
        """Find loss and accuracy on the test split for the present weights; False if it was left early."""
        if self._evaluated is not None:
            return True
        model, size = self.place.evaluation, max(self.plan.recipe.batch_size, self.world.size)
        model.eval()
        found = Tally()
        shard = (self.world.rank, self.world.size)
        workers = self.plan.settings.workers
        with torch.no_grad(), self.data.batches("test", batch_size=size, shard=shard, workers=workers) as batches:
            count = len(batches)
            for number, batch in enumerate(batches, start=1):
                if len(batch.labels):
                    images, labels = self._on_device(batch, noisy=False)
                    logits = self._logits(model, images)
                    loss = float(functional.cross_entropy(logits, labels, reduction="sum"))
                    found = found.plus(loss, int((logits.argmax(1) == labels).sum()), len(labels))
                self._report("test", number, count, found)
                # Together, processes stop between training steps only.
                if self.world.size == 1 and self._wish.signal is not None:
                    self._stopping = True
                    return False
        sums = self.world.total([found.loss_sum, found.correct, found.samples])
        self._evaluated = Tally(sums[0], round(sums[1]), round(sums[2]))
        if not math.isfinite(self._evaluated.loss):
            raise MeasureError("the loss on the test split is not finite", got=repr(self._evaluated.loss))
        if self.place.session is not None:
            self.place.session.timeline.clear()
        return True

    def _finish_epoch(self) -> None:
        tested = self._evaluated
        if tested is None:
            raise MeasureError("an epoch cannot end before it was evaluated")
        position = self._position
        result = EpochResult(
            epoch=position.epoch,
            steps=position.step,
            lr=self.plan.recipe.lr_at(position.epoch),
            train_loss=self._tally.loss,
            train_accuracy=self._tally.accuracy,
            test_loss=tested.loss,
            test_accuracy=tested.accuracy,
        )
        self._history = (*self._history, result)
        best = self._best is None or tested.accuracy > self._best
        self._best = tested.accuracy if best else self._best
        self._position, self._tally = Position(position.epoch + 1, 0, position.step), Tally()
        spent = self._spent()
        figures = {
            "loss/train": result.train_loss,
            "accuracy/train": result.train_accuracy,
            "bytes/out": float(sum(each.sent_bytes for each in self.place.traffic().values())),
        }
        if spent.epsilon is not None and math.isfinite(spent.epsilon):
            figures["privacy/epsilon"] = spent.epsilon
        self.log.scalars(position.step, figures)
        self._log_test(tested)
        self._log_ranks()
        self._save(best=best)
        self._report("epoch", 0, 0, tested, result)

    def _log_test(self, tested: Tally | None) -> None:
        if tested is not None:
            self.log.scalars(self._position.step, {"loss/test": tested.loss, "accuracy/test": tested.accuracy})

    def _spent(self) -> Spent:
        return spent_privacy(self.plan.settings, self.data, self.place, self.plan.recipe.batch_size, self.world)

    def _log_ranks(self) -> None:
        if self._ranks:
            self.log.ranks(self._position.step, self._ranks)
            self._ranks = {}

    def _report(
        self, phase: Phase, batch: int, batches: int, tally: Tally, finished: EpochResult | None = None
    ) -> None:
        if self._tell is not None:
            epochs, at = self.plan.recipe.epochs, self._position
            epoch = at.epoch + 1 if finished is None else at.epoch
            self._tell(Progress(phase, epoch, epochs, batch, batches, at.step, tally.loss, tally.accuracy, finished))

    # --- snapshots ------------------------------------------------------------------------------------------------
    def _save(self, *, best: bool) -> None:
        """Write a checkpoint. All processes come here at the same step; the one with the store writes."""
        self._saved = self._position
        if self.plan.settings.checkpoint_dir is None:
            return
        generators = self._generator_states()
        if self.store is not None:
            self._release = self.store.save(self._snapshot(generators), best=best)

    def _snapshot(self, generators: Mapping[str, Tensor]) -> Snapshot:
        plain, session = self.place.plain, self.place.session
        tensors = {f"model/{name}": tensor for name, tensor in plain.state_dict().items()}
        for name, parameter in plain.named_parameters():
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum/{name}"] = momentum
        return Snapshot(
            run_id=self.plan.run_id,
            facts=self.plan.facts,
            position=self._position,
            tally=self._tally,
            history=self._history,
            best=self._best,
            session=None if session is None else session.state(),
            tensors={**tensors, **generators},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where ``snapshot`` was taken.

        Raises:
            FormatError: its tensors are not those of this model.
        """
        tensors = dict(snapshot.tensors)
        state = self.place.plain.state_dict()
        with torch.no_grad():
            for name, target in state.items():
                target.copy_(_taken(tensors, f"model/{name}", target))
        for name, parameter in self.place.plain.named_parameters():
            if f"momentum/{name}" in tensors:
                buffer = torch.empty_like(parameter, requires_grad=False)
                buffer.copy_(_taken(tensors, f"momentum/{name}", parameter))
                self._optimizer.state[parameter]["momentum_buffer"] = buffer
        for name, own in self._generators().items():
            found = [_taken(tensors, f"generator/{name}/{rank}", own) for rank in range(self.world.size)]
            self._set_generator(name, found[self.world.rank])
        if tensors:
            raise FormatError("tensors of another model in the checkpoint", got=", ".join(sorted(tensors)[:3]))
        session = self.place.session
        if session is not None:
            if session.scheme.noise is not None and self.world.main:
                _LOG.warning("%s", AGAIN)
            if snapshot.session is None:
                raise FormatError("the checkpoint holds no state of the split layers")
            # The first process's state; every other has its own noise key, named by the run.
            own_key = session.state().noise_key if self.world.rank else snapshot.session.noise_key
            session.restore(replace(snapshot.session, noise_key=own_key))
            if self._charges is not None:
                self._charges.watch(session)
        self._position, self._tally = snapshot.position, snapshot.tally
        self._history, self._best, self._saved = snapshot.history, snapshot.best, snapshot.position

    def _generators(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.place.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.place.device)
        return states

    def _set_generator(self, name: str, state: Tensor) -> None:
        if name == "cuda":
            torch.cuda.set_rng_state(state, self.place.device)
        else:
            torch.set_rng_state(state)

    def _generator_states(self) -> dict[str, Tensor]:
        return {
            f"generator/{name}/{rank}": state
            for name, own in self._generators().items()
            for rank, state in enumerate(self.world.gather(own))
        }

    # --- the end --------------------------------------------------------------------------------------------------
    def _result(self) -> TrainResult:
        traffic = self.place.traffic().values()
        sums = self.world.total(
            [sum(each.sent_bytes for each in traffic), sum(each.received_bytes for each in traffic)]
        )
        tested = None if self._stopping else self._evaluated
        return TrainResult(
            model=self.place.plain,
            recipe=self.plan.recipe,
            dtype=self.plan.dtype,
            threads=self.plan.threads,
            processes=self.world.size,
            main=self.world.main,
            provenance=self.data.provenance,
            private=self.data.private,
            history=self._history,
            steps=self._position.step,
            test_loss=None if tested is None else tested.loss,
            test_accuracy=None if tested is None else tested.accuracy,
            step_s=tuple(self._step_s[-_MAX_STEP_SAMPLES:]),
            curve=self._curve.points,
            layers=self.place.layers,
            bytes_out=round(sums[0]),
            bytes_in=round(sums[1]),
            spent=self._spent(),
            stopped=(self._wish.signal or "another process") if self._stopping else None,
            release=self._release,
            charged=None if self._charges is None else self._charges.charged,
        )


def with_input_noise(images: Tensor, indices: Tensor, sigma: float, seed: int, epoch: int) -> Tensor:
    """``images`` (B, C, H, W) with Gaussian noise of standard deviation ``sigma``; a copy.

    The noise is a function of seed, epoch and sample, wherever the sample is computed: repeatable and **not secret**.
    """
    seeds = Draws(seed, epoch, indices.numpy().astype(np.int64)).bits(_INPUT_NOISE) >> np.uint64(1)
    noise = torch.empty_like(images)
    for row, own in enumerate(seeds):
        noise[row] = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(int(own)))
    return images + sigma * noise


def _taken(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors.pop(name, None)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        expected = f"{tuple(like.shape)} {like.dtype}"
        got = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise FormatError("a tensor of another model in the checkpoint", where=name, expected=expected, got=got)
    return found
