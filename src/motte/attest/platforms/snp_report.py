"""The attestation report of AMD SEV-SNP and the extensions of the certificate that signs it, read strictly.

Sources: AMD 56860, "SEV Secure Nested Paging Firmware ABI Specification", table "ATTESTATION_REPORT" (versions 2 to 5,
always 1184 bytes, little-endian); AMD 57230, "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface
Specification", tables of certificate extensions. Numbers of the checks: docs/spec/evidence/snp_nvidia.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from motte.attest.certificates import Certificate
from motte.attest.platforms.snp_tcb import Tcb
from motte.errors import EvidenceError

REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0
VERSIONS: Final = (2, 3, 4, 5)
_ECDSA_P384_SHA384: Final = 1
_NUMBER_BYTES: Final = 72
"""Of r and of s: little-endian, of which a P-384 number fills 48."""
_CHIP_ID_BYTES: Final = (64, 8)

_POLICY_MIGRATE: Final = 1 << 18
_POLICY_DEBUG: Final = 1 << 19
_POLICY_MUST_BE_ONE: Final = 1 << 17
_POLICY_KNOWN_BITS: Final = (1 << 26) - 1
_FLAG_AUTHOR_KEY: Final = 1
_FLAG_MASK_CHIP_KEY: Final = 2
_FLAGS_KNOWN_BITS: Final = 0x1F
_SIGNERS: Final = {0: "vcek", 1: "vlek"}

_OID: Final = "1.3.6.1.4.1.3704.1"
_SPL: Final = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 8, "fmc": 9}
"""Last number of each level's object identifier."""
_UNUSED_SPL: Final = (4, 5, 6, 7)

_LAYOUTS: Final[dict[int, tuple[str | None, ...]]] = {
    0: ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    1: ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode"),
}
"""Bytes of a TCB version by the certificate's structure version: 0 for family 19h (Milan, Genoa), 1 for 1Ah (Turin)."""
_FAMILIES: Final = {0: 0x19, 1: 0x1A}


@dataclass(frozen=True, slots=True)
class SnpReport:
    """One report, **unverified**. Byte fields are as they stand there, TCB versions raw (8 bytes; :func:`read_tcb`)."""

    raw: bytes
    version: int
    guest_svn: int
    policy: int
    vmpl: int
    platform_info: int
    signer: Literal["vcek", "vlek"]
    author_key: bool
    report_data: bytes
    measurement: bytes
    host_data: bytes
    family_id: bytes
    image_id: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    chip_id: bytes
    cpu_family: int | None
    current_tcb: bytes
    reported_tcb: bytes
    committed_tcb: bytes
    launch_tcb: bytes
    firmware: str
    signature: tuple[int, int]

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return self.raw[:SIGNED_BYTES]

    @property
    def debug(self) -> bool:
        """Whether the guest's policy lets the host read and change its memory."""
        return bool(self.policy & _POLICY_DEBUG)

    @property
    def migratable(self) -> bool:
        """Whether the guest's policy lets a migration agent take it to another machine."""
        return bool(self.policy & _POLICY_MIGRATE)


def parse_report(data: bytes, *, check: str) -> SnpReport:
    """Read **unverified** bytes.

    Raises:
        EvidenceError: another size or version, another signature algorithm, no signing key, or a reserved bit is set.
    """

    def number(offset: int, size: int) -> int:
        return int.from_bytes(data[offset : offset + size], "little")

    if len(data) != REPORT_BYTES:
        raise _malformed(check, "size", f"{REPORT_BYTES} bytes", f"{len(data)} bytes")
    version, policy, flags = number(0, 4), number(8, 8), number(0x48, 4)
    if version not in VERSIONS:
        raise _malformed(check, "version", " or ".join(map(str, VERSIONS)), str(version))
    if number(0x34, 4) != _ECDSA_P384_SHA384:
        raise _malformed(check, "signature algorithm", "1 (ECDSA P-384 with SHA-384)", str(number(0x34, 4)))
    if not policy & _POLICY_MUST_BE_ONE or policy & ~_POLICY_KNOWN_BITS:
        raise _malformed(check, "guest policy", "bit 17 set, bits 26 to 63 clear", f"{policy:#x}")
    if flags & ~_FLAGS_KNOWN_BITS or flags & _FLAG_MASK_CHIP_KEY or flags >> 2 not in _SIGNERS:
        raise _malformed(check, "flags", "signed by VCEK or VLEK", f"{flags:#x}")
    _reserved_are_zero(data, version, check)
    return SnpReport(
        raw=data,
        version=version,
        guest_svn=number(4, 4),
        policy=policy,
        vmpl=number(0x30, 4),
        platform_info=number(0x40, 8),
        signer="vlek" if flags >> 2 else "vcek",
        author_key=bool(flags & _FLAG_AUTHOR_KEY),
        report_data=data[0x50:0x90],
        measurement=data[0x90:0xC0],
        host_data=data[0xC0:0xE0],
        family_id=data[0x10:0x20],
        image_id=data[0x20:0x30],
        id_key_digest=data[0xE0:0x110],
        author_key_digest=data[0x110:0x140],
        report_id=data[0x140:0x160],
        chip_id=data[0x1A0:0x1E0],
        cpu_family=data[0x188] if version >= 3 else None,
        current_tcb=data[0x38:0x40],
        reported_tcb=data[0x180:0x188],
        committed_tcb=data[0x1E0:0x1E8],
        launch_tcb=data[0x1F0:0x1F8],
        firmware=f"{data[0x1EA]}.{data[0x1E9]}.{data[0x1E8]}",
        signature=(number(0x2A0, _NUMBER_BYTES), number(0x2A0 + _NUMBER_BYTES, _NUMBER_BYTES)),
    )


def _reserved_are_zero(data: bytes, version: int, check: str) -> None:
    ranges = [
        (0x4C, 0x50),
        (0x18B if version >= 3 else 0x188, 0x1A0),
        (0x1EB, 0x1EC),
        (0x1EF, 0x1F0),
        (0x208 if version >= 5 else 0x1F8, SIGNED_BYTES),
        (SIGNED_BYTES + 2 * _NUMBER_BYTES, REPORT_BYTES),
    ]
    for begin, end in ranges:
        if any(data[begin:end]):
            raise _malformed(check, f"reserved bytes {begin:#x} to {end - 1:#x}", "zero", "something else")


def _malformed(check: str, what: str, expected: str, got: str) -> EvidenceError:
    return EvidenceError("not an SEV-SNP report", check=check, where=what, expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class ChipKey:
    """What the extensions of a VCEK or VLEK certificate say.

    Attributes:
        layout: structure version: 0 for family 19h, 1 for 1Ah.
        product: such as ``Milan-B0``.
        levels: the TCB version for which the key was derived.
        hardware_id: 64 bytes (8 on Turin); None: a VLEK, which is bound to no chip.
        provider: the cloud provider to whom a VLEK was issued; None: a VCEK.
    """

    layout: int
    product: str
    levels: Tcb
    hardware_id: bytes | None
    provider: str | None

    def tcb_bytes(self) -> bytes:
        """:attr:`levels` as a report carries them, unused bytes zero."""
        return bytes(0 if name is None else getattr(self.levels, name) for name in _LAYOUTS[self.layout])

    @property
    def cpu_family(self) -> int:
        """The CPUID family that goes with the layout."""
        return _FAMILIES[self.layout]


def read_tcb(raw: bytes, layout: int) -> Tcb:
    """The 8 bytes of a TCB version; bytes without a meaning are left out."""
    return Tcb(**{name: value for name, value in zip(_LAYOUTS[layout], raw, strict=True) if name is not None})


def read_chip_key(certificate: Certificate, kind: Literal["vcek", "vlek"], *, check: str) -> ChipKey:
    """The AMD extensions of an **unverified** certificate.

    Raises:
        EvidenceError: one is missing or malformed, or a level that this layout does not have is not zero.
    """
    layout = _small_integer(certificate, "1", check)
    if layout not in _LAYOUTS:
        raise _extension_error(certificate, "1", check, "structure version 0 or 1")
    levels = {
        name: _small_integer(certificate, f"3.{place}", check)
        for name, place in _SPL.items()
        if name in _LAYOUTS[layout]
    }
    for place in _UNUSED_SPL:
        if certificate.extension(f"{_OID}.3.{place}") is not None and _small_integer(certificate, f"3.{place}", check):
            raise _extension_error(certificate, f"3.{place}", check, "zero")
    hardware_id = certificate.extension(f"{_OID}.4")
    if kind == "vcek":
        hardware_id = _hardware_id(certificate, hardware_id, check)
    elif hardware_id is not None:
        raise _extension_error(certificate, "4", check, "no chip id in a VLEK")
    return ChipKey(
        layout=layout,
        product=_text(certificate, "2", check),
        levels=Tcb(**levels),
        hardware_id=hardware_id,
        provider=_text(certificate, "5", check) if kind == "vlek" else None,
    )


def _hardware_id(certificate: Certificate, value: bytes | None, check: str) -> bytes:
    # Issued as bare bytes, without the tag of a DER octet string; newer issues may carry it.
    for size in _CHIP_ID_BYTES:
        if value is not None and len(value) == size:
            return value
        if value is not None and len(value) == size + 2 and value[:2] == bytes([0x04, size]):
            return value[2:]
    raise _extension_error(certificate, "4", check, "a chip id of 64 or 8 bytes")


def _small_integer(certificate: Certificate, place: str, check: str) -> int:
    # DER of 0 to 255: one byte, or two of which the first is zero and the second is above 127.
    value = certificate.extension(f"{_OID}.{place}")
    if value is not None and len(value) == 3 and value[:2] == b"\x02\x01" and value[2] < 128:
        return value[2]
    if value is not None and len(value) == 4 and value[:3] == b"\x02\x02\x00" and value[3] >= 128:
        return value[3]
    raise _extension_error(certificate, place, check, "an integer of 0 to 255")


def _text(certificate: Certificate, place: str, check: str) -> str:
    value = certificate.extension(f"{_OID}.{place}")
    if value is not None and len(value) > 2 and value[0] == 0x16 and value[1] == len(value) - 2 < 128:
        text = value[2:]
        if all(0x20 <= byte < 0x7F for byte in text):
            return text.decode("ascii")
    raise _extension_error(certificate, place, check, "an ASCII text")


def _extension_error(certificate: Certificate, place: str, check: str, expected: str) -> EvidenceError:
    value = certificate.extension(f"{_OID}.{place}")
    return EvidenceError(
        "not the certificate of an AMD chip key",
        check=check,
        where=f"{certificate.where}, extension {_OID}.{place}",
        expected=expected,
        got="none" if value is None else value[:16].hex(),
    )
