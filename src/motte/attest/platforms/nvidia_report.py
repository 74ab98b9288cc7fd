"""The attestation report of an NVIDIA H100: an SPDM request for measurements and the signed answer, read strictly.

Sources: DMTF DSP0274, "Security Protocol and Data Model (SPDM) Specification" 1.1, GET_MEASUREMENTS and MEASUREMENTS;
the opaque fields are NVIDIA's own, as its verifier reads them (``nv-local-gpu-verifier`` 2.7.3). Numbers are
little-endian. The signature is ECDSA P-384 with SHA-384 over everything before it, the request included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from motte.errors import EvidenceError
from motte.limits import MAX_GPU_REPORT_BYTES

NONCE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 96
_REQUEST: Final = b"\x11\xe0"
_RESPONSE: Final = b"\x11\x60"
"""SPDM 1.1 and the message's code."""
_SIGNATURE_REQUESTED: Final = 1
_ALL_MEASUREMENTS: Final = 0xFF
_DMTF: Final = 1
_MAX_VALUE_BYTES: Final = 64

_FIELD_DRIVER: Final = 3
_FIELD_VBIOS: Final = 6
_FIELD_NVDEC: Final = 11
_FIELD_FWID: Final = 20
_NVDEC_DISABLED: Final = b"\x55"


@dataclass(frozen=True, slots=True)
class NvidiaReport:
    """One report, **unverified**.

    Attributes:
        signed: what the signature is over. signature: the numbers (r, s).
        nonce: 32 bytes that the asking guest chose.
        measurements: values by number, counted from 0 as NVIDIA's reference manifests do (SPDM's block 1 is 0).
        record_digest: SHA-384 of all measurement blocks as they stand in the report.
        driver, vbios: versions as NVIDIA writes them, such as ``550.90.07`` and ``96.00.9F.00.01``.
        fwid: digest of the firmware that asked for the signing key; None: the report states none.
        nvdec: whether the first video decoder is on; where it is off, measurement 35 means nothing.
    """

    signed: bytes
    signature: tuple[int, int]
    nonce: bytes
    measurements: Mapping[int, bytes]
    record_digest: bytes
    driver: str
    vbios: str
    fwid: bytes | None
    nvdec: bool


class _Reader:
    def __init__(self, data: bytes, check: str) -> None:
        self._data, self._at, self._check = data, 0, check

    def take(self, count: int, what: str) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            raise self.malformed(what, f"{count} bytes", f"{len(piece)} bytes")
        self._at += count
        return piece

    def number(self, count: int, what: str) -> int:
        return int.from_bytes(self.take(count, what), "little")

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def malformed(self, what: str, expected: str, got: str) -> EvidenceError:
        return EvidenceError("not an NVIDIA report", check=self._check, where=what, expected=expected, got=got)


def parse_report(data: bytes, *, check: str) -> NvidiaReport:
    """Read **unverified** bytes.

    Raises:
        EvidenceError: too long, cut off, with bytes left over, another SPDM version or message, a measurement or field
            twice, or a version that cannot be read.
    """
    reader = _Reader(data, check)
    if len(data) > MAX_GPU_REPORT_BYTES:
        raise reader.malformed("size", f"at most {MAX_GPU_REPORT_BYTES} bytes", f"{len(data)} bytes")
    if (code := reader.take(2, "request")) != _REQUEST:
        raise reader.malformed("request", _REQUEST.hex(), code.hex())
    asked = reader.take(2, "request parameters")
    if not asked[0] & _SIGNATURE_REQUESTED or asked[1] != _ALL_MEASUREMENTS:
        raise reader.malformed("request parameters", "a signature over all measurements", asked.hex())
    nonce = reader.take(NONCE_BYTES, "nonce")
    reader.take(1, "slot")
    if (code := reader.take(2, "response")) != _RESPONSE:
        raise reader.malformed("response", _RESPONSE.hex(), code.hex())
    reader.take(2, "response parameters")
    blocks = reader.number(1, "number of measurements")
    record = reader.take(reader.number(3, "length of the measurements"), "measurements")
    reader.take(NONCE_BYTES, "the device's nonce")
    fields = _fields(_Reader(reader.take(reader.number(2, "length of the fields"), "fields"), check))
    signed = data[: len(data) - reader.left]
    signature = reader.take(SIGNATURE_BYTES, "signature")
    if reader.left:
        raise reader.malformed("end", "nothing after the signature", f"{reader.left} bytes")
    half = SIGNATURE_BYTES // 2
    return NvidiaReport(
        signed=signed,
        signature=(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")),
        nonce=nonce,
        measurements=MappingProxyType(_measurements(_Reader(record, check), blocks)),
        record_digest=hashlib.sha384(record).digest(),
        driver=_driver(fields, reader),
        vbios=_vbios(fields, reader),
        fwid=fields.get(_FIELD_FWID),
        nvdec=fields.get(_FIELD_NVDEC) != _NVDEC_DISABLED,
    )


def _measurements(reader: _Reader, blocks: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for _ in range(blocks):
        block = reader.number(1, "a measurement's number")
        specification = reader.number(1, "a measurement's specification")
        inner = reader.number(2, "a measurement's length")
        reader.take(1, "a measurement's type")
        size = reader.number(2, "a value's length")
        if specification != _DMTF or inner != size + 3 or not 0 < size <= _MAX_VALUE_BYTES:
            raise reader.malformed(
                f"measurement {block}", "DMTF's form", f"form {specification}, {inner} for {size} bytes"
            )
        if block == 0 or block - 1 in found:
            raise reader.malformed("a measurement's number", "each once, from 1", str(block))
        found[block - 1] = reader.take(size, "a value")
    if reader.left or not found:
        raise reader.malformed("measurements", "at least one, and nothing after them", f"{reader.left} bytes")
    return found


def _fields(reader: _Reader) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while reader.left:
        kind = reader.number(2, "a field's kind")
        if kind in found:
            raise reader.malformed("a field's kind", "each once", str(kind))
        found[kind] = reader.take(reader.number(2, "a field's length"), "a field")
    return found


def _driver(fields: Mapping[int, bytes], reader: _Reader) -> str:
    value = fields.get(_FIELD_DRIVER, b"").rstrip(b"\x00")
    if not 0 < len(value) <= 32 or set(value) - set(b"0123456789."):
        raise reader.malformed("driver version", "digits and points", value[:32].hex())
    return value.decode("ascii")


def _vbios(fields: Mapping[int, bytes], reader: _Reader) -> str:
    # Eight bytes, least significant first: the last of the lower half follows the upper half's four.
    value = fields.get(_FIELD_VBIOS, b"")
    if len(value) != 8:
        raise reader.malformed("firmware version", "8 bytes", f"{len(value)} bytes")
    return ".".join(f"{byte:02X}" for byte in (*value[3::-1], value[4]))
