"""SGX and TDX quotes (Intel DCAP): the strict frame, ``dcap-qvl`` for everything signed, and which check has failed.

A quote is read twice. Our own frame comes first: every length adds up to the end, the certification data is the PCK
chain, nothing but zeros follows. Then ``dcap-qvl`` verifies, from Intel's root down: revocation lists, TCB info, QE
identity, PCK chain, QE report, attestation key, quote, TCB level, attributes. It reports failures as text; the text
names the number of our check, and only that: whatever the library refuses is refused. The facts come from the
library's verified claims. Layout: Intel "SGX ECDSA Quote Library Reference" (quote version 3) and "TDX DCAP Quoting
Library API" (versions 4 and 5). Checks 1 to 14, with ``G-`` for sgx and ``D-`` for tdx: docs/spec/evidence.md.
"""

from __future__ import annotations

import calendar
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from motte.attest.anchors import Anchors
from motte.attest.certificates import load_pem_chain
from motte.attest.evidence import Evidence
from motte.attest.platforms.dcap_collateral import Collateral, CollateralCache, fetch, library
from motte.errors import AttestationError, EvidenceError
from motte.strict_json import Fields

T = TypeVar("T")
INTEL_ROOT_KEY_ID: Final = (
    "46e403bd34f05a3f2817ab9badcaacc7ffc98e0f261008cd30dae936cace18d5dcf58eef31463613de1570d516200993"
)
"""SHA-384 of the public key of Intel's SGX root CA: what ``dcap-qvl`` states for claims under Intel's own root."""
TCB_SIGNER: Final = "Intel SGX TCB Signing"
"""Common name of the certificate that signs TCB info and QE identity; no other leaf under the root may."""
_HEADER_BYTES: Final = 48
_QE_REPORT_BYTES: Final = 384
_SIGNATURE_BYTES: Final = 64
_QE_AUTHENTICATION_BYTES: Final = 32
_PCK_CHAIN: Final = 5
_QE_REPORT_DATA: Final = 6
_ECDSA_P256: Final = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of quote: the platform's name, the letter of its checks, its number, body bytes by version (None: the
    quote says), and the names that the library gives to its reports."""

    platform: str
    letter: str
    tee_type: int
    bodies: Mapping[int, int | None]
    reports: tuple[str, ...]

    def check(self, number: int) -> str:
        """The number of a check, such as ``G-1``."""
        return f"{self.letter}-{number}"


SGX: Final = Kind("sgx", "G", 0x00, {3: 384}, ("SgxEnclave",))
TDX: Final = Kind("tdx", "D", 0x81, {4: 584, 5: None}, ("TD10", "TD15", "TD15Ex"))

_BY_TEXT: Final[tuple[tuple[int, tuple[str, ...]], ...]] = (
    (4, ("CrlExpired", "CertExpired", "CertNotValidYet", "TCBInfo expired", "QE Identity expired")),
    (4, ("issue date is in the future",)),
    (3, ("Failed to load root ca", "Failed to parse root CA CRL", "Failed to parse PCK CRL")),
    (5, ("Failed to verify certificate chain", "UnknownRevocationStatus", "CertRevoked", "UnsupportedCrl")),
    (5, ("Certificate chain is too short", "Too many intermediate", "leaf certificate", "PCK certificate")),
    (5, ("Failed to parse certs", "Intel extension", "Unsupported DCAP PCK cert format", "OID is missing")),
    (6, ("Signature is invalid for tcb_info", "Signature is invalid for qe_identity")),
    (6, ("Failed to decode TcbInfo", "Failed to decode QeIdentity", "issue date", "next update")),
    (7, ("Signature is invalid for qe_report", "Failed to decode QE report")),
    (8, ("QE report hash mismatch", "Invalid QE auth data length")),
    (9, ("Unsupported QE Identity", "QE MRSIGNER", "QE ISVPRODID", "QE MISCSELECT", "QE ATTRIBUTES", "QE report")),
    (9, ("QE Identity", "QE TCB", "QE ISVSVN")),
    (10, ("ISV enclave report signature",)),
    (12, ("Debug mode", "TD profiling", "TD attributes", "TD migration", "SERVTD_EXT", "SEPT_VE", "MR service TD")),
    (11, ("Fmspc", "TCB info", "TCB Info", "TCB level", "TCB status", "TDX module", "component count")),
    (1, ("Failed to decode quote", "Unsupported DCAP", "QE vendor ID", "TEE type", "TEE quote")),
)
"""Which check a text of the library belongs to; the first match counts. A text that is not here is check 14."""
_MESSAGES: Final = {
    1: "not a quote of this platform",
    3: "the root certificate or a revocation list does not verify",
    4: "a certificate, revocation list or statement of the platform vendor is not in force at this time",
    5: "a certificate chain does not lead to the pinned root, or was revoked",
    6: "TCB info or QE identity is not signed by the platform vendor, or was altered",
    7: "the quoting enclave's report is not signed by the platform's certified key",
    8: "the attestation key is not the quoting enclave's",
    9: "not a quoting enclave that the platform vendor vouches for",
    10: "the quote is not signed by its attestation key, or was altered",
    11: "the platform's state has no place in the vendor's statement, or was revoked",
    12: "an environment that can be debugged, migrated or profiled from outside, or has unknown attributes",
    14: "the quote does not verify",
}


@dataclass(frozen=True, slots=True)
class QuoteFacts:
    """**Verified** facts of a quote. ``report`` holds the body's fields by the library's names: byte fields as
    hexadecimal text, numbers as integers."""

    simulated: bool
    report: Mapping[str, Any]
    tcb_status: str
    advisories: tuple[str, ...]
    instance: str | None
    collateral_until: datetime
    details: Mapping[str, str]


# --- the frame ----------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, data: bytes, check: str) -> None:
        self._data, self._at, self._check = data, 0, check

    def take(self, count: int, what: str) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            got = f"{len(piece)} bytes"
            raise EvidenceError("the quote is too short", check=self._check, where=what, expected=str(count), got=got)
        self._at += count
        return piece

    def number(self, count: int, what: str) -> int:
        return int.from_bytes(self.take(count, what), "little")

    def equal(self, found: int, expected: int, what: str) -> None:
        if found != expected:
            raise EvidenceError(
                "not a quote of this platform", check=self._check, where=what, expected=str(expected), got=str(found)
            )

    def left(self) -> bytes:
        return self._data[self._at :]


def framed(quote: bytes, kind: Kind) -> bytes:
    """The **unverified** quote without the zeros that some devices put behind it, once its frame holds (check 1).

    Raises:
        EvidenceError: another version, key type or platform, a length that does not add up, certification data other
            than a PCK chain in PEM, or something behind the end.
    """
    check = kind.check(1)
    reader = _Reader(quote, check)
    version = reader.number(2, "version")
    if version not in kind.bodies:
        expected = " or ".join(map(str, kind.bodies))
        raise EvidenceError("another version", check=check, where="version", expected=expected, got=str(version))
    reader.equal(reader.number(2, "key type"), _ECDSA_P256, "key type")
    reader.equal(reader.number(4, "TEE type"), kind.tee_type, "TEE type")
    reader.take(_HEADER_BYTES - 8, "header")
    body_bytes = kind.bodies[version]
    if body_bytes is None:
        reader.take(2, "body type")
        body_bytes = reader.number(4, "body bytes")
    reader.take(body_bytes, "body")
    signature_data = reader.take(reader.number(4, "signature bytes"), "signature data")
    behind = reader.left()
    if behind.strip(b"\x00"):
        raise EvidenceError("bytes behind the quote's end", check=check, got=f"{len(behind)} bytes, not all zero")
    chain = _certification_data(signature_data, version, check)
    load_pem_chain(chain, where="PCK chain", check=check)
    return quote[: len(quote) - len(behind)]


def _certification_data(signature_data: bytes, version: int, check: str) -> bytes:
    reader = _Reader(signature_data, check)
    reader.take(2 * _SIGNATURE_BYTES, "signature and attestation key")
    if version > 3:
        reader.equal(reader.number(2, "certification type"), _QE_REPORT_DATA, "certification type")
        inner = reader.take(reader.number(4, "certification bytes"), "certification data")
        _nothing(reader.left(), "signature data", check)
        reader = _Reader(inner, check)
    reader.take(_QE_REPORT_BYTES + _SIGNATURE_BYTES, "QE report")
    reader.equal(reader.number(2, "QE authentication bytes"), _QE_AUTHENTICATION_BYTES, "QE authentication bytes")
    reader.take(_QE_AUTHENTICATION_BYTES, "QE authentication data")
    reader.equal(reader.number(2, "certification type"), _PCK_CHAIN, "certification type")
    chain = reader.take(reader.number(4, "certificate bytes"), "certificates")
    _nothing(reader.left(), "certification data", check)
    return chain


def _nothing(left: bytes, where: str, check: str) -> None:
    if left:
        raise EvidenceError("bytes behind the end", check=check, where=where, got=f"{len(left)} bytes")


# --- verification -------------------------------------------------------------------------------------------------


def verify_quote(evidence: Evidence, anchors: Anchors, now: datetime, kind: Kind) -> QuoteFacts:
    """Check **unverified** evidence with the documents ``quote`` and, if it brings it along, ``collateral``.

    Raises:
        EvidenceError: malformed (E-2, checks 1 and 2).
        AttestationError: it does not verify (checks 2 to 14).
        ResourceError: ``dcap-qvl`` is missing, or collateral was to be fetched and could not be.
    """
    documents = evidence.take(kind.platform, required=("quote",), optional=("collateral",))
    quote = framed(documents["quote"], kind)
    if anchors.intel_collateral is not None:
        given = Collateral.decode(anchors.intel_collateral, check=kind.check(2), where="given collateral")
        return _verified(quote, given, anchors, now, kind)
    cache = None if anchors.intel_cache is None else _cache(anchors, quote, kind)
    cached = None if cache is None else cache.load(check=kind.check(2))
    if cached is not None:
        try:
            return _verified(quote, cached, anchors, now, kind)
        except AttestationError as problem:
            if problem.check not in (kind.check(4), kind.check(13)):  # only a stale one is worth another source
                raise
    if anchors.intel_pccs is not None:
        timeout_s = anchors.intel_pccs_timeout_s
        fetched = fetch(anchors.intel_pccs, quote, timeout_s=timeout_s, check=kind.check(2))
        facts = _verified(quote, fetched, anchors, now, kind)
        if cache is not None:
            cache.store(fetched)
        return facts
    if "collateral" not in documents:
        raise AttestationError(
            "no collateral for this quote",
            check=kind.check(2),
            expected="given, in a cache and in force, from a PCCS, or in the evidence",
            got="none",
            hint="name a PCCS, or let the evidence bring its collateral along",
        )
    return _verified(quote, Collateral.decode(documents["collateral"], check=kind.check(2)), anchors, now, kind)


def _cache(anchors: Anchors, quote: bytes, kind: Kind) -> CollateralCache | None:
    if anchors.intel_cache is None:
        return None
    parsed = _guarded(lambda: library().parse_quote(quote), kind)
    words = _guarded(lambda: (str(parsed.fmspc()), str(parsed.ca())), kind)
    return CollateralCache(anchors.intel_cache, (kind.platform, *words))


def _guarded(call: Callable[[], T], kind: Kind) -> T:
    # The library is Rust: beside ValueError, a panic would come as a BaseException that nobody else catches.
    try:
        return call()
    except (ValueError, TypeError, OverflowError) as problem:
        raise _refusal(str(problem), kind) from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise _refusal(f"panic: {problem}", kind) from problem


def _refusal(text: str, kind: Kind) -> AttestationError:
    number = next((number for number, words in _BY_TEXT if any(word in text for word in words)), 14)
    return AttestationError(_MESSAGES[number], check=kind.check(number), got=" ".join(text.split())[:300])


def _verified(quote: bytes, collateral: Collateral, anchors: Anchors, now: datetime, kind: Kind) -> QuoteFacts:
    qvl, now_s = library(), calendar.timegm(now.utctimetuple())
    if now_s < 0:
        raise AttestationError(_MESSAGES[4], check=kind.check(4), expected="a time from 1970", got=now.isoformat())
    for chain in sorted({collateral.tcb_info_issuer_chain, collateral.qe_identity_issuer_chain}):
        _signed_by_tcb_signer(chain.encode(), kind)
    theirs = collateral.for_library()
    try:
        policy = qvl.QuotePolicy.claims_only(now_s)  # deciding is the business of our own policies
        verifier = qvl.QuoteVerifier(anchors.intel_root)
        text = _guarded(lambda: verifier.verify_with_policy(quote, theirs, now_s, policy).to_json(), kind)
    except AttestationError:
        _say_why(quote, theirs, anchors, now_s, kind)
        raise
    return _facts(text, anchors, kind)


def _say_why(quote: bytes, theirs: Any, anchors: Anchors, now_s: int, kind: Kind) -> None:
    # The library's older call runs the same checks and states the whole chain of causes, not only the outermost.
    qvl = library()
    if anchors.intel_root is None:
        _guarded(lambda: qvl.verify(quote, theirs, now_s), kind)
    else:
        root = anchors.intel_root
        _guarded(lambda: qvl.verify_with_root_ca(quote, theirs, root, now_s), kind)


def _signed_by_tcb_signer(chain: bytes, kind: Kind) -> None:
    # The library takes any leaf under the root. A PCK certificate is one too, and its key lives on a platform.
    leaf = load_pem_chain(chain, where="issuer chain of the collateral", check=kind.check(2))[0]
    if leaf.common_name() != TCB_SIGNER:
        raise AttestationError(
            "collateral signed by a certificate of another purpose",
            check=kind.check(6),
            expected=TCB_SIGNER,
            got=leaf.common_name()[:80],
        )


# --- facts --------------------------------------------------------------------------------------------------------


def _facts(text: str, anchors: Anchors, kind: Kind) -> QuoteFacts:
    claims = Fields(json.loads(text), where="verified claims")  # the library's own words, nothing from outside
    tcb, platform, qe = claims.fields("tcb"), claims.fields("platform"), claims.fields("qe")
    pck = platform.fields("pck")
    root_key = bytes(platform.any("root_key_id")).hex()
    simulated = root_key != INTEL_ROOT_KEY_ID
    evaluation = int(tcb.any("eval_data_number"))
    if simulated and anchors.intel_root is None:
        expected = INTEL_ROOT_KEY_ID[:32] + "..."
        raise AttestationError("another root", check=kind.check(13), expected=expected, got=root_key[:32] + "...")
    if evaluation < anchors.intel_min_evaluation:
        raise AttestationError(
            "collateral older than the lowest allowed revision",
            check=kind.check(13),
            where="tcbEvaluationDataNumber",
            expected=f"at least {anchors.intel_min_evaluation}",
            got=str(evaluation),
        )
    ppid, piid = bytes(pck.any("ppid")), pck.any("platform_instance_id")
    details = {
        "fmspc": bytes(pck.any("fmspc")).hex(),
        "ppid": ppid.hex(),
        "pce_svn": str(pck.any("pce_svn")),
        "cpu_svn": bytes(pck.any("cpu_svn")).hex(),
        "tcb_evaluation": str(evaluation),
        "tcb_date": str(platform.fields("tcb_level").any("tcbDate")),
        "qe_status": str(qe.fields("tcb_level").any("tcbStatus")),
    }
    if piid is not None:
        details["platform_instance_id"] = bytes(piid).hex()
    return QuoteFacts(
        simulated=simulated,
        report=_report(claims.any("report"), kind),
        tcb_status=str(tcb.any("status")),
        advisories=tuple(str(each) for each in tcb.any("advisory_ids")),
        instance=ppid.hex() if any(ppid) else None,
        collateral_until=datetime.fromtimestamp(int(claims.any("earliest_expiration_date")), UTC),
        details=details,
    )


def _report(value: Any, kind: Kind) -> Mapping[str, Any]:
    name = next(iter(value))
    if name not in kind.reports:
        expected = " or ".join(kind.reports)
        raise AttestationError("another report", check=kind.check(13), expected=expected, got=str(name))
    found = dict(value[name])
    while "base" in found:  # a later report of TDX holds the earlier one
        found |= found.pop("base")
    return found
