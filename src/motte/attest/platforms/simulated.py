"""Simulated evidence: a statement signed by a development key. It proves nothing about hardware and always says so.

Documents: ``statement`` (canonical JSON: format, report_data, measurement, signer, svn, debug, tcb_status, instance),
``signature`` (64 bytes, Ed25519) and ``public`` (32 bytes). It verifies only for keys in ``Anchors.simulated_signers``,
and its claims are SIMULATED whatever they say. Checks S-1 to S-4: docs/spec/evidence.md.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from motte.attest.anchors import Anchors
from motte.attest.claims import Claims
from motte.attest.evidence import REPORT_DATA_BYTES, Evidence
from motte.errors import AttestationError, EvidenceError, InputError, SignatureError
from motte.limits import KIB, MAX_NAME_BYTES
from motte.seal.primitives import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    ed25519_public,
    sign_simulated_evidence,
    verify_simulated_evidence,
)
from motte.strict_json import Fields, canonical, parse

PLATFORM: Final = "simulated"
DIGEST_BYTES: Final = 32
_FORMAT: Final = "motte-simulated-evidence-1"
_MAX_STATEMENT_BYTES: Final = 16 * KIB


def issue(
    report_data: bytes,
    *,
    private: bytes,
    measurement: bytes = bytes(DIGEST_BYTES),
    signer: bytes = bytes(DIGEST_BYTES),
    svn: int = 0,
    debug: bool = False,
    tcb_status: str = "UpToDate",
    instance: bytes = bytes(DIGEST_BYTES),
) -> Evidence:
    """Evidence that says what it is told to say, signed by the development key ``private`` (32 bytes).

    Raises:
        InputError: a value is out of bounds.
    """
    for name, value, length in (
        ("report_data", report_data, REPORT_DATA_BYTES),
        ("measurement", measurement, DIGEST_BYTES),
        ("signer", signer, DIGEST_BYTES),
        ("instance", instance, DIGEST_BYTES),
        ("private", private, KEY_BYTES),
    ):
        if len(value) != length:
            raise InputError("a value has a wrong length", where=name, expected=f"{length} bytes", got=str(len(value)))
    statement = canonical(
        {
            "format": _FORMAT,
            "report_data": report_data.hex(),
            "measurement": measurement.hex(),
            "signer": signer.hex(),
            "svn": svn,
            "debug": debug,
            "tcb_status": tcb_status,
            "instance": instance.hex(),
        }
    )
    signature = sign_simulated_evidence(private, statement)
    documents = {"statement": statement, "signature": signature, "public": ed25519_public(private)}
    return Evidence(PLATFORM, documents)


def verify(evidence: Evidence, anchors: Anchors, now: datetime) -> Claims:
    """Check **unverified** simulated evidence. ``now`` is not used: a development key has no expiry.

    Raises:
        EvidenceError: malformed (E-2, S-1, S-4).
        AttestationError: not by a key that the anchors name (S-2), or altered (S-3).
    """
    documents = evidence.take(PLATFORM, required=("statement", "signature", "public"))
    public, signature, statement = documents["public"], documents["signature"], documents["statement"]
    if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES or len(statement) > _MAX_STATEMENT_BYTES:
        raise EvidenceError("a document has a wrong length", check="S-1", where="simulated evidence")
    if public not in anchors.simulated_signers:
        raise AttestationError(
            "simulated evidence by a key that is not named",
            check="S-2",
            expected="one of simulated_signers" if anchors.simulated_signers else "no simulated evidence at all",
            got=public.hex(),
        )
    try:
        verify_simulated_evidence(public, signature, statement)
    except SignatureError as problem:
        raise AttestationError("the statement is not signed by its key, or was altered", check="S-3") from problem
    return _claims(statement)


class _StatementError(EvidenceError):
    """An :class:`EvidenceError` of check S-4, for the strict reader."""

    def __init__(self, message: str, **facts: str | None) -> None:
        super().__init__(message, **{"check": "S-4", **facts})


def _claims(statement: bytes) -> Claims:
    what = "simulated statement"
    error = _StatementError
    fields = Fields(parse(statement, max_bytes=_MAX_STATEMENT_BYTES, what=what, error=error), where=what, error=error)
    fields.choice("format", (_FORMAT,))
    claims = Claims(
        platform=PLATFORM,
        simulated=True,
        report_data=fields.hexadecimal("report_data", length_bytes=REPORT_DATA_BYTES),
        measurements={"measurement": fields.hexadecimal("measurement", length_bytes=DIGEST_BYTES).hex()},
        signer=fields.hexadecimal("signer", length_bytes=DIGEST_BYTES).hex(),
        svn=fields.integer("svn", low=0, high=(1 << 16) - 1),
        debug=fields.boolean("debug"),
        tcb_status=fields.text("tcb_status", max_bytes=MAX_NAME_BYTES),
        instance=fields.hexadecimal("instance", length_bytes=DIGEST_BYTES).hex(),
    )
    fields.done()
    return claims
