"""TDX: quotes of confidential VMs. Documents: ``quote`` (DCAP, version 4 or 5) and, if it comes along, ``collateral``.

Claims: ``mrtd`` is the first measurement and covers the firmware that the host loaded; kernel, command line and what
follows are extended into ``rtmr0`` to ``rtmr3`` by firmware and boot loader, so a policy names those too. Further:
``mrconfigid``, ``mrowner``, ``mrownerconfig`` (chosen by the host at the start) and ``mrseam`` (the TDX module). A TD
has no signer and no security version. The instance is the PPID as for SGX. Checks D-1 to D-14: docs/spec/evidence.md.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

from motte.attest.anchors import Anchors
from motte.attest.claims import Claims
from motte.attest.evidence import Evidence
from motte.attest.platforms.dcap import TDX, verify_quote
from motte.attest.platforms.tsm import TSM_ROOT, read_report

PROVIDER: Final = "tdx_guest"
"""What configfs calls this platform."""
_DEBUG: Final = 0x01
_MEASUREMENTS: Final = {
    "mrtd": "mr_td",
    "rtmr0": "rt_mr0",
    "rtmr1": "rt_mr1",
    "rtmr2": "rt_mr2",
    "rtmr3": "rt_mr3",
    "mrconfigid": "mr_config_id",
    "mrowner": "mr_owner",
    "mrownerconfig": "mr_owner_config",
    "mrseam": "mr_seam",
}


def issue(report_data: bytes, *, root: Path = TSM_ROOT, collateral: bytes | None = None) -> Evidence:
    """Evidence of the TDX guest that we run in, for ``report_data`` (64 bytes).

    Args:
        root: configfs' folder of reports.
        collateral: to be brought along (JSON).

    Raises:
        InputError: ``report_data`` is not 64 bytes.
        ResourceError: not inside a TDX guest with configfs reports.
    """
    quote = read_report(report_data, root=root, expected_provider=PROVIDER)
    return Evidence("tdx", {"quote": quote} | ({} if collateral is None else {"collateral": collateral}))


def verify(evidence: Evidence, anchors: Anchors, now: datetime) -> Claims:
    """Check **unverified** TDX evidence as of ``now`` (aware, UTC).

    Raises:
        EvidenceError: malformed (E-2, D-1, D-2).
        AttestationError: it does not verify (D-2 to D-14); a debug, migratable or profiled guest is refused here
            already (D-12).
        ResourceError: collateral was to be fetched, and could not be.
    """
    facts = verify_quote(evidence, anchors, now, TDX)
    report = facts.report
    details = {"td_attributes": report["td_attributes"], "xfam": report["xfam"], "tee_tcb_svn": report["tee_tcb_svn"]}
    return Claims(
        platform="tdx",
        simulated=facts.simulated,
        report_data=bytes.fromhex(report["report_data"]),
        measurements={name: report[field] for name, field in _MEASUREMENTS.items()},
        debug=bool(bytes.fromhex(report["td_attributes"])[0] & _DEBUG),
        tcb_status=facts.tcb_status,
        advisories=facts.advisories,
        instance=facts.instance,
        collateral_until=facts.collateral_until,
        details={**facts.details, **details},
    )
