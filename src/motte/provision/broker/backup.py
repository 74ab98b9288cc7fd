"""Backup and restore. A backup holds no key in clear: it opens with the wrapping key of its time, which lies elsewhere.

A restored broker has forgotten what happened after its backup: nonces it saw used, releases it counted, entries it
showed to clients. So a restore ends every nonce and lease, holds every training run for good, and begins a new **era**
of the log, which every client that knows a head of the old one notices and refuses until a person has looked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from motte.errors import InputError, ResourceError
from motte.provision.broker import log, tables
from motte.provision.broker.state import DATABASE, Broker, open_broker
from motte.provision.broker.store import put_setting, setting
from motte.provision.broker.wrapping import Unlock
from motte.provision.heads import Head, load_head
from motte.seal.atomic import atomic_file


def backup(broker: Broker, path: Path) -> dict[str, Any]:
    """Write a consistent copy to ``path`` (mode 0600, never overwritten) while the broker may be serving: the signed
    head.

    Raises:
        InputError: the file exists. ResourceError: it cannot be written.
    """
    with broker.store.write() as db:
        document = log.append(db, broker.signer, "backup", {"file": path.name[:200]})
    with atomic_file(path, overwrite=False, mode=0o600) as fd:
        broker.store.copy_to(Path(f"/proc/self/fd/{fd}"))
    return document


def restore(path: Path, folder: Path, unlock: Unlock, heads: Sequence[Path] = ()) -> tuple[dict[str, Any], int]:
    """Make a broker in ``folder`` from a backup: the signed head of its new era, and how many training runs are held.

    Args:
        heads: files of heads that clients took home. Those later than the backup are no error, it cannot hold them; the
            others must be among its heads.

    Raises:
        InputError: a broker is there already, or no such backup. TrustError: the backup's log does not verify.
        KeyAccessError: ``unlock`` does not open it. ResourceError: it cannot be written.
    """
    target = folder / DATABASE
    for each in (target, *_beside(target)):
        if os.path.lexists(each):
            raise InputError("a broker is here already", where=str(each), hint="restore into another folder")
    try:
        data = path.read_bytes()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as problem:
        raise ResourceError("cannot restore", where=str(path), got=problem.strerror) from problem
    with atomic_file(target, overwrite=False, mode=0o600) as fd:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
    try:
        with open_broker(folder, unlock) as broker:
            return _new_era(broker, [load_head(each, broker.signer.public) for each in heads])
    except BaseException:
        for each in (target, *_beside(target)):
            each.unlink(missing_ok=True)
        raise


def _new_era(broker: Broker, known: Sequence[Head]) -> tuple[dict[str, Any], int]:
    with broker.store.write() as db:
        last = db.execute(select(func.max(tables.audit.c.idx))).scalar_one()
        newest = log.verify(db, broker.signer.public, [each for each in known if each.index <= last])
        era = int(setting(db, "era")) + 1
        put_setting(db, "era", str(era))
        db.execute(tables.nonces.delete())
        db.execute(tables.leases.update().values(ended=True))
        held = db.execute(tables.runs.update().values(held=True)).rowcount
        lost = max((each.index for each in known), default=newest.index) - newest.index
        facts = {"era": era, "entries_known_lost": max(0, lost), "runs_held": held}
        return log.append(db, broker.signer, "restored", facts), held


def _beside(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", "-journal")]
