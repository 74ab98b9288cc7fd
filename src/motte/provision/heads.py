"""Heads of a broker's audit log: what every client takes home, so that a log cut short or written anew is found.

An entry's digest and the head after it (docs/spec/broker.md, section 6)::

    digest k = H("motte-audit-1 entry\\0" || canonical JSON of entry k)
    head 0   = H("motte-audit-1 start\\0" || the broker's public key)
    head k   = H("motte-audit-1 head\\0" || head k-1 || digest k)

Whoever knows head i and later gets head j asks for digests i+1 to j and computes: one other bit anywhere in the first i
entries, and it does not come out. Digests say nothing of what the entries hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from motte.digests import sha256
from motte.errors import HandshakeError, InputError, RollbackError
from motte.limits import MAX_KEY_WORD_BYTES, MAX_RELEASE
from motte.provision.statements import check_signed, sign
from motte.seal.atomic import atomic_file
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.strict_json import canonical, parse

DIGEST_BYTES: Final = 32
HEAD_FORMAT: Final = "motte-audit-head-1"
_ENTRY: Final = b"motte-audit-1 entry\x00"
_START: Final = b"motte-audit-1 start\x00"
_HEAD: Final = b"motte-audit-1 head\x00"


@dataclass(frozen=True, slots=True)
class Head:
    """The state of a log after ``index`` entries. ``era`` rises when the broker is restored from a backup."""

    era: int
    index: int
    digest: bytes
    at_ms: int
    """When it was signed, milliseconds of UTC since 1970."""

    def signed(self, broker: SignerPrivateKey) -> dict[str, Any]:
        """The signed document."""
        body = {
            "at_ms": self.at_ms,
            "digest": self.digest.hex(),
            "era": self.era,
            "format": HEAD_FORMAT,
            "index": self.index,
        }
        return sign(body, broker)


def start_digest(broker: SignerPublicKey) -> bytes:
    """Head 0 of a broker's log: 32 bytes."""
    return sha256(_START, broker.raw)


def entry_digest(entry: Mapping[str, Any]) -> bytes:
    """The digest of one entry: 32 bytes."""
    return sha256(_ENTRY, canonical(entry))


def next_head(head: bytes, digest: bytes) -> bytes:
    """The head after one more entry."""
    return sha256(_HEAD, head, digest)


def read_head(value: Any, broker: SignerPublicKey, *, where: str = "head") -> Head:
    """An **unverified** signed head, checked.

    Raises:
        FormatError: malformed. SignatureError: not signed by ``broker``.
    """
    fields = check_signed(value, form=HEAD_FORMAT, key=broker, where=where)
    head = Head(
        era=fields.integer("era", low=1, high=MAX_RELEASE),
        index=fields.integer("index", low=0, high=MAX_RELEASE),
        digest=fields.hexadecimal("digest", length_bytes=DIGEST_BYTES),
        at_ms=fields.integer("at_ms", low=0, high=MAX_RELEASE),
    )
    fields.done()
    return head


def check_not_behind(known: Head, new: Head) -> None:
    """Check H-8 on two **verified** heads: ``new`` is of the same log and no shorter. Not yet that it extends
    ``known``.

    Raises:
        RollbackError: the log was cut short, written anew, or restored from a backup meanwhile.
    """
    if new.era != known.era:
        raise RollbackError(
            "the broker was restored from a backup since we last heard of it",
            check="H-8",
            expected=f"era {known.era}",
            got=f"era {new.era}",
            hint="ask its owner what the log lost, then forget the head that is kept",
        )
    if new.index < known.index or (new.index == known.index and new.digest != known.digest):
        raise RollbackError(
            "the broker's audit log was cut short or written anew",
            check="H-8",
            expected=f"entry {known.index} or later, {known.digest.hex()} among its heads",
            got=f"entry {new.index}, {new.digest.hex()}",
        )


def check_extends(known: Head, new: Head, digests: Iterable[bytes]) -> None:
    """Check H-9: ``digests`` (**unverified**), those of entries ``known.index + 1`` to ``new.index``, lead from one to
    the other.

    Raises:
        RollbackError: as :func:`check_not_behind`. HandshakeError: they do not.
    """
    check_not_behind(known, new)
    head, count = known.digest, 0
    for each in digests:
        head, count = next_head(head, each), count + 1
    if count != new.index - known.index or head != new.digest:
        raise HandshakeError(
            "the broker's audit log does not continue the one that we know",
            check="H-9",
            expected=f"{new.index - known.index} entries that lead to {new.digest.hex()}",
            got=f"{count} entries that lead to {head.hex()}",
        )


def save_head(path: Path, document: Mapping[str, Any]) -> None:
    """Keep a signed head, as the broker sent it, for :func:`load_head` and ``motte broker audit verify --head``."""
    with atomic_file(path, overwrite=True) as fd:
        os.write(fd, canonical(document) + b"\n")


def load_head(path: Path, broker: SignerPublicKey) -> Head:
    """A head that was kept.

    Raises:
        InputError: no such file. FormatError, SignatureError: not a head of this broker.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_WORD_BYTES + 1)
    except OSError as problem:
        raise InputError("cannot read a kept head", where=str(path), got=problem.strerror) from problem
    return read_head(parse(data, max_bytes=MAX_KEY_WORD_BYTES, what=str(path)), broker, where=str(path))
