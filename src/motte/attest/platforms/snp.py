"""AMD SEV-SNP: a report signed by the chip's key, whose certificate leads over ASK (or ASVK) to AMD's root.

Documents (certificates in DER): ``report``, 1184 bytes; ``vcek`` or ``vlek``, of the key that signed it; ``ask``, of
its issuer; and, if one likes, ``ark``, which must be one of the pinned roots. All of them are **unverified** until
:func:`verify` returns. The checks N-1 to N-13 stand in docs/spec/evidence/snp_nvidia.md, in the order of the code.

What firmware is good enough is no vendor's word here: AMD publishes minimal versions in bulletins, and the verifier's
owner states them (``Anchors.amd_min_tcb``). Without a statement the status is ``NoMinimum``, never ``UpToDate``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from motte.attest.anchors import Anchors
from motte.attest.certificates import (
    Certificate,
    key_kind,
    load_der,
    load_pem_chain,
    verify_chain,
    verify_ecdsa,
    verify_not_revoked,
)
from motte.attest.claims import Claims
from motte.attest.evidence import Evidence
from motte.attest.platforms.snp_report import ChipKey, SnpReport, parse_report, read_chip_key, read_tcb
from motte.attest.platforms.snp_tcb import Tcb
from motte.attest.platforms.tsm import TSM_ROOT, read_blobs
from motte.attest.platforms.vendor_roots import AMD_ARKS
from motte.errors import AttestationError, EvidenceError, InputError, ResourceError
from motte.limits import MAX_CERTIFICATE_BYTES

UP_TO_DATE: Final = "UpToDate"
OUT_OF_DATE: Final = "OutOfDate"
NO_MINIMUM: Final = "NoMinimum"
_CURVE: Final = "secp384r1"
_MAX_VMPL: Final = 3
_TABLE_ENTRY_BYTES: Final = 24
_TABLE: Final = {
    "63da758d-e664-4564-adc5-f4b93be8accd": "vcek",
    "a8074bc2-a25a-483e-aae6-39c045a0b8a1": "vlek",
    "4ab7b379-bbac-4fe4-a02f-05aef327c782": "ask",
    "c0b406a4-a803-4952-9743-3fb6014cd0ae": "ark",
}
"""GUIDs of a host's table of certificates (GHCB specification, AMD 56421, "SNP Extended Guest Request")."""


def verify(evidence: Evidence, anchors: Anchors, now: datetime) -> Claims:
    """Verify **unverified** SEV-SNP evidence as of ``now`` (aware, UTC).

    Raises:
        EvidenceError: malformed (N-1 to N-3). AttestationError: it does not verify (N-4 to N-13).
    """
    kind = _documents(evidence)
    report = parse_report(evidence.documents["report"], check="N-2")
    leaf = load_der(evidence.documents[kind], where=kind, check="N-3")
    others = [
        load_der(evidence.documents[name], where=name, check="N-3")
        for name in ("ask", "ark")
        if name in evidence.documents
    ]
    if key_kind(leaf.spki, where=kind, check="N-3") != _CURVE:
        raise EvidenceError("not a P-384 key", check="N-3", where=kind)
    chip_key = read_chip_key(leaf, kind, check="N-3")
    path, product = _chain(kind, leaf, others, anchors, now)
    required = path[1:2] if anchors.demand_revocation else ()
    until = verify_not_revoked(anchors.revocation_lists, path, now, required=required, check="N-6")
    verify_ecdsa(leaf.spki, report.signature, report.signed, hash_name="sha384", where="report", check="N-7")
    _same_machine(kind, report, chip_key, product)
    _wanted_guest(report, anchors)
    status = _status(report, chip_key, product, anchors.amd_min_tcb)
    return _claims(report, chip_key, product, path, until, status)


def _documents(evidence: Evidence) -> Literal["vcek", "vlek"]:
    names = set(evidence.documents)
    leaves: tuple[Literal["vcek", "vlek"], ...] = ("vcek", "vlek")
    found = [name for name in leaves if name in names]
    if evidence.platform != "snp" or len(found) != 1 or names - {"ark"} != {"report", "ask", found[0]}:
        raise EvidenceError(
            "not the documents of SEV-SNP evidence",
            check="N-1",
            expected="report, vcek or vlek, ask, and perhaps ark",
            got=f"{evidence.platform}: {', '.join(sorted(names))}"[:200],
        )
    return found[0]


def _chain(
    kind: Literal["vcek", "vlek"], leaf: Certificate, others: list[Certificate], anchors: Anchors, now: datetime
) -> tuple[tuple[Certificate, ...], str]:
    """The verified path leaf, ASK (or ASVK), ARK, and the product that the root stands for."""
    pinned = tuple(AMD_ARKS.values()) if anchors.amd_arks is None else anchors.amd_arks
    roots = [_pinned_root(each) for each in pinned]
    path = verify_chain(leaf, others, roots, now, check="N-4", expiry_check="N-5")
    product = path[-1].common_name().removeprefix("ARK-")
    names = [each.common_name() for each in path]
    expected = [
        f"SEV-{kind.upper()}",
        f"SEV-{product}" if kind == "vcek" else f"SEV-VLEK-{product}",
        f"ARK-{product}",
    ]
    if names != expected:
        raise AttestationError(
            "not a chain of AMD's form", check="N-4", expected=" < ".join(expected), got=" < ".join(names)[:200]
        )
    return path, product


@functools.lru_cache(maxsize=16)
def _pinned_root(data: bytes) -> Certificate:
    return load_der(data, where="pinned AMD root", check="N-4")


def _same_machine(kind: str, report: SnpReport, chip_key: ChipKey, product: str) -> None:
    if report.signer != kind:
        raise AttestationError("signed by another kind of key", check="N-8", expected=kind, got=report.signer)
    # Version 2 of the report names no processor; it was written for family 19h alone.
    family = 0x19 if report.cpu_family is None else report.cpu_family
    if family != chip_key.cpu_family:
        raise AttestationError(
            "the report and the certificate are of different processors",
            check="N-9",
            expected=f"family {chip_key.cpu_family:#x} ({product})",
            got=f"family {family:#x}",
        )
    if chip_key.tcb_bytes() != report.reported_tcb:
        raise AttestationError(
            "the certificate is for another firmware than the one that the report states",
            check="N-10",
            expected=str(chip_key.levels),
            got=str(read_tcb(report.reported_tcb, chip_key.layout)),
        )
    if chip_key.hardware_id is not None and chip_key.hardware_id.ljust(64, b"\x00") != report.chip_id:
        raise AttestationError(
            "the certificate is for another chip",
            check="N-11",
            expected=chip_key.hardware_id.hex()[:32] + "...",
            got=report.chip_id.hex()[:32] + "...",
        )


def _wanted_guest(report: SnpReport, anchors: Anchors) -> None:
    # A report that the host asked for itself says VMPL 0xFFFFFFFF, and its report data are the host's.
    highest = min(anchors.amd_max_vmpl, _MAX_VMPL)
    if report.vmpl > highest:
        raise AttestationError(
            "the report was asked for at a lower privilege level of the guest",
            check="N-12",
            expected=f"VMPL 0 to {highest}",
            got=f"VMPL {report.vmpl}",
            hint="a guest under an SVSM reports at VMPL 1 to 3: allow it only if what runs above it is measured too",
        )
    if report.migratable and not anchors.amd_allow_migration:
        raise AttestationError(
            "the guest's policy lets a migration agent move it to another machine",
            check="N-13",
            expected="bit 18 of the policy clear",
            got=f"{report.policy:#x}",
        )


def _status(report: SnpReport, chip_key: ChipKey, product: str, minimum: Mapping[str, Tcb]) -> str:
    if product not in minimum:
        return NO_MINIMUM
    # Reported: what the key proves. Committed: what the host cannot go back below. Launch: under what it was started.
    for raw in (report.reported_tcb, report.committed_tcb, report.current_tcb, report.launch_tcb):
        if not read_tcb(raw, chip_key.layout).at_least(minimum[product]):
            return OUT_OF_DATE
    return UP_TO_DATE


def _claims(
    report: SnpReport,
    chip_key: ChipKey,
    product: str,
    path: tuple[Certificate, ...],
    until: datetime | None,
    status: str,
) -> Claims:
    signer = report.author_key_digest if report.author_key else report.id_key_digest
    signed = any(signer)
    tcb = {
        name: str(read_tcb(raw, chip_key.layout))
        for name, raw in (
            ("reported_tcb", report.reported_tcb),
            ("committed_tcb", report.committed_tcb),
            ("current_tcb", report.current_tcb),
            ("launch_tcb", report.launch_tcb),
        )
    }
    return Claims(
        platform="snp",
        simulated=path[-1].der not in AMD_ARKS.values(),
        report_data=report.report_data,
        measurements={
            "measurement": report.measurement.hex(),
            "host_data": report.host_data.hex(),
            "id_key_digest": report.id_key_digest.hex(),
            "author_key_digest": report.author_key_digest.hex(),
            "family_id": report.family_id.hex(),
            "image_id": report.image_id.hex(),
        },
        signer=signer.hex() if signed else None,
        # Without a signed ID block nobody stands for the number.
        svn=report.guest_svn if signed else None,
        debug=report.debug,
        tcb_status=status,
        instance=report.chip_id.hex() if any(report.chip_id) else None,
        collateral_until=until,
        details={
            "product": chip_key.product,
            "root": product,
            "vmpl": str(report.vmpl),
            "guest_policy": f"{report.policy:#x}",
            "platform_info": f"{report.platform_info:#x}",
            "firmware": report.firmware,
            "report_id": report.report_id.hex(),
            "signed_by": report.signer,
            "revocation": "not checked" if until is None else f"checked, until {until:%Y-%m-%d %H:%M} UTC",
            **({} if chip_key.provider is None else {"provider": chip_key.provider}),
            **tcb,
        },
    )


# --- inside the guest ---------------------------------------------------------------------------------------------


def issue(report_data: bytes, *, root: Path = TSM_ROOT, certificates: Path | None = None) -> Evidence:
    """Evidence of this SEV-SNP guest for 64 bytes of report data, through configfs (:mod:`motte.attest.platforms.tsm`).

    The host may hand the certificates over with the report (``auxblob``). Where it does not, they come from the folder
    ``certificates``: ``vcek.der`` or ``vlek.der``, ``ask.der``, or PEM under the ending ``.pem``.

    Raises:
        InputError: not 64 bytes, or a certificate that cannot be read.
        ResourceError: no such device, or no certificates; the hint says where AMD serves them.
    """
    blob, table = read_blobs(report_data, root=root, expected_provider="sev_guest")
    try:
        report = parse_report(blob, check="N-2")
        found = {} if not any(table) else _certificate_table(table)
    except EvidenceError as problem:
        raise ResourceError("the platform's answer cannot be read", where=str(root), got=str(problem)) from problem
    if report.report_data != report_data:
        raise ResourceError("the platform answered for other report data", where=str(root))
    if certificates is not None:
        found = _certificate_folder(certificates)
    if not {report.signer, "ask"} <= set(found):
        raise ResourceError(
            "the host gives no certificates for the report",
            expected=f"{report.signer} and ask",
            got=", ".join(sorted(found)) or "none",
            hint=f"fetch them from {_kds_url(report)} and .../cert_chain, and name their folder",
        )
    kept = {name: data for name, data in found.items() if name in (report.signer, "ask", "ark")}
    return Evidence("snp", {"report": blob, **kept})


def _kds_url(report: SnpReport) -> str:
    layout, product = (1, "Turin") if report.cpu_family == 0x1A else (0, "Milan or Genoa")
    levels = read_tcb(report.reported_tcb, layout)
    chip = report.chip_id[: 8 if layout else 64].hex()
    query = f"blSPL={levels.bootloader}&teeSPL={levels.tee}&snpSPL={levels.snp}&ucodeSPL={levels.microcode}"
    return f"https://kdsintf.amd.com/vcek/v1/{product}/{chip}?{query}" + (f"&fmcSPL={levels.fmc}" if layout else "")


def _certificate_table(table: bytes) -> dict[str, bytes]:
    """Entries of 24 bytes (GUID, offset, length; little-endian numbers) up to one of zeros, then the certificates."""
    found: dict[str, bytes] = {}
    for start in range(0, len(table) - _TABLE_ENTRY_BYTES + 1, _TABLE_ENTRY_BYTES):
        entry = table[start : start + _TABLE_ENTRY_BYTES]
        if not any(entry):
            return found
        guid = entry[:16].hex()
        name = _TABLE.get(f"{guid[:8]}-{guid[8:12]}-{guid[12:16]}-{guid[16:20]}-{guid[20:]}")
        offset, length = int.from_bytes(entry[16:20], "little"), int.from_bytes(entry[20:24], "little")
        if offset + length > len(table):
            raise EvidenceError("a certificate lies outside of the host's table", check="N-1", where=name)
        if name is not None and length:
            found[name] = _as_der(table[offset : offset + length], name)
    raise EvidenceError("the host's table of certificates has no end", check="N-1")


def _certificate_folder(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in ("vcek", "vlek", "ask", "ark"):
        for path in (folder / f"{name}.der", folder / f"{name}.pem"):
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_CERTIFICATE_BYTES + 1)
            except FileNotFoundError:
                continue
            except OSError as problem:
                raise InputError("cannot read a certificate", where=str(path), got=problem.strerror) from problem
            try:
                found[name] = _as_der(data, str(path))
            except EvidenceError as problem:
                raise InputError("not a certificate", where=str(path), got=str(problem)) from problem
    return found


def _as_der(data: bytes, where: str) -> bytes:
    if data.startswith(b"-----BEGIN"):
        return load_pem_chain(data, where=where, check="N-3")[0].der
    return load_der(data, where=where, check="N-3").der
