"""A certificate that carries evidence: its form, and every way in which one is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from attest_makers.certificate_maker import ec_key
from attest_makers.dcap_maker import AT, Maker
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from motte.attest.cbor import Tagged, decode, encode
from motte.attest.certificates import load_der
from motte.attest.evidence import Evidence
from motte.attest.policy import AllOf, Fresh, InsecureAllowSimulated, Platform
from motte.attest.ra_tls import EVIDENCE_OID, Attester, Shown, decode_shown, encode_shown, issue_certificate
from motte.attest.ra_tls_verify import Demand, verify_peer_certificate
from motte.attest.report_data import Binding
from motte.errors import AttestationError, EvidenceError, MotteError, ResourceError
from motte.seal.primitives import new_ed25519

NOW = datetime(2030, 1, 1, tzinfo=UTC)
NONCE = b"n" * 32
SUBJECT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "worker")])


def certificate(
    key: ec.EllipticCurvePrivateKey,
    *extensions: bytes,
    issuer: x509.Name = SUBJECT,
    signer: ec.EllipticCurvePrivateKey | None = None,
    begin: timedelta = timedelta(days=-1),
    end: timedelta = timedelta(days=1),
    more: tuple[Any, ...] = (x509.BasicConstraints(ca=False, path_length=None),),
) -> bytes:
    """A certificate as a stranger may make one, with any number of extensions of evidence."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(SUBJECT)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW + begin)
        .not_valid_after(NOW + end)
    )
    for value in more:
        builder = builder.add_extension(value, critical=False)
    for value in extensions:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier(EVIDENCE_OID), value), critical=False
        )
    made = builder.sign(key if signer is None else signer, hashes.SHA384())
    return made.public_bytes(serialization.Encoding.DER)


def spki_digest(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key.public_key().public_bytes(*form)).digest()


class Worker:
    """A genuine trusted process, and whoever takes parts of what it showed."""

    def __init__(self, trusted: Any) -> None:
        self.trusted = trusted
        self.key, self.other = ec_key("genuine"), ec_key("stranger")
        self.binding = Binding(NONCE, trusted.public_key, spki_digest(self.key), trusted.configuration)
        self.evidence = trusted.issue(self.binding.report_data())
        self.value = encode_shown(Shown(self.evidence, self.binding))

    def said(self, **changes: bytes) -> bytes:
        """The genuine evidence, said to speak for something else."""
        return encode_shown(Shown(self.evidence, replace(self.binding, **changes)))

    def check_of(self, der: bytes, now: datetime = NOW, **changes: Any) -> str | None:
        nonce = changes.pop("nonce", NONCE)
        with pytest.raises((AttestationError, EvidenceError)) as caught:
            verify_peer_certificate(der, replace(self.trusted.demand, **changes), now, nonce=nonce)
        return caught.value.check


@pytest.fixture(scope="module")
def worker(trusted: Any) -> Worker:
    return Worker(trusted)


def test_the_form(trusted: Any) -> None:
    identity = issue_certificate(trusted.shown, NONCE, NOW)
    parsed = load_der(identity.der(), where="test", check="X-1")
    value = parsed.extension(EVIDENCE_OID)
    assert value is not None
    tagged = decode(value, what="test", check="X-5")
    assert isinstance(tagged, Tagged)
    assert tagged.tag == int.from_bytes(b"mott", "big")
    evidence, claims = tagged.value  # type: ignore[misc]
    assert Evidence.decode(evidence).platform == "simulated"
    # As Gramine writes it: the digest of the key as an array inside of a byte string, the algorithm by IANA's number.
    entry = bytes.fromhex("82015820") + hashlib.sha256(parsed.spki).digest()
    assert decode(claims, what="test", check="X-5") == {
        "pubkey-hash": entry,
        "nonce": NONCE,
        "motte-public-key": trusted.public_key,
        "motte-configuration": trusted.configuration,
    }
    assert parsed.subject == parsed.issuer == "CN=motte"
    assert issue_certificate(trusted.shown, NONCE, NOW).der() != identity.der()  # another key each time


def test_a_verdict(trusted: Any) -> None:
    der = issue_certificate(trusted.shown, NONCE, NOW).der()
    verdict = verify_peer_certificate(der, trusted.demand, NOW, nonce=NONCE, issued_at=NOW - timedelta(seconds=50))
    assert verdict.claims.binding is not None
    assert verdict.claims.binding.public_key == trusted.public_key
    assert verdict.claims.simulated


def test_a_bare_quote_of_sgx_stands_as_gramine_writes_it() -> None:
    maker = Maker()

    def issue(report_data: bytes) -> Evidence:
        evidence = maker.but(report_data=report_data).evidence()
        return Evidence("sgx", {"quote": evidence.documents["quote"]})

    der = issue_certificate(Attester(issue, b"k" * 32, b"c" * 32), NONCE, AT).der()
    value = load_der(der, where="test", check="X-1").extension(EVIDENCE_OID)
    assert value is not None
    assert value.startswith(bytes.fromhex("d9ea6082"))  # tag 60000, an array of two
    collateral = maker.evidence().documents["collateral"]
    anchors = replace(maker.anchors(), intel_collateral=collateral)
    policy = AllOf(InsecureAllowSimulated(), Platform(frozenset({"sgx"})), Fresh(60))
    verdict = verify_peer_certificate(der, Demand(policy, b"c" * 32, anchors), AT, nonce=NONCE)
    assert verdict.claims.platform == "sgx"
    shown = decode_shown(value)
    # Collateral has no place beside a quote in that form: such evidence takes the other one.
    more = Shown(Evidence("sgx", {**shown.evidence.documents, "collateral": collateral}), shown.binding)
    assert encode_shown(more).startswith(bytes.fromhex("da6d6f747482"))
    assert decode_shown(encode_shown(more)) == more
    # ... and a bare quote not: one piece of evidence has one form.
    twice = encode(Tagged(0x6D6F7474, (shown.evidence.encode(), decode(value, what="", check="").value[1])))  # type: ignore[union-attr, index]
    with pytest.raises(EvidenceError, match="bare quote"):
        decode_shown(twice)


def test_every_lie_has_its_check(worker: Worker) -> None:
    genuine = certificate(worker.key, worker.value)
    verify_peer_certificate(genuine, worker.trusted.demand, NOW, nonce=NONCE)
    stranger = spki_digest(worker.other)
    cases = {
        # not a certificate of the one kind
        "noise": (b"\x30\x03abc", "X-1"),
        "trailing byte": (genuine + b"\0", "X-1"),
        "another curve": (certificate(ec.generate_private_key(ec.SECP256R1()), worker.value), "X-1"),
        "two extensions": (_with_two_extensions(worker), "X-1"),
        # not its own issuer
        "another issuer": (
            certificate(worker.key, worker.value, issuer=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])),
            "X-2",
        ),
        "another signature": (certificate(worker.key, worker.value, signer=worker.other), "X-2"),
        # dates
        "expired": (certificate(worker.key, worker.value, end=timedelta(seconds=-1)), "X-3"),
        "not yet": (certificate(worker.key, worker.value, begin=timedelta(seconds=1)), "X-3"),
        # extensions
        "no evidence": (certificate(worker.key), "X-4"),
        "an authority": (
            certificate(worker.key, worker.value, more=(x509.BasicConstraints(ca=True, path_length=None),)),
            "X-4",
        ),
        "one extension more": (
            certificate(worker.key, worker.value, more=(x509.SubjectAlternativeName([x509.DNSName("bank.example")]),)),
            "X-4",
        ),
        # what it carries
        "no CBOR": (certificate(worker.key, b"evidence"), "X-5"),
        "another tag": (certificate(worker.key, encode(Tagged(60001, (b"q", b"c")))), "X-5"),
        "three": (certificate(worker.key, encode(Tagged(60000, (b"q", b"c", b"c")))), "X-5"),
        "no quote": (certificate(worker.key, encode(Tagged(60000, (b"q", b"c")))), "X-5"),
        "malformed evidence": (certificate(worker.key, encode(Tagged(0x6D6F7474, (b"{}", b"c")))), "E-1"),
        # what it is said to speak for; R-2: what it does speak for
        "another key": (certificate(worker.other, worker.value), "X-6"),
        "another key, said so": (certificate(worker.other, worker.said(tls_spki_digest=stranger)), "R-2"),
        "another nonce": (certificate(worker.key, worker.said(nonce=b"o" * 32)), "X-7"),
        "another configuration": (certificate(worker.key, worker.said(configuration_digest=b"d" * 32)), "X-8"),
        "another key for secrets": (certificate(worker.key, worker.said(public_key=b"h" * 32)), "R-2"),
    }
    found = {name: worker.check_of(der) for name, (der, _) in cases.items()}
    assert found == {name: check for name, (_, check) in cases.items()}


def _with_two_extensions(worker: Worker) -> bytes:
    """As only a stranger's own encoder makes it: a second extension of the same kind, signed again."""
    single = certificate(worker.key, worker.value, more=(x509.UnrecognizedExtension(_MARKED, b"second extension"),))
    name, marked = bytes.fromhex("0606678105050409"), bytes.fromhex("0606678105050463")
    assert single.count(marked) == 1
    return _signed_again(single.replace(marked, name), worker.key)


_MARKED = x509.ObjectIdentifier("2.23.133.5.4.99")


def _signed_again(der: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """``der`` with a signature over its (patched) body."""
    body_start = 4
    length = int.from_bytes(der[body_start + 2 : body_start + 4], "big")
    body = der[body_start : body_start + 4 + length]
    algorithm = bytes.fromhex("300a06082a8648ce3d040303")
    signature = b"\x00" + key.sign(body, ec.ECDSA(hashes.SHA384()))
    content = body + algorithm + b"\x03" + bytes([len(signature)]) + signature
    return b"\x30\x82" + len(content).to_bytes(2, "big") + content


def test_two_extensions_are_refused_because_there_are_two(worker: Worker) -> None:
    der = _with_two_extensions(worker)
    with pytest.raises(EvidenceError) as caught:
        verify_peer_certificate(der, worker.trusted.demand, NOW, nonce=NONCE)
    assert "uplicate" in str(caught.value.got)
    # The same certificate with one of them under its own name is well-signed, and refused for the unknown one alone.
    marked = certificate(worker.key, worker.value, more=(x509.UnrecognizedExtension(_MARKED, b"second extension"),))
    assert worker.check_of(marked) == "X-4"


def test_what_the_verifier_demands(worker: Worker) -> None:
    der = certificate(worker.key, worker.value)
    trusted = worker.trusted
    assert worker.check_of(der, policy=trusted.strict) == "P-1"  # SIMULATED, without the permission
    assert worker.check_of(der, anchors=None) == "S-2"
    assert worker.check_of(der, configuration_digest=b"d" * 32) == "X-8"
    assert worker.check_of(der, nonce=b"o" * 32) == "X-7"  # replayed to another question
    late = trusted.demand
    with pytest.raises(AttestationError) as caught:
        verify_peer_certificate(der, late, NOW, nonce=NONCE, issued_at=NOW - timedelta(seconds=61))
    assert caught.value.check == "P-11"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"measurement": b"x" * 32}, "P-3"),
        ({"debug": True}, "P-6"),
        ({"private": new_ed25519()[0]}, "S-2"),
    ]
    for change, check in changes:
        evidence = trusted.issue(worker.binding.report_data(), **change)
        value = encode_shown(Shown(evidence, worker.binding))
        assert worker.check_of(certificate(worker.key, value)) == check


def test_evidence_has_one_encoding(worker: Worker) -> None:
    evidence = decode_shown(worker.value).evidence
    fields = json.loads(evidence.encode())
    turned = {name: fields[name] for name in sorted(fields, reverse=True)}
    other = json.dumps(turned, separators=(",", ":")).encode()
    assert Evidence.decode(other) == evidence
    tagged = decode(worker.value, what="evidence extension", check="X-5")
    assert isinstance(tagged, Tagged)
    assert isinstance(tagged.value, tuple)
    with pytest.raises(EvidenceError, match="another encoding") as caught:
        decode_shown(encode(Tagged(tagged.tag, (other, tagged.value[1]))))
    assert caught.value.check == "X-5"


@given(st.integers(0, 1 << 20), st.integers(1, 255))
def test_flipped_bytes_are_refused_and_never_crash(worker: Worker, place: int, flip: int) -> None:
    value = bytearray(worker.value)
    value[place % len(value)] ^= flip
    try:
        shown = decode_shown(bytes(value))
    except (EvidenceError, AttestationError):
        return
    assert encode_shown(shown) == bytes(value)
    der = certificate(worker.key, bytes(value))
    with pytest.raises(MotteError):
        verify_peer_certificate(der, worker.trusted.demand, NOW, nonce=NONCE)


def test_evidence_that_does_not_fit_a_certificate_is_said_so(trusted: Any) -> None:
    large = Attester(lambda _: Evidence("snp", {"report": bytes(60_000)}), b"k" * 32, b"c" * 32)
    with pytest.raises(ResourceError, match="too large for a certificate"):
        issue_certificate(large, NONCE, NOW)
