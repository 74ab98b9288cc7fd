"""Vendors' evidence of made-up machines: honest, and with every kind of lie. docs/spec/evidence.md numbers the checks.

What only a vendor's key could sign lies in ``motte/audit/vectors/evidence.json``, under test roots that it names
(``scripts/make_evidence_vectors.py``): quotes of machines that are debugged, outdated, revoked, or somebody else's.
What a host can do with genuine evidence is done here: flip bytes, put parts of other evidence in, send it again, say
that it speaks for something else.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import resources
from typing import Any, Final

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.fresh import NonceBook
from motte.attest.platforms.snp_tcb import Tcb
from motte.attest.policy import (
    AllOf,
    Configuration,
    InsecureAllowSimulated,
    Measurement,
    NotDebug,
    Platform,
    Policy,
    TcbStatus,
)
from motte.attest.report_data import Binding
from motte.attest.verify import verify
from motte.audit.attacks.conformance import Trial
from motte.errors import AttestationError, EvidenceError, FormatError
from motte.strict_json import Fields, parse

VECTORS: Final = ("vectors", "evidence.json")
FORMAT: Final = "motte-evidence-vectors-1"
_MAX_BYTES: Final = 4 << 20
_CLAIMS: Final = {"sgx": "H3", "tdx": "H3", "snp": "H4", "nvidia": "H5", "tpm": "H6"}
_BY_CHECK: Final = {"R-2": "H1", "P-9": "H1", "P-10": "H1", "P-11": "H1", "P-1": "H2"}
"""Claims that a check speaks of on every platform."""
_LETTERS: Final = {"sgx": "G", "tdx": "D"}
_UP_TO_DATE: Final = {"Milan": Tcb(bootloader=4, tee=0, snp=22, microcode=213)}
"""The firmware of the made-up SEV-SNP machines."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """One platform's evidence, all for one binding unless its name says else.

    Attributes:
        at: when its certificates hold.
        code: the measurement of the code that was meant.
        anchors: the test roots; ``others``: those of another made-up vendor.
        evidence: by what is wrong with it; ``honest``: nothing. **Unverified**, as all evidence.
    """

    platform: str
    at: datetime
    code: str
    anchors: Anchors
    others: Anchors
    evidence: Mapping[str, Evidence]


def load_vectors() -> tuple[Binding, tuple[Vectors, ...]]:
    """What the installed package holds: the binding that was meant, and each platform's evidence.

    Raises:
        FormatError: the file is damaged.
    """
    data = resources.files("motte.audit").joinpath(*VECTORS).read_bytes()
    fields = Fields(parse(data, max_bytes=_MAX_BYTES, what="evidence vectors", error=FormatError), where="vectors")
    fields.choice("format", (FORMAT,))
    given = fields.any("binding")
    tables: Any = fields.any("platforms")
    fields.done()
    try:
        binding = Binding(**{name: bytes.fromhex(value) for name, value in given.items()})
        return binding, tuple(_vectors(table) for table in tables)
    except (TypeError, ValueError, KeyError, AttributeError) as problem:
        raise FormatError("damaged evidence vectors", where="/".join(VECTORS), got=str(problem)[:200]) from problem


def _vectors(table: Mapping[str, Any]) -> Vectors:
    return Vectors(
        platform=table["platform"],
        at=datetime.strptime(table["at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC),
        code=table["code"],
        anchors=_anchors(table["anchors"]),
        others=_anchors(table["other_anchors"]),
        evidence={name: Evidence.decode(text.encode()) for name, text in table["evidence"].items()},
    )


def _anchors(given: Mapping[str, Sequence[str]]) -> Anchors:
    found = {name: tuple(base64.b64decode(each, validate=True) for each in values) for name, values in given.items()}
    settings: dict[str, Any] = {name: each[0] if name.endswith("_root") else each for name, each in found.items()}
    return Anchors(amd_min_tcb=_UP_TO_DATE, **settings)


def evidence_trials(platforms: Sequence[str]) -> Iterator[Trial]:
    """All of them, for ``platforms``."""
    binding, tables = load_vectors()
    for table in tables:
        if table.platform in platforms:
            yield from _Relying(table, binding).trials()


class _Relying:
    """A relying party that pins the test roots, and what a host shows it."""

    def __init__(self, vectors: Vectors, binding: Binding) -> None:
        self._of, self._binding = vectors, binding
        self._honest = vectors.evidence["honest"]
        status = () if vectors.platform == "tpm" else (TcbStatus(frozenset({"UpToDate"})),)
        self._conditions: tuple[Policy, ...] = (
            Platform(frozenset({vectors.platform})),
            Measurement(frozenset({vectors.code})),
            NotDebug(),
            *status,
            Configuration(frozenset({binding.configuration_digest.hex()})),
        )

    def trials(self) -> Iterator[Trial]:
        """Every line of the platform."""
        yield self._trial("honest", None, self._asked(self._honest), accepted=True)
        for name, check, act in (*self._common(), *self._bound(), *self._vendor()):
            yield self._trial(name, check, act)
        for name, document, place, check in _REGIONS[self._of.platform]:
            act = self._asked(self._flipped(document, place))
            yield self._trial(f"{document}: {name} flipped", self._number(check), act)

    def _trial(self, name: str, check: str | None, act: Callable[[], object], *, accepted: bool = False) -> Trial:
        claim = _BY_CHECK.get(check or "", _CLAIMS[self._of.platform])
        kinds = () if accepted else (AttestationError, EvidenceError)
        return Trial(f"{self._of.platform} evidence: {name}", claim, kinds, check, act)

    def _asked(
        self,
        evidence: Evidence,
        *,
        anchors: Anchors | None = None,
        binding: Binding | None = None,
        conditions: Sequence[Policy] = (),
        now: datetime | None = None,
    ) -> Callable[[], object]:
        policy = AllOf(InsecureAllowSimulated(), *self._conditions, *conditions)
        return partial(
            verify,
            evidence,
            policy,
            now or self._of.at,
            anchors=anchors or self._of.anchors,
            binding=binding or self._binding,
        )

    # --- what a host can do on any platform ---------------------------------------------------------------------------
    def _common(self) -> Iterator[tuple[str, str | None, Callable[[], object]]]:
        honest, named = self._honest, self._of.platform
        chain = _CHAIN[named]
        yield "under the vendor's own root", chain, self._asked(honest, anchors=Anchors(amd_min_tcb=_UP_TO_DATE))
        yield "under another root", chain, self._asked(honest, anchors=self._of.others)
        yield "a foreign chain", chain, self._asked(self._of.evidence["theirs"])
        other = "tdx" if named == "sgx" else "sgx"
        yield "given out for another platform", None, self._asked(Evidence(other, honest.documents))
        yield (
            "with a document that nobody knows",
            None,
            self._asked(Evidence(named, {**honest.documents, "more": b"x"})),
        )
        for document in honest.documents:
            left = {name: data for name, data in honest.documents.items() if name != document}
            if document not in ("ark", "collateral"):
                yield f"without its {document}", None, self._asked(Evidence(named, left))
            yield f"with an empty {document}", None, self._asked(Evidence(named, {**left, document: b""}))
        strict = AllOf(*self._conditions)
        yield (
            "where simulated evidence is not permitted",
            "P-1",
            partial(verify, honest, strict, self._of.at, anchors=self._of.anchors, binding=self._binding),
        )
        other_code = Measurement(frozenset({"00" * (len(self._of.code) // 2)}))
        yield "of other code", "P-3", self._asked(honest, conditions=(other_code,))

    def _bound(self) -> Iterator[tuple[str, str | None, Callable[[], object]]]:
        honest, binding = self._honest, self._binding
        for name, field in (
            ("another nonce", "nonce"),
            ("another key", "public_key"),
            ("another TLS certificate", "tls_spki_digest"),
            ("another configuration", "configuration_digest"),
        ):
            said = replace(binding, **{field: b"x" * 32})
            yield f"said to speak for {name}", "R-2", self._asked(honest, binding=said)
        yield (
            "said to speak for no TLS certificate",
            "R-2",
            self._asked(honest, binding=replace(binding, tls_spki_digest=b"")),
        )
        unsigned = replace(binding, configuration_digest=b"u" * 32)
        rebound = self._of.evidence["rebound"]
        yield "of a configuration that no owner signed", "P-9", self._asked(rebound, binding=unsigned)
        yield "of one configuration, said to be of another", "R-2", self._asked(rebound)
        yield "sent a second time", "P-10", self._replayed
        yield "for a nonce of somebody else", "P-10", self._foreign_nonce
        yield "for a nonce that is too old", "P-11", self._stale

    def _replayed(self) -> None:
        book = _Book(self._binding.nonce, self._of.at)
        self._asked(self._honest, conditions=(book.take(self._binding.nonce),))()
        self._asked(self._honest, conditions=(book.take(self._binding.nonce),))()

    def _foreign_nonce(self) -> None:
        fresh = _Book(b"m" * 32, self._of.at).take(b"m" * 32)
        self._asked(self._honest, conditions=(fresh,))()

    def _stale(self) -> None:
        fresh = _Book(self._binding.nonce, self._of.at - timedelta(seconds=61)).take(self._binding.nonce)
        self._asked(self._honest, conditions=(fresh,))()

    # --- what a vendor would not vouch for ----------------------------------------------------------------------------
    def _vendor(self) -> Iterator[tuple[str, str | None, Callable[[], object]]]:
        for kind, name, check in _SIGNED[self._of.platform]:
            yield name, self._number(check), self._asked(self._of.evidence[kind])
        for name, document, check in _SWAPPED[self._of.platform]:
            theirs = self._of.evidence["theirs"].documents[document]
            mixed = Evidence(self._of.platform, {**self._honest.documents, document: theirs})
            yield name, self._number(check), self._asked(mixed)
        if self._of.platform in _LETTERS:
            later = self._of.at + timedelta(days=60)
            yield "with collateral that has expired", self._number("4"), self._asked(self._honest, now=later)

    def _flipped(self, document: str, place: int) -> Evidence:
        data = bytearray(self._honest.documents[document])
        data[place] ^= 0x01
        return Evidence(self._of.platform, {**self._honest.documents, document: bytes(data)})

    def _number(self, check: str | None) -> str | None:
        letter = _LETTERS.get(self._of.platform)
        return check if check is None or letter is None or "-" in check else f"{letter}-{check}"


class _Book(NonceBook):
    """A book in which one nonce stands that we chose: the one for which the vectors were made."""

    def __init__(self, nonce: bytes, at: datetime) -> None:
        super().__init__(60)
        self._issued[nonce] = at


# --- tables -----------------------------------------------------------------------------------------------------------
_CHAIN: Final = {"sgx": "G-3", "tdx": "D-3", "snp": "N-4", "nvidia": "V-4", "tpm": "T-4"}
"""The check that refuses another root."""
_SIGNED: Final[Mapping[str, tuple[tuple[str, str, str | None], ...]]] = {
    "sgx": (
        ("debug", "of an enclave that can be debugged", "12"),
        ("older", "of firmware that is out of date", "P-7"),
        ("below", "of firmware below every known level", "11"),
        ("revoked", "by a key that was revoked", "5"),
    ),
    "tdx": (
        ("debug", "of a guest that can be debugged", "12"),
        ("older", "of firmware that is out of date", "P-7"),
        ("below", "of firmware below every known level", "11"),
        ("revoked", "by a key that was revoked", "5"),
    ),
    "snp": (
        ("debug", "of a guest that can be debugged", "P-6"),
        ("older", "of firmware that is out of date", "P-7"),
        ("below", "of older firmware than its certificate says", "N-10"),
        ("migratable", "of a guest that may be moved", "N-13"),
        ("privileged", "asked for at a lower privilege level", "N-12"),
        ("neighbour", "with the certificate of another chip", "N-11"),
    ),
    "nvidia": (("modified", "of a GPU with other firmware", "V-11"),),
    "tpm": (("unrestricted", "by a key that signs anything", "T-3"),),
}
"""Evidence that is wrong, and signed by whom it should be: kind, name, check."""
_SWAPPED: Final[Mapping[str, tuple[tuple[str, str, str | None], ...]]] = {
    "sgx": (("with another vendor's collateral", "collateral", "3"), ("with another vendor's quote", "quote", "5")),
    "tdx": (("with another vendor's collateral", "collateral", "3"), ("with another vendor's quote", "quote", "5")),
    "snp": (
        ("with another vendor's chip key", "vcek", "N-4"),
        ("with another vendor's issuer", "ask", "N-4"),
        ("with another vendor's root", "ark", "N-4"),
        ("signed by another vendor's chip", "report", "N-7"),
    ),
    "nvidia": (
        ("with another GPU's report", "report", "V-7"),
        ("with another GPU's chain", "certificates", "V-4"),
        ("with another guest", "cpu", "N-4"),
    ),
    "tpm": (
        ("with another TPM's key", "ak_public", "T-4"),
        ("with another TPM's quote", "attest", "T-11"),
        ("with another TPM's signature", "signature", "T-11"),
    ),
}
"""Genuine evidence with one document of another made-up vendor: name, document, check."""
_TDX: Final = 48 + 584
_SGX: Final = 48 + 384


def _dcap_regions(end: int, body: Sequence[tuple[str, int]]) -> tuple[tuple[str, str, int, str | None], ...]:
    """Regions of a quote whose signed part ends at ``end``; ``body``: what stands in it, behind 48 bytes."""
    behind = end + (6 if end == _TDX else 0)
    places: tuple[tuple[str, int, str | None], ...] = (
        ("version", 0, "1"),
        ("key type", 2, "1"),
        ("TEE type", 4, "1"),
        ("security version", 8, "10"),
        ("user data", 30, "10"),
        *((name, 48 + offset, "10") for name, offset in body),
        ("signature", end + 8, "10"),
        ("attestation key", end + 72, "8"),
        ("quoting enclave's report", behind + 202, "7"),
        ("quoting enclave's signature", behind + 522, "7"),
        ("quoting enclave's data", behind + 582, "8"),
        ("type of the chain", behind + 614, "1"),
        ("certificate chain", behind + 680, None),
    )
    return tuple((name, "quote", place, check) for name, place, check in places)


_REGIONS: Final[Mapping[str, tuple[tuple[str, str, int, str | None], ...]]] = {
    "sgx": _dcap_regions(
        _SGX,
        (
            ("cpusvn", 0),
            ("attributes", 48),
            ("mrenclave", 64),
            ("mrsigner", 128),
            ("isvsvn", 258),
            ("report data", 330),
        ),
    ),
    "tdx": _dcap_regions(
        _TDX,
        (
            ("tcb svn", 0),
            ("mrseam", 20),
            ("attributes", 120),
            ("mrtd", 140),
            ("rtmr2", 430),
            ("report data", 530),
        ),
    ),
    "snp": (
        ("version", "report", 0x00, "N-2"),
        ("guest svn", "report", 0x04, "N-7"),
        ("policy", "report", 0x08, "N-7"),
        ("report data", "report", 0x50, "N-7"),
        ("measurement", "report", 0x90, "N-7"),
        ("host data", "report", 0xC0, "N-7"),
        ("id key", "report", 0xE0, "N-7"),
        ("reported TCB", "report", 0x180, "N-7"),
        ("chip", "report", 0x1A0, "N-7"),
        ("launch TCB", "report", 0x1F0, "N-7"),
        ("signature", "report", 0x2A0, "N-7"),
        ("a byte", "vcek", 300, None),
        ("a byte", "ask", 300, None),
        ("a byte", "ark", 300, None),
    ),
    "nvidia": (
        ("request", "report", 0, "V-2"),
        ("nonce", "report", 10, "V-7"),
        ("a measurement", "report", 60, "V-7"),
        ("signature", "report", -40, "V-7"),
        ("a byte", "certificates", 200, None),
        ("a byte", "cpu", 400, None),
        ("a byte", "report_data", 0, "V-9"),
    ),
    "tpm": (
        ("magic", "attest", 0, "T-9"),
        ("kind", "attest", 5, "T-9"),
        ("extra data", "attest", 50, "T-11"),
        ("last byte of the digest", "attest", -1, "T-11"),
        ("signature", "signature", -1, "T-11"),
        ("a register", "pcrs", 3, "T-15"),
        ("a byte", "report_data", 0, "T-13"),
        ("last byte of the key", "ak_public", -1, "T-2"),
    ),
}
"""Name, document, place of the byte that is flipped, check."""
