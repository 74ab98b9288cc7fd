"""A TLS certificate that carries evidence for its own key (RA-TLS): its form, and how a trusted process makes one.

The form is that of interoperable RA-TLS, as Gramine writes it: an X.509 extension (2.23.133.5.4.9, TCG DICE) with a
tagged CBOR array of two byte strings: the evidence, and the claims that the evidence is about. What differs is the
report data: ours also binds a key for HPKE and the run's configuration (:mod:`motte.attest.report_data`). The form and
its checks, X-1 to X-8: docs/spec/attested_channel.md; who verifies: :mod:`motte.attest.ra_tls_verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from motte.attest.cbor import Tagged, Value, decode, encode
from motte.attest.evidence import Evidence
from motte.attest.report_data import DIGEST_BYTES, NONCE_BYTES, PUBLIC_KEY_BYTES, Binding
from motte.errors import EvidenceError, ResourceError
from motte.limits import MAX_CERTIFICATE_BYTES

if TYPE_CHECKING:
    from motte.seal.tls import TlsIdentity

Issue = Callable[[bytes], Evidence]
"""Makes evidence over 64 bytes of report data: ``issue`` of a platform, its devices bound."""

EVIDENCE_OID: Final = "2.23.133.5.4.9"
"""``tcg-dice-conceptual-message-wrapper``, called tagged evidence before."""
QUOTE_TAG: Final = 60000
"""A bare quote of SGX or TDX (registered)."""
EVIDENCE_TAG: Final = 0x6D6F7474
"""Evidence of motte with any documents: ``mott``; **not registered**."""
CERTIFICATE_VALID: Final = timedelta(days=1)
"""Before and after the making: a certificate is for one connection, and clocks of two machines differ."""
_NAME: Final = "motte"
_SHA256: Final = 1
"""Its number among IANA's named information hash algorithms."""
_SPKI_CLAIM, _NONCE_CLAIM = "pubkey-hash", "nonce"
_PUBLIC_KEY_CLAIM, _CONFIGURATION_CLAIM = "motte-public-key", "motte-configuration"
_TEE_TYPE: Final = slice(4, 8)
_TEE: Final = {bytes(4): "sgx", b"\x81\0\0\0": "tdx"}
"""Kinds of quote by the TEE type in their header."""
_TYPES: Final = {platform: kind for kind, platform in _TEE.items()}


@dataclass(frozen=True, slots=True)
class Attester:
    """What one end of a channel shows of itself.

    Attributes:
        issue: makes its evidence.
        public_key: X25519 (32 bytes), to which keys may be sealed; its private half stays where it was made.
        configuration_digest: of :class:`motte.attest.configuration.RunConfiguration`, from what the owner signed.
    """

    issue: Issue
    public_key: bytes
    configuration_digest: bytes


@dataclass(frozen=True, slots=True)
class Shown:
    """What a certificate says: evidence and what it is said to speak for. **Unverified**, all of it."""

    evidence: Evidence
    binding: Binding


def issue_certificate(shown: Attester, nonce: bytes, now: datetime) -> TlsIdentity:
    """A new key (P-384), and a self-signed certificate with evidence about it, ``nonce`` and what ``shown`` commits to.

    Args:
        nonce: 32 bytes of whoever will verify.
        now: aware; the certificate is in force for :data:`CERTIFICATE_VALID` before and after it.

    Raises:
        EvidenceError: a field of the binding has another length (R-1).
        ResourceError: no evidence can be made here, or it is too large for a certificate. Also what ``issue`` raises.
    """
    from motte.seal.tls import TlsKey

    key = TlsKey.new()
    binding = Binding(nonce, shown.public_key, key.spki_digest, shown.configuration_digest)
    evidence = shown.issue(binding.report_data())
    value = encode_shown(Shown(evidence, binding))
    identity = key.certify(
        _NAME, extension=(EVIDENCE_OID, value), begin=now - CERTIFICATE_VALID, end=now + CERTIFICATE_VALID
    )
    size = len(identity.der())
    if size > MAX_CERTIFICATE_BYTES:
        raise ResourceError(
            "the evidence is too large for a certificate",
            expected=f"at most {MAX_CERTIFICATE_BYTES} bytes",
            got=f"{size} bytes",
            hint="bring less along: a verifier can have collateral from its own sources",
        )
    return identity


def encode_shown(shown: Shown) -> bytes:
    """The value of the extension."""
    binding = shown.binding
    claims = encode(
        {
            _SPKI_CLAIM: encode((_SHA256, binding.tls_spki_digest)),
            _NONCE_CLAIM: binding.nonce,
            _PUBLIC_KEY_CLAIM: binding.public_key,
            _CONFIGURATION_CLAIM: binding.configuration_digest,
        }
    )
    quote = _bare_quote(shown.evidence)
    if quote is not None:
        return encode(Tagged(QUOTE_TAG, (quote, claims)))
    return encode(Tagged(EVIDENCE_TAG, (shown.evidence.encode(), claims)))


def decode_shown(data: bytes) -> Shown:
    """Read the **unverified** value of the extension.

    Raises:
        EvidenceError: another form (X-5), or malformed evidence in it (E-1, R-1).
    """
    tagged = decode(data, what="evidence extension", check="X-5")
    if not isinstance(tagged, Tagged) or tagged.tag not in (QUOTE_TAG, EVIDENCE_TAG):
        raise _wrong("no evidence of a known kind", f"tag {QUOTE_TAG} or {EVIDENCE_TAG}")
    if not isinstance(tagged.value, tuple) or len(tagged.value) != 2:
        raise _wrong("not evidence and claims", "an array of two")
    raw, claims = _as_bytes(tagged.value[0], "evidence"), _as_bytes(tagged.value[1], "claims")
    if tagged.tag == QUOTE_TAG:
        evidence = _of_quote(raw)
    else:
        evidence = Evidence.decode(raw)
        if evidence.encode() != raw:
            # Strict JSON knows more than one order of fields, and more than one spelling of a text.
            raise _wrong("evidence in another encoding than its own", "canonical JSON")
        if _bare_quote(evidence) is not None:
            raise _wrong("a bare quote in the form for other evidence", f"tag {QUOTE_TAG}")
    return Shown(evidence, _read_claims(claims))


def _bare_quote(evidence: Evidence) -> bytes | None:
    """The quote, where it is all that the evidence holds and says itself which platform made it."""
    quote = evidence.documents.get("quote", b"")
    plain = evidence.documents.keys() == {"quote"} and quote[_TEE_TYPE] == _TYPES.get(evidence.platform)
    return quote if plain else None


def _of_quote(quote: bytes) -> Evidence:
    platform = _TEE.get(quote[_TEE_TYPE])
    if platform is None:
        raise _wrong("not a quote of SGX or TDX", "TEE type 0 or 0x81")
    return Evidence(platform, {"quote": quote})


def _read_claims(data: bytes) -> Binding:
    claims = decode(data, what="claims", check="X-5")
    names = {_SPKI_CLAIM, _NONCE_CLAIM, _PUBLIC_KEY_CLAIM, _CONFIGURATION_CLAIM}
    if not isinstance(claims, dict) or claims.keys() != names:
        raise _wrong("not the claims of this protocol", ", ".join(sorted(names)))
    entry = decode(_as_bytes(claims[_SPKI_CLAIM], _SPKI_CLAIM), what=_SPKI_CLAIM, check="X-5")
    if not isinstance(entry, tuple) or len(entry) != 2 or entry[0] != _SHA256:
        raise _wrong("not a digest by SHA-256", "[1, digest]")
    return Binding(
        nonce=_as_bytes(claims[_NONCE_CLAIM], _NONCE_CLAIM, NONCE_BYTES),
        public_key=_as_bytes(claims[_PUBLIC_KEY_CLAIM], _PUBLIC_KEY_CLAIM, PUBLIC_KEY_BYTES),
        tls_spki_digest=_as_bytes(entry[1], _SPKI_CLAIM, DIGEST_BYTES),
        configuration_digest=_as_bytes(claims[_CONFIGURATION_CLAIM], _CONFIGURATION_CLAIM, DIGEST_BYTES),
    )


def _as_bytes(value: Value, name: str, length: int | None = None) -> bytes:
    if not isinstance(value, bytes) or (length is not None and len(value) != length):
        raise _wrong(f"{name} has another type or length", "bytes" if length is None else f"{length} bytes")
    return value


def _wrong(message: str, expected: str) -> EvidenceError:
    return EvidenceError(message, check="X-5", where="evidence extension", expected=expected)
