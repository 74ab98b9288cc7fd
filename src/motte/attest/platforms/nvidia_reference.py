"""Reference manifests for NVIDIA GPUs: the measurements that one driver and one firmware should show.

NVIDIA signs its manifests (RIM) as XML. **This project does not verify XML signatures**: the owner verifies NVIDIA's
files with NVIDIA's own tool and states their values here, and a verifier believes them because its owner gave them
(``Anchors.nvidia_rim``), never because they came with the evidence. The form is strict JSON:

    {"format": "motte-nvidia-reference-1", "driver": "550.90.07", "vbios": "96.00.9F.00.01",
     "measurements": {"1": ["HEX", ...], ...}}

Numbers count from 0 as in NVIDIA's manifests; each lists the values that are good. What NVIDIA's manifests mark
``active="False"`` is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from motte.attest.platforms.nvidia_report import NvidiaReport
from motte.errors import AttestationError, InputError
from motte.limits import MAX_GPU_MEASUREMENTS, MAX_GPU_REFERENCE_BYTES, MAX_NAME_BYTES
from motte.strict_json import Fields, canonical, parse

_FORMAT: Final = "motte-nvidia-reference-1"
_NVDEC_MEASUREMENT: Final = 35
_MAX_ALTERNATIVES: Final = 64


@dataclass(frozen=True, slots=True)
class GpuReference:
    """Good measurements of one driver with one firmware: for each number, every good value in hexadecimal.

    Raises:
        InputError: no measurement, or one without a value: it would match everything.
    """

    driver: str
    vbios: str
    measurements: Mapping[int, frozenset[str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "measurements", MappingProxyType(dict(self.measurements)))
        if not self.measurements or not all(self.measurements.values()):
            raise InputError("a reference without measurements", where="reference.measurements")

    def encode(self) -> bytes:
        """Canonical JSON."""
        values = {str(number): sorted(good) for number, good in self.measurements.items()}
        return canonical({"format": _FORMAT, "driver": self.driver, "vbios": self.vbios, "measurements": values})

    @staticmethod
    def decode(data: bytes) -> GpuReference:
        """Read what the verifier's owner stated.

        Raises:
            FormatError: not a reference as :meth:`encode` writes it, or larger than the limits. InputError: empty.
        """
        fields = Fields(parse(data, max_bytes=MAX_GPU_REFERENCE_BYTES, what="reference"), where="reference")
        fields.choice("format", (_FORMAT,))
        driver = fields.text("driver", max_bytes=MAX_NAME_BYTES)
        vbios = fields.text("vbios", max_bytes=MAX_NAME_BYTES)
        table = fields.fields("measurements")
        fields.done()
        found = {
            number: frozenset(table.items(str(number), max_items=_MAX_ALTERNATIVES, read=_digest))
            for number in range(MAX_GPU_MEASUREMENTS)
            if table.has(str(number))
        }
        table.done()
        return GpuReference(driver, vbios, found)

    def differing(self, report: NvidiaReport) -> tuple[int, ...]:
        """Numbers of the measurements of ``report`` that are not as stated here, those that are missing included."""
        return tuple(
            number
            for number, good in sorted(self.measurements.items())
            if (report.nvdec or number != _NVDEC_MEASUREMENT) and report.measurements.get(number, b"").hex() not in good
        )


def _digest(value: object, where: str) -> str:
    fields = Fields({"value": value}, where=where)
    length = 64 if isinstance(value, str) and len(value) == 128 else 48
    return fields.hexadecimal("value", length_bytes=length).hex()


def compare(report: NvidiaReport, references: tuple[GpuReference, ...], *, check: str) -> bool:
    """Whether the **verified** report matched a reference; False: none was given, so nothing was compared.

    Raises:
        AttestationError: references were given, and none is for this driver and firmware, or a measurement differs
            from each that is.
    """
    if not references:
        return False
    mine = [each for each in references if (each.driver, each.vbios.upper()) == (report.driver, report.vbios)]
    if not mine:
        raise AttestationError(
            "no reference for the GPU's driver and firmware",
            check=check,
            expected=", ".join(f"{each.driver} with {each.vbios}" for each in references)[:200],
            got=f"{report.driver} with {report.vbios}",
        )
    differing = [each.differing(report) for each in mine]
    if all(differing):
        raise AttestationError(
            "measurements of the GPU are not those of its reference",
            check=check,
            where=f"driver {report.driver}, firmware {report.vbios}",
            got=f"others at {', '.join(map(str, differing[0]))}"[:200],
            hint="another firmware, a GPU in developer mode, or one that was tampered with",
        )
    return True
