"""The enclave's side: every step once and in order; no answer is believed but the broker's own to this question."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from motte.errors import FormatError, HandshakeError, KeyAccessError, MotteError, RollbackError
from motte.provision.address import BrokerAddress
from motte.provision.broker import answers, state
from motte.provision.broker.wrapping import Unlock
from motte.provision.handshake import Handshake
from motte.provision.heads import Head, start_digest
from motte.provision.messages import Ask, Challenge, Proof, Target
from motte.provision.release import Lease, ReleaseTerms, encode_release, seal_release
from motte.provision.statements import sign
from motte.seal import SignerPrivateKey, open_bundle
from motte.strict_json import canonical


def test_keys_open_the_bundle_and_nothing_else(place, header) -> None:
    release, _ = place.obtain(header)
    with open_bundle(place.folder.parent / "3-model.motte", signer=place.owner.public) as bundle:
        with bundle.unlock_with(release.data_keys) as unlocked:
            assert unlocked.manifest() == b"manifest"
            assert unlocked.open_part_chunk(0, 0) == b"part one"
        with pytest.raises(KeyAccessError):
            bundle.unlock_with(release.data_keys[:-1])
    assert release.target == Target.of(header)
    assert release.lease.expires_at > time.time() + 3000
    assert release.tls_spki_digest == b"\x05" * 32
    for secret in (*release.data_keys, release.session):
        assert repr(secret)[2:-1] not in repr(release)
    kept = place.verify(release.head)
    assert kept == release.head


@pytest.mark.parametrize("steps", ["b", "c", "aa", "ac", "aba", "abb", "abcc", "abca"])
def test_wrong_order_is_an_error_and_ends_it(place, header, steps) -> None:
    handshake = place.handshake(header)
    answer = b""

    def take(step: str) -> None:
        nonlocal answer
        if step == "a":
            answer = answers.ask(place.broker, handshake.ask())
        elif step == "b":
            answer = answers.prove(place.broker, handshake.prove(answer))
        else:
            handshake.finish(answer)

    for step in steps[:-1]:
        take(step)
    with pytest.raises(HandshakeError) as found:
        take(steps[-1])
    assert found.value.check == "H-1"
    assert handshake.state == "failed"
    with pytest.raises(HandshakeError):
        handshake.ask()


def test_answers_of_another_moment_are_refused(place, header) -> None:
    one, two = place.handshake(header), place.handshake(header)
    first, second = (answers.ask(place.broker, each.ask()) for each in (one, two))
    proofs = one.prove(first), two.prove(second)
    taken = [answers.prove(place.broker, each) for each in proofs]
    # The other's answer: another nonce, another key.
    with pytest.raises(HandshakeError) as found:
        one.finish(taken[1])
    assert found.value.check == "H-5"
    two.finish(taken[1])
    # A challenge in the place of an answer, and an answer in the place of a challenge.
    for step, answer in (("prove", taken[0]), ("finish", first)):
        third = place.handshake(header)
        challenge = answers.ask(place.broker, third.ask())
        if step == "finish":
            third.prove(challenge)
        with pytest.raises(HandshakeError) as found:
            getattr(third, step)(answer)
        assert found.value.check == "H-2"


def test_every_altered_answer_is_refused(place, header) -> None:
    def altered(data: bytes):
        value = json.loads(data)
        yield data[:-1], "H-2"
        yield data.replace(b'"', b"'", 1), "H-2"
        yield canonical({**value, "more": 1}), "H-3"
        for name in value:
            missing = {key: each for key, each in value.items() if key != name}
            yield canonical(missing), "H-2" if name in ("format", "signature") else "H-3"
            if isinstance(value[name], str) and name not in ("format", "signature"):
                turned = ("0" if value[name][0] != "0" else "1") + value[name][1:]
                yield canonical({**value, name: turned}), "H-3"
        yield canonical({**value, "signature": "00" * 64}), "H-3"
        yield canonical(sign({key: each for key, each in value.items() if key != "signature"}, stranger)), "H-3"

    stranger = SignerPrivateKey.new()
    handshake = place.handshake(header)
    challenge = answers.ask(place.broker, handshake.ask())
    answer = answers.prove(place.broker, handshake.prove(challenge))
    for wrong, check in altered(challenge):
        fresh = place.handshake(header)
        fresh.ask()
        with pytest.raises(HandshakeError) as found:
            fresh.prove(wrong)
        assert found.value.check == check
    expected, private = handshake._expected, handshake._private
    for wrong, check in altered(answer):
        fresh = place.handshake(header)
        fresh._state, fresh._expected, fresh._private = "proved", expected, private
        fresh._known_head = handshake._known_head
        with pytest.raises(HandshakeError) as found:
            fresh.finish(wrong)
        assert found.value.check == check
    assert handshake.finish(answer)[0].data_keys


@pytest.mark.parametrize(
    ("what", "check"),
    [
        ("nonce", "H-5"),
        ("target", "H-5"),
        ("public_key", "H-5"),
        ("lease over", "H-7"),
        ("sealed under another lease", "H-6"),
        ("sealed for another nonce", "H-6"),
        ("one key too few", "H-2"),
        ("log behind", "H-8"),
        ("a run that nobody asked for", "H-5"),
    ],
)
def test_a_broker_that_answers_wrongly_under_its_own_key(place, header, what, check) -> None:
    """Signed by the right key, and still not an answer to this question: a bug there, or one of its keys stolen."""
    handshake = place.handshake(header)
    handshake.prove(answers.ask(place.broker, handshake.ask()))
    expected = handshake._expected
    lease = Lease(b"l" * 16, 1 if what == "lease over" else int(time.time()) + 60)
    terms = ReleaseTerms(expected.target, expected.nonce, expected.public_key, lease)
    if what in ("nonce", "public_key"):
        terms = replace(terms, **{what: b"\x09" * 32})
    if what == "target":
        terms = replace(terms, target=replace(expected.target, release=4))
    inside = terms
    if what == "sealed under another lease":
        inside = replace(terms, lease=replace(lease, expires_at=lease.expires_at + 1))
    if what == "sealed for another nonce":
        inside = replace(terms, nonce=b"\x09" * 32)
    keys = [b"k" * 32] * (len(header.sections) - (what == "one key too few"))
    sealed = seal_release(
        replace(inside, public_key=expected.public_key), session=b"s" * 32, data_keys=keys, checkpoint_key=None
    )
    if what == "a run that nobody asked for":
        from motte.provision.messages import Resume
        from motte.provision.release import RunState

        terms = replace(terms, resume=Resume(b"r" * 16, 0), run_state=RunState(0, 0))
    newest = place.verify()
    index = 1 if what == "log behind" else newest.index
    head = Head(1, index, newest.digest, newest.at_ms).signed(place.broker.signer)
    with pytest.raises((HandshakeError, RollbackError)) as found:
        handshake.finish(encode_release(terms, sealed, head, place.broker.signer))
    assert found.value.check == check


def test_a_challenge_for_another_bundle_or_of_an_older_log(place, header) -> None:
    document = place.broker
    other = replace(Target.of(header), release=9)
    newest = place.verify()
    for target, index, kind, check in (
        (other, newest.index, HandshakeError, "H-4"),
        (Target.of(header), 1, RollbackError, "H-8"),
    ):
        handshake = place.handshake(header, head=newest)
        handshake.ask()
        head = Head(1, index, newest.digest, newest.at_ms)
        challenge = Challenge(b"n" * 32, target, 1 << 33, head, head.signed(document.signer))
        with pytest.raises(kind) as found:
            handshake.prove(challenge.encode(document.signer))
        assert found.value.check == check


def test_another_broker_of_the_same_kind_is_not_ours(place, header, tmp_path) -> None:
    with state.create(tmp_path / "other", Unlock(key_file=tmp_path / "other.key")) as other:
        handshake = Handshake(other.signer.public, header, place.enclave(header))
        with pytest.raises(HandshakeError) as found:
            handshake.prove(answers.ask(place.broker, handshake.ask()))
        assert found.value.check == "H-3"
        assert start_digest(other.signer.public) != start_digest(place.broker.signer.public)


def test_messages_read_what_they_write_and_nothing_else(place, header) -> None:
    handshake = place.handshake(header)
    asked = handshake.ask()
    assert Ask.decode(asked).encode() == asked
    proof = handshake.prove(answers.ask(place.broker, asked))
    assert Proof.decode(proof).encode() == proof
    for data, read in ((asked, Ask.decode), (proof, Proof.decode)):
        value = json.loads(data)
        for name in value:
            for wrong in (None, 1, -1, True, "x", [], {}, 1e400):
                if value[name] == wrong or (name == "release" and type(wrong) is int and wrong >= 0):
                    continue
                changed = {**value, name: wrong}
                with pytest.raises(FormatError):
                    read(json.dumps(changed).encode())
            with pytest.raises(FormatError):
                read(canonical({key: each for key, each in value.items() if key != name}))
        with pytest.raises(FormatError):
            read(canonical({**value, "more": 1}))


def test_an_address_is_one_word(place) -> None:
    address = BrokerAddress("127.0.0.1", 8443, b"\x01" * 32, place.broker.signer.public)
    for each in (address, replace(address, host="::1")):
        assert BrokerAddress.parse(str(each)) == each
    text = str(address)
    for wrong in (
        "",
        "https://h:1",
        text.replace("https", "http"),
        text.replace(":8443", ""),
        text[:-1],
        text + "0",
        text.replace("#", "/path#"),
        text.replace("sha256:", "sha1:"),
        "https://[::1#x+y",
        text * 9,
    ):
        with pytest.raises(MotteError):
            BrokerAddress.parse(wrong)
