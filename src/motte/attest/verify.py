"""Evidence -> Verdict: the one door. Holding a :class:`Verdict` means that every numbered check has passed.

The order is that of docs/spec/evidence.md: common checks (E), the platform's own, the binding (R), the policy (P).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from motte.attest.anchors import Anchors
from motte.attest.claims import Claims
from motte.attest.evidence import PLATFORMS, REPORT_DATA_BYTES, Evidence
from motte.attest.policy import Policy
from motte.attest.policy_text import dumps
from motte.attest.report_data import Binding
from motte.errors import AttestationError, EvidenceError, InputError

Verifier = Callable[[Evidence, Anchors, datetime], Claims]


@dataclass(frozen=True, slots=True)
class Verdict:
    """**Verified** claims that a policy accepted.

    Attributes:
        policy_text: the policy as it was asked, in its text form, for logs.
        at: the time as of which all of it held.
    """

    claims: Claims
    policy_text: str
    at: datetime


def verify(
    evidence: Evidence,
    policy: Policy,
    now: datetime,
    *,
    anchors: Anchors | None = None,
    binding: Binding | None = None,
) -> Verdict:
    """Check **unverified** evidence as of ``now`` and ask ``policy`` about what it says.

    Args:
        now: aware, UTC; every validity and expiry is compared with it.
        anchors: roots and reference data; None: the vendors' own roots.
        binding: the nonce, key, TLS certificate and configuration that the evidence is said to speak for. Without it
            ``Fresh`` and ``Configuration`` refuse, and the caller must compare the report data itself.

    Raises:
        EvidenceError: malformed; ``check`` has the number.
        AttestationError: it does not verify, or the policy refuses it; ``check`` has the number.
        ResourceError: collateral was to be fetched, and could not be.
        InputError: ``now`` is not an aware time in UTC, or ``policy`` is none of :mod:`motte.attest.policy`.
    """
    if now.tzinfo is None or now.utcoffset() != timedelta(0):
        raise InputError("not a time in UTC", where="now", got=repr(now))
    policy_text = dumps(policy)  # first: what has no text is no policy
    claims = _verifier(evidence.platform)(evidence, Anchors() if anchors is None else anchors, now)
    _sane(claims, evidence)
    if binding is not None:
        binding.require(claims.report_data)
        claims = replace(claims, binding=binding)
    policy.check(claims, now)
    return Verdict(claims, policy_text, now)


def _sane(claims: Claims, evidence: Evidence) -> None:
    if claims.platform != evidence.platform or claims.binding is not None:
        raise AttestationError(
            "claims of another platform", check="E-3", expected=evidence.platform, got=claims.platform
        )
    if len(claims.report_data) != REPORT_DATA_BYTES:
        got = f"{len(claims.report_data)} bytes"
        raise AttestationError("not report data", check="E-3", expected=f"{REPORT_DATA_BYTES} bytes", got=got)


def _verifier(platform: str) -> Verifier:
    # Imported when asked for: a verifier of one platform needs none of the other platforms' packages.
    if platform == "sgx":
        from motte.attest.platforms import sgx

        return sgx.verify
    if platform == "tdx":
        from motte.attest.platforms import tdx

        return tdx.verify
    if platform == "snp":
        from motte.attest.platforms import snp

        return snp.verify
    if platform == "tpm":
        from motte.attest.platforms import tpm

        return tpm.verify
    if platform == "nvidia":
        from motte.attest.platforms import nvidia

        return nvidia.verify
    if platform == "simulated":
        from motte.attest.platforms import simulated

        return simulated.verify
    raise EvidenceError("unknown platform", check="E-2", expected=" or ".join(PLATFORMS), got=repr(platform)[:80])
