"""Checkpoints of a run under a key broker: only the newest that was committed there has a key.

    next.checkpoint         sealed under the key of the next number, on its way
    last.checkpoint         the newest that was committed: where the run continues
    best.checkpoint         the best test accuracy so far: another name of what ``last`` was then

The broker gives the key of number ``newest + 1``; the file is written whole and synced as ``next``; the number is
committed; ``next`` becomes ``last``. So after a crash at any point one of the two is the committed one. The release of
the file is its number, and a number that the broker does not call the newest gets no key: an old copy that is put back
is refused, whatever else the host puts back with it.

Each file is sealed to a recipient that is derived from the broker's key, and to the owner of the data (docs/spec/
training.md). The run itself never uses the second way.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from motte.errors import InputError, ResourceError, RollbackError
from motte.seal import primitives
from motte.seal.header import parse_header
from motte.seal.keys import RecipientPrivateKey
from motte.seal.reader import open_file, read_front
from motte.train.admission import Granted
from motte.train.checkpoint import SEALED_SUFFIX, name_best, read_checkpoint, write_sealed
from motte.train.owner import OwnerKeys
from motte.train.state import Snapshot

_PURPOSE: Final = b"recipient of a training checkpoint"


def announced(folder: Path) -> tuple[int, ...]:
    """Numbers of the checkpoints in ``folder`` by their **unverified** headers.

    Raises:
        InputError: there is none. BundleError: a file that is no bundle.
    """
    found = tuple(number for path in _candidates(folder) if (number := _number(path)) is not None)
    if not found:
        raise InputError("no checkpoint to continue from", where=str(folder), hint="start without --resume")
    return found


def refuse_used(folder: Path) -> None:
    """Refuse a folder in which an earlier run left a checkpoint.

    Raises:
        InputError: so it is.
    """
    path = folder / f"last{SEALED_SUFFIX}"
    if os.path.lexists(path):
        hint = "continue it with --resume, or choose another folder"
        raise InputError("a run left its checkpoint here", where=str(path), hint=hint)


class BookedCheckpoints:
    """The checkpoints of one run in one folder, their keys from its broker. Used as a ``CheckpointStore`` is.

    Args:
        keys: of the owner of the data.

    Raises:
        ResourceError: the folder cannot be made.
    """

    def __init__(self, folder: Path, keys: OwnerKeys, given: Granted) -> None:
        self.folder, self._keys, self._given = folder, keys, given
        self.last, self.best = (folder / f"{name}{SEALED_SUFFIX}" for name in ("last", "best"))
        self._next = folder / f"next{SEALED_SUFFIX}"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as problem:
            raise ResourceError("cannot make the folder", where=str(folder), got=problem.strerror) from problem

    def save(self, snapshot: Snapshot, *, best: bool) -> int:
        """Write the next checkpoint and commit it; returns its number.

        Raises:
            ResourceError: it cannot be written. BrokerRefused, HandshakeError, LinkError: the broker did not take it.
            What was committed before still has its file and its key.
        """
        books = self._given.books
        if books is None:
            raise InputError("only process 0 writes checkpoints", where=str(self.folder))
        if os.path.lexists(self._next) and _number(self._next) == books.checkpoint:
            self._promote()  # committed before a crash, and not yet renamed
        number = books.checkpoint + 1
        reader = _recipient(books.prepare(number))
        write_sealed(self._next, snapshot, number, self._keys, also=(reader.public,))
        books.commit(number)
        self._promote()
        if best:
            name_best(self.last, self.best)
        return number

    def load(self) -> Snapshot:
        """The checkpoint that the broker gave a key for.

        Raises:
            InputError: its file is not there. RollbackError: an older one is in its place.
            TrustError, FormatError: altered, or of another run.
        """
        key, number = self._given.checkpoint_key, self._given.checkpoint
        if key is None:
            raise InputError("no checkpoint to continue from", where=str(self.last), hint="start without --resume")
        path = next((each for each in _candidates(self.folder) if _number(each) == number), self.last)
        snapshot, release = read_checkpoint(path, (_recipient(key), self._keys.signer.public), min_release=number)
        if release != number:
            raise RollbackError(
                "not the checkpoint that has a key", where=str(path), expected=str(number), got=str(release)
            )
        return snapshot

    def _promote(self) -> None:
        try:
            os.replace(self._next, self.last)
        except OSError as problem:
            raise ResourceError("cannot name the checkpoint", where=str(self.last), got=problem.strerror) from problem


def _candidates(folder: Path) -> tuple[Path, ...]:
    return tuple(path for name in ("next", "last") if os.path.lexists(path := folder / f"{name}{SEALED_SUFFIX}"))


def _number(path: Path) -> int | None:
    """The release that an **unverified** file says it is; None: it went away meanwhile."""
    try:
        fd = open_file(path)
    except InputError:
        return None
    try:
        encoded, _ = read_front(fd, None)
        return parse_header(encoded).release
    finally:
        os.close(fd)


def _recipient(key: bytes) -> RecipientPrivateKey:
    return RecipientPrivateKey(primitives.derived_key(key, _PURPOSE))
