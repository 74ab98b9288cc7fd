"""The training loop: one run from its settings to its result, under any scheme.

    (signed terms -> keys) -> open data -> build and place the model -> (continue from a checkpoint) -> epochs -> result

Everything that follows from private data stays in this process, but for what the scheme lets leave through the link,
and for checkpoints and logs, which are sealed to the data's owner. The library prints nothing: progress goes to a
callback, warnings to the logger ``motte``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from motte.errors import SettingError
from motte.seal import primitives
from motte.train.admission import Granted, granted, signed_data
from motte.train.booked_checkpoint import BookedCheckpoints, announced, refuse_used
from motte.train.books import Charges
from motte.train.checkpoint import CheckpointStore, refuse_other_run
from motte.train.data import ReleasedKeys
from motte.train.distributed import World, open_world, stated_place
from motte.train.figures import check_record
from motte.train.interrupt import stop_on_signals
from motte.train.logs import open_log
from motte.train.models import build_model
from motte.train.opening import check_memory, open_training_data, run_facts
from motte.train.owner import OwnerKeys, owner_keys, run_keys
from motte.train.recipe import resolve
from motte.train.result import Progress, TrainResult
from motte.train.run import Run, RunPlan
from motte.train.schemes import placed, resolved_dtype, resolved_threads
from motte.train.settings import TrainSettings
from motte.train.signed_terms import check_settings

if TYPE_CHECKING:
    from pathlib import Path

    from motte.attest.configuration import RunConfiguration
    from motte.link.recording import Recorder
    from motte.seal.reader import SignedBundle
    from motte.train.attested_star import AttestedCollectives
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
        SettingError, InputError: before anything starts, where that can be known; a setting other than the owner of
            sealed data signed, before any evidence is made.
        RollbackError, KeyAccessError, HandshakeError, BrokerRefused: under a key broker, which gives no keys, or has
            counted all releases that the owner allowed; the last checkpoint stands.
        ResourceError: does not fit the stated memory, or a file cannot be written.
        TrustError, LinkError: the accelerator lied, or ended; the last checkpoint stands.
        MeasureError: the loss is not finite any more; the last checkpoint stands.
    """
    check_record(settings)
    with contextlib.ExitStack() as stack:
        signed = stack.enter_context(signed_data(settings))
        configuration = None if signed is None else check_settings(settings, signed.header, stated_place()[1])
        if settings.broker is not None and settings.checkpoint_dir is not None and not settings.resume:
            refuse_used(settings.checkpoint_dir)
        world = stack.enter_context(
            open_world(
                insecure_plaintext_collectives=settings.insecure_plaintext_collectives,
                attested=_collectives(settings, configuration),
            )
        )
        threads = resolved_threads(settings, world)
        stack.enter_context(_arithmetic(threads, settings.seed + world.rank))
        admitted = stack.enter_context(_admitted(settings, signed, configuration, world))
        data = stack.enter_context(open_training_data(settings, admitted.keys))
        run = _start(settings, admitted, data, world, threads, stack, recorder)
        with stop_on_signals() as wish:
            return run.go(wish, progress if world.main else None)


def _collectives(settings: TrainSettings, configuration: RunConfiguration | None) -> AttestedCollectives | None:
    if settings.meeting is None or configuration is None:
        return settings.attested_collectives
    return settings.meeting.collectives(configuration)


@dataclass(frozen=True)
class _Admitted:
    """What a run may use: the keys of its data, those of what it writes, and what a broker gave it. Secret."""

    keys: ReleasedKeys | None
    owner: OwnerKeys | None
    given: Granted | None


@contextlib.contextmanager
def _admitted(
    settings: TrainSettings, signed: SignedBundle | None, configuration: RunConfiguration | None, world: World
) -> Iterator[_Admitted]:
    owner = None if settings.insecure_plaintext_checkpoint else owner_keys(settings)
    if signed is None:
        yield _Admitted(None, owner, None)
        return
    if settings.data_key is not None:
        yield _Admitted(ReleasedKeys(signed, signed.data_keys(signed.unwrap(settings.data_key))), owner, None)
        return
    broker, folder = settings.broker, settings.checkpoint_dir
    if broker is None or configuration is None:
        raise SettingError("sealed data needs a key that opens it, or a key broker", where=settings.data)
    checkpoints = announced(folder) if settings.resume and folder is not None and world.main else ()
    with granted(broker, signed, configuration, checkpoints, world) as given:
        owner = run_keys(given.data_keys[0], broker.run)
        yield _Admitted(ReleasedKeys(signed, given.data_keys), owner, given)


def _start(
    settings: TrainSettings,
    admitted: _Admitted,
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
    keys = admitted.owner
    store = snapshot = None
    if settings.checkpoint_dir is not None and (world.main or settings.resume):
        store = _store(settings, settings.checkpoint_dir, admitted)
        if settings.resume:
            snapshot = store.load()
            refuse_other_run(snapshot, facts, growing=("epochs",) if recipe.scheduler == "step" else ())
    run_id = world.from_main(_run_id(settings)) if snapshot is None else snapshot.run_id
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
    charges = None if admitted.given is None else Charges(admitted.given.books, world)
    run = Run(plan, data, place, world, store if world.main else None, log, charges)
    if snapshot is not None:
        run.restore(snapshot)
    return run


def _store(settings: TrainSettings, folder: Path, admitted: _Admitted) -> CheckpointStore | BookedCheckpoints:
    if admitted.given is not None and admitted.owner is not None:
        return BookedCheckpoints(folder, admitted.owner, admitted.given)
    store = CheckpointStore(folder, admitted.owner, min_release=settings.min_release)
    if not settings.resume:
        store.refuse_if_used()
    return store


def _run_id(settings: TrainSettings) -> bytes:
    return primitives.random_bytes(16) if settings.broker is None else settings.broker.run


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
