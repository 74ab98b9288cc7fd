"""NVIDIA H100 **together with the confidential VM that drives it**; a GPU's report alone is never accepted.

A genuine report says that some genuine GPU answered a nonce. Whoever owns such a GPU anywhere can ask it and pass the
answer on, so alone it proves nothing about the GPU in front of the guest. Here the guest's own evidence (SEV-SNP or
TDX) carries a digest over the GPU's report and certificates: software that is **measured** vouches that it got this
report from its own driver. What that does not prove stands in docs/spec/evidence/snp_nvidia.md.

Documents: ``report`` (SPDM request and answer, as the driver gives it); ``certificates`` (PEM chain of the key that
signed it); ``cpu`` (encoded evidence of the guest); ``report_data`` (64 bytes: what the whole evidence speaks for).
The order when it is made: report data -> nonce of the GPU -> its report -> report data of the guest -> its evidence.
The checks V-1 to V-11 stand in the same file.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, Literal

from motte.attest.anchors import Anchors
from motte.attest.certificates import (
    Certificate,
    key_kind,
    load_der,
    load_pem_chain,
    spki_digest,
    verify_chain,
    verify_ecdsa,
    verify_not_revoked,
)
from motte.attest.claims import Claims
from motte.attest.evidence import REPORT_DATA_BYTES, Evidence
from motte.attest.platforms import nvml
from motte.attest.platforms.nvidia_reference import GpuReference, compare
from motte.attest.platforms.nvidia_report import NvidiaReport, parse_report
from motte.attest.platforms.vendor_roots import NVIDIA_DEVICE_ROOT
from motte.errors import AttestationError, EvidenceError, FormatError, InputError

GPU_NOT_MEASURED: Final = "GpuNotMeasured"
_CPU_PLATFORMS: Final = ("snp", "tdx")
_DOCUMENTS: Final = frozenset({"report", "certificates", "cpu", "report_data"})
_NONCE_DOMAIN: Final = b"motte-gpu-nonce-1\x00"
_COMPOSITE_DOMAIN: Final = b"motte-gpu-composite-1\x00"
_CURVE: Final = "secp384r1"
_FWID_EXTENSION: Final = "2.23.133.5.4.1"
"""TCG DICE composite device id; it ends with the firmware's SHA-384 as an octet string."""
_FWID_BYTES: Final = 48
_PRODUCTS: Final = {"NVIDIA GH100 Identity": "GH100"}
"""Names of the certificates right below the root; one root stands above switches and network cards too."""
_MIN_PATH: Final = 4
"""Device, device identity, product, root: fewer is no chain of a device."""


def gpu_nonce(report_data: bytes) -> bytes:
    """The 32 bytes for which the GPU is asked: SHA-256 over the domain string and the report data behind its length."""
    return hashlib.sha256(_NONCE_DOMAIN + _prefixed(report_data)).digest()


def composite_report_data(report_data: bytes, report: bytes, certificates: bytes) -> bytes:
    """The 64 bytes of report data of the **guest's** evidence: SHA-512 over the domain string and the three fields.

    Each stands behind its length (8 bytes, big-endian): ``report_data`` of the whole (64 bytes, which bind nonce, key,
    TLS certificate and configuration), the GPU's report and its certificates, byte for byte as they travel.
    """
    return hashlib.sha512(
        _COMPOSITE_DOMAIN + _prefixed(report_data) + _prefixed(report) + _prefixed(certificates)
    ).digest()


def _prefixed(value: bytes) -> bytes:
    return len(value).to_bytes(8, "big") + value


def verify(evidence: Evidence, anchors: Anchors, now: datetime) -> Claims:
    """Verify **unverified** evidence of a GPU and of its guest as of ``now`` (aware, UTC).

    The claims are the guest's (measurements, signer, instance), to which the GPU's are added: ``gpu`` (SHA-384 of its
    measurement record) and ``gpu_device`` (SHA-256 of its identity key). Unless its measurements matched a reference
    that the verifier's owner gave, its state is unknown, and unknown counts as bad: ``tcb_status`` is
    ``GpuNotMeasured`` and ``debug`` is true, since nothing else in the report shows developer mode.

    Raises:
        EvidenceError: malformed. AttestationError: it does not verify; the guest's part with the guest's check numbers.
    """
    documents = evidence.documents
    if evidence.platform != "nvidia" or set(documents) != _DOCUMENTS:
        raise EvidenceError(
            "not the documents of a GPU with its confidential VM",
            check="V-1",
            expected=", ".join(sorted(_DOCUMENTS)),
            got=f"{evidence.platform}: {', '.join(sorted(documents))}"[:200],
            hint="a GPU's report alone can be relayed, and is not accepted",
        )
    report_data = documents["report_data"]
    if len(report_data) != REPORT_DATA_BYTES:
        got = f"{len(report_data)} bytes"
        raise EvidenceError("not report data", check="V-1", expected=f"{REPORT_DATA_BYTES} bytes", got=got)
    report = parse_report(documents["report"], check="V-2")
    chain = load_pem_chain(documents["certificates"], where="certificates", check="V-3")
    path = _device_chain(chain, anchors, now)
    required = [each for each in path[1:-1] if each.names_a_revocation_list] if anchors.demand_revocation else ()
    until = verify_not_revoked(anchors.revocation_lists, path, now, required=required, check="V-6")
    verify_ecdsa(path[0].spki, report.signature, report.signed, hash_name="sha384", where="report", check="V-7")
    _firmware_of_the_key(path[0], report)
    if not hmac.compare_digest(report.nonce, gpu_nonce(report_data)):
        raise AttestationError(
            "the GPU answered another nonce",
            check="V-9",
            expected=gpu_nonce(report_data).hex(),
            got=report.nonce.hex(),
            hint="a replayed report, or one that was asked for by somebody else",
        )
    guest = _guest(documents, anchors, now)
    references = tuple(GpuReference.decode(each) for each in anchors.nvidia_rim)
    measured = compare(report, references, check="V-11")
    return _merged(guest, report, path, report_data, until, measured)


def _device_chain(chain: tuple[Certificate, ...], anchors: Anchors, now: datetime) -> tuple[Certificate, ...]:
    root = NVIDIA_DEVICE_ROOT if anchors.nvidia_root is None else anchors.nvidia_root
    leaf = chain[0]
    if leaf.is_ca or key_kind(leaf.spki, where=leaf.where, check="V-3") != _CURVE:
        raise EvidenceError("not the certificate of a device's P-384 key", check="V-3", where=leaf.where)
    path = verify_chain(leaf, chain[1:], [_pinned_root(root)], now, check="V-4", expiry_check="V-5")
    product = path[-2].common_name() if len(path) >= _MIN_PATH else "none"
    if product not in _PRODUCTS:
        raise AttestationError(
            "not a chain of a GPU that is known here",
            check="V-4",
            expected=", ".join(_PRODUCTS),
            got=product[:200],
        )
    return path


@functools.lru_cache(maxsize=4)
def _pinned_root(data: bytes) -> Certificate:
    return load_der(data, where="pinned NVIDIA root", check="V-4")


def _firmware_of_the_key(leaf: Certificate, report: NvidiaReport) -> None:
    """The key was derived for one firmware (DICE); the report states which one runs."""
    value = leaf.extension(_FWID_EXTENSION) or b""
    tag = bytes([0x04, _FWID_BYTES])
    certified = value[-_FWID_BYTES:] if value[-_FWID_BYTES - 2 : -_FWID_BYTES] == tag else None
    if report.fwid is None or certified is None or report.fwid != certified:
        raise AttestationError(
            "the GPU's key was made for another firmware than the report states",
            check="V-8",
            expected="none" if certified is None else certified.hex(),
            got="none" if report.fwid is None else report.fwid.hex()[:96],
        )


def _guest(documents: Any, anchors: Anchors, now: datetime) -> Claims:
    try:
        guest = Evidence.decode(documents["cpu"])
    except FormatError as problem:
        raise EvidenceError("not evidence of a confidential VM", check="V-10", got=str(problem)[:200]) from problem
    if guest.platform not in _CPU_PLATFORMS:
        raise EvidenceError(
            "a GPU counts only with a confidential VM",
            check="V-10",
            expected=" or ".join(_CPU_PLATFORMS),
            got=guest.platform,
        )
    claims = _verifier(guest.platform)(guest, anchors, now)
    expected = composite_report_data(documents["report_data"], documents["report"], documents["certificates"])
    if not hmac.compare_digest(claims.report_data, expected):
        raise AttestationError(
            "the confidential VM does not vouch for this GPU's report",
            check="V-10",
            expected=expected.hex()[:32] + "...",
            got=claims.report_data.hex()[:32] + "...",
            hint="the report, its certificates or the guest's evidence belong to something else",
        )
    return claims


def _verifier(platform: str) -> Callable[[Evidence, Anchors, datetime], Claims]:
    if platform == "snp":
        from motte.attest.platforms import snp

        return snp.verify
    from motte.attest.platforms import tdx

    return tdx.verify


def _merged(
    guest: Claims,
    report: NvidiaReport,
    path: tuple[Certificate, ...],
    report_data: bytes,
    until: datetime | None,
    measured: bool,
) -> Claims:
    ends = [end for end in (guest.collateral_until, until) if end is not None]
    return Claims(
        platform="nvidia",
        simulated=guest.simulated or path[-1].der != NVIDIA_DEVICE_ROOT,
        report_data=report_data,
        measurements={
            **guest.measurements,
            "gpu": report.record_digest.hex(),
            "gpu_device": spki_digest(path[1].spki).hex(),
        },
        signer=guest.signer,
        svn=guest.svn,
        debug=guest.debug or not measured,
        tcb_status=guest.tcb_status if measured else GPU_NOT_MEASURED,
        advisories=guest.advisories,
        instance=guest.instance,
        collateral_until=min(ends, default=None),
        details={
            **guest.details,
            "cpu_platform": guest.platform,
            "gpu": _PRODUCTS[path[-2].common_name()],
            "gpu_driver": report.driver,
            "gpu_vbios": report.vbios,
            "gpu_measurements": "as in the reference given" if measured else "not compared: no reference given",
            "gpu_revocation": "not checked" if until is None else f"checked, until {until:%Y-%m-%d %H:%M} UTC",
        },
    )


# --- inside the guest ---------------------------------------------------------------------------------------------


def issue(
    report_data: bytes,
    *,
    cpu: Literal["snp", "tdx"] | Callable[[bytes], Evidence] = "snp",
    gpu: Callable[[bytes], nvml.GpuAnswer] = nvml.read_gpu,
) -> Evidence:
    """Evidence of this guest and its GPU for 64 bytes of report data.

    Args:
        cpu: the guest's platform, or what issues its evidence for 64 bytes.
        gpu: what asks the driver for 32 bytes of nonce.

    Raises:
        InputError: not 64 bytes. ResourceError: no GPU in confidential-computing mode, or no confidential VM.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise InputError("not report data", expected=f"{REPORT_DATA_BYTES} bytes", got=f"{len(report_data)} bytes")
    answer = gpu(gpu_nonce(report_data))
    bound = composite_report_data(report_data, answer.report, answer.certificates)
    guest = (_issuer(cpu) if isinstance(cpu, str) else cpu)(bound)
    return Evidence(
        "nvidia",
        {
            "report": answer.report,
            "certificates": answer.certificates,
            "cpu": guest.encode(),
            "report_data": report_data,
        },
    )


def _issuer(platform: Literal["snp", "tdx"]) -> Callable[[bytes], Evidence]:
    if platform == "snp":
        from motte.attest.platforms import snp

        return snp.issue
    from motte.attest.platforms import tdx

    return tdx.issue
