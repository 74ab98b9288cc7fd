"""The audit log: append-only, each entry chained to all before it, each head signed (:mod:`motte.provision.heads`).

An entry is written in the transaction of what it tells, so neither can be there without the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from motte.errors import FormatError, SignatureError, TrustError
from motte.limits import MAX_AUDIT_ENTRY_BYTES, MAX_KEY_WORD_BYTES, MAX_RELEASE
from motte.provision.broker import tables
from motte.provision.broker.store import setting
from motte.provision.heads import Head, entry_digest, next_head, read_head, start_digest
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.strict_json import Fields, canonical, parse

_AUDIT = tables.audit.c
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: when (milliseconds of UTC since 1970), what, and its facts."""

    index: int
    at_ms: int
    kind: str
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What its digest is taken over."""
        return {"at_ms": self.at_ms, "facts": dict(self.facts), "index": self.index, "kind": self.kind}


def append(db: Connection, signer: SignerPrivateKey, kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write one entry in the transaction ``db`` (a writing one): the signed head after it."""
    last = db.execute(select(_AUDIT.idx, _AUDIT.head).order_by(_AUDIT.idx.desc()).limit(1)).one_or_none()
    index, before = (0, start_digest(signer.public)) if last is None else (last.idx, last.head)
    entry = Entry(index + 1, time.time_ns() // 1_000_000, kind, facts).to_json()
    head = Head(int(setting(db, "era")), index + 1, next_head(before, entry_digest(entry)), entry["at_ms"])
    document = head.signed(signer)
    values = {"idx": index + 1, "entry": canonical(entry).decode("ascii"), "head": head.digest}
    db.execute(tables.audit.insert().values(**values, signed_head=canonical(document).decode("ascii")))
    return document


def newest_head(db: Connection) -> dict[str, Any]:
    """The newest signed head; ``init`` wrote the first."""
    text = db.execute(select(_AUDIT.signed_head).order_by(_AUDIT.idx.desc()).limit(1)).scalar_one()
    document: dict[str, Any] = json.loads(text)
    return document


def digests(db: Connection, after: int, until: int) -> list[bytes]:
    """The digests of entries ``after + 1`` to ``until``, as far as they exist."""
    rows = db.execute(select(_AUDIT.entry).where(_AUDIT.idx > after, _AUDIT.idx <= until).order_by(_AUDIT.idx))
    return [entry_digest(json.loads(text)) for text in rows.scalars()]


def entries(db: Connection, *, last: int | None = None) -> Iterator[Entry]:
    """Entries in order, as they stand in the database, **unverified**: all, or the ``last`` ones.

    Raises:
        FormatError: one is malformed.
    """
    newest = db.execute(select(func.max(_AUDIT.idx))).scalar_one() or 0
    after = 0 if last is None else max(0, newest - last)
    for row in _rows(db, after):
        yield _read_entry(row.entry, row.idx)


def verify(db: Connection, broker: SignerPublicKey, known: Sequence[Head] = ()) -> Head:
    """Compute the whole chain anew (A-1 to A-4): the newest head, **verified**.

    Args:
        known: **verified** heads that clients took home; each must be among the heads of this log (A-5).

    Raises:
        FormatError: an entry is malformed. TrustError: ``check`` says what does not fit, ``where`` at which entry.
    """
    head, count, era = start_digest(broker), 0, 1
    wanted: dict[int, list[Head]] = {}
    for each in known:
        wanted.setdefault(each.index, []).append(each)
    newest: Head | None = None
    for row in _rows(db, 0):
        count += 1
        where = f"entry {count}"
        entry = _read_entry(row.entry, row.idx)
        if row.idx != count or entry.index != count:
            raise TrustError("an entry is missing or out of its place", check="A-1", where=where, got=str(row.idx))
        if entry.kind == "restored":
            era += 1
        head = next_head(head, entry_digest(entry.to_json()))
        if row.head != head:
            raise TrustError("an entry was altered", check="A-2", where=where)
        newest = _signed_head(row.signed_head, broker, where)
        if (newest.era, newest.index, newest.digest) != (era, count, head):
            raise TrustError("a head does not belong to its entry", check="A-4", where=where)
        for each in wanted.pop(count, ()):
            _compare(each, newest)
    if newest is None:
        raise TrustError("the audit log is empty", check="A-1", hint="it begins with the broker's making")
    if wanted:
        missing = max(wanted)
        raise TrustError(
            "the audit log was cut short: a client knows a later entry",
            check="A-5",
            expected=f"at least {missing} entries",
            got=f"{count}",
        )
    return newest


def _compare(known: Head, found: Head) -> None:
    if known.digest != found.digest:
        raise TrustError(
            "the audit log was written anew: a client knows another head",
            check="A-5",
            where=f"entry {found.index}",
            expected=known.digest.hex(),
            got=found.digest.hex(),
        )


def _signed_head(text: str, broker: SignerPublicKey, where: str) -> Head:
    try:
        return read_head(parse(text, max_bytes=MAX_KEY_WORD_BYTES, what=where), broker, where=where)
    except SignatureError as problem:
        raise TrustError("a head is not signed by the broker's key", check="A-3", where=where) from problem


def _rows(db: Connection, after: int) -> Iterator[Any]:
    while True:
        chosen = select(tables.audit).where(_AUDIT.idx > after).order_by(_AUDIT.idx).limit(_PAGE)
        page = db.execute(chosen).all()
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1].idx


def _read_entry(text: str, index: int) -> Entry:
    where = f"entry {index}"
    fields = Fields(parse(text, max_bytes=MAX_AUDIT_ENTRY_BYTES, what=where), where=where)
    facts = fields.any("facts")
    entry = Entry(
        index=fields.integer("index", low=1, high=MAX_RELEASE),
        at_ms=fields.integer("at_ms", low=0, high=MAX_RELEASE),
        kind=fields.text("kind", max_bytes=100),
        facts=facts if isinstance(facts, dict) else {},
    )
    fields.done()
    if not isinstance(facts, dict):
        raise FormatError("not the facts of an entry", where=where)
    return entry
