"""The training loop: one run from its settings to its result, under any scheme.

    open data -> build and place the model -> (continue from a checkpoint) -> epochs -> result

Everything that follows from private data stays in this process, but for what the scheme lets leave through the link,
and for checkpoints and logs, which are sealed to the data's owner. The library prints nothing: progress goes to a
callback, warnings to the logger ``motte``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from motte.errors import SettingError
from motte.seal import primitives
from motte.train.checkpoint import CheckpointStore, refuse_other_run
from motte.train.distributed import World, open_world
from motte.train.figures import check_record
from motte.train.interrupt import stop_on_signals
from motte.train.logs import open_log
from motte.train.models import build_model
from motte.train.opening import check_memory, open_training_data, run_facts
from motte.train.owner import owner_keys
from motte.train.recipe import resolve
from motte.train.result import Progress, TrainResult
from motte.train.run import Run, RunPlan
from motte.train.schemes import placed, resolved_dtype, resolved_threads
from motte.train.settings import TrainSettings

if TYPE_CHECKING:
    from motte.link.recording import Recorder
    from motte.train.data import DataSet

__all__ = ["Progress", "TrainResult", "train"]


def train(
    settings: TrainSettings,
    *,
    progress: Callable[[Progress], None] | None = None,
    recorder: Recorder | None = None,
) -> TrainResult:
    """Train as ``settings`` say. Blocks until the end, SIGINT or SIGTERM; the main thread's handlers are put back.

    Args:
        progress: called after each batch, in the first process only.
        recorder: sees every frame to and from the accelerator.

    Raises:
        SettingError, InputError: before anything starts, where that can be known.
        ResourceError: does not fit the stated memory, or a file cannot be written.
        TrustError, LinkError: the accelerator lied, or ended; the last checkpoint stands.
        MeasureError: the loss is not finite any more; the last checkpoint stands.
    """
    check_record(settings)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(
            open_world(
                insecure_plaintext_collectives=settings.insecure_plaintext_collectives,
                attested=settings.attested_collectives,
            )
        )
        threads = resolved_threads(settings, world)
        stack.enter_context(_arithmetic(threads, settings.seed + world.rank))
        data = stack.enter_context(open_training_data(settings))
        run = _start(settings, data, world, threads, stack, recorder)
        with stop_on_signals() as wish:
            return run.go(wish, progress if world.main else None)


def _start(
    settings: TrainSettings,
    data: DataSet,
    world: World,
    threads: int,
    stack: contextlib.ExitStack,
    recorder: Recorder | None,
) -> Run:
    recipe = resolve(settings, data.shape)
    if len(data.train) < world.size or not len(data.test):
        got = f"{len(data.train)} and {len(data.test)}"
        raise SettingError("too few records to train and test with", expected=f"{world.size} at least", got=got)
    model = build_model(
        settings.model, classes=len(data.classes), image_shape=data.shape, seed=settings.seed, width=settings.width
    ).train()
    dtype = resolved_dtype(settings)
    check_memory(settings, model, data, recipe, world)
    facts = run_facts(settings, data, recipe, dtype, world)
    keys = None if settings.insecure_plaintext_checkpoint else owner_keys(settings)
    store = snapshot = None
    if settings.checkpoint_dir is not None and (world.main or settings.resume):
        store = CheckpointStore(settings.checkpoint_dir, keys, min_release=settings.min_release)
        if settings.resume:
            snapshot = store.load()
            refuse_other_run(snapshot, facts, growing=("epochs",) if recipe.scheduler == "step" else ())
        else:
            store.refuse_if_used()
    run_id = world.from_main(primitives.random_bytes(16)) if snapshot is None else snapshot.run_id
    place = stack.enter_context(
        placed(
            settings,
            model,
            torch.zeros(1, *data.shape),
            world=world,
            threads=threads,
            noise_key=None if keys is None else keys.noise_key(run_id, world.rank),
            recorder=recorder,
        )
    )
    plaintext = settings.insecure_plaintext_log
    log = open_log(settings.log_dir, private=data.private, insecure_plaintext=plaintext, keys=keys, main=world.main)
    stack.callback(log.close)
    plan = RunPlan(settings, recipe, facts, dtype, threads, run_id)
    run = Run(plan, data, place, world, store if world.main else None, log)
    if snapshot is not None:
        run.restore(snapshot)
    return run


@contextlib.contextmanager
def _arithmetic(threads: int, seed: int) -> Iterator[None]:
    """Threads and the generator of dropout for the time of a run; both are as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
