"""SGX: quotes of Gramine enclaves. Documents: ``quote`` (DCAP, version 3) and, if it comes along, ``collateral``.

Claims: ``mrenclave`` names the code, ``mrsigner`` its signer, the ISV security version is ``svn``; the instance is the
PPID of the platform's certificate (16 bytes), which names the processor package. Checks G-1 to G-14:
docs/spec/evidence.md.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Final

from motte.attest.anchors import Anchors
from motte.attest.claims import Claims
from motte.attest.evidence import REPORT_DATA_BYTES, Evidence
from motte.errors import InputError, ResourceError
from motte.limits import KIB

GRAMINE_DEVICE: Final = Path("/dev/attestation")
MAX_QUOTE_BYTES: Final = 64 * KIB
_DEBUG: Final = 0x02


def issue(report_data: bytes, *, device: Path = GRAMINE_DEVICE, collateral: bytes | None = None) -> Evidence:
    """Evidence of the Gramine enclave that we run in, for ``report_data`` (64 bytes).

    Args:
        device: Gramine's folder; ``user_report_data`` takes the report data, ``quote`` gives the quote.
        collateral: to be brought along (JSON).

    Raises:
        InputError: ``report_data`` is not 64 bytes.
        ResourceError: not inside Gramine with SGX and DCAP attestation.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise InputError("not report data", expected=f"{REPORT_DATA_BYTES} bytes", got=f"{len(report_data)} bytes")
    try:
        with (device / "user_report_data").open("wb", buffering=0) as file:
            file.write(report_data)
        with (device / "quote").open("rb", buffering=0) as file:
            quote = _all(file)
    except OSError as problem:
        raise ResourceError(
            "no SGX quote from Gramine",
            where=str(device),
            got=problem.strerror,
            hint='it needs gramine-sgx and a manifest with sgx.remote_attestation = "dcap"; gramine-direct has none',
        ) from problem
    if not 0 < len(quote) <= MAX_QUOTE_BYTES:
        expected = f"1 to {MAX_QUOTE_BYTES} bytes"
        raise ResourceError("not a quote", where=str(device / "quote"), expected=expected, got=f"{len(quote)} bytes")
    return Evidence("sgx", {"quote": quote} | ({} if collateral is None else {"collateral": collateral}))


def _all(file: Any) -> bytes:
    pieces: list[bytes] = []
    while sum(map(len, pieces)) <= MAX_QUOTE_BYTES and (piece := file.read(MAX_QUOTE_BYTES)):
        pieces.append(piece)
    return b"".join(pieces)


def verify(evidence: Evidence, anchors: Anchors, now: datetime) -> Claims:
    """Check **unverified** SGX evidence as of ``now`` (aware, UTC).

    Raises:
        EvidenceError: malformed (E-2, G-1, G-2).
        AttestationError: it does not verify (G-2 to G-14); a debug enclave is refused here already (G-12).
        ResourceError: collateral was to be fetched, and could not be.
    """
    # Here and not above: whoever only issues evidence, in the enclave, loads none of it.
    from motte.attest.platforms.dcap import SGX, verify_quote

    facts = verify_quote(evidence, anchors, now, SGX)
    report = facts.report
    attributes = bytes.fromhex(report["attributes"])
    details = {
        "isvprodid": str(report["isv_prod_id"]),
        "attributes": report["attributes"],
        "miscselect": f"{report['misc_select']:08x}",
    }
    return Claims(
        platform="sgx",
        simulated=facts.simulated,
        report_data=bytes.fromhex(report["report_data"]),
        measurements={"mrenclave": report["mr_enclave"]},
        signer=report["mr_signer"],
        svn=int(report["isv_svn"]),
        debug=bool(attributes[0] & _DEBUG),
        tcb_status=facts.tcb_status,
        advisories=facts.advisories,
        instance=facts.instance,
        collateral_until=facts.collateral_until,
        details={**facts.details, **details},
    )
