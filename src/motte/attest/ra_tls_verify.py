"""Verify a certificate that carries evidence: from the bytes that a TLS peer showed to a verdict about it.

The order is that of docs/spec/attested_channel.md: the certificate (X-1 to X-4), what it carries (X-5), that it speaks
for this key, nonce and configuration (X-6 to X-8), and then the evidence itself (:func:`motte.attest.verify.verify`).
That the peer **holds** the key is TLS's to show: a verdict counts for a connection whose handshake used this
certificate, and for no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from motte.attest.anchors import Anchors
from motte.attest.certificates import Certificate, key_kind, load_der, spki_digest, verify_chain, verify_self_signed
from motte.attest.policy import Policy, with_nonce
from motte.attest.ra_tls import EVIDENCE_OID, Shown, decode_shown
from motte.attest.verify import Verdict, verify
from motte.errors import AttestationError, EvidenceError

CURVE: Final = "secp384r1"
_BASIC_CONSTRAINTS: Final = "2.5.29.19"
_WHERE: Final = "peer certificate"


@dataclass(frozen=True, slots=True)
class Demand:
    """What one end of a channel demands of the other.

    Attributes:
        policy: decides on the verified claims; ``Fresh`` in it gets the nonce of the connection.
        configuration_digest: of the one configuration (32 bytes) that the other end must be committed to.
        anchors: roots and reference data; None: the vendors' own roots.
    """

    policy: Policy
    configuration_digest: bytes
    anchors: Anchors | None = None


def verify_peer_certificate(
    der: bytes, demand: Demand, now: datetime, *, nonce: bytes, issued_at: datetime | None = None
) -> Verdict:
    """Verify the **unverified** certificate ``der`` that a peer showed for ``nonce``.

    Args:
        now: aware, UTC, by our own clock.
        nonce: 32 bytes that we gave this peer, for this connection and no other.
        issued_at: when we did; None: now.

    Returns:
        the verdict; ``verdict.claims.binding.public_key`` is the key to which secrets for this peer can be sealed.

    Raises:
        EvidenceError, AttestationError: refused; ``check`` has the number: X-1 to X-8, or one of the evidence's own.
        ResourceError: collateral was to be fetched, and could not be.
    """
    certificate = load_der(der, where=_WHERE, check="X-1")
    kind = key_kind(certificate.spki, where=_WHERE, check="X-1")
    if kind != CURVE:
        raise EvidenceError("a key of another kind", check="X-1", where=_WHERE, expected=CURVE, got=kind)
    verify_self_signed(certificate, check="X-2")
    # Alone it is its own path: what is left of the rules are its dates and that nothing critical is unknown.
    verify_chain(certificate, (), (certificate,), now, check="X-4", expiry_check="X-3")
    shown = decode_shown(_extension(certificate))
    _about_us(shown, certificate, nonce, demand.configuration_digest)
    policy = with_nonce(demand.policy, nonce, now if issued_at is None else issued_at)
    return verify(shown.evidence, policy, now, anchors=demand.anchors, binding=shown.binding)


def _extension(certificate: Certificate) -> bytes:
    unknown = certificate.extension_names() - {EVIDENCE_OID, _BASIC_CONSTRAINTS}
    if unknown or certificate.is_ca:
        got = ", ".join(sorted(unknown)) or "a certificate authority"
        raise AttestationError("not a certificate for evidence alone", check="X-4", where=_WHERE, got=got)
    value = certificate.extension(EVIDENCE_OID)
    if value is None:
        raise AttestationError(
            "the certificate carries no evidence",
            check="X-4",
            where=_WHERE,
            expected=f"an extension {EVIDENCE_OID}",
            got="none",
            hint="the other side does not run as an attested process",
        )
    return value


def _about_us(shown: Shown, certificate: Certificate, nonce: bytes, configuration_digest: bytes) -> None:
    binding = shown.binding
    for check, what, expected, got in (
        ("X-6", "another key than the certificate's", spki_digest(certificate.spki), binding.tls_spki_digest),
        ("X-7", "another nonce than ours", nonce, binding.nonce),
        ("X-8", "another configuration than the owner's", configuration_digest, binding.configuration_digest),
    ):
        if expected != got:
            raise AttestationError(
                f"the evidence is said to speak for {what}",
                check=check,
                where=_WHERE,
                expected=expected.hex(),
                got=got.hex(),
                hint="a certificate of another connection, or of another run",
            )
