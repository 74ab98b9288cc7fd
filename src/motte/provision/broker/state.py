"""An opened broker: its keys, unwrapped into this process's memory, and its database."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, select

from motte.errors import DecryptError, FormatError, InputError, ResourceError
from motte.limits import MAX_KEY_WORD_BYTES
from motte.provision.broker import log, tables
from motte.provision.broker.store import Store, put_setting, setting
from motte.provision.broker.wrapping import (
    SCRYPT_LOG2_N,
    KeyWrapper,
    Unlock,
    check_wrapper,
    new_wrapper,
    open_wrapper,
    wrapper_check,
)
from motte.seal import primitives
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey, SignerPublicKey
from motte.seal.tls import TlsIdentity
from motte.strict_json import canonical, parse

DATABASE: Final = "broker.db"
_SIGNING: Final = "signing key"
_RECIPIENT: Final = "recipient key"
_TLS: Final = "TLS key"
_SESSIONS: Final = "session root"


@dataclass(slots=True)
class Broker:
    """A broker whose secrets are open. Made by :func:`create` and :func:`open_broker`; use it in a ``with`` block.

    Attributes:
        signer: signs every answer and every head.
        recipient: bundles are sealed to it.
        sessions: the root of all session keys of leases.
    """

    folder: Path
    store: Store
    wrapper: KeyWrapper
    signer: SignerPrivateKey
    recipient: RecipientPrivateKey
    tls: TlsIdentity
    sessions: bytes = field(repr=False)

    def session_key(self, lease: bytes) -> bytes:
        """The session key of a lease: derived, so that none is stored."""
        return primitives.derived_key(self.sessions, b"broker lease " + lease)

    def close(self) -> None:
        """Forget the wrapping key and close the database."""
        self.wrapper.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def create(folder: Path, unlock: Unlock, *, scrypt_log2_n: int = SCRYPT_LOG2_N) -> Broker:
    """Make a broker in ``folder``: new keys, an empty database, the first entry of its log. Nothing is overwritten.

    Args:
        scrypt_log2_n: cost of a passphrase; lower only for tests.

    Raises:
        InputError: a broker is there already, or ``unlock`` is not usable. ResourceError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as problem:
        raise ResourceError("cannot make the folder", where=str(folder), got=problem.strerror) from problem
    path = folder / DATABASE
    if os.path.lexists(path):
        raise InputError("a broker is here already", where=str(path))
    wrapper = new_wrapper(unlock, log2_n=scrypt_log2_n)
    store = Store.create(path)
    try:
        signer, tls = SignerPrivateKey.new(), TlsIdentity.new("motte broker")
        made = {
            _SIGNING: signer.secret,
            _RECIPIENT: RecipientPrivateKey.new().secret,
            _TLS: tls.key,
            _SESSIONS: primitives.random_bytes(primitives.KEY_BYTES),
        }
        with store.write() as db:
            put_setting(db, "era", "1")
            put_setting(db, "key", str(signer.public))
            put_setting(db, "certificate", tls.certificate.decode("ascii"))
            _put_wrapper(db, wrapper)
            for name, secret in made.items():
                db.execute(tables.secrets.insert().values(name=name, wrapped=wrapper.wrap(secret, name.encode())))
            log.append(db, signer, "made", {"key": str(signer.public), "wrapping": wrapper.parameters["kind"]})
        return _opened(folder, store, wrapper)
    except BaseException:
        store.close()
        for each in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))):
            each.unlink(missing_ok=True)
        raise


def open_broker(folder: Path, unlock: Unlock) -> Broker:
    """Open the broker in ``folder``.

    Raises:
        InputError: none is there, or another way of unlocking than it was made with.
        KeyAccessError: a wrong passphrase, file or token. FormatError: not a broker's database.
    """
    store = Store(folder / DATABASE)
    try:
        with store.read() as db:
            text, check = setting(db, "wrapping"), setting(db, "wrapping_check")
        wrapper = open_wrapper(parse(text, max_bytes=MAX_KEY_WORD_BYTES, what="wrapping"), unlock)
        check_wrapper(wrapper, bytes.fromhex(check))
        return _opened(folder, store, wrapper)
    except BaseException:
        store.close()
        raise


def public_key(store: Store) -> SignerPublicKey:
    """The broker's public key, as the database says it: enough to read its log, no secret is opened."""
    with store.read() as db:
        return SignerPublicKey.parse(setting(db, "key"))


def rotate_wrapping(broker: Broker, unlock: Unlock, *, scrypt_log2_n: int = SCRYPT_LOG2_N) -> None:
    """Wrap every secret anew under another wrapping key, in one transaction; the broker goes on under it.

    The old key opens nothing of this database any more; **backups made before still open with it**.

    Raises:
        InputError, ResourceError: as :func:`create`.
    """
    old, new = broker.wrapper, new_wrapper(unlock, log2_n=scrypt_log2_n)
    with broker.store.write() as db:
        for row in db.execute(select(tables.secrets)).all():
            again = new.wrap(old.unwrap(row.wrapped, row.name.encode()), row.name.encode())
            db.execute(tables.secrets.update().where(tables.secrets.c.name == row.name).values(wrapped=again))
        for row in db.execute(select(tables.bundles)).all():
            context = kek_context(row.bundle_id, row.release)
            again = new.wrap(old.unwrap(row.wrapped_kek, context), context)
            chosen = (tables.bundles.c.bundle_id == row.bundle_id) & (tables.bundles.c.release == row.release)
            db.execute(tables.bundles.update().where(chosen).values(wrapped_kek=again))
        for row in db.execute(select(tables.runs)).all():
            context = run_context(row.run)
            again = new.wrap(old.unwrap(row.wrapped_root, context), context)
            db.execute(tables.runs.update().where(tables.runs.c.run == row.run).values(wrapped_root=again))
        _put_wrapper(db, new)
        log.append(db, broker.signer, "rotated", {"wrapping": new.parameters["kind"]})
    broker.wrapper = new
    old.close()


def unwrapped(broker: Broker, wrapped: bytes, context: bytes) -> bytes:
    """A secret of the database, opened. Secret.

    Raises:
        ResourceError: it is under another wrapping key than the one that this process opened.
    """
    try:
        return broker.wrapper.unwrap(wrapped, context)
    except DecryptError as problem:
        raise ResourceError(
            "a stored key does not open", hint="if the wrapping key was rotated meanwhile, start the broker again"
        ) from problem


def kek_context(bundle_id: bytes, release: int) -> bytes:
    """What a key-encryption key is wrapped for."""
    return b"kek " + bundle_id + release.to_bytes(8, "big")


def run_context(run: bytes) -> bytes:
    """What the root of a training run's checkpoint keys is wrapped for."""
    return b"run " + run


def _put_wrapper(db: Connection, wrapper: KeyWrapper) -> None:
    put_setting(db, "wrapping", canonical(dict(wrapper.parameters)).decode("ascii"))
    put_setting(db, "wrapping_check", wrapper_check(wrapper).hex())


def _opened(folder: Path, store: Store, wrapper: KeyWrapper) -> Broker:
    with store.read() as db:
        rows: dict[str, bytes] = {row.name: row.wrapped for row in db.execute(select(tables.secrets))}
        certificate, key = setting(db, "certificate"), setting(db, "key")

    def secret(name: str) -> bytes:
        if name not in rows:
            raise FormatError("not a broker's database", where=f"secrets.{name}")
        return wrapper.unwrap(rows[name], name.encode())

    signer = SignerPrivateKey(secret(_SIGNING))
    if str(signer.public) != key:
        raise FormatError("the broker's key is not the one that its database names", expected=key)
    tls = TlsIdentity(certificate.encode("ascii"), secret(_TLS))
    return Broker(folder, store, wrapper, signer, RecipientPrivateKey(secret(_RECIPIENT)), tls, secret(_SESSIONS))


def facts_of(value: Any) -> str:
    """Plain values as the text that a column holds."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
