"""TLS between two machines that know each other by key: self-signed certificates, told apart by SHA-256 of the key.

No certificate authority is asked and no name is compared: the one question is whether the other side holds the private
key whose public half was pinned. TLS 1.3 proves possession in its handshake (RFC 8446, 4.4.3); the pin is taken over
the SubjectPublicKeyInfo (as in RFC 7469), so that a certificate can be renewed under the same key.

ECDSA on P-256, since every TLS library has it and OpenSSL signs with it in well under a millisecond.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from motte.digests import sha256
from motte.errors import InputError, SignatureError
from motte.limits import MAX_CERTIFICATE_BYTES
from motte.seal.atomic import atomic_file

PIN_PREFIX: Final = "sha256:"
_VALID: Final = datetime.timedelta(days=3650)
"""A pin does not expire; the dates are there because the format wants them."""


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    @property
    def pin(self) -> str:
        """What the other side is told: ``sha256:`` and 64 hexadecimal digits."""
        return PIN_PREFIX + _pin_of_pem(self.certificate).hex()

    @staticmethod
    def new(name: str) -> TlsIdentity:
        """A new key and a self-signed certificate for it; ``name`` is for people."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # A clock that is a day behind on the other machine is no reason to fail.
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + _VALID)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        return TlsIdentity(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def der(self) -> bytes:
        """The certificate in DER."""
        return x509.load_pem_x509_certificate(self.certificate).public_bytes(serialization.Encoding.DER)

    def save(self, certificate: Path, key: Path) -> None:
        """Into two files; the key's is readable by its owner alone. Nothing is overwritten.

        Raises:
            InputError: one of them exists. ResourceError: they cannot be written.
        """
        if os.path.lexists(certificate):
            raise InputError("the file exists already", where=str(certificate), hint="choose another name")
        with atomic_file(key, overwrite=False, mode=0o600) as fd:
            os.write(fd, self.key)
        with atomic_file(certificate, overwrite=False) as fd:
            os.write(fd, self.certificate)

    @staticmethod
    def load(certificate: Path, key: Path) -> TlsIdentity:
        """From two PEM files.

        Raises:
            InputError: unreadable, not a certificate, or a key that others can read.
        """
        if (mode := _mode(key)) & 0o077:
            raise InputError(
                "others can read the private key",
                where=str(key),
                expected="mode 0600",
                got=f"{mode:04o}",
                hint=f"chmod 600 {key}",
            )
        made = TlsIdentity(_read(certificate), _read(key))
        _pin_of_pem(made.certificate, where=str(certificate))
        return made


@dataclass(frozen=True, slots=True)
class TlsKey:
    """A private key that has no certificate yet: evidence about its public half has to be made first.

    P-384, because other implementations of RA-TLS take no other curve.

    Attributes:
        spki_digest: SHA-256 of the SubjectPublicKeyInfo (DER): 32 bytes.
    """

    spki_digest: bytes
    _private: ec.EllipticCurvePrivateKey = field(repr=False)

    @staticmethod
    def new() -> TlsKey:
        """A new key."""
        private = ec.generate_private_key(ec.SECP384R1())
        return TlsKey(_spki_digest(private.public_key()), private)

    def certify(
        self, name: str, *, extension: tuple[str, bytes], begin: datetime.datetime, end: datetime.datetime
    ) -> TlsIdentity:
        """A self-signed certificate of this key, in force from ``begin`` to ``end`` (aware).

        Args:
            extension: dotted object identifier and value of one more extension; not critical, since TLS libraries
                refuse critical ones that they do not know.
        """
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        oid, value = extension
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
            .sign(self._private, hashes.SHA384())
        )
        return TlsIdentity(
            certificate.public_bytes(serialization.Encoding.PEM),
            self._private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )


def read_certificate(path: Path) -> bytes:
    """A certificate in PEM, checked to be one.

    Raises:
        InputError: unreadable, or none.
    """
    data = _read(path)
    _pin_of_pem(data, where=str(path))
    return data


def parse_pin(text: str) -> bytes:
    """The 32 bytes of ``sha256:HEX``.

    Raises:
        InputError: something else.
    """
    digits = text.strip().lower().removeprefix(PIN_PREFIX)
    if not text.strip().lower().startswith(PIN_PREFIX) or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise InputError("not a pin", expected="sha256: and 64 hexadecimal digits", got=repr(text)[:100])
    return bytes.fromhex(digits)


def client_context(identity: TlsIdentity | None) -> ssl.SSLContext:
    """TLS 1.3 to a server that :func:`pin_of_peer` checks after the handshake, before anything is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # No authority and no name: the pin alone decides.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if identity is not None:
        _load(context, identity)
    return context


def server_context(identity: TlsIdentity, *, clients: Sequence[bytes] = ()) -> ssl.SSLContext:
    """TLS 1.3 for a server; with ``clients`` (certificates, PEM) only their holders complete the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load(context, identity)
    if clients:
        context.verify_mode = ssl.CERT_REQUIRED
        for each in clients:
            context.load_verify_locations(cadata=each.decode("ascii"))
    return context


def attested_server_context(identity: TlsIdentity, *, client: bytes | None = None) -> ssl.SSLContext:
    """TLS 1.3 without resumption, so that every connection has evidence of its own.

    Args:
        client: the certificate (DER) whose holder alone completes the handshake; None: nobody is asked for one.

    Raises:
        SignatureError: ``client`` cannot be read.
    """
    context = server_context(identity)
    context.num_tickets = 0
    if client is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=client)
        except (ssl.SSLError, ValueError) as problem:
            raise SignatureError("the certificate cannot be read", got=str(problem)[:120]) from problem
    return context


def pins_of(certificates: Sequence[bytes]) -> list[bytes]:
    """The pins of certificates in PEM."""
    return [_pin_of_pem(each) for each in certificates]


def pin_of_peer(sock: ssl.SSLSocket, *, demanded: Sequence[bytes], where: str) -> bytes:
    """The pin of the other side of a finished handshake.

    Raises:
        SignatureError: it is none of those ``demanded``.
    """
    der = sock.getpeercert(binary_form=True)
    if der is None:
        raise SignatureError("no certificate was shown", where=where)
    try:
        got = _pin(x509.load_der_x509_certificate(der))
    except ValueError as problem:
        raise SignatureError("the certificate cannot be read", where=where) from problem
    if not any(got == each for each in demanded):
        raise SignatureError(
            "the other side holds another key than the pinned one",
            where=where,
            expected=" or ".join(PIN_PREFIX + each.hex() for each in demanded),
            got=PIN_PREFIX + got.hex(),
            hint="take the pin that the server printed; if it did not change, somebody stands in between",
        )
    return got


def _pin(certificate: x509.Certificate) -> bytes:
    return _spki_digest(certificate.public_key())


def _spki_digest(key: CertificatePublicKeyTypes) -> bytes:
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sha256(spki)


def _pin_of_pem(pem: bytes, *, where: str | None = None) -> bytes:
    try:
        return _pin(x509.load_pem_x509_certificate(pem))
    except ValueError as problem:
        raise InputError("not a certificate", where=where, expected="PEM") from problem


def _load(context: ssl.SSLContext, identity: TlsIdentity) -> None:
    # ssl reads keys from files only: one in memory, which no other user sees, serves.
    with _in_memory(identity.certificate) as certificate, _in_memory(identity.key) as key:
        try:
            context.load_cert_chain(certificate, key)
        except ssl.SSLError as problem:
            raise InputError("certificate and key do not belong together", got=str(problem)) from problem


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    fd = os.memfd_create("motte-tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode & 0o777
    except OSError as problem:
        raise InputError("cannot read a file", where=str(path), got=problem.strerror) from problem


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CERTIFICATE_BYTES + 1)
    except OSError as problem:
        raise InputError("cannot read a file", where=str(path), got=problem.strerror) from problem
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise InputError("too large for a certificate", where=str(path))
    return data
