"""What a verifier starts from: pinned roots and reference data that no evidence can bring along itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from motte.attest.platforms.snp_tcb import Tcb


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """Pinned roots and given reference data. The default trusts the vendors' own roots and nothing else.

    A root other than the vendor's marks its claims SIMULATED. Nothing is fetched from a network by default.

    Attributes:
        intel_root: DER certificate instead of Intel's SGX root CA; None: Intel's own.
        intel_collateral: collateral for SGX and TDX quotes (JSON, as ``dcap-qvl`` writes it), used instead of what
            the evidence brings along; it is signed by Intel, so it need not come from a trusted place.
        intel_cache: folder of collateral by platform type; None: no cache.
        intel_pccs: URL of the PCCS from which missing or expired collateral is fetched; None: never.
        intel_pccs_timeout_s: seconds for one such fetch in all.
        intel_min_evaluation: lowest TCB evaluation data number that collateral may have; 0: any.
        amd_arks: DER certificates of AMD root keys; None: AMD's own, by product.
        amd_min_tcb: lowest firmware levels by product (``Milan``, ``Genoa``, ``Turin``) for the status ``UpToDate``; a
            product that is not named here gets ``NoMinimum``.
        amd_max_vmpl: highest VM privilege level (0 to 3; 0 is the most privileged) at which a report may be asked for.
        amd_allow_migration: accept guests whose policy lets a migration agent move them.
        nvidia_root: DER certificate of NVIDIA's device identity root; None: NVIDIA's own.
        nvidia_rim: reference manifests (:mod:`motte.attest.platforms.nvidia_reference`) with which a GPU's measurements
            are compared; empty: none are, and its state counts as unknown.
        revocation_lists: revocation lists (DER) of AMD and NVIDIA; those of other issuers are skipped.
        demand_revocation: refuse SEV-SNP and NVIDIA evidence whose intermediate certificates no such list covers.
        tpm_roots: DER certificates of TPM manufacturers' roots for endorsement keys.
        tpm_enrolled: TPM attestation keys enrolled beforehand: records
            (:meth:`motte.attest.platforms.tpm_enrol.Enrolment.encode`), or bare public keys (SubjectPublicKeyInfo,
            DER), whose claims are SIMULATED since nothing says that a TPM holds them.
        simulated_signers: Ed25519 public keys (32 bytes) whose simulated evidence verifies; empty: none.
    """

    intel_root: bytes | None = None
    intel_collateral: bytes | None = None
    intel_cache: Path | None = None
    intel_pccs: str | None = None
    intel_pccs_timeout_s: float = 10.0
    intel_min_evaluation: int = 0
    amd_arks: tuple[bytes, ...] | None = None
    amd_min_tcb: Mapping[str, Tcb] = field(default_factory=dict)
    amd_max_vmpl: int = 0
    amd_allow_migration: bool = False
    nvidia_root: bytes | None = None
    nvidia_rim: tuple[bytes, ...] = ()
    revocation_lists: tuple[bytes, ...] = ()
    demand_revocation: bool = False
    tpm_roots: tuple[bytes, ...] = ()
    tpm_enrolled: tuple[bytes, ...] = ()
    simulated_signers: tuple[bytes, ...] = ()
