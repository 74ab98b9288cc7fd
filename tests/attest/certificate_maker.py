"""Certificates, revocation lists and keys of made-up vendors, for tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
BEGIN, END = NOW - timedelta(days=30), NOW + timedelta(days=30)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@functools.cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """One key for each name: making them is slow."""
    return rsa.generate_private_key(65537, 2048)


@functools.cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def spki_of(key: Key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


@dataclass(frozen=True)
class Issuer:
    """A certificate together with the key that signs under it."""

    certificate: x509.Certificate
    key: Key

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def sign(
    common: str,
    key: Key,
    parent: Issuer | None = None,
    *,
    ca: bool | None = True,
    path_length: int | None = None,
    begin: datetime = BEGIN,
    end: datetime = END,
    may_issue: bool = True,
    may_list: bool = True,
    extra: Sequence[tuple[str, bytes, bool]] = (),
    points_to_list: bool = False,
) -> Issuer:
    """A certificate for ``key`` by ``parent`` (None: by itself), RSA with PSS as AMD signs."""
    signer = parent.key if parent else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(common))
        .issuer_name(parent.certificate.subject if parent else name(common))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
    if ca:
        usage = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(
            x509.KeyUsage(key_cert_sign=may_issue, crl_sign=may_list, **usage), critical=True
        )
    if points_to_list:
        point = x509.DistributionPoint([x509.UniformResourceIdentifier("http://crl.invalid/a")], None, None, None)
        builder = builder.add_extension(x509.CRLDistributionPoints([point]), critical=False)
    for oid, value, critical in extra:
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical)
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48) if isinstance(signer, rsa.RSAPrivateKey) else None
    return Issuer(builder.sign(signer, hashes.SHA384(), rsa_padding=pss), key)


def revocation_list(
    issuer: Issuer,
    revoked: Sequence[x509.Certificate] = (),
    *,
    signer: Key | None = None,
    begin: datetime = BEGIN,
    end: datetime = END,
    partial: bool = False,
) -> bytes:
    """A revocation list (DER) in the name of ``issuer``, signed with ``signer`` (None: its own key)."""
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.certificate.subject)
    builder = builder.last_update(begin).next_update(end)
    for each in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(each.serial_number).revocation_date(begin).build()
        builder = builder.add_revoked_certificate(entry)
    if partial:
        point = x509.IssuingDistributionPoint(
            full_name=None,
            relative_name=None,
            only_contains_user_certs=True,
            only_contains_ca_certs=False,
            only_some_reasons=None,
            indirect_crl=False,
            only_contains_attribute_certs=False,
        )
        builder = builder.add_extension(point, critical=True)
    return builder.sign(signer or issuer.key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)
