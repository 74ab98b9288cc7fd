"""Checkpoints: a run's state in one file that appears whole or not at all, sealed to the data's owner and signed.

A sealed checkpoint is a bundle (docs/spec/bundle.md): its manifest is canonical JSON (:mod:`motte.train.state`), its
one part a safetensors file of all tensors. So the release counter stands in the signed header; nothing is unpickled.

    last.checkpoint         where the run continues
    best.checkpoint         the best test accuracy so far: another name of what ``last`` was then
    newest-release          the release of the latest ``last``; an older one is refused

**The counter file is no protection from a host that owns the disk**: who can put an old checkpoint back can put the old
counter back with it. It catches mistakes; ``min_release``, remembered by the owner, catches the host.

A host sees when each is written, and so which epochs were the best so far: one bit of the test split an epoch.

Plaintext checkpoints (``*.insecure-plaintext``) are one safetensors file with the state as metadata: for public data
only, and not where noise is used, since the noise key would lie in them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from motte.errors import BundleError, FormatError, InputError, ResourceError, RollbackError, SettingError
from motte.limits import MAX_CHECKPOINT_TENSORS, MAX_MANIFEST_BYTES, MAX_RELEASE, MAX_SECTION_BYTES
from motte.seal.atomic import atomic_file
from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPublicKey
from motte.seal.reader import open_bundle
from motte.seal.writer import BytesPart, write_all, write_bundle
from motte.strict_json import canonical, parse
from motte.train.files import read_bounded
from motte.train.owner import OwnerKeys
from motte.train.state import Snapshot, read_state

if TYPE_CHECKING:
    from torch import Tensor

SEALED_SUFFIX: Final = ".checkpoint"
PLAINTEXT_SUFFIX: Final = ".insecure-plaintext"
_COUNTER: Final = "newest-release"
_STATE: Final = "motte-checkpoint"


class CheckpointStore:
    """The checkpoints of one run in one folder.

    Args:
        keys: None: plaintext.
        min_release: an older checkpoint is not continued.

    Raises:
        ResourceError: the folder cannot be made.
    """

    def __init__(self, folder: Path, keys: OwnerKeys | None, *, min_release: int = 0) -> None:
        self._keys = keys
        self._min_release = min_release
        suffix = PLAINTEXT_SUFFIX if keys is None else SEALED_SUFFIX
        self.folder = folder
        self.last, self.best = folder / f"last{suffix}", folder / f"best{suffix}"
        self._counter = folder / _COUNTER
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as problem:
            raise ResourceError("cannot make the folder", where=str(folder), got=problem.strerror) from problem
        self._release = self._newest_known()

    def refuse_if_used(self) -> None:
        """Refuse a folder in which an earlier run left a checkpoint.

        Raises:
            InputError: so it is.
        """
        for suffix in (SEALED_SUFFIX, PLAINTEXT_SUFFIX):
            path = self.folder / f"last{suffix}"
            if os.path.lexists(path):
                hint = "continue it with --resume, or choose another folder"
                raise InputError("a run left its checkpoint here", where=str(path), hint=hint)

    def save(self, snapshot: Snapshot, *, best: bool) -> int:
        """Write ``last`` under the next release, and give it the name ``best`` too; returns the release.

        Raises:
            ResourceError: it cannot be written; what stood there before still does.
        """
        if self._release >= MAX_RELEASE:
            raise InputError("no release number is left", where=str(self.folder))
        release = self._release + 1
        if self._keys is None:
            _write_plaintext(self.last, snapshot, release)
        else:
            write_sealed(self.last, snapshot, release, self._keys)
        self._release = release
        with atomic_file(self._counter, overwrite=True) as fd:
            write_all(fd, f"{release}\n".encode("ascii"), 0)
        if best:
            name_best(self.last, self.best)
        return release

    def load(self) -> Snapshot:
        """What ``last`` holds.

        Raises:
            InputError: there is none.
            RollbackError: older than ``min_release``, or than the newest that was written here.
            TrustError, FormatError: altered, of another signer, or sealed to another key.
        """
        if not os.path.lexists(self.last):
            hint = "start without --resume"
            other = PLAINTEXT_SUFFIX if self._keys is not None else SEALED_SUFFIX
            if os.path.lexists(self.folder / f"last{other}"):
                hint = f"the folder holds last{other}: give the keys that it was written with, or none"
            raise InputError("no checkpoint to continue from", where=str(self.last), hint=hint)
        demanded = max(self._min_release, self._release)
        keys = None if self._keys is None else (self._keys.opener, self._keys.signer.public)
        snapshot, release = read_checkpoint(self.last, keys, min_release=demanded)
        self._release = release
        return snapshot

    def _newest_known(self) -> int:
        try:
            with self._counter.open("rb") as file:
                text = file.read(64)
        except FileNotFoundError:
            return 0
        except OSError as problem:
            raise ResourceError("cannot read", where=str(self._counter), got=problem.strerror) from problem
        digits = text.removesuffix(b"\n")
        if not digits.isdigit() or text != digits + b"\n" or int(digits) > MAX_RELEASE:
            raise FormatError("not a counter of releases", where=str(self._counter), got=repr(text)[:80])
        return int(digits)


def write_sealed(
    path: Path, snapshot: Snapshot, release: int, keys: OwnerKeys, *, also: tuple[RecipientPublicKey, ...] = ()
) -> None:
    """Write a sealed checkpoint in the place of what is at ``path``: whole and synced when this returns.

    Args:
        also: who can open it beside the owner.

    Raises:
        ResourceError: it cannot be written; what stood there before still does.
    """
    write_bundle(
        path,
        release=release,
        manifest=canonical(snapshot.state(release)),
        parts=[BytesPart(_tensor_bytes(snapshot.tensors))],
        recipients=(*keys.everybody, *also),
        signer=keys.signer,
        overwrite=True,
    )


def read_checkpoint(
    path: Path, keys: tuple[RecipientPrivateKey, SignerPublicKey] | None, *, min_release: int = 0
) -> tuple[Snapshot, int]:
    """Open one checkpoint: the snapshot and its release.

    Args:
        keys: what opens it, and whose signature is demanded; None: it is plaintext.

    Raises:
        InputError: no such file. RollbackError: older than demanded.
        TrustError, FormatError: as :func:`motte.seal.reader.open_bundle`; FormatError also for other contents.
    """
    if keys is None:
        snapshot, release = _read_plaintext(path)
        if release < min_release:
            raise _rolled_back(path, min_release, release)
        return snapshot, release
    opener, signer = keys
    with open_bundle(path, signer=signer, min_release=min_release) as signed:
        # Another recipient knows the data keys too; the digests say that the signer wrote these very bytes.
        signed.verify_digests()
        with signed.unlock(signed.unwrap(opener)) as unlocked:
            if unlocked.parts != 1:
                raise BundleError("not a checkpoint", where=str(path), expected="1 part", got=f"{unlocked.parts} parts")
            value = parse(unlocked.manifest(), max_bytes=MAX_MANIFEST_BYTES, what=str(path))
            data = bytearray(unlocked.part_bytes(0))
            unlocked.open_part(0, memoryview(data))
        snapshot, release = read_state(value, _tensors(bytes(data), str(path)), where=str(path))
        if release != signed.header.release:
            raise FormatError(
                "the state names another release than the header",
                where=str(path),
                expected=str(signed.header.release),
                got=str(release),
            )
    return snapshot, release


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """What :func:`write_weights` wrote, and from which state."""

    tensors: int
    steps: int
    release: int


def write_weights(path: Path, output: Path, keys: tuple[RecipientPrivateKey, SignerPublicKey] | None) -> WrittenWeights:
    """Write the model's weights and buffers of a checkpoint as safetensors **in the clear**, readable by their owner.

    Raises:
        InputError: ``output`` exists. Others as :func:`read_checkpoint`.
    """
    snapshot, release = read_checkpoint(path, keys)
    prefix = "model/"
    weights = {name.removeprefix(prefix): each for name, each in snapshot.tensors.items() if name.startswith(prefix)}
    with atomic_file(output, overwrite=False, mode=0o600) as fd:
        write_all(fd, _tensor_bytes(weights), 0)
    return WrittenWeights(len(weights), snapshot.position.step, release)


def refuse_other_run(snapshot: Snapshot, facts: Mapping[str, object], *, growing: tuple[str, ...] = ()) -> None:
    """Refuse to continue a run under settings that would change its arithmetic.

    Args:
        growing: facts that may be larger now than they were.

    Raises:
        SettingError: names the first setting that differs.
    """
    for name in sorted(set(facts) | set(snapshot.facts)):
        before, now = snapshot.facts.get(name), facts.get(name)
        if before == now and type(before) is type(now):
            continue
        if name in growing and isinstance(before, int) and isinstance(now, int) and now > before:
            continue
        raise SettingError(
            "the checkpoint is of a run with another setting",
            where=name,
            expected=repr(before)[:120],
            got=repr(now)[:120],
            hint="continue with the settings of the first start, or begin another run in another folder",
        )


def _rolled_back(path: Path, demanded: int, release: int) -> RollbackError:
    return RollbackError(
        "an older checkpoint than the newest known",
        where=str(path),
        expected=f"at least {demanded}",
        got=str(release),
        hint="it may be an old copy put in the place of the current one",
    )


# --- tensors --------------------------------------------------------------------------------------------------------
def _tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    # Cloned: two names may share memory (tied weights), which safetensors refuses to write.
    flat = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return save(flat, metadata=None if metadata is None else dict(metadata))


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(data)
    except (SafetensorError, ValueError, KeyError) as problem:
        raise FormatError("not tensors of a checkpoint", where=where, got=str(problem)[:200]) from problem
    if len(found) > MAX_CHECKPOINT_TENSORS:
        raise FormatError("too many tensors", where=where, expected=f"at most {MAX_CHECKPOINT_TENSORS}")
    return found


# --- plaintext ------------------------------------------------------------------------------------------------------
def _write_plaintext(path: Path, snapshot: Snapshot, release: int) -> None:
    state = canonical(snapshot.state(release)).decode("ascii")
    with atomic_file(path, overwrite=True, mode=0o600) as fd:
        write_all(fd, _tensor_bytes(snapshot.tensors, {_STATE: state}), 0)


def _read_plaintext(path: Path) -> tuple[Snapshot, int]:
    data = read_bounded(path, MAX_SECTION_BYTES, what="the checkpoint")
    tensors = _tensors(data, str(path))
    # safetensors has checked that its own header fits; it gives no metadata from bytes, so it is read again here.
    header = parse(data[8 : 8 + int.from_bytes(data[:8], "little")], max_bytes=MAX_MANIFEST_BYTES, what=str(path))
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(_STATE) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FormatError("not a plaintext checkpoint", where=str(path))
    return read_state(parse(text, max_bytes=MAX_MANIFEST_BYTES, what=str(path)), tensors, where=str(path))


def name_best(path: Path, name: Path) -> None:
    """Make ``name`` another name of the file at ``path``, atomically; a copy where the disk knows no links.

    Raises:
        ResourceError: neither can be done.
    """
    partial = name.parent / f".{name.name}.{secrets.token_hex(6)}.partial"
    try:
        try:
            os.link(path, partial)
        except OSError:
            with atomic_file(name, overwrite=True, mode=0o600) as fd:
                write_all(fd, path.read_bytes(), 0)
            return
        os.replace(partial, name)
    except OSError as problem:
        raise ResourceError("cannot name the best checkpoint", where=str(name), got=problem.strerror) from problem
    finally:
        partial.unlink(missing_ok=True)
