"""Evidence of a made-up NVIDIA GPU in a made-up SEV-SNP guest: the real formats under test roots."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from attest_makers import certificate_maker as make
from attest_makers import snp_maker
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.platforms import nvidia
from motte.attest.platforms.nvidia_reference import GpuReference
from motte.attest.platforms.nvml import GpuAnswer

DRIVER, VBIOS = "550.90.07", "96.00.9F.00.01"
FWID = bytes(range(48))
MEASUREMENTS = {0: bytes(48), 1: b"\x01" * 48, 2: b"\x02" * 48, 35: b"\x35" * 48}


def record(values: Mapping[int, bytes]) -> bytes:
    return b"".join(
        bytes([number + 1, 1])
        + (len(value) + 3).to_bytes(2, "little")
        + b"\x01"
        + len(value).to_bytes(2, "little")
        + value
        for number, value in values.items()
    )


def fields(values: Mapping[int, bytes]) -> bytes:
    return b"".join(
        kind.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value for kind, value in values.items()
    )


@dataclass(frozen=True)
class Gpu:
    """One made-up GPU; its guest is ``machine``."""

    vendor: str = "gpu"
    product: str = "NVIDIA GH100 Identity"
    measurements: Mapping[int, bytes] = field(default_factory=lambda: dict(MEASUREMENTS))
    fwid: bytes = FWID
    certified_fwid: bytes = FWID
    nvdec: bytes = b"\xaa"
    machine: snp_maker.Machine = field(default_factory=snp_maker.Machine)

    def chain(self) -> tuple[make.Issuer, ...]:
        """Device key, device identity, provisioner, product, root; the same ones at every call."""
        return self._made

    @functools.cached_property
    def _made(self) -> tuple[make.Issuer, ...]:
        root = make.sign("Test Device Identity CA", make.ec_key(self.vendor + "root"))
        product = make.sign(self.product, make.ec_key(self.vendor + "product"), root, points_to_list=True)
        maker = make.sign("Provisioner", make.ec_key(self.vendor + "maker"), product, points_to_list=True)
        device = make.sign("GSP BROM", make.ec_key(self.vendor + "device"), maker)
        identity = b"\x30\x32" + b"\x04\x30" + self.certified_fwid
        extra = [("2.23.133.5.4.1", identity, False)]
        leaf = make.sign("GSP FMC", make.ec_key(self.vendor + "leaf"), device, ca=False, extra=extra)
        return leaf, device, maker, product, root

    def report(
        self, nonce: bytes, *, request: bytes = b"\x11\xe0\x01\xff", response: bytes = b"\x11\x60\x00\x00"
    ) -> bytes:
        parts = record(self.measurements)
        opaque = fields(
            {
                3: DRIVER.encode() + b"\x00",
                6: bytes.fromhex("009f009601000000"),
                11: self.nvdec,
                20: self.fwid,
            }
        )
        body = (
            request
            + nonce
            + b"\x00"
            + response
            + bytes([len(self.measurements)])
            + len(parts).to_bytes(3, "little")
            + parts
            + bytes(32)
            + len(opaque).to_bytes(2, "little")
            + opaque
        )
        return self.signed(body)

    def signed(self, body: bytes) -> bytes:
        key = make.ec_key(self.vendor + "leaf")
        r, s = decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA384())))
        return body + r.to_bytes(48, "big") + s.to_bytes(48, "big")

    def reference(self, **changed: Mapping[int, frozenset[str]]) -> bytes:
        values = {number: frozenset({value.hex()}) for number, value in MEASUREMENTS.items()}
        return GpuReference(DRIVER, VBIOS, changed.get("measurements", values)).encode()

    def answer(self, nonce: bytes) -> GpuAnswer:
        return GpuAnswer(self.report(nonce), b"".join(each.pem for each in self.chain()))

    def evidence(self, report_data: bytes, *, measured: bool = True) -> tuple[Evidence, Anchors]:
        """Evidence that verifies under the anchors beside it."""
        guests: list[Anchors] = []

        def guest(bound: bytes) -> Evidence:
            found, anchors = self.machine.evidence(bound)
            guests.append(anchors)
            return found

        found = nvidia.issue(report_data, cpu=guest, gpu=self.answer)
        root = self.chain()[-1]
        return found, Anchors(
            amd_arks=guests[0].amd_arks,
            nvidia_root=root.der,
            nvidia_rim=(self.reference(),) if measured else (),
        )
