"""SGX and TDX quotes with everything that Intel would sign, under a root of our own."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.platforms.dcap_collateral import Collateral

AT = datetime(2031, 5, 1, 12, tzinfo=UTC)
"""When the made evidence is in force."""
FMSPC = bytes.fromhex("112233445566")
PPID = bytes(range(16))
QE_SIGNER = b"Q" * 32
VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_INTEL = "1.2.840.113741.1.13.1"
_PEM = serialization.Encoding.PEM


# --- certificates -------------------------------------------------------------------------------------------------


def der(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    if len(body) < 128:
        return bytes([tag, len(body)]) + body
    return bytes([tag, 0x82]) + len(body).to_bytes(2, "big") + body


def oid(text: str) -> bytes:
    first, second, *rest = map(int, text.split("."))
    found = bytes([40 * first + second])
    for number in rest:
        digits = [number & 0x7F]
        while number := number >> 7:
            digits.append(0x80 | number & 0x7F)
        found += bytes(reversed(digits))
    return der(6, found)


def integer(value: int) -> bytes:
    return der(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def sgx_extension(cpu_svn: bytes, pce_svn: int, ppid: bytes, fmspc: bytes) -> bytes:
    def entry(name: str, value: bytes) -> bytes:
        return der(0x30, oid(f"{_INTEL}.{name}"), value)

    parts = [entry(f"2.{index + 1}", integer(value)) for index, value in enumerate(cpu_svn)]
    tcb = der(0x30, *parts, entry("2.17", integer(pce_svn)), entry("2.18", der(4, cpu_svn)))
    return der(
        0x30,
        entry("1", der(4, ppid)),
        entry("2", tcb),
        entry("3", der(4, bytes(2))),
        entry("4", der(4, fmspc)),
        entry("5", der(10, b"\x00")),
    )


@functools.cache
def key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def raw_sign(name: str, data: bytes) -> bytes:
    r, s = decode_dss_signature(key(name).sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_public(name: str) -> bytes:
    numbers = key(name).public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


@dataclass(frozen=True)
class Party:
    """A holder of a key: its name in the certificate and of its key."""

    common: str
    key_name: str

    @property
    def name(self) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.common)])


def certificate(
    of: Party, by: Party, *, ca: bool, until: datetime, extension: bytes | None = None, serial: int | None = None
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(of.name)
        .issuer_name(by.name)
        .public_key(key(of.key_name).public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(AT - timedelta(days=1000))
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key(of.key_name).public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key(by.key_name).public_key()), critical=False
        )
        .add_extension(x509.KeyUsage(not ca, not ca, False, False, False, ca, ca, False, False), critical=True)
    )
    if extension is not None:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(_INTEL), extension)
        builder = builder.add_extension(unknown, critical=False)
    return builder.sign(key(by.key_name), hashes.SHA256())


def revocations(by: Party, until: datetime, *revoked: int) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(by.name)
        .last_update(AT - timedelta(days=1))
        .next_update(until)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key(by.key_name).public_key()), critical=False
        )
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(AT - timedelta(days=2)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key(by.key_name), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


# --- one platform -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maker:
    """A made-up Intel and one platform of it. ``replace`` a field to get a world that differs in it.

    ``world`` names the keys: two worlds share none.
    """

    platform: str = "sgx"
    world: str = "ours"
    report_data: bytes = b"r" * 64
    code: bytes = b"E"
    attributes: bytes = bytes([5]) + bytes(15)
    td_attributes: bytes = bytes([0, 0, 0, 0x10, 0, 0, 0, 0])
    cpu_svn: bytes = bytes([3]) * 16
    needed_svn: int = 3
    status: str = "UpToDate"
    older_status: str = "OutOfDate"
    fmspc: bytes = FMSPC
    ppid: bytes = PPID
    qe_signer: bytes = QE_SIGNER
    tcb_common: str = "Intel SGX TCB Signing"
    tcb_key: str = "tcb"
    pck_serial: int = 4711
    revoked: tuple[int, ...] = ()
    evaluation: int = 20
    issued: datetime = AT - timedelta(days=1)
    until: datetime = AT + timedelta(days=29)
    certificates_until: datetime = AT + timedelta(days=3000)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Maker:
        return replace(self, **changes)

    def _party(self, common: str, key_name: str) -> Party:
        return Party(common, f"{self.world} {key_name}")

    @property
    def _root(self) -> Party:
        return self._party("Test SGX Root CA", "root")

    @property
    def _ca(self) -> Party:
        return self._party("Intel SGX PCK Platform CA", "ca")

    @property
    def root(self) -> bytes:
        return _root_of(self.world).public_bytes(serialization.Encoding.DER)

    def anchors(self, **given: Any) -> Anchors:
        return Anchors(intel_root=self.root, **given)

    def pck_chain(self) -> bytes:
        extension = sgx_extension(self.cpu_svn, 13, self.ppid, self.fmspc)
        pck = certificate(
            self._party("Intel SGX PCK Certificate", "pck"),
            self._ca,
            ca=False,
            until=self.certificates_until,
            extension=extension,
            serial=self.pck_serial,
        )
        ca = certificate(self._ca, self._root, ca=True, until=AT + timedelta(days=3000))
        return b"".join(each.public_bytes(_PEM) for each in (pck, ca, _root_of(self.world)))

    def body(self) -> bytes:
        if self.platform == "sgx":
            return sgx_report(self.code * 32, b"S" * 32, 7, 9, self.report_data, self.attributes)
        registers = b"".join(self.code * 48 if index == 0 else bytes([index]) * 48 for index in range(8))
        head = bytes([3, 0] + [3] * 14) + bytes(48) + bytes(48) + bytes(8) + self.td_attributes + bytes(8)
        return head + registers + self.report_data

    def quote(self) -> bytes:
        version, tee = (3, 0) if self.platform == "sgx" else (4, 0x81)
        signed = struct.pack("<HHIHH16s20s", version, 2, tee, 0, 0, VENDOR, bytes(20)) + self.body()
        attestation, authentication = raw_public(f"{self.world} attestation"), b"A" * 32
        bound = hashlib.sha256(attestation + authentication).digest() + bytes(32)
        qe = sgx_report(b"q" * 32, self.qe_signer, 1, 8, bound, bytes([0x11]) + bytes(15))
        chain = self.pck_chain()
        inner = qe + raw_sign(f"{self.world} pck", qe) + struct.pack("<H", 32) + authentication
        inner += struct.pack("<HI", 5, len(chain)) + chain
        if version > 3:
            inner = struct.pack("<HI", 6, len(inner)) + inner
        data = raw_sign(f"{self.world} attestation", signed) + attestation + inner
        return signed + struct.pack("<I", len(data)) + data

    def tcb_info(self) -> str:
        tdx = self.platform == "tdx"

        def level(svn: int, status: str) -> dict[str, Any]:
            tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn}] * 16, "pcesvn": 13}
            if tdx:
                tcb["tdxtcbcomponents"] = [{"svn": 3}, {"svn": 0}] + [{"svn": 3}] * 14
            return {"tcb": tcb, "tcbDate": "2031-03-01T00:00:00Z", "tcbStatus": status, "advisoryIDs": ["INTEL-SA-0"]}

        info: dict[str, Any] = {
            "id": self.platform.upper(),
            "version": 3,
            "issueDate": _stamp(self.issued),
            "nextUpdate": _stamp(self.until),
            "fmspc": FMSPC.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbEvaluationDataNumber": self.evaluation,
            "tcbLevels": [level(self.needed_svn, self.status), level(1, self.older_status)],
        }
        if tdx:
            info["tdxModule"] = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        return json.dumps(info | dict(self.changes), separators=(",", ":"))

    def qe_identity(self) -> str:
        return json.dumps(
            {
                "id": "QE" if self.platform == "sgx" else "TD_QE",
                "version": 2,
                "issueDate": _stamp(self.issued),
                "nextUpdate": _stamp(self.until),
                "tcbEvaluationDataNumber": self.evaluation,
                "miscselect": "00000000",
                "miscselectMask": "FFFFFFFF",
                "attributes": "11" + "00" * 15,
                "attributesMask": "FB" + "FF" * 7 + "00" * 8,
                "mrsigner": QE_SIGNER.hex().upper(),
                "isvprodid": 1,
                "tcbLevels": [{"tcb": {"isvsvn": 8}, "tcbDate": "2031-03-01T00:00:00Z", "tcbStatus": "UpToDate"}],
            },
            separators=(",", ":"),
        )

    def collateral(self) -> Collateral:
        signer = certificate(
            self._party(self.tcb_common, self.tcb_key), self._root, ca=False, until=self.certificates_until
        )
        chain = b"".join(each.public_bytes(_PEM) for each in (signer, _root_of(self.world))).decode()
        info, identity = self.tcb_info(), self.qe_identity()
        return Collateral(
            pck_crl_issuer_chain=chain,
            root_ca_crl=revocations(self._root, self.until),
            pck_crl=revocations(self._ca, self.until, *self.revoked),
            tcb_info_issuer_chain=chain,
            tcb_info=info,
            tcb_info_signature=raw_sign(f"{self.world} {self.tcb_key}", info.encode()),
            qe_identity_issuer_chain=chain,
            qe_identity=identity,
            qe_identity_signature=raw_sign(f"{self.world} {self.tcb_key}", identity.encode()),
        )

    def evidence(self) -> Evidence:
        return Evidence(self.platform, {"quote": self.quote(), "collateral": self.collateral().encode()})


@functools.cache
def _root_of(world: str) -> x509.Certificate:
    root = Party("Test SGX Root CA", f"{world} root")
    return certificate(root, root, ca=True, until=AT + timedelta(days=5000))


def _stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def sgx_report(enclave: bytes, signer: bytes, product: int, svn: int, report_data: bytes, attributes: bytes) -> bytes:
    """384 bytes."""
    head = bytes([3]) * 16 + bytes(32) + attributes + enclave + bytes(32) + signer + bytes(96)
    return head + struct.pack("<HH", product, svn) + bytes(60) + report_data
