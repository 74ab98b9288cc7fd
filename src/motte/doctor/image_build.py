"""Makes a closed image of a worker: runs one to see what it loads, makes the image, runs that alone, writes the rest.

Beside the image: Gramine's manifest, a container file and what a confidential VM needs, all from the same record.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from motte.doctor.image_trial import MODES, Asked, TrialBundle, ask
from motte.enclave import container, vm
from motte.enclave.image import ROOT, ImageRecord, write_bytes, write_image
from motte.enclave.image_files import Member, members_of, module_folders
from motte.enclave.manifest import NAME, Choices, dumps, manifest_of
from motte.enclave.manifest_rules import check
from motte.enclave.sizes import ModelNeed, Sizes, derive, estimated_start_s
from motte.enclave.workers import BareWorker, TracedWorker
from motte.engines.select import ENGINES
from motte.errors import InputError, MismatchError, SettingError, WorkerDied
from motte.measure.clock import Clock
from motte.seal.keys import RecipientPrivateKey, SignerPublicKey
from motte.seal.manifest import loads
from motte.seal.reader import open_bundle

BUILD: Final = "build.json"
NO_NAMESPACE: Final = "no namespace of its own"
"""How :mod:`motte.enclave.bare` begins its last words where this machine makes no namespaces."""
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Closed:
    """Whether the image was run alone, and answered bit for bit as the worker outside; ``why``: why it was not run."""

    proved: bool
    why: str | None


@dataclass(frozen=True, slots=True)
class Built:
    """A finished image in ``folder``, and how it was made."""

    folder: Path
    record: ImageRecord
    sizes: Sizes
    closed: Closed
    clock: Clock

    @property
    def start_s(self) -> float:
        """**Estimated** seconds to the first answer under Gramine."""
        return estimated_start_s(self.record)


@dataclass(frozen=True, slots=True)
class Request:
    """What to build. ``need``: of the model that the enclave is sized for; None: of the shipped one."""

    engine: str
    slim: bool
    choices: Choices
    need: ModelNeed | None = None
    at_least_bytes: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise SettingError("unknown engine", expected=", ".join(ENGINES), got=repr(self.engine))


def build(folder: Path, request: Request, tell: Tell, *, trial: TrialBundle | None = None) -> Built:
    """Build ``folder``, which must not exist; after an error, or Ctrl-C, nothing of it is left.

    Args:
        tell: is called with what is being done.
        trial: a bundle for the trials; None: one is sealed for them, which needs torch.

    Raises:
        InputError: the folder exists. UnsupportedError: the engine, or what makes the trial's bundle, is not installed.
        MismatchError: the image answers otherwise than the worker outside. WorkerDied: it lacks a file; its last words.
    """
    if os.path.lexists(folder):
        raise InputError("the folder exists already", where=str(folder), hint="choose another name")
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="motte-image-") as passing:
        if trial is None:
            tell("sealing a model for the trials")
            with clock.segment("seal trial", since="asked for", until="bundle written"):
                trial = TrialBundle.seal(Path(passing) / "trial.motte")
        tell("starting workers to see what they load")
        with clock.segment("trace", since="first worker spawned", until="its files listed"):
            members, outside = trace(request, trial)
        need = request.need or trial_need(trial, request)
        record: ImageRecord | None = None
        try:
            tell("making the image")
            with clock.segment("make image", since="files listed", until="record written"):
                record = write_image(folder, members, engine=request.engine, slim=request.slim)
            tell("running the image alone")
            with clock.segment("prove closed", since="record written", until="answers compared"):
                closed = prove(folder, request, trial, outside)
            sizes = derive(record, need, threads=request.choices.threads, at_least_bytes=request.at_least_bytes)
            built = Built(folder, record, sizes, closed, clock)
            _write_rest(built, request)
        except BaseException:
            if record is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return built


def trace(request: Request, trial: TrialBundle) -> tuple[tuple[Member, ...], tuple[bytes, ...]]:
    """What goes into the image, and what workers with the files of this machine answer, mode by mode."""
    asked: list[Asked] = []
    opened: set[str] = set()
    for mode in MODES:
        worker = TracedWorker(threads=1, engine=request.engine, precision=request.choices.precision)
        asked.append(ask(trial, worker, mode))
        opened.update(worker.opened())
    members = members_of((each.tcb for each in asked), opened, engine=request.engine, folders=module_folders())
    return members, tuple(each.answer for each in asked)


def prove(folder: Path, request: Request, trial: TrialBundle, outside: tuple[bytes, ...]) -> Closed:
    """Run the image with nothing else in sight, and compare its answers bit for bit.

    Raises:
        MismatchError: another answer. WorkerDied: the worker did not come up, though it had its namespace.
    """
    for mode, expected in zip(MODES, outside, strict=True):
        try:
            worker = BareWorker(
                folder / ROOT,
                (),
                threads=1,
                engine=request.engine,
                precision=request.choices.precision,
            )
        except WorkerDied as problem:
            if NO_NAMESPACE in problem.message:
                return Closed(False, problem.message[problem.message.index(NO_NAMESPACE) :][:300])
            raise
        if ask(trial, worker, mode).answer != expected:
            raise MismatchError("the image answers otherwise than the worker outside of it", where=f"{mode} mode")
    return Closed(True, None)


def trial_need(trial: TrialBundle, request: Request) -> ModelNeed:
    """What the shipped model needs."""
    return bundle_need(trial.path, trial.recipient, trial.signer.public, engine=request.engine)


def bundle_need(
    path: Path,
    key: RecipientPrivateKey,
    signer: SignerPublicKey,
    *,
    engine: str,
    dims: Mapping[str, int] | None = None,
) -> ModelNeed:
    """What the model of a bundle needs, all of it open at once, at ``dims`` or those that it was planned for.

    Raises:
        BundleError, SignatureError, KeyAccessError: the bundle was refused. PlanError: dimensions that it has not.
    """
    with open_bundle(path, signer=signer) as signed:
        manifest = loads(signed.unlock(signed.unwrap(key)).manifest())
    return ModelNeed.of(manifest, bundle_bytes=path.stat().st_size, engine=engine, streamed=False, dims=dims)


def _write_rest(built: Built, request: Request) -> None:
    choices = request.choices
    manifest = manifest_of(built.record, built.sizes, choices)
    problems = check(manifest)
    if problems:
        raise MismatchError("our own manifest breaks a rule", where=problems[0].key, got=problems[0].reason)
    texts = {f"{NAME}.manifest": dumps(manifest)}
    texts[container.CONTAINERFILE] = container.containerfile(
        built.record, threads=choices.threads, precision=choices.precision
    )
    texts[container.IGNORE] = container.ignore_file()
    (built.folder / vm.FOLDER).mkdir()
    for name, text in vm.files(built.record, threads=choices.threads, precision=choices.precision).items():
        texts[f"{vm.FOLDER}/{name}"] = text
    for name, text in texts.items():
        write_bytes(built.folder / name, text.encode())
    # What differs from build to build stands apart from what must not.
    write_bytes(built.folder / BUILD, f"{json.dumps(report(built), indent=1, sort_keys=True)}\n".encode())


def report(built: Built) -> dict[str, Any]:
    """How the image was made, and what it is expected to need; JSON values."""
    return {
        "engine": built.record.engine,
        "slim": built.record.slim,
        "files": len(built.record.files),
        "bytes": built.record.bytes,
        "modules": len(built.record.modules),
        "hashed_bytes": sum(file.bytes for file in built.record.hashed()),
        "estimated_start_s": round(built.start_s, 2),
        "closed": {"proved": built.closed.proved, "why": built.closed.why},
        "sizes": built.sizes.to_json(),
        "segments": built.clock.segments().to_json(),
    }
