"""SEV-SNP evidence of a made-up AMD: the real formats under test roots."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from datetime import datetime

from attest_makers import certificate_maker as make
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence

OID = "1.3.6.1.4.1.3704.1"
LEVELS = {"bootloader": 4, "tee": 0, "snp": 22, "microcode": 213, "fmc": 3}
PLACES = {
    0: ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    1: ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode"),
}


def integer(value: int) -> bytes:
    return bytes([2, 1, value]) if value < 128 else bytes([2, 2, 0, value])


def text(value: str) -> bytes:
    return bytes([0x16, len(value)]) + value.encode()


@dataclass(frozen=True)
class Machine:
    """One made-up machine of a made-up AMD; ``vendor`` names the keys, so two vendors never share one."""

    vendor: str = "test"
    product: str = "Milan"
    layout: int = 0
    kind: str = "vcek"
    levels: dict[str, int] = field(default_factory=lambda: dict(LEVELS))
    chip_id: bytes = bytes(range(1, 65))
    begin: datetime = make.BEGIN
    end: datetime = make.END

    def ark(self) -> make.Issuer:
        return make.sign(f"ARK-{self.product}", make.rsa_key(self.vendor + "ark"))

    def ask(self, ark: make.Issuer) -> make.Issuer:
        common = f"SEV-{self.product}" if self.kind == "vcek" else f"SEV-VLEK-{self.product}"
        return make.sign(common, make.rsa_key(self.vendor + self.kind + "ask"), ark, path_length=0)

    def extensions(self) -> list[tuple[str, bytes, bool]]:
        found = {"1": integer(self.layout), "2": text(f"{self.product}-B0")}
        places = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 8, "fmc": 9}
        for name in filter(None, PLACES[self.layout]):
            found[f"3.{places[name]}"] = integer(self.levels[name])
        for unused in (5, 6, 7):
            found[f"3.{unused}"] = integer(0)
        if self.kind == "vcek":
            found["4"] = self.chip_id[: 8 if self.layout else 64]
        else:
            found["5"] = text("cloud")
        return [(f"{OID}.{place}", value, False) for place, value in found.items()]

    def key(self) -> ec.EllipticCurvePrivateKey:
        return make.ec_key(self.vendor + self.kind)

    def leaf(self, ask: make.Issuer, *, without: str = "", common: str = "") -> make.Issuer:
        extra = [each for each in self.extensions() if each[0] != f"{OID}.{without}"]
        common = common or f"SEV-{self.kind.upper()}"
        return make.sign(common, self.key(), ask, ca=None, extra=extra, begin=self.begin, end=self.end)

    def tcb(self, **changed: int) -> bytes:
        levels = {**self.levels, **changed}
        return bytes(levels[name] if name else 0 for name in PLACES[self.layout])

    def report(self, report_data: bytes, **changed: bytes | int) -> bytes:
        """A signed report; ``at_0xNN=value`` writes bytes, or a number, at an offset."""
        body = bytearray(0x2A0)

        def put(offset: int, value: bytes | int, size: int = 4) -> None:
            raw = value if isinstance(value, bytes) else value.to_bytes(size, "little")
            body[offset : offset + len(raw)] = raw

        put(0x00, 3)
        put(0x08, 0x30000, 8)
        put(0x34, 1)
        put(0x48, 4 if self.kind == "vlek" else 0)
        put(0x50, report_data)
        put(0x90, bytes(range(48)))
        put(0xE0, b"\x11" * 48)
        put(0x04, 7)
        for offset in (0x38, 0x180, 0x1E0, 0x1F0):
            put(offset, self.tcb())
        put(0x188, bytes([0x1A if self.layout else 0x19, 1, 1]))
        chip = self.chip_id if self.kind == "vcek" else bytes(64)
        put(0x1A0, chip[:8].ljust(64, b"\x00") if self.layout else chip)
        for where, value in changed.items():
            put(int(where.removeprefix("at_"), 16), value, 8 if where == "at_0x08" else 4)
        return self.signed(bytes(body))

    def signed(self, body: bytes) -> bytes:
        r, s = decode_dss_signature(self.key().sign(body, ec.ECDSA(hashes.SHA384())))
        return body + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(512 - 144)

    @functools.cached_property
    def _made(self) -> tuple[make.Issuer, make.Issuer, make.Issuer]:
        ark = self.ark()
        ask = self.ask(ark)
        return self.leaf(ask), ask, ark

    def chain(self) -> tuple[make.Issuer, make.Issuer, make.Issuer]:
        """Leaf, ASK (or ASVK), ARK; the same ones at every call."""
        return self._made

    def evidence(self, report_data: bytes, **changed: bytes | int) -> tuple[Evidence, Anchors]:
        """Evidence that verifies under the anchors beside it, but for what ``changed`` writes into the report."""
        leaf, ask, ark = self.chain()
        documents = {"report": self.report(report_data, **changed), self.kind: leaf.der, "ask": ask.der, "ark": ark.der}
        return Evidence("snp", documents), Anchors(amd_arks=(ark.der,))


def other_chip(machine: Machine) -> Machine:
    return replace(machine, chip_id=bytes(64 - index for index in range(64)))
