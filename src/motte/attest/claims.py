"""What evidence says once its signatures hold: the facts on which a policy decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

from motte.attest.report_data import Binding


@dataclass(frozen=True, slots=True)
class Claims:
    """Facts of **verified** evidence: a platform's verifier checked every signature up to its pinned root.

    They are facts and no decision: whether this measurement, state or machine is wanted is the policy's question.

    Attributes:
        platform: one of :data:`motte.attest.evidence.PLATFORMS`.
        simulated: no hardware stands behind it (development key, software TPM, test root).
        report_data: the 64 bytes that the environment bound into its evidence.
        measurements: lower-case hexadecimal digests by their field's own name: ``mrenclave``; ``mrtd``, ``rtmr0`` to
            ``rtmr3``; ``measurement`` (SNP launch digest); ``pcr0``...; the first is the one that names the code.
        signer: who signed the code, hexadecimal (``mrsigner``, the SNP author key digest); None: nobody.
        svn: security version of the code; None: the platform has none.
        debug: whether the environment can be debugged from outside.
        tcb_status: the platform vendor's word for the state of its firmware (``UpToDate``, ``OutOfDate``...), or
            what a verifier derives from versions (SNP).
        advisories: the vendor's advisories that apply.
        instance: what names this one machine, hexadecimal (platform instance id, chip id, endorsement key digest);
            None: unknown.
        collateral_until: when the vendor's statements that were used expire; None: there are none.
        details: further facts for people, by name.
        binding: what the report data was proved to stand for; None until :func:`motte.attest.verify.verify` compared.
    """

    platform: str
    simulated: bool
    report_data: bytes
    measurements: Mapping[str, str]
    signer: str | None = None
    svn: int | None = None
    debug: bool = False
    tcb_status: str | None = None
    advisories: tuple[str, ...] = ()
    instance: str | None = None
    collateral_until: datetime | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    binding: Binding | None = None

    def __post_init__(self) -> None:
        for name in ("measurements", "details"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
