"""Report data: the 64 bytes by which evidence speaks for one nonce, one key, one TLS certificate and one configuration.

This is the only place that computes them. Every field is length-prefixed, so no two different bindings share an
encoding, and the domain string keeps the digest apart from every other hash of this project. Numbers of the checks:
docs/spec/evidence.md, R-1 and R-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from motte.attest.evidence import REPORT_DATA_BYTES
from motte.digests import sha512
from motte.errors import AttestationError, EvidenceError

NONCE_BYTES: Final = 32
PUBLIC_KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 32
_DOMAIN: Final = b"motte-report-data-1\x00"


def report_data(*, nonce: bytes, public_key: bytes, tls_spki_digest: bytes, configuration_digest: bytes) -> bytes:
    """The 64 bytes of report data: SHA-512 over the domain string and each field behind its length (8 bytes).

    Args:
        nonce: 32 bytes of whoever will verify; used once.
        public_key: the X25519 key (32 bytes) to which keys are released.
        tls_spki_digest: SHA-256 of the SubjectPublicKeyInfo of the TLS certificate (32 bytes); empty: no TLS.
        configuration_digest: :meth:`motte.attest.configuration.RunConfiguration.digest` (32 bytes).

    Raises:
        EvidenceError: a field has another length (check R-1).
    """
    pieces = [_DOMAIN]
    for name, value, lengths in (
        ("nonce", nonce, (NONCE_BYTES,)),
        ("public_key", public_key, (PUBLIC_KEY_BYTES,)),
        ("tls_spki_digest", tls_spki_digest, (DIGEST_BYTES, 0)),
        ("configuration_digest", configuration_digest, (DIGEST_BYTES,)),
    ):
        if len(value) not in lengths:
            raise EvidenceError(
                "a field of the report data has a wrong length",
                check="R-1",
                where=name,
                expected=" or ".join(f"{length} bytes" for length in lengths),
                got=f"{len(value)} bytes",
            )
        pieces += [len(value).to_bytes(8, "big"), value]
    return sha512(*pieces)


@dataclass(frozen=True, slots=True)
class Binding:
    """What evidence is said to speak for; the fields are those of :func:`report_data`.

    A binding that somebody sends is **unverified** until :meth:`require` has compared it with verified report data.

    Raises:
        EvidenceError: a field has another length (check R-1).
    """

    nonce: bytes
    public_key: bytes
    tls_spki_digest: bytes
    configuration_digest: bytes

    def __post_init__(self) -> None:
        self.report_data()

    def report_data(self) -> bytes:
        """The 64 bytes that evidence for this binding carries."""
        return report_data(
            nonce=self.nonce,
            public_key=self.public_key,
            tls_spki_digest=self.tls_spki_digest,
            configuration_digest=self.configuration_digest,
        )

    def require(self, found: bytes) -> None:
        """Return only if the **verified** report data ``found`` is this binding's.

        Raises:
            AttestationError: it is not (check R-2): another nonce, key, TLS certificate or configuration.
        """
        expected = self.report_data()
        if len(found) != REPORT_DATA_BYTES or found != expected:
            raise AttestationError(
                "the evidence was made for another nonce, key, TLS certificate or configuration",
                check="R-2",
                expected=expected.hex()[:32] + "...",
                got=found.hex()[:32] + "...",
                hint="ask for a new nonce and new evidence; if it happens again, somebody relays evidence",
            )
