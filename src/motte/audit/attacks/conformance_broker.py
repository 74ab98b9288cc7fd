"""Lies to and of a key broker: evidence, relays, replays, rollbacks; and what an enclave must not believe.

A broker of its own is made for it, with a policy that takes simulated evidence; nothing crosses a network. Evidence of
hardware vendors needs their signatures, which nobody can make on the spot: the tests of this project hold such vectors.
Not tried here, since they need a clock that is moved: nonces and leases that ran out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.evidence import Evidence
from motte.attest.platforms import simulated
from motte.attest.policy_text import loads
from motte.attest.report_data import report_data
from motte.audit.attacks.conformance import Trial
from motte.errors import (
    AttestationError,
    EvidenceError,
    FormatError,
    HandshakeError,
    KeyAccessError,
    MotteError,
    RollbackError,
    TrustError,
)
from motte.provision.broker import answers, enroll, policies, state
from motte.provision.broker.wrapping import Unlock
from motte.provision.handshake import Enclave, Handshake
from motte.provision.heads import Head
from motte.provision.messages import Ask, Challenge, Proof, Target
from motte.provision.registration import Registration
from motte.provision.release import Lease, ReleaseTerms, encode_release, seal_release
from motte.provision.statements import sign
from motte.seal import BytesPart, SignerPrivateKey, open_bundle, write_bundle
from motte.seal.header import BundleHeader
from motte.seal.primitives import new_ed25519, new_x25519
from motte.strict_json import canonical, parse

_MEASUREMENT: Final = b"\x07" * 32
_TLS: Final = b"\x05" * 32
_POLICY: Final = """{"format": "motte-policy-1", "policy": {"all_of": [
    {"insecure_allow_simulated": {}}, {"platform": ["simulated"]}, {"not_debug": {}},
    {"measurement": {"allowed": ["MEASUREMENT"]}}, {"fresh": {"max_age_s": 120}}]}}""".replace(
    "MEASUREMENT", _MEASUREMENT.hex()
)
Alter = Callable[[Proof], Proof]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A broker, the owner of one model, and a genuine enclave's key."""

    folder: Path
    broker: state.Broker
    owner: SignerPrivateKey
    development_key: bytes

    def register(self, release: int, model: str) -> BundleHeader:
        path = self.folder / f"{release}-{model}.motte"
        parts = [BytesPart(b"part one"), BytesPart(b"part two" * 100)]
        recipients = [self.broker.recipient.public]
        write_bundle(path, release=release, manifest=b"m", parts=parts, recipients=recipients, signer=self.owner)
        with open_bundle(path, signer=self.owner.public) as bundle:
            header: BundleHeader = bundle.header
        made = Registration(
            header=header, model=model, policy="development", configurations=(self.configuration(header),)
        )
        enroll.register(self.broker, made, self.broker.recipient)
        return header

    def configuration(self, header: BundleHeader, **other: Any) -> bytes:
        base = RunConfiguration(
            bundle_id=header.bundle_id,
            release=header.release,
            signer=header.signer.raw,
            broker=str(self.broker.signer.public),
            scheme="trusted",
            placement="all inside",
            noise="gaussian 1.0",
            integrity="on",
        )
        return replace(base, **other).digest()

    def enclave(self, header: BundleHeader, *, configuration: bytes | None = None, **evidence: Any) -> Enclave:
        given = {"private": self.development_key, "measurement": _MEASUREMENT, **evidence}
        chosen = self.configuration(header) if configuration is None else configuration
        return Enclave(lambda data: simulated.issue(data, **given), _TLS, chosen)

    def handshake(self, header: BundleHeader, enclave: Enclave | None = None, **how: Any) -> Handshake:
        return Handshake(self.broker.signer.public, header, enclave or self.enclave(header), **how)

    def ask(self, handshake: Handshake) -> bytes:
        return answers.ask(self.broker, handshake.ask())

    def prove(self, proof: bytes) -> bytes:
        """What the broker answers.

        Raises:
            MotteError: its refusal.
        """
        try:
            return answers.prove(self.broker, proof)
        except answers.Refused as refusal:
            raise refusal.problem from refusal


def broker_trials(folder: Path) -> Iterator[Trial]:
    """All of them; the broker lives below ``folder`` until the last one was taken."""
    private, public = new_ed25519()
    owner = SignerPrivateKey.new()
    with state.create(folder / "broker", Unlock(key_file=folder / "wrapping.key")) as broker:
        place = _Place(folder, broker, owner, private)
        anchors = Anchors(simulated_signers=(public,))
        policies.set_policy(broker, "development", loads(_POLICY), anchors=anchors, owners=[owner.public])
        header = place.register(3, "model")
        yield Trial("an honest handshake", "H7", (), None, partial(_whole, place, header))
        yield from _evidence(public, private)
        yield from _proofs(place, header)
        yield from _moments(place, header)
        yield from _answers(place, header)
        yield from _registrations(place)


def _whole(place: _Place, header: BundleHeader) -> None:
    handshake = place.handshake(header)
    release, _ = handshake.finish(place.prove(handshake.prove(place.ask(handshake))))
    if len(release.data_keys) != len(header.sections):
        raise RuntimeError("another number of keys than sections")


# --- evidence ---------------------------------------------------------------------------------------------------------
def _evidence(public: bytes, private: bytes) -> Iterator[Trial]:
    from datetime import UTC, datetime

    from motte.seal.primitives import sign_header, sign_simulated_evidence

    good = simulated.issue(b"r" * 64, private=private, measurement=_MEASUREMENT)
    statement = good.documents["statement"]
    named, stranger = Anchors(simulated_signers=(public,)), new_ed25519()

    def verified(anchors: Anchors = named, **changes: bytes) -> Callable[[], object]:
        evidence = Evidence("simulated", {**good.documents, **changes})
        return lambda: simulated.verify(evidence, anchors, datetime.now(UTC))

    def said(key: str, value: object) -> Callable[[], object]:
        altered = canonical({**_fields(statement), key: value})
        return verified(statement=altered, signature=sign_simulated_evidence(private, altered))

    small = bytes(32)
    lies: tuple[tuple[str, str, Callable[[], object]], ...] = (
        ("where no key is named", "S-2", verified(Anchors())),
        ("under another key", "S-2", verified(public=stranger[1])),
        ("signed by another", "S-3", verified(signature=sign_simulated_evidence(stranger[0], statement))),
        ("signed under another domain", "S-3", verified(signature=sign_header(private, statement))),
        ("altered after signing", "S-3", verified(statement=statement.replace(b'"debug":false', b'"debug":true '))),
        ("a short signature", "S-1", verified(signature=b"short")),
        ("a document that nobody knows", "E-2", verified(more=b"x")),
        (
            "a key for which anyone can sign",
            "S-3",
            verified(Anchors(simulated_signers=(small,)), public=small, signature=bytes(64)),
        ),
        ("a statement that it is no simulation", "S-4", said("simulated", False)),
        ("a negative version", "S-4", said("svn", -1)),
        ("report data of another length", "S-4", said("report_data", "00")),
    )
    yield Trial("honest simulated evidence", "H2", (), None, verified())
    for name, check, act in lies:
        yield Trial(f"evidence: {name}", "H2", (AttestationError, EvidenceError), check, act)


def _fields(data: bytes) -> dict[str, Any]:
    found = parse(data, max_bytes=1 << 20, what="statement")
    return dict(found) if isinstance(found, dict) else {}


# --- what a broker refuses --------------------------------------------------------------------------------------------
def _proofs(place: _Place, header: BundleHeader) -> Iterator[Trial]:
    def shown(enclave: Enclave, alter: Alter = lambda proof: proof) -> Callable[[], object]:
        def act() -> None:
            handshake = place.handshake(header, enclave)
            proof = Proof.decode(handshake.prove(place.ask(handshake)))
            place.prove(alter(proof).encode())

        return act

    genuine = place.enclave(header)
    for name, check, enclave in (
        ("another measurement", "P-3", place.enclave(header, measurement=b"\x08" * 32)),
        ("a debug enclave", "P-6", place.enclave(header, debug=True)),
        ("a key that nobody named", "S-2", place.enclave(header, private=new_ed25519()[0])),
    ):
        yield Trial(f"keys for {name}", "H7", (AttestationError,), check, shown(enclave))
    for chosen in (
        {"noise": None},
        {"integrity": "off"},
        {"peers": ("tcp:another-accelerator",)},
        {"broker": "another broker"},
        {"scheme": "accelerator"},
        {"placement": "all outside"},
    ):
        enclave = place.enclave(header, configuration=place.configuration(header, **chosen))
        name = "keys for a configuration with another " + next(iter(chosen))
        yield Trial(name, "H1", (KeyAccessError,), "K-9", shown(enclave))
    _, mine = new_x25519()

    def old(proof: Proof) -> Proof:
        data = report_data(
            nonce=bytes(32),
            public_key=proof.public_key,
            tls_spki_digest=proof.tls_spki_digest,
            configuration_digest=proof.configuration_digest,
        )
        return replace(proof, evidence=genuine.issue(data))

    relays: tuple[tuple[str, str, type[MotteError], Alter], ...] = (
        ("its own key", "R-2", AttestationError, lambda proof: replace(proof, public_key=mine)),
        ("a key that everybody can open", "K-8", KeyAccessError, lambda proof: replace(proof, public_key=bytes(32))),
        ("another certificate", "R-2", AttestationError, lambda proof: replace(proof, tls_spki_digest=b"\x01" * 32)),
        ("evidence for an earlier nonce", "R-2", AttestationError, old),
        ("a nonce of its own", "K-5", KeyAccessError, lambda proof: replace(proof, nonce=b"\x01" * 32)),
    )
    for name, check, kind, alter in relays:
        yield Trial(f"a relay that puts in {name}", "H1", (kind,), check, shown(genuine, alter))


def _moments(place: _Place, header: BundleHeader) -> Iterator[Trial]:
    def replayed() -> None:
        handshake = place.handshake(header)
        proof = handshake.prove(place.ask(handshake))
        place.prove(proof)
        place.prove(proof)

    def used_up() -> None:
        handshake = place.handshake(header)
        proof = Proof.decode(handshake.prove(place.ask(handshake)))
        try:
            place.prove(replace(proof, tls_spki_digest=b"\x01" * 32).encode())
        except AttestationError:
            place.prove(proof.encode())

    def diverted() -> None:
        other = place.register(4, "another")
        handshake = place.handshake(header)
        proof = Proof.decode(handshake.prove(place.ask(handshake)))
        place.prove(replace(proof, target=Target.of(other)).encode())

    yield Trial("a proof given twice", "H7", (KeyAccessError,), "K-6", replayed)
    yield Trial("a nonce after a wrong proof", "H7", (KeyAccessError,), "K-6", used_up)
    yield Trial("a nonce of another bundle", "H7", (KeyAccessError,), "K-7", diverted)
    target = Target.of(header)
    for name, wrong in (
        ("bundle", replace(target, bundle_id=bytes(16))),
        ("release", replace(target, release=4)),
        ("header", replace(target, header_digest=bytes(32))),
    ):
        act = partial(answers.ask, place.broker, Ask(wrong).encode())
        yield Trial(f"a question about an unknown {name}", "H7", (KeyAccessError,), "K-2", act)
    for name, data in (
        ("nothing", b""),
        ("an empty object", b"{}"),
        ("no text", b"\xff"),
        ("a field too many", Ask(target).encode()[:-1] + b',"x":1}'),
    ):
        act = partial(answers.ask, place.broker, data)
        yield Trial(f"a question that is malformed: {name}", "H7", (FormatError,), None, act)


def _registrations(place: _Place) -> Iterator[Trial]:
    """Rollbacks and revocations; last, since they change what the broker gives."""
    old = place.register(5, "rolled")

    def below_the_floor() -> None:
        place.register(6, "rolled")
        place.ask(place.handshake(old))

    yield Trial("keys for a release below the lowest", "H9", (RollbackError,), "K-3", below_the_floor)
    yield Trial(
        "a release registered below the lowest",
        "H9",
        (RollbackError, TrustError),
        None,
        partial(place.register, 2, "rolled"),
    )
    lower = partial(enroll.revoke, place.broker, "rolled", min_release=1)
    yield Trial("a lowest release that is lowered", "H9", (RollbackError,), None, lower)

    def revoked() -> None:
        header = place.register(1, "revoked")
        enroll.revoke(place.broker, "revoked")
        place.ask(place.handshake(header))

    yield Trial("keys of a model that was revoked", "H9", (KeyAccessError, RollbackError), "K-4", revoked)


# --- what an enclave refuses ------------------------------------------------------------------------------------------
def _answers(place: _Place, header: BundleHeader) -> Iterator[Trial]:
    def order(steps: str) -> Callable[[], object]:
        def act() -> None:
            handshake, answer = place.handshake(header), b""
            for step in steps:
                if step == "a":
                    answer = place.ask(handshake)
                elif step == "b":
                    answer = place.prove(handshake.prove(answer))
                else:
                    handshake.finish(answer)

        return act

    for steps in ("b", "c", "aa", "ac", "abcc", "abca"):
        yield Trial(f"steps in the order {steps}", "H11", (HandshakeError,), "H-1", order(steps))
    stranger = SignerPrivateKey.new()
    for name, check, alter in (
        ("cut off", "H-2", lambda data: data[:-1]),
        ("a field too many", "H-3", lambda data: canonical({**_fields(data), "more": 1})),
        ("no signature", "H-3", lambda data: canonical({**_fields(data), "signature": "00" * 64})),
        ("signed by another", "H-3", lambda data: canonical(_signed(data, stranger))),
        ("another nonce", "H-3", lambda data: canonical({**_fields(data), "nonce": "00" * 32})),
    ):
        for step in ("challenge", "release"):
            act = partial(_altered, place, header, step, alter)
            yield Trial(f"{step}: {name}", "H11", (HandshakeError,), check, act)
    for name, check in _OWN_LIES:
        kinds: tuple[type[MotteError], ...] = (HandshakeError, RollbackError)
        yield Trial(
            f"release by the broker's own key: {name}", "H11", kinds, check, partial(_own_lie, place, header, name)
        )
    yield Trial(
        "challenge for another bundle", "H11", (HandshakeError,), "H-4", partial(_own_challenge, place, header, 9, 0)
    )
    name = "challenge of a log that is behind"
    yield Trial(name, "H10", (RollbackError,), "H-8", partial(_own_challenge, place, header, header.release, 1))
    yield Trial("another handshake's release", "H11", (HandshakeError,), "H-5", partial(_exchanged, place, header))


def _signed(data: bytes, by: SignerPrivateKey) -> dict[str, Any]:
    return sign({key: value for key, value in _fields(data).items() if key != "signature"}, by)


def _altered(place: _Place, header: BundleHeader, step: str, alter: Callable[[bytes], bytes]) -> None:
    handshake = place.handshake(header)
    challenge = place.ask(handshake)
    if step == "challenge":
        handshake.prove(alter(challenge))
    else:
        handshake.finish(alter(place.prove(handshake.prove(challenge))))


def _exchanged(place: _Place, header: BundleHeader) -> None:
    one, two = place.handshake(header), place.handshake(header)
    proofs = [each.prove(place.ask(each)) for each in (one, two)]
    released = [place.prove(each) for each in proofs]
    one.finish(released[1])


_OWN_LIES: Final = (
    ("another nonce", "H-5"),
    ("another public key", "H-5"),
    ("another bundle", "H-5"),
    ("a lease that is over", "H-7"),
    ("sealed under another lease", "H-6"),
    ("one key too few", "H-2"),
    ("a log that is behind", "H-8"),
)


def _own_lie(place: _Place, header: BundleHeader, what: str) -> None:
    """Signed by the right key, and still not an answer to this question."""
    handshake = place.handshake(header)
    proof = Proof.decode(handshake.prove(place.ask(handshake)))
    lease = Lease(b"l" * 16, 1 if what == "a lease that is over" else int(time.time()) + 60)
    inside = terms = ReleaseTerms(proof.target, proof.nonce, proof.public_key, lease)
    if what == "another nonce":
        inside = terms = replace(terms, nonce=b"\x09" * 32)
    elif what == "another public key":
        terms = replace(terms, public_key=b"\x09" * 32)
    elif what == "another bundle":
        inside = terms = replace(terms, target=replace(proof.target, release=header.release + 1))
    elif what == "sealed under another lease":
        inside = replace(terms, lease=replace(lease, expires_at=lease.expires_at + 1))
    keys = [b"k" * 32] * (len(header.sections) - (what == "one key too few"))
    sealed = seal_release(inside, session=b"s" * 32, data_keys=keys, checkpoint_key=None)
    newest = _newest(place)
    index = 1 if what == "a log that is behind" else newest.index
    head = Head(newest.era, index, newest.digest, newest.at_ms).signed(place.broker.signer)
    handshake.finish(encode_release(terms, sealed, head, place.broker.signer))


def _own_challenge(place: _Place, header: BundleHeader, release: int, index: int) -> None:
    newest = _newest(place)
    handshake = place.handshake(header, known_head=newest)
    handshake.ask()
    target = replace(Target.of(header), release=release)
    head = Head(newest.era, index or newest.index, newest.digest, newest.at_ms)
    challenge = Challenge(b"n" * 32, target, 1 << 33, head, head.signed(place.broker.signer))
    handshake.prove(challenge.encode(place.broker.signer))


def _newest(place: _Place) -> Head:
    from motte.provision.broker import log

    with place.broker.store.read() as db:
        return log.verify(db, place.broker.signer.public, ())
