"""X.509 certificates, revocation lists and bare signatures of attestation: read strictly, verified up to a given root.

The only file of this package that calls ``cryptography``. The path rules are those of RFC 5280, section 6, cut down to
what the vendors of trusted hardware use, and written out here because a verifier of web certificates refuses what they
issue (no subject alternative name, dates in the year 9999, a serial number of zero):

* every certificate is valid at the given time, the root included;
* issuer and subject names match and the issuer's key verifies the signature: ECDSA, RSA PKCS #1 v1.5 or RSA-PSS, with
  SHA-256 or longer, RSA keys of at least 2048 bits, the NIST curves P-256, P-384 and P-521;
* an issuer is marked as a CA, its path length holds, and its key usage allows certificates;
* no critical extension is unknown;
* a certificate that has no place in the path is refused: what is sent is used, or it is an error.

Whoever calls names the number of the check (docs/spec/evidence.md) under which a failure is reported.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import ExtensionOID

from motte.digests import sha256
from motte.errors import AttestationError, EvidenceError
from motte.limits import MAX_CERTIFICATE_BYTES, MAX_EVIDENCE_BYTES

HashName = Literal["sha256", "sha384", "sha512"]
MAX_CHAIN_CERTIFICATES: Final = 8
"""Certificates of one PEM document, and of one path."""

_HASHES: Final[dict[str, Callable[[], hashes.HashAlgorithm]]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
_CURVES: Final[dict[str, Callable[[], ec.EllipticCurve]]] = {
    "secp256r1": ec.SECP256R1,
    "secp384r1": ec.SECP384R1,
    "secp521r1": ec.SECP521R1,
}
_MIN_RSA_BITS: Final = 2048
_MAX_RSA_BITS: Final = 8192
_KNOWN_CRITICAL: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS.dotted_string, ExtensionOID.KEY_USAGE.dotted_string})
_PEM_BLOCK: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----\r?\n((?:[A-Za-z0-9+/]+\r?\n)*[A-Za-z0-9+/]+=?=?\r?\n)-----END CERTIFICATE-----"
)
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_quiet_lock = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """One X.509 certificate, read and **unverified** until :func:`verify_chain` returned a path with it.

    Attributes:
        der: its bytes. spki: its public key (SubjectPublicKeyInfo, DER, re-encoded).
        subject, issuer: names as in RFC 4514. serial: its number (AMD issues zero).
        not_before, not_after: UTC.
        where: what an error calls it.
    """

    der: bytes
    spki: bytes
    subject: str
    issuer: str
    serial: int
    not_before: datetime
    not_after: datetime
    where: str
    _parsed: x509.Certificate = field(repr=False)
    _extensions: x509.Extensions = field(repr=False)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of :attr:`der`: 32 bytes."""
        return sha256(self.der)

    def extension(self, oid: str) -> bytes | None:
        """The raw value (DER) of the extension with the dotted ``oid`` that ``cryptography`` has no reader for.

        None: there is none.
        """
        for each in self._extensions:
            if each.oid.dotted_string == oid and isinstance(each.value, x509.UnrecognizedExtension):
                return each.value.value
        return None

    def extended_key_usage(self) -> frozenset[str]:
        """Dotted object identifiers of its extended key usage; empty where it has none."""
        for each in self._extensions:
            if isinstance(each.value, x509.ExtendedKeyUsage):
                return frozenset(oid.dotted_string for oid in each.value)
        return frozenset()

    def extension_names(self) -> frozenset[str]:
        """Dotted object identifiers of all its extensions."""
        return frozenset(each.oid.dotted_string for each in self._extensions)

    @property
    def names_a_revocation_list(self) -> bool:
        """Whether it says where a revocation list that covers it is published."""
        return any(isinstance(each.value, x509.CRLDistributionPoints) for each in self._extensions)

    @property
    def is_ca(self) -> bool:
        """Whether it may issue others."""
        return any(isinstance(each.value, x509.BasicConstraints) and each.value.ca for each in self._extensions)

    def directory_names(self) -> dict[str, str]:
        """Attributes of the directory names in its subject alternative name, by dotted object identifier.

        A TPM's endorsement certificate says there who made the TPM. An attribute that occurs twice is left out: which
        of the two counts would be the reader's guess.
        """
        found: list[tuple[str, str]] = []
        for each in self._extensions:
            if isinstance(each.value, x509.SubjectAlternativeName):
                for name in each.value.get_values_for_type(x509.DirectoryName):
                    found += [(part.oid.dotted_string, str(part.value)) for part in name]
        names = [oid for oid, _ in found]
        return {oid: value for oid, value in found if names.count(oid) == 1}

    def common_name(self) -> str:
        """The subject's common name; an empty string where it has none, or more than one."""
        names = self._parsed.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return str(names[0].value) if len(names) == 1 else ""


# --- reading ------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    # AMD's serial numbers are zero and some vendors' names are too long: cryptography warns, and what counts is
    # checked here. The filters are the process's, so one thread at a time.
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_der(data: bytes, *, where: str, check: str) -> Certificate:
    """Read one **unverified** certificate in DER, nothing before or after it.

    Raises:
        EvidenceError: not a certificate, with an unknown key type, a weak one, or a larger one than the limits.
    """
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise EvidenceError("a certificate is too large", check=check, where=where, got=f"{len(data)} bytes")
    try:
        with _quiet():
            parsed = x509.load_der_x509_certificate(data)
            if not data.endswith(b"\x00" + parsed.signature):
                # A bit string may say that its last bits are unused; then two encodings would be one certificate.
                raise ValueError("unused bits in the signature")
            return Certificate(
                der=data,
                spki=_spki_of(parsed.public_key(), where=where, check=check),
                subject=parsed.subject.rfc4514_string(),
                issuer=parsed.issuer.rfc4514_string(),
                serial=parsed.serial_number,
                not_before=parsed.not_valid_before_utc,
                not_after=parsed.not_valid_after_utc,
                where=where,
                _parsed=parsed,
                _extensions=parsed.extensions,
            )
    except _UNREADABLE as problem:
        raise EvidenceError("not a certificate", check=check, where=where, got=_short(problem)) from problem


def load_pem(data: bytes, *, where: str, check: str) -> Certificate:
    """Read exactly one **unverified** certificate in PEM.

    Raises:
        EvidenceError: none, several, or something else around it.
    """
    found = load_pem_chain(data, where=where, check=check)
    if len(found) != 1:
        raise EvidenceError("not one certificate", check=check, where=where, got=f"{len(found)} certificates")
    return found[0]


def load_pem_chain(data: bytes, *, where: str, check: str) -> tuple[Certificate, ...]:
    """Read 1 to 8 **unverified** certificates in PEM, in their order; only white space may stand between them.

    Raises:
        EvidenceError: something else.
    """
    if len(data) > MAX_CHAIN_CERTIFICATES * MAX_CERTIFICATE_BYTES:
        raise EvidenceError("certificates are too large", check=check, where=where, got=f"{len(data)} bytes")
    blocks, end = [], 0
    for match in _PEM_BLOCK.finditer(data):
        if data[end : match.start()].strip():
            break
        blocks.append(match.group(1))
        end = match.end()
    if data[end:].strip(b"\x00\r\n\t ") or not 0 < len(blocks) <= MAX_CHAIN_CERTIFICATES:
        raise EvidenceError(
            "not a list of PEM certificates",
            check=check,
            where=where,
            expected=f"1 to {MAX_CHAIN_CERTIFICATES} certificates and nothing else",
            got=f"{len(blocks)} certificates, then something else" if data[end:].strip() else f"{len(blocks)}",
        )
    return tuple(
        load_der(_decoded(block, where, check), where=f"{where}[{index}]", check=check)
        for index, block in enumerate(blocks)
    )


def _decoded(block: bytes, where: str, check: str) -> bytes:
    try:
        return base64.b64decode(block.replace(b"\r", b"").replace(b"\n", b""), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise EvidenceError("not base64", check=check, where=where, got=_short(problem)) from problem


def _spki_of(key: object, *, where: str, check: str) -> bytes:
    # Anything but RSA and the NIST curves is refused here, so that no later step meets another kind.
    on_curve = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    rsa_sized = isinstance(key, rsa.RSAPublicKey) and _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS
    if not (on_curve or rsa_sized) or not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise EvidenceError(
            "a public key of a kind or size that is not accepted",
            check=check,
            where=where,
            expected=f"RSA of {_MIN_RSA_BITS} to {_MAX_RSA_BITS} bits, or ECDSA on {', '.join(_CURVES)}",
            got=f"{type(key).__name__} {getattr(key, 'key_size', '')}".strip(),
        )
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _short(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}"[:120]


# --- paths --------------------------------------------------------------------------------------------------------


def verify_chain(
    leaf: Certificate,
    intermediates: Sequence[Certificate],
    roots: Sequence[Certificate],
    now: datetime,
    *,
    check: str,
    expiry_check: str | None = None,
    allow_critical: frozenset[str] = frozenset(),
) -> tuple[Certificate, ...]:
    """Verify that ``leaf`` leads to one of the **pinned** ``roots``, and return the path: leaf first, root last.

    Args:
        intermediates: **unverified**, in any order; a copy of a root may be among them, and is ignored.
        roots: trusted because the caller pinned them; nothing about them is believed from the evidence.
        now: timezone-aware.
        check: number for every failure but dates; ``expiry_check`` for those (default: the same).
        allow_critical: dotted object identifiers of critical extensions that the caller interprets itself.

    Raises:
        AttestationError: no path, a path that breaks a rule of this file's head, or a certificate left over.
    """
    trusted = {root.der for root in roots}
    unused = [each for each in intermediates if each.der not in trusted]
    if len(unused) > MAX_CHAIN_CERTIFICATES:
        raise AttestationError("too many certificates", check=check, where=leaf.where, got=str(len(unused)))
    path = [leaf]
    while path[-1].der not in trusted:
        issuer = _issuer_of(path[-1], (*roots, *unused), check=check)
        path.append(issuer)
        if issuer in unused:
            unused.remove(issuer)
    if unused:
        raise AttestationError(
            "a certificate has no place in the chain", check=check, where=unused[0].where, got=unused[0].subject[:200]
        )
    for depth, each in enumerate(path):
        _no_unknown_critical(each, allow_critical, check)
        if depth:
            _may_issue(each, below=depth - 1, check=check)
        _valid_at(each, now, expiry_check or check)
    return tuple(path)


def verify_self_signed(certificate: Certificate, *, check: str) -> None:
    """Return only if ``certificate`` names itself as its issuer and is signed by its own key.

    Raises:
        AttestationError: it is not.
    """
    problem = _issued_by(certificate, certificate)
    if certificate.subject != certificate.issuer or problem is not None:
        got = "another issuer" if problem is None else _short(problem)
        raise AttestationError("not signed by its own key", check=check, where=certificate.where, got=got)


def _issuer_of(child: Certificate, candidates: Sequence[Certificate], *, check: str) -> Certificate:
    named = [each for each in candidates if each is not child and each.subject == child.issuer]
    problem: BaseException | None = None
    for each in named:
        problem = _issued_by(child, each)
        if problem is None:
            return each
    if problem is not None:
        raise AttestationError(
            "a certificate is not signed by the issuer that it names",
            check=check,
            where=child.where,
            expected=f"a signature by {named[-1].subject}"[:200],
            got=_short(problem),
        )
    raise AttestationError(
        "a chain ends at none of the pinned roots",
        check=check,
        where=child.where,
        expected=f"a certificate of {child.issuer}"[:200],
        got=", ".join(each.subject for each in candidates)[:200] or "none",
        hint="the evidence comes from another vendor or product, or its root has to be given",
    )


def _issued_by(child: Certificate, issuer: Certificate) -> BaseException | None:
    """None: it is; otherwise what is in the way."""
    try:
        with _quiet():
            algorithm = child._parsed.signature_hash_algorithm
            if algorithm is None or algorithm.name not in _HASHES:
                return ValueError(f"signed with {algorithm.name if algorithm else 'no hash'}")
            child._parsed.verify_directly_issued_by(issuer._parsed)
    except (InvalidSignature, *_UNREADABLE) as problem:
        return problem
    return None


def _no_unknown_critical(each: Certificate, allowed: frozenset[str], check: str) -> None:
    for extension in each._extensions:
        name = extension.oid.dotted_string
        if extension.critical and name not in _KNOWN_CRITICAL | allowed:
            raise AttestationError("an unknown critical extension", check=check, where=each.where, got=name)


def _may_issue(each: Certificate, *, below: int, check: str) -> None:
    """``below``: intermediates between it and the leaf."""
    constraints: x509.BasicConstraints | None = None
    usage: x509.KeyUsage | None = None
    for extension in each._extensions:
        if isinstance(extension.value, x509.BasicConstraints):
            constraints = extension.value
        elif isinstance(extension.value, x509.KeyUsage):
            usage = extension.value
    if constraints is None or not constraints.ca:
        raise AttestationError("an issuer is not marked as a CA", check=check, where=each.where)
    if constraints.path_length is not None and below > constraints.path_length:
        raise AttestationError(
            "the chain is longer than an issuer allows",
            check=check,
            where=each.where,
            expected=f"at most {constraints.path_length} below it",
            got=str(below),
        )
    if usage is not None and not usage.key_cert_sign:
        raise AttestationError("an issuer's key is not for certificates", check=check, where=each.where)


def _valid_at(each: Certificate, now: datetime, check: str) -> None:
    if not each.not_before <= now <= each.not_after:
        raise AttestationError(
            "a certificate is not valid at this time",
            check=check,
            where=each.where,
            expected=f"{each.not_before:%Y-%m-%d %H:%M} to {each.not_after:%Y-%m-%d %H:%M} UTC",
            got=f"{now:%Y-%m-%d %H:%M}",
        )


# --- revocation ---------------------------------------------------------------------------------------------------


def verify_not_revoked(
    lists: Sequence[bytes],
    path: Sequence[Certificate],
    now: datetime,
    *,
    required: Sequence[Certificate],
    check: str,
) -> datetime | None:
    """Check a **verified** path against **unverified** revocation lists (RFC 5280, section 5; DER).

    A list of an issuer that is not in the path is about other machines and is skipped. One of an issuer in the path
    must be signed by it, in force at ``now``, and complete: a delta or partial list is refused, as is one without an
    end.

    Args:
        required: certificates of the path that some list must cover; empty: absence is no error.

    Returns:
        when the first of the lists that were used expires (UTC); None: none was used.

    Raises:
        EvidenceError: not a revocation list.
        AttestationError: not signed by its issuer, not in force, a certificate of the path is on it, or a required
            certificate is covered by none.
    """
    covered: set[bytes] = set()
    ends: list[datetime] = []
    for index, data in enumerate(lists):
        where = f"revocation list {index}"
        try:
            with _quiet():
                if len(data) > MAX_EVIDENCE_BYTES:
                    raise ValueError(f"{len(data)} bytes")
                crl = x509.load_der_x509_crl(data)
                issuers = [each for each in path[1:] if each._parsed.subject == crl.issuer]
                if not issuers:
                    continue
                ends.append(_list_in_force(crl, issuers, now, where, check))
                about = [each for each in path if each._parsed.issuer == crl.issuer]
                revoked = [each for each in about if crl.get_revoked_certificate_by_serial_number(each.serial)]
        except _UNREADABLE as problem:
            raise EvidenceError("not a revocation list", check=check, where=where, got=_short(problem)) from problem
        if revoked:
            got = revoked[0].subject[:200]
            raise AttestationError("a certificate was revoked", check=check, where=revoked[0].where, got=got)
        covered.update(each.fingerprint for each in about)
    for each in required:
        if each.fingerprint not in covered:
            raise AttestationError(
                "no revocation list covers a certificate, and one is demanded",
                check=check,
                where=each.where,
                expected=f"a list of {each.issuer}"[:200],
                got="none",
                hint="fetch the vendor's current list and give it to the verifier",
            )
    return min(ends, default=None)


def _list_in_force(
    crl: x509.CertificateRevocationList, issuers: Sequence[Certificate], now: datetime, where: str, check: str
) -> datetime:
    algorithm, begin, end = crl.signature_hash_algorithm, crl.last_update_utc, crl.next_update_utc
    signed = any(
        crl.is_signature_valid(each._parsed.public_key())  # type: ignore[arg-type]
        for each in issuers
        if _may_sign_lists(each)
    )
    if not signed or algorithm is None or algorithm.name not in _HASHES:
        raise AttestationError("a revocation list is not signed by its issuer", check=check, where=where)
    critical = [each.oid.dotted_string for each in crl.extensions if each.critical]
    if critical:
        raise AttestationError("a partial revocation list", check=check, where=where, got=", ".join(critical))
    if end is None or not begin <= now <= end:
        raise AttestationError(
            "a revocation list is not in force",
            check=check,
            where=where,
            expected=f"{begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC" if end else "one that ends",
            got=f"{now:%Y-%m-%d %H:%M}",
            hint="fetch the vendor's current list",
        )
    return end


def _may_sign_lists(each: Certificate) -> bool:
    usage = [extension.value for extension in each._extensions if isinstance(extension.value, x509.KeyUsage)]
    return all(each.crl_sign for each in usage)


# --- bare signatures and keys -------------------------------------------------------------------------------------


def spki_digest(spki: bytes) -> bytes:
    """SHA-256 of a SubjectPublicKeyInfo in DER: 32 bytes."""
    return sha256(spki)


def key_kind(spki: bytes, *, where: str, check: str) -> str:
    """``rsa2048`` (its bits) or a curve's name such as ``secp384r1``, of an **unverified** SubjectPublicKeyInfo.

    Raises:
        EvidenceError: not a public key, or of a kind or size that is not accepted.
    """
    key = _key(spki, where, check)
    return f"rsa{key.key_size}" if isinstance(key, rsa.RSAPublicKey) else key.curve.name


def ec_spki(curve: str, x: int, y: int, *, where: str, check: str) -> bytes:
    """The SubjectPublicKeyInfo (DER) of a point on ``secp256r1``, ``secp384r1`` or ``secp521r1``.

    Raises:
        EvidenceError: another curve, or the point is not on it.
    """
    if curve not in _CURVES:
        raise EvidenceError("an unknown curve", check=check, where=where, expected=", ".join(_CURVES), got=curve)
    try:
        key = ec.EllipticCurvePublicNumbers(x, y, _CURVES[curve]()).public_key()
    except _UNREADABLE as problem:
        raise EvidenceError("not a point of the curve", check=check, where=where, got=curve) from problem
    return _spki_of(key, where=where, check=check)


def rsa_spki(modulus: int, exponent: int, *, where: str, check: str) -> bytes:
    """The SubjectPublicKeyInfo (DER) of an RSA public key.

    Raises:
        EvidenceError: not one, or its size is not accepted.
    """
    try:
        key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except _UNREADABLE as problem:
        raise EvidenceError("not an RSA public key", check=check, where=where, got=_short(problem)) from problem
    return _spki_of(key, where=where, check=check)


def verify_ecdsa(
    spki: bytes, signature: bytes | tuple[int, int], data: bytes, *, hash_name: HashName, where: str, check: str
) -> None:
    """Verify an ECDSA signature, given as DER or as the numbers (r, s), over ``data`` (hashed here).

    Raises:
        EvidenceError: not an elliptic-curve key. AttestationError: the signature does not hold.
    """
    key = _key(spki, where, check)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise EvidenceError("not an elliptic-curve key", check=check, where=where, got="RSA")
    try:
        encoded = signature if isinstance(signature, bytes) else encode_dss_signature(*signature)
        key.verify(encoded, data, ec.ECDSA(_HASHES[hash_name]()))
    except (InvalidSignature, *_UNREADABLE) as problem:
        raise AttestationError("a signature does not hold", check=check, where=where) from problem


def verify_rsa(
    spki: bytes,
    signature: bytes,
    data: bytes,
    *,
    hash_name: HashName,
    scheme: Literal["pkcs1", "pss"],
    where: str,
    check: str,
) -> None:
    """Verify an RSA signature over ``data`` (hashed here): PKCS #1 v1.5, or PSS with MGF1 of the same hash.

    The salt of PSS may have any length.

    Raises:
        EvidenceError: not an RSA key. AttestationError: the signature does not hold.
    """
    key = _key(spki, where, check)
    if not isinstance(key, rsa.RSAPublicKey):
        raise EvidenceError("not an RSA key", check=check, where=where, got=key.curve.name)
    digest = _HASHES[hash_name]()
    pss = padding.PSS(mgf=padding.MGF1(digest), salt_length=padding.PSS.AUTO)
    try:
        key.verify(signature, data, pss if scheme == "pss" else padding.PKCS1v15(), digest)
    except (InvalidSignature, *_UNREADABLE) as problem:
        raise AttestationError("a signature does not hold", check=check, where=where) from problem


def _key(spki: bytes, where: str, check: str) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_der_public_key(spki)
    except _UNREADABLE as problem:
        raise EvidenceError("not a public key", check=check, where=where, got=_short(problem)) from problem
    _spki_of(key, where=where, check=check)
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise EvidenceError("a public key of an unknown kind", check=check, where=where, got=type(key).__name__)
    return key
