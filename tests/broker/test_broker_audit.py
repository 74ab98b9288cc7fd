"""The audit log: append-only, chained, signed; what was cut off or written anew is found by who kept a head."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError

from motte.errors import HandshakeError, MotteError, ResourceError, RollbackError, TrustError
from motte.provision.broker import log, tables
from motte.provision.broker.store import Store
from motte.provision.heads import Head, check_extends, load_head, save_head
from motte.seal import SignerPrivateKey
from motte.strict_json import canonical


def tampered(place, *orders: str) -> None:
    """Change the file behind the broker's back, triggers and all."""
    with sqlite3.connect(place.folder / "broker.db") as db:
        db.execute("DROP TRIGGER audit_no_update")
        db.execute("DROP TRIGGER audit_no_delete")
        for each in orders:
            db.execute(each)
    db.close()


@pytest.mark.parametrize(
    ("order", "check"),
    [
        ('UPDATE audit SET entry = replace(entry, \'"kind":"released"\', \'"kind":"refused_"\') WHERE idx = 4', "A-2"),
        ("UPDATE audit SET entry = replace(entry, '\"at_ms\":1', '\"at_ms\":2') WHERE idx = 2", "A-2"),
        ("UPDATE audit SET head = zeroblob(32) WHERE idx = 3", "A-2"),
        ("DELETE FROM audit WHERE idx = 3", "A-1"),
        ("DELETE FROM audit WHERE idx = 1", "A-1"),
        ("DELETE FROM audit", "A-1"),
        ("UPDATE audit SET idx = idx + 1 WHERE idx = 5", "A-1"),
        ("UPDATE audit SET signed_head = replace(signed_head, '\"era\":1', '\"era\":2') WHERE idx = 5", "A-3"),
        ("UPDATE audit SET signed_head = (SELECT signed_head FROM audit WHERE idx = 4) WHERE idx = 5", "A-4"),
        ("DELETE FROM audit WHERE idx = 5", "A-5"),
    ],
)
def test_what_was_altered_is_found(place, header, order, check) -> None:
    place.obtain(header)
    release, _ = place.obtain(header)
    assert place.verify(release.head).index == 5
    tampered(place, order)
    with pytest.raises(TrustError) as found:
        place.verify(release.head)
    assert found.value.check == check


def test_a_log_written_anew_with_the_brokers_own_key_is_found_by_a_clients_head(place, header) -> None:
    release, _ = place.obtain(header)
    tampered(place, "DELETE FROM audit WHERE idx = 4")
    with place.broker.store.write() as db:
        log.append(db, place.broker.signer, "refused", {"check": "K-9"})
    assert place.verify().index == 4
    with pytest.raises(TrustError) as found:
        place.verify(release.head)
    assert found.value.check == "A-5"


def test_the_store_itself_refuses_to_change_the_log(place) -> None:
    for order in (tables.audit.delete(), tables.audit.update().values(entry="{}")):
        with pytest.raises(ResourceError, match="cannot be written") as found, place.broker.store.write() as db:
            db.execute(order)
        assert isinstance(found.value.__cause__, IntegrityError)
    place.verify()


def test_a_client_checks_that_the_log_goes_on(place, header) -> None:
    first, _ = place.obtain(header)
    for _ in range(3):
        last, _ = place.obtain(header)
    with place.broker.store.read() as db:
        path = log.digests(db, first.head.index, last.head.index)
    check_extends(first.head, last.head, path)
    check_extends(last.head, last.head, [])
    for wrong in (path[:-1], path[::-1], [*path, path[0]], [b"\x00" * 32] * len(path), []):
        with pytest.raises(HandshakeError) as found:
            check_extends(first.head, last.head, wrong)
        assert found.value.check == "H-9"
    for known, new in (
        (last.head, first.head),
        (replace(last.head, digest=bytes(32)), last.head),
        (replace(first.head, era=2), last.head),
    ):
        with pytest.raises(RollbackError) as behind:
            check_extends(known, new, path)
        assert behind.value.check == "H-8"


def test_a_kept_head_is_checked_when_it_is_read(place, header, tmp_path) -> None:
    release, _ = place.obtain(header)
    save_head(tmp_path / "kept", release.head_document)
    assert load_head(tmp_path / "kept", place.broker.signer.public) == release.head
    forged = Head(1, 99, bytes(32), 0).signed(SignerPrivateKey.new())
    (tmp_path / "forged").write_bytes(canonical(forged))
    for name in ("forged", "absent"):
        with pytest.raises(MotteError):
            load_head(tmp_path / name, place.broker.signer.public)


def test_a_file_that_is_no_store_or_open_to_others(place, tmp_path) -> None:
    (tmp_path / "x.db").write_bytes(b"nothing of the kind" * 1000)
    (tmp_path / "x.db").chmod(0o600)
    with pytest.raises(MotteError, match="not a broker's database"):
        Store(tmp_path / "x.db")
    (place.folder / "broker.db").chmod(0o644)
    with pytest.raises(MotteError, match="by others"):
        Store(place.folder / "broker.db")
