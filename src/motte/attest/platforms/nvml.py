"""A GPU's attestation report and certificates from NVIDIA's driver, through its management library (NVML).

Source: NVIDIA's ``nvml.h`` (``nvmlDeviceGetConfComputeGpuAttestationReport`` and its neighbours) as ``nvidia-ml-py``
12 and 13 call it. Only a guest whose GPU is in confidential-computing mode gets an answer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

from motte.errors import ResourceError

LIBRARY: Final = "libnvidia-ml.so.1"
NONCE_BYTES: Final = 32
_ERRORS: Final = {
    3: "not supported",
    4: "no permission",
    6: "not found",
    9: "the driver is not loaded",
    15: "the GPU is lost",
}


class _Certificates(ctypes.Structure):
    _fields_ = [
        ("chain_size", ctypes.c_uint),
        ("attestation_chain_size", ctypes.c_uint),
        ("chain", ctypes.c_uint8 * 0x1000),
        ("attestation_chain", ctypes.c_uint8 * 0x1400),
    ]


class _Report(ctypes.Structure):
    _fields_ = [
        ("has_cec_report", ctypes.c_uint),
        ("size", ctypes.c_uint),
        ("cec_size", ctypes.c_uint),
        ("nonce", ctypes.c_uint8 * NONCE_BYTES),
        ("report", ctypes.c_uint8 * 0x2000),
        ("cec_report", ctypes.c_uint8 * 0x1000),
    ]


@dataclass(frozen=True, slots=True)
class GpuAnswer:
    """What the driver gave: the report for a nonce, and the certificate chain of the key that signed it (PEM)."""

    report: bytes
    certificates: bytes


def read_gpu(nonce: bytes, *, index: int = 0, library: Any = None) -> GpuAnswer:
    """Ask the driver for a report of GPU ``index`` over ``nonce`` (32 bytes).

    Args:
        library: an opened NVML; None: the system's.

    Raises:
        ResourceError: no library, no such GPU, or it is not in confidential-computing mode.
    """
    library = _opened() if library is None else library
    _call(library, "nvmlInit_v2")
    try:
        device = ctypes.c_void_p()
        _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        report, chain = _Report(), _Certificates()
        report.nonce = (ctypes.c_uint8 * NONCE_BYTES)(*nonce)
        _call(library, "nvmlDeviceGetConfComputeGpuAttestationReport", device, ctypes.byref(report))
        _call(library, "nvmlDeviceGetConfComputeGpuCertificate", device, ctypes.byref(chain))
    finally:
        library.nvmlShutdown()
    if report.size > len(report.report) or chain.attestation_chain_size > len(chain.attestation_chain):
        raise ResourceError("the driver's answer is longer than its buffer", where=LIBRARY)
    return GpuAnswer(
        bytes(report.report)[: report.size],
        bytes(chain.attestation_chain)[: chain.attestation_chain_size].rstrip(b"\x00"),
    )


def count_gpus(*, library: Any = None) -> int:
    """How many GPUs the driver has here, whatever an environment hides from CUDA.

    Raises:
        ResourceError: as :func:`read_gpu`.
    """
    library = _opened() if library is None else library
    _call(library, "nvmlInit_v2")
    try:
        count = ctypes.c_uint()
        _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    finally:
        library.nvmlShutdown()
    return count.value


def _opened() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as problem:
        hint = "it comes with NVIDIA's driver, and has to be in the guest"
        raise ResourceError("NVIDIA's management library is missing", where=LIBRARY, hint=hint) from problem


def _call(library: Any, name: str, *arguments: Any) -> None:
    try:
        function = getattr(library, name)
    except AttributeError as problem:
        raise ResourceError("NVIDIA's management library is too old", where=name) from problem
    status = function(*arguments)
    if status != 0:
        raise ResourceError(
            "NVIDIA's driver gives no report",
            where=name,
            got=f"error {status}" + (f" ({_ERRORS[status]})" if status in _ERRORS else ""),
            hint="the GPU must be passed to a confidential VM with its confidential-computing mode on",
        )
