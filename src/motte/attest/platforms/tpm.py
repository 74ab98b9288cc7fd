"""Evidence of a TPM 2.0: a quote over platform configuration registers by an attestation key that the owner enrolled.

What it means, and what not: a TPM measures how a **machine** was started, as a chain of hashes in its registers. It
does not look at a process. Whoever is root there can have a quote made for any report data, so a policy on the
registers has to cover everything that can become root: firmware, boot loader, kernel, its command line and the whole
file system. There is no debug mode that a quote could state: :attr:`Claims.debug` is False because the TPM offers no
way to look inside it; whether the system may be debugged stands in the registers alone.

The checks are T-1 to T-15 of docs/spec/evidence/tpm.md, in the order of this file. Enrolment is
:mod:`motte.attest.platforms.tpm_enrol`.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import struct
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from motte.attest.anchors import Anchors
from motte.attest.certificates import Certificate
from motte.attest.claims import Claims
from motte.attest.evidence import REPORT_DATA_BYTES, Evidence
from motte.attest.platforms.tpm_enrol import Enrolment, hardware_path
from motte.attest.platforms.tpm_structures import (
    RESETTABLE_PCRS,
    Public,
    Quote,
    parse_public,
    parse_quote,
    parse_signature,
    require_attestation_key,
    verify_signature,
)
from motte.attest.platforms.tpm_tools import DEFAULT_HANDLE, Bank, Quoted, Tpm
from motte.errors import AttestationError, EvidenceError, InputError, ResourceError
from motte.limits import MAX_TPM_STRUCTURE_BYTES

PLATFORM: Final = "tpm"
DOCUMENTS: Final = ("ak_public", "attest", "pcrs", "report_data", "signature")
DEFAULT_PCRS: Final = (0, 2, 4, 7, 8, 9, 11, 12, 13, 14)
"""Code of the firmware and of its extensions, boot loader, secure boot, GRUB's commands and files, and what a unified
kernel image measures. Left out: settings and hardware that change by themselves (1, 3, 5, 6) and running files (10)."""
SOFTWARE_FIRMWARE: Final = frozenset({0x2019102300163636})
"""Firmware versions in the quotes of libtpms, on which swtpm and with it most virtual TPMs stand."""
_COMPOSITE_DOMAIN: Final = b"motte-tpm-pcrs-1\x00"
_QUOTE_TRIES: Final = 3


def verify(evidence: Evidence, anchors: Anchors, now: datetime) -> Claims:
    """Check **unverified** evidence of a TPM as of ``now`` (aware, UTC) and return what it says.

    Measurements: ``pcrs``, the digest over the selection and the values of all quoted registers
    (:func:`composite`), and ``pcrN`` for each. Instance: digest of the endorsement key; None for a key that is pinned
    without a record.

    Raises:
        EvidenceError: malformed (T-1, T-2, T-5, T-8, T-10, T-14).
        AttestationError: the other checks of T-1 to T-15.
    """
    documents = _documents(evidence)
    key = parse_public(documents["ak_public"], where="ak_public", check="T-2")
    require_attestation_key(key, check="T-3")
    record = _enrolment(key, anchors)
    path = _path(record, anchors, now)
    quote = parse_quote(documents["attest"], where="attest", check="T-8", magic_check="T-9")
    signature = parse_signature(documents["signature"], where="signature", check="T-10")
    verify_signature(signature, key, quote.signed, where="signature", check="T-11")
    if record is not None:
        _same(quote.qualified_signer, record.qualified_name, "T-12", "the quote names another signer, or another TPM")
    report_data = documents["report_data"]
    _same(quote.extra_data, extra_data(report_data), "T-13", "the quote was made for other report data")
    registers = _registers(quote, documents["pcrs"])
    digest = hashlib.new(signature.hash_name, documents["pcrs"]).digest()
    _same(quote.pcr_digest, digest, "T-15", "the quote was made over other registers")
    simulated = record is None or record.simulated or quote.firmware in SOFTWARE_FIRMWARE
    return Claims(
        platform=PLATFORM,
        simulated=simulated,
        report_data=report_data,
        measurements={"pcrs": composite(quote.bank, registers), **{f"pcr{n}": v.hex() for n, v in registers.items()}},
        debug=False,
        instance=None if record is None else record.instance,
        collateral_until=min((each.not_after for each in path), default=None),
        details=_details(quote, key, record),
    )


def extra_data(report_data: bytes) -> bytes:
    """What a quote carries for ``report_data``: its SHA-256, 32 bytes, which every TPM 2.0 takes.

    The report data itself is 64 bytes, which a TPM without SHA-512 does not take as qualifying data.
    """
    return hashlib.sha256(report_data).digest()


def composite(bank: str, registers: dict[int, bytes]) -> str:
    """The measurement ``pcrs``: SHA-256 over the bank, and over each register's number and value; hexadecimal.

    Unlike the digest inside a quote it names the registers, so that equal values of other registers are not the same.
    """
    digest = hashlib.sha256(_COMPOSITE_DOMAIN + bank.encode() + struct.pack(">I", len(registers)))
    for number, value in sorted(registers.items()):
        digest.update(struct.pack(">II", number, len(value)) + value)
    return digest.hexdigest()


# --- the checks, in their order -----------------------------------------------------------------------------------


def _documents(evidence: Evidence) -> dict[str, bytes]:
    """Check T-1."""
    documents = dict(evidence.documents)
    if evidence.platform != PLATFORM or sorted(documents) != sorted(DOCUMENTS):
        raise EvidenceError(
            "not the documents of a TPM's evidence",
            check="T-1",
            expected=f"{PLATFORM}: " + ", ".join(DOCUMENTS),
            got=f"{evidence.platform}: " + ", ".join(sorted(map(repr, documents)))[:200],
        )
    if len(documents["report_data"]) != REPORT_DATA_BYTES:
        got = f"{len(documents['report_data'])} bytes"
        raise EvidenceError("not report data", check="T-1", expected=f"{REPORT_DATA_BYTES} bytes", got=got)
    if len(documents["pcrs"]) > MAX_TPM_STRUCTURE_BYTES:
        raise EvidenceError("too many registers", check="T-1", where="pcrs", got=f"{len(documents['pcrs'])} bytes")
    return documents


def _enrolment(key: Public, anchors: Anchors) -> Enrolment | None:
    """Checks T-4 and T-5: the record of this key; None: it is pinned bare, as a SubjectPublicKeyInfo."""
    bare, records = _entries(anchors.tpm_enrolled)
    found = [record for record in records if record.ak.name == key.name]
    if found:
        # Enrolled twice: the record that claims less counts.
        return max(found, key=lambda record: record.simulated)
    if key.spki in bare:
        return None
    raise AttestationError(
        "the attestation key is not enrolled",
        check="T-4",
        where="ak_public",
        expected=f"one of {len(records)} enrolled keys, or of {len(bare)} pinned ones",
        got=f"key name {key.name.hex()}",
        hint="any software TPM has an attestation key: enrol the machine's TPM first, and keep its record",
    )


def _entries(entries: Iterable[bytes]) -> tuple[list[bytes], list[Enrolment]]:
    # A record is a JSON object, a public key in DER a sequence: their first bytes differ.
    bare, records = [], []
    for entry in entries:
        if entry[:1] == b"{":
            records.append(_decoded(entry))
        else:
            bare.append(entry)
    return bare, records


@functools.lru_cache(maxsize=4096)
def _decoded(entry: bytes) -> Enrolment:
    # The same records are asked for at each verification, and each holds two keys to check.
    return Enrolment.decode(entry)


def _path(record: Enrolment | None, anchors: Anchors, now: datetime) -> tuple[Certificate, ...]:
    """Checks T-6 and T-7: a record that claims hardware has to prove it again, under the roots that are pinned now."""
    if record is None or record.simulated:
        return ()
    return hardware_path(record.ek, record.certificates, anchors.tpm_roots, now, check="T-6", expiry_check="T-7")


def _registers(quote: Quote, values: bytes) -> dict[int, bytes]:
    """Check T-14."""
    resettable = sorted(RESETTABLE_PCRS & set(quote.pcrs))
    if resettable:
        raise AttestationError(
            "a register that any software can reset", check="T-14", where="attest", got=f"pcr{resettable[0]}"
        )
    size = hashlib.new(quote.bank).digest_size
    if len(values) != size * len(quote.pcrs):
        raise EvidenceError(
            "not the values of the quoted registers",
            check="T-14",
            where="pcrs",
            expected=f"{len(quote.pcrs)} of {size} bytes",
            got=f"{len(values)} bytes",
        )
    return {number: values[size * index : size * (index + 1)] for index, number in enumerate(quote.pcrs)}


def _same(got: bytes, expected: bytes, check: str, message: str) -> None:
    if not hmac.compare_digest(got, expected):
        raise AttestationError(message, check=check, where="attest", expected=expected.hex(), got=got.hex()[:140])


def _details(quote: Quote, key: Public, record: Enrolment | None) -> dict[str, str]:
    details = {
        "bank": quote.bank,
        "clock_ms": str(quote.clock_ms),
        "clock_safe": "yes" if quote.safe else "no",
        "reset_count": str(quote.resets),
        "restart_count": str(quote.restarts),
        "firmware_version": f"{quote.firmware:#018x}",
        "key_name": key.name.hex(),
        "enrolment": "bare public key" if record is None else "credential activation",
    }
    if record is not None:
        details["manufacturer"] = record.manufacturer
        details["vendor"] = record.vendor
        details["enrolled_at"] = record.enrolled_at.isoformat()
    return details


# --- issuing ------------------------------------------------------------------------------------------------------


def issue(
    report_data: bytes,
    *,
    tpm: Tpm | None = None,
    handle: int = DEFAULT_HANDLE,
    pcrs: tuple[int, ...] = DEFAULT_PCRS,
    bank: Bank = "sha256",
) -> Evidence:
    """A quote for ``report_data`` (64 bytes) by the attestation key at ``handle``.

    Args:
        tpm: which TPM, and how long to wait for it; None: ``/dev/tpmrm0``.
        pcrs: register numbers (0 to 23), not 16 or 23.

    Raises:
        InputError: not report data, or not registers.
        ResourceError: no TPM, no tools, no attestation key at ``handle``, or registers that keep changing.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise InputError("not report data", expected=f"{REPORT_DATA_BYTES} bytes", got=f"{len(report_data)} bytes")
    chosen = tuple(sorted(set(pcrs)))
    if not chosen or len(chosen) != len(pcrs) or not set(chosen) <= set(range(24)) - RESETTABLE_PCRS:
        raise InputError(
            "not registers to quote",
            where="pcrs",
            expected="numbers from 0 to 23, each once, not 16 or 23",
            got=str(pcrs),
        )
    device = tpm or Tpm()
    key = device.public(handle)
    for _ in range(_QUOTE_TRIES):
        quoted = device.quote(handle, extra_data(report_data), chosen, bank, key)
        if _consistent(quoted, chosen, bank, key):
            return Evidence(
                PLATFORM,
                {
                    "ak_public": key.encoded,
                    "attest": quoted.attest,
                    "pcrs": quoted.pcrs,
                    "report_data": report_data,
                    "signature": quoted.signature,
                },
            )
    raise ResourceError(
        "the registers do not stand still, or the bank is not active",
        where=f"{bank}: {', '.join(map(str, chosen))}",
        hint="leave out registers that a running system extends, such as 10, or choose the other bank",
    )


def _consistent(quoted: Quoted, pcrs: tuple[int, ...], bank: Bank, key: Public) -> bool:
    # The tools read the registers beside the quote, not in it: one of them may have been extended in between.
    # Of a bank that is off, a TPM quotes no register at all.
    try:
        quote = parse_quote(quoted.attest, where="attest", check="T-8", magic_check="T-9")
    except EvidenceError:
        return False
    if (quote.bank, quote.pcrs) != (bank, pcrs) or key.scheme_hash is None:
        return False
    return quote.pcr_digest == hashlib.new(key.scheme_hash, quoted.pcrs).digest()
