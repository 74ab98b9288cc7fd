"""What gets no keys, each refused by name, logged, and its nonce used up."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from motte.attest.report_data import report_data
from motte.errors import FormatError, KeyAccessError, RollbackError
from motte.provision.broker import answers, enroll, tables
from motte.provision.handshake import Enclave, Handshake
from motte.provision.messages import Ask, Proof, Target
from motte.seal.primitives import new_x25519


def refused(place, enclave: Enclave, header, change=lambda proof: proof) -> answers.Refused:
    """A handshake whose proof is changed on its way: the refusal, which must stand in the log."""
    handshake = Handshake(place.broker.signer.public, header, enclave)
    proof = Proof.decode(handshake.prove(answers.ask(place.broker, handshake.ask())))
    with pytest.raises(answers.Refused) as found:
        answers.prove(place.broker, change(proof).encode())
    entry = place.entries()[-1]
    assert (entry.kind, entry.facts["check"]) == ("refused", found.value.problem.check)
    assert found.value.head_document["index"] == entry.index
    # Used up, whatever was wrong: the unchanged proof comes too late now.
    with pytest.raises(answers.Refused) as late:
        answers.prove(place.broker, proof.encode())
    assert late.value.problem.check in ("K-6", "K-3", "K-4")
    return found.value


@pytest.mark.parametrize(
    ("other", "check"),
    [
        ({"measurement": b"\x08" * 32}, "P-3"),
        ({"debug": True}, "P-6"),
        ({"private": b"\x11" * 32}, "S-2"),
    ],
)
def test_other_evidence(place, header, other, check) -> None:
    found = refused(place, place.enclave(header, **other), header)
    assert found.problem.check == check


@pytest.mark.parametrize(
    "chosen",
    [
        {"noise": None},
        {"integrity": "off"},
        {"peers": ("tcp:another-accelerator",)},
        {"broker": "another broker"},
        {"scheme": "accelerator"},
        {"placement": "all outside"},
        {"ranks": 2},
    ],
)
def test_a_configuration_that_the_owner_did_not_sign(place, header, chosen) -> None:
    enclave = replace(place.enclave(header), configuration_digest=place.configuration(header, **chosen))
    assert refused(place, enclave, header).problem.check == "K-9"


def test_a_relay_that_puts_in_its_own_key_or_words(place, header) -> None:
    _, mine = new_x25519()
    enclave = place.enclave(header)
    assert refused(place, enclave, header, lambda p: replace(p, public_key=mine)).problem.check == "R-2"
    assert refused(place, enclave, header, lambda p: replace(p, public_key=bytes(32))).problem.check == "K-8"
    assert refused(place, enclave, header, lambda p: replace(p, tls_spki_digest=b"\x01" * 32)).problem.check == "R-2"
    assert refused(place, enclave, header, lambda p: replace(p, tls_spki_digest=b"")).problem.check == "R-2"

    # Evidence that was made for an earlier nonce.
    def old(proof: Proof) -> Proof:
        data = report_data(
            nonce=bytes(32),
            public_key=proof.public_key,
            tls_spki_digest=proof.tls_spki_digest,
            configuration_digest=proof.configuration_digest,
        )
        return replace(proof, evidence=place.issue()(data))

    assert refused(place, enclave, header, old).problem.check == "R-2"


def test_a_nonce_serves_one_bundle(place, header) -> None:
    place.register(place.seal(4), model="another")
    other = Target.of(place.header(place.folder.parent / "4-model.motte"))
    assert refused(place, place.enclave(header), header, lambda p: replace(p, target=other)).problem.check == "K-7"


def test_a_used_an_expired_and_an_unknown_nonce(place, header, monkeypatch) -> None:
    handshake = place.handshake(header)
    proof = handshake.prove(answers.ask(place.broker, handshake.ask()))
    answers.prove(place.broker, proof)
    for _ in range(3):
        with pytest.raises(answers.Refused) as found:
            answers.prove(place.broker, proof)
        assert found.value.problem.check == "K-6"
    # One entry for the release, one for all replays: a replayer cannot fill the disk.
    assert [each.kind for each in place.entries()][-2:] == ["released", "refused"]
    count = len(place.entries())
    unknown = replace(Proof.decode(proof), nonce=b"\x00" * 32)
    with pytest.raises(KeyAccessError) as stranger:
        answers.prove(place.broker, unknown.encode())
    assert (stranger.value.check, len(place.entries())) == ("K-5", count)
    late = place.handshake(header)
    proof = late.prove(answers.ask(place.broker, late.ask()))
    now = time.time()
    monkeypatch.setattr(answers.time, "time", lambda: now + answers.NONCE_LIFE_S + 1)
    with pytest.raises(answers.Refused) as found:
        answers.prove(place.broker, proof)
    assert found.value.problem.check == "K-5"


def test_evidence_older_than_the_policy_wants(place, header) -> None:
    handshake = place.handshake(header)
    proof = handshake.prove(answers.ask(place.broker, handshake.ask()))
    with place.broker.store.write() as db:
        db.execute(tables.nonces.update().values(issued_at_ms=tables.nonces.c.issued_at_ms - 121_000))
    with pytest.raises(answers.Refused) as found:
        answers.prove(place.broker, proof)
    assert found.value.problem.check == "P-11"


def test_one_nonce_releases_once_however_many_ask_at_once(place, header) -> None:
    handshake = place.handshake(header)
    proof = handshake.prove(answers.ask(place.broker, handshake.ask()))
    got: list[object] = []

    def one() -> None:
        try:
            got.append(answers.prove(place.broker, proof))
        except answers.Refused as refusal:
            got.append(refusal.problem.check)

    threads = [threading.Thread(target=one) for _ in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(map(str, got))[:11] == ["K-6"] * 11
    assert sum(isinstance(each, bytes) for each in got) == 1
    assert [each.kind for each in place.entries()].count("released") == 1


def test_old_releases_get_no_keys_and_the_floor_never_falls(place) -> None:
    old, new = place.seal(3), place.seal(5)
    place.register(old)
    place.obtain(place.header(old))
    held = place.handshake(place.header(old))
    proof = held.prove(answers.ask(place.broker, held.ask()))
    place.register(new)
    # Asked before the floor rose, answered after.
    with pytest.raises(answers.Refused) as late:
        answers.prove(place.broker, proof)
    assert late.value.problem.check == "K-3"
    with pytest.raises(RollbackError) as found:
        place.obtain(place.header(old))
    assert found.value.check == "K-3"
    place.obtain(place.header(new))
    with pytest.raises(RollbackError):
        place.register(place.seal(4))
    with pytest.raises(RollbackError):
        enroll.revoke(place.broker, "model", min_release=2)
    kept = place.seal(6)
    place.register(kept, min_release=5)
    place.obtain(place.header(new))
    place.obtain(place.header(kept))


@pytest.mark.parametrize("how", [{"release": 3}, {}, {"min_release": 4}])
def test_revoked_keys_are_not_given(place, header, how) -> None:
    release, _ = place.obtain(header)
    head = enroll.revoke(place.broker, "model", **how)
    assert place.entries()[-1].facts["leases_ended"] == 1
    with pytest.raises((KeyAccessError, RollbackError)) as found:
        place.obtain(header)
    assert found.value.check in ("K-3", "K-4")
    assert head["index"] == place.verify(release.head).index


def test_an_unknown_or_altered_bundle_and_a_malformed_question(place, header) -> None:
    target = Target.of(header)
    for wrong in (
        replace(target, bundle_id=bytes(16)),
        replace(target, release=4),
        replace(target, header_digest=bytes(32)),
    ):
        with pytest.raises(KeyAccessError) as found:
            answers.ask(place.broker, Ask(wrong).encode())
        assert found.value.check == "K-2"
    for data in (b"", b"{}", b"[]", b"\xff", Ask(target).encode()[:-1] + b',"x":1}'):
        with pytest.raises(FormatError):
            answers.ask(place.broker, data)
        with pytest.raises(FormatError):
            answers.prove(place.broker, data)


def test_open_nonces_are_bounded(place, header, monkeypatch) -> None:
    monkeypatch.setattr(answers, "MAX_OPEN_NONCES", 3)
    asked = Ask(Target.of(header)).encode()
    for _ in range(3):
        answers.ask(place.broker, asked)
    from motte.errors import ResourceError

    with pytest.raises(ResourceError):
        answers.ask(place.broker, asked)
    now = time.time_ns()
    monkeypatch.setattr(answers.time, "time_ns", lambda: now + (answers.NONCE_LIFE_S + 1) * 10**9)
    answers.ask(place.broker, asked)
