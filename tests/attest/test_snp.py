"""SEV-SNP: synthetic evidence under test roots meets every check; the real report verifies, altered it does not."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.attest.anchors import Anchors
from motte.attest.certificates import load_pem_chain
from motte.attest.evidence import Evidence
from motte.attest.platforms import snp
from motte.attest.platforms.snp_report import parse_report, read_chip_key
from motte.attest.platforms.snp_tcb import Tcb
from motte.attest.policy import AllOf, InsecureAllowSimulated, NotDebug, PlatformInstance, TcbStatus
from motte.attest.verify import verify
from motte.errors import AttestationError, EvidenceError, InputError, ResourceError, SettingError

sys.modules.setdefault("attest_makers", ModuleType("attest_makers")).__path__ = [str(Path(__file__).parent)]
make: Any = importlib.import_module("attest_makers.certificate_maker")
maker: Any = importlib.import_module("attest_makers.snp_maker")

NOW = make.NOW
DATA = bytes(range(64))
MACHINE = maker.Machine()
SAMPLES = Path(os.environ.get("MOTTE_EVIDENCE_DIR", Path(__file__).resolve().parents[3] / "shared/data/evidence"))
SAMPLE_TIME = datetime(2025, 6, 20, tzinfo=UTC)
needs_samples = pytest.mark.skipif(
    not (SAMPLES / "snp_report_milan.bin").exists(), reason=f"no real SEV-SNP evidence in {SAMPLES}"
)


def refusal(evidence: Evidence, anchors: Anchors, now: datetime = NOW) -> str | None:
    with pytest.raises((AttestationError, EvidenceError)) as caught:
        snp.verify(evidence, anchors, now)
    return caught.value.check


def with_documents(evidence: Evidence, **documents: bytes | None) -> Evidence:
    kept = {name: data for name, data in {**evidence.documents, **documents}.items() if data is not None}
    return Evidence(evidence.platform, kept)


@pytest.mark.parametrize(
    "machine",
    [
        MACHINE,
        maker.Machine(kind="vlek"),
        maker.Machine(product="Turin", layout=1),
        maker.Machine(product="Genoa", levels={**maker.LEVELS, "snp": 0, "microcode": 0}),
    ],
    ids=["milan", "milan-vlek", "turin", "genoa"],
)
def test_synthetic_evidence_verifies(machine: Any) -> None:
    evidence, anchors = machine.evidence(DATA)
    claims = snp.verify(Evidence.decode(evidence.encode()), anchors, NOW)
    assert claims.simulated
    assert claims.report_data == DATA
    assert next(iter(claims.measurements.items())) == ("measurement", bytes(range(48)).hex())
    assert (claims.signer, claims.svn, claims.debug) == ("11" * 48, 7, False)
    assert claims.tcb_status == snp.NO_MINIMUM
    assert claims.collateral_until is None
    chip = machine.chip_id[:8].ljust(64, b"\x00") if machine.layout else machine.chip_id
    assert claims.instance == (None if machine.kind == "vlek" else chip.hex())
    assert claims.details.get("provider") == ("cloud" if machine.kind == "vlek" else None)


def test_without_an_id_block_nobody_signed_and_the_author_stands_above_the_id_key() -> None:
    evidence, anchors = MACHINE.evidence(DATA, at_0xE0=bytes(48))
    claims = snp.verify(evidence, anchors, NOW)
    assert (claims.signer, claims.svn) == (None, None)
    evidence, anchors = MACHINE.evidence(DATA, at_0x48=1, at_0x110=b"\x22" * 48)
    assert snp.verify(evidence, anchors, NOW).signer == "22" * 48


def test_the_status_is_derived_from_stated_levels() -> None:
    levels = {name: value for name, value in maker.LEVELS.items() if name != "fmc"}

    def status(minimum: dict[str, Tcb], **changed: bytes | int) -> str | None:
        evidence, anchors = MACHINE.evidence(DATA, **changed)
        return snp.verify(evidence, replace(anchors, amd_min_tcb=minimum), NOW).tcb_status

    exact = {"Milan": Tcb(**levels)}
    assert status(exact) == snp.UP_TO_DATE
    assert status({"Genoa": Tcb(**levels)}) == snp.NO_MINIMUM
    # One level below is not made up for by another above.
    assert status({"Milan": Tcb(**{**levels, "snp": 23, "microcode": 0})}) == snp.OUT_OF_DATE
    for offset in ("at_0x38", "at_0x1E0", "at_0x1F0"):
        assert status(exact, **{offset: MACHINE.tcb(microcode=212)}) == snp.OUT_OF_DATE, offset
    with pytest.raises(SettingError):
        Tcb(snp=256)


def test_policies_decide_about_debug_machine_and_status() -> None:
    def ask(policy: Any, **changed: bytes | int) -> None:
        evidence, anchors = MACHINE.evidence(DATA, **changed)
        verify(evidence, AllOf(InsecureAllowSimulated(), policy), NOW, anchors=anchors)

    ask(NotDebug())
    ask(PlatformInstance(frozenset({MACHINE.chip_id.hex()})))
    for check, policy, changed in (
        ("P-6", NotDebug(), {"at_0x08": 0xB0000}),
        ("P-7", TcbStatus(frozenset({"UpToDate"})), {}),
        ("P-8", PlatformInstance(frozenset({"00" * 64})), {}),
    ):
        with pytest.raises(AttestationError) as caught:
            ask(policy, **changed)
        assert caught.value.check == check


def lies() -> dict[str, tuple[str, Callable[[], tuple[Evidence, Anchors]]]]:
    evidence, anchors = MACHINE.evidence(DATA)
    leaf, ask, ark = MACHINE.chain()
    foreign = maker.Machine(vendor="foreign")
    foreign_leaf, foreign_ask, foreign_ark = foreign.chain()
    downgraded = replace(MACHINE, levels={**maker.LEVELS, "snp": 21})

    def documents(**changed: bytes | None) -> tuple[Evidence, Anchors]:
        return with_documents(evidence, **changed), anchors

    def report(**changed: bytes | int) -> tuple[Evidence, Anchors]:
        return documents(report=MACHINE.report(DATA, **changed))

    def leaf_of(machine: Any, **changed: str) -> tuple[Evidence, Anchors]:
        made = machine.leaf(ask, **changed)
        return with_documents(evidence, vcek=made.der, ask=ask.der, ark=ark.der), Anchors(amd_arks=(ark.der,))

    def lists(*given: bytes, demand: bool = False) -> tuple[Evidence, Anchors]:
        # The lists have to be of the very certificates that the evidence carries.
        changed = with_documents(evidence, vcek=leaf.der, ask=ask.der, ark=ark.der)
        return changed, Anchors(amd_arks=(ark.der,), revocation_lists=given, demand_revocation=demand)

    unchained = make.sign("SEV-VCEK", make.ec_key("testvcek"), ark, ca=None, extra=MACHINE.extensions())
    p256 = make.ec.generate_private_key(make.ec.SECP256R1())
    small = make.sign("SEV-VCEK", p256, ask, ca=None, extra=MACHINE.extensions())
    return {
        "another platform": ("N-1", lambda: (Evidence("tdx", evidence.documents), anchors)),
        "no report": ("N-1", lambda: documents(report=None)),
        "no ask": ("N-1", lambda: documents(ask=None)),
        "an unknown document": ("N-1", lambda: documents(quote=b"x")),
        "both kinds of key": ("N-1", lambda: documents(vlek=leaf.der)),
        "a short report": ("N-2", lambda: documents(report=evidence.documents["report"][:-1])),
        "version 1": ("N-2", lambda: report(at_0x00=1)),
        "version 6": ("N-2", lambda: report(at_0x00=6)),
        "another algorithm": ("N-2", lambda: report(at_0x34=2)),
        "a reserved byte": ("N-2", lambda: report(at_0x210=1)),
        "an unknown policy bit": ("N-2", lambda: report(at_0x08=0x30000 | 1 << 40)),
        "signed by nobody": ("N-2", lambda: report(at_0x48=7 << 2)),
        "the chip's key masked": ("N-2", lambda: report(at_0x48=2)),
        "no certificate": ("N-3", lambda: documents(vcek=b"x")),
        "a key on another curve": ("N-3", lambda: documents(vcek=small.der)),
        "no product": ("N-3", lambda: leaf_of(MACHINE, without="2")),
        "no chip": ("N-3", lambda: leaf_of(MACHINE, without="4")),
        "no microcode level": ("N-3", lambda: leaf_of(MACHINE, without="3.8")),
        "AMD's own roots": ("N-4", lambda: (evidence, Anchors())),
        "another vendor's root": ("N-4", lambda: (evidence, Anchors(amd_arks=(foreign_ark.der,)))),
        "a foreign chip key": ("N-4", lambda: documents(vcek=foreign_leaf.der)),
        "a foreign chain": (
            "N-4",
            lambda: documents(vcek=foreign_leaf.der, ask=foreign_ask.der, ark=foreign_ark.der),
        ),
        "a foreign root beside a good chain": ("N-4", lambda: documents(ark=foreign_ark.der)),
        "issued by the root itself": (
            "N-4",
            lambda: (with_documents(evidence, vcek=unchained.der, ask=ask.der, ark=ark.der), lists()[1]),
        ),
        "another name": ("N-4", lambda: leaf_of(MACHINE, common="SEV-VLEK")),
        "an expired chip key": ("N-5", lambda: leaf_of(replace(MACHINE, end=NOW - timedelta(days=1)))),
        "a chip key of tomorrow": ("N-5", lambda: leaf_of(replace(MACHINE, begin=NOW + timedelta(days=1)))),
        "its issuer revoked": ("N-6", lambda: lists(make.revocation_list(ark, [ask.certificate]))),
        "the chip key revoked": ("N-6", lambda: lists(make.revocation_list(ask, [leaf.certificate]))),
        "no revocation list": ("N-6", lambda: lists(demand=True)),
        "an old revocation list": (
            "N-6",
            lambda: lists(make.revocation_list(ark, end=NOW - timedelta(days=1)), demand=True),
        ),
        "signed by another key": ("N-7", lambda: documents(report=foreign.report(DATA))),
        "another kind of key": ("N-8", lambda: report(at_0x48=1 << 2)),
        "another processor": ("N-9", lambda: report(at_0x188=b"\x1a")),
        "a downgraded certificate": ("N-10", lambda: leaf_of(downgraded)),
        "a downgraded report": ("N-10", lambda: report(at_0x180=MACHINE.tcb(snp=21))),
        "another chip's certificate": ("N-11", lambda: leaf_of(maker.other_chip(MACHINE))),
        "another chip's report": ("N-11", lambda: report(at_0x1A0=bytes(64))),
        "a low privilege level": ("N-12", lambda: report(at_0x30=1)),
        "asked for by the host": (
            "N-12",
            lambda: (report(at_0x30=0xFFFFFFFF)[0], replace(anchors, amd_max_vmpl=1 << 32)),
        ),
        "a migration agent": ("N-13", lambda: report(at_0x08=0x30000 | 1 << 18)),
    }


def test_each_lie_meets_its_check() -> None:
    for label, (check, build) in lies().items():
        evidence, anchors = build()
        assert refusal(evidence, anchors) == check, label


def test_what_an_owner_may_allow() -> None:
    leaf, ask, ark = MACHINE.chain()
    report = MACHINE.report(DATA, at_0x30=1, at_0x08=0x30000 | 1 << 18)
    evidence = Evidence("snp", {"report": report, "vcek": leaf.der, "ask": ask.der})
    until = NOW + timedelta(days=3)
    anchors = Anchors(
        amd_arks=(ark.der,),
        amd_max_vmpl=1,
        amd_allow_migration=True,
        demand_revocation=True,
        revocation_lists=(make.revocation_list(ark, end=until),),
    )
    claims = snp.verify(evidence, anchors, NOW)
    assert claims.collateral_until == until
    assert claims.details["vmpl"] == "1"


def flips(evidence: Evidence, anchors: Anchors, now: datetime, step: int) -> None:
    """Flip a bit of every ``step``-th byte of each document: a report meets N-2 or N-7, a certificate N-3 or N-4."""
    for name, data in evidence.documents.items():
        allowed = {"N-2", "N-7"} if name == "report" else {"N-3", "N-4"}
        for at in range(step // 2, len(data), step):
            altered = bytearray(data)
            altered[at] ^= 1 << at % 8
            found = refusal(with_documents(evidence, **{name: bytes(altered)}), anchors, now)
            assert found in allowed, (name, at, found)


def test_flipped_bytes_of_synthetic_evidence_are_refused() -> None:
    flips(*MACHINE.evidence(DATA), NOW, 23)


@pytest.fixture(scope="module")
def sample() -> Evidence:
    ask, ark = load_pem_chain((SAMPLES / "snp_ask_ark_milan.pem").read_bytes(), where="chain", check="N-3")
    report, vcek = (SAMPLES / "snp_report_milan.bin").read_bytes(), (SAMPLES / "snp_vcek.der").read_bytes()
    return Evidence("snp", {"report": report, "vcek": vcek, "ask": ask.der, "ark": ark.der})


@needs_samples
def test_the_real_report_verifies_up_to_amds_own_root(sample: Evidence) -> None:
    claims = snp.verify(sample, Anchors(), SAMPLE_TIME)
    assert not claims.simulated
    assert claims.measurements["measurement"].startswith("b07af9620f3b839b")
    assert claims.report_data[:8] == bytes.fromhex("0102030405000000")
    assert claims.instance is not None
    assert claims.instance.startswith("3ac3fe21e13fb099")
    assert claims.debug
    assert claims.details["product"] == "Milan-B0"
    with pytest.raises(AttestationError) as caught:
        verify(sample, NotDebug(), SAMPLE_TIME)
    assert caught.value.check == "P-6"
    assert refusal(sample, Anchors(), datetime(2029, 9, 25, tzinfo=UTC)) == "N-5"
    assert refusal(sample, Anchors(), datetime(2022, 9, 1, tzinfo=UTC)) == "N-5"
    assert refusal(sample, MACHINE.evidence(DATA)[1], SAMPLE_TIME) == "N-4"
    made = MACHINE.evidence(DATA)[0].documents
    assert refusal(with_documents(sample, report=made["report"]), Anchors(), SAMPLE_TIME) == "N-7"
    assert refusal(with_documents(sample, vcek=made["vcek"]), Anchors(), SAMPLE_TIME) == "N-4"


@needs_samples
def test_flipped_bytes_of_the_real_evidence_are_refused(sample: Evidence) -> None:
    flips(sample, Anchors(), SAMPLE_TIME, 17)


# --- issuing ------------------------------------------------------------------------------------------------------


def table(**entries: bytes) -> bytes:
    guids = {name: bytes.fromhex(guid.replace("-", "")) for guid, name in snp._TABLE.items()}
    guids["unknown"] = bytes(range(16))
    offset, head, body = 24 * (len(entries) + 1), b"", b""
    for name, data in entries.items():
        head += guids[name] + (offset + len(body)).to_bytes(4, "little") + len(data).to_bytes(4, "little")
        body += data
    return head + bytes(24) + body


class GuestConfigfs(type(Path())):  # type: ignore[misc]
    """Configfs of a made-up guest whose host hands certificates over beside the report."""

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        super().mkdir(*args, **kwargs)
        for name, data in (("provider", "sev_guest\n"), ("generation", "0\n")):
            (self / name).write_text(data)

    def write_bytes(self, data: Any) -> int:
        leaf, ask, _ = MACHINE.chain()
        Path(self.parent / "outblob").write_bytes(MACHINE.report(bytes(data)))
        Path(self.parent / "auxblob").write_bytes(table(vcek=leaf.der, ask=ask.der))
        Path(self.parent / "generation").write_text("1\n")
        return super().write_bytes(data)

    def rmdir(self) -> None:
        for each in self.iterdir():
            each.unlink()
        super().rmdir()


def test_a_guest_reports_through_configfs_with_the_hosts_certificates(tmp_path: Path) -> None:
    evidence = snp.issue(DATA, root=GuestConfigfs(tmp_path))
    claims = snp.verify(evidence, Anchors(amd_arks=(MACHINE.chain()[2].der,)), NOW)
    assert claims.report_data == DATA
    assert list(tmp_path.iterdir()) == []


def plant(monkeypatch: pytest.MonkeyPatch, report: bytes, blob: bytes) -> None:
    monkeypatch.setattr(snp, "read_blobs", lambda report_data, *, root, expected_provider: (report, blob))


def test_issued_evidence_verifies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leaf, ask, ark = MACHINE.chain()
    anchors, report = Anchors(amd_arks=(ark.der,)), MACHINE.report(DATA)
    plant(monkeypatch, report, table(vcek=leaf.der, ask=ask.pem, ark=ark.der, unknown=b"?"))
    evidence = snp.issue(DATA)
    assert set(evidence.documents) == {"report", "vcek", "ask", "ark"}
    assert snp.verify(evidence, anchors, NOW).report_data == DATA
    (tmp_path / "vcek.der").write_bytes(leaf.der)
    (tmp_path / "ask.pem").write_bytes(ask.pem)
    plant(monkeypatch, report, b"")
    assert snp.verify(snp.issue(DATA, certificates=tmp_path), anchors, NOW).report_data == DATA
    with pytest.raises(ResourceError) as caught:
        snp.issue(DATA)
    assert "kdsintf.amd.com/vcek/v1/" in str(caught.value.hint)
    (tmp_path / "ask.pem").write_bytes(b"x")
    with pytest.raises(InputError):
        snp.issue(DATA, certificates=tmp_path)


def test_a_platform_that_answers_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leaf, ask, _ = MACHINE.chain()
    good = table(vcek=leaf.der, ask=ask.der)
    for report, blob in (
        (b"short", good),
        (MACHINE.report(bytes(64)), good),
        (MACHINE.report(DATA), good[:48]),
        (MACHINE.report(DATA), good[:-1]),
        (MACHINE.report(DATA), b"\x01" * 24),
        (MACHINE.report(DATA), table(vcek=leaf.der, ask=b"x")),
        (MACHINE.report(DATA), table(ask=ask.der)),
    ):
        plant(monkeypatch, report, blob)
        with pytest.raises(ResourceError):
            snp.issue(DATA)
    monkeypatch.undo()
    with pytest.raises(ResourceError):
        snp.issue(DATA, root=tmp_path / "absent")


# --- fuzz ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    at=st.integers(0, 1183),
    what=st.binary(min_size=1, max_size=32),
    names=st.sets(st.sampled_from(["vcek", "ask", "report"])),
)
def test_no_bytes_crash_the_verifier(at: int, what: bytes, names: set[str]) -> None:
    evidence, anchors = FUZZED
    changed = {}
    for name in names:
        data = evidence.documents[name]
        changed[name] = data[: at % len(data)] + what + data[at % len(data) + len(what) :]
    try:
        snp.verify(with_documents(evidence, **changed), anchors, NOW)
    except (AttestationError, EvidenceError) as problem:
        refused = str(problem.check)
    else:
        refused = "N-" if all(data == evidence.documents[name] for name, data in changed.items()) else "nothing"
    assert refused.startswith("N-")


FUZZED = MACHINE.evidence(DATA)


@settings(max_examples=80)
@given(data=st.binary(max_size=400))
def test_no_bytes_crash_the_readers(data: bytes) -> None:
    for attempt in (
        lambda: parse_report(data.ljust(1184, b"\x00"), check="N-2"),
        lambda: snp._certificate_table(data),
        lambda: parse_report(
            b"\x03\x00\x00\x00".ljust(0x34, b"\x00") + b"\x01" + data.ljust(1131, b"\x00"), check="N-2"
        ),
    ):
        with pytest.raises(EvidenceError):
            attempt()


def test_extensions_are_read_strictly() -> None:
    ask = MACHINE.ask(MACHINE.ark())
    for place, value in (
        ("1", b"\x02\x01\x02"),
        ("1", b"\x02\x02\x00\x01"),
        ("3.1", b"\x02\x01\x80"),
        ("3.5", b"\x02\x01\x01"),
        ("2", b"\x0c\x02ab"),
        ("2", b"\x16\x03ab"),
        ("4", bytes(63)),
    ):
        extra = [(oid, value if oid == f"{maker.OID}.{place}" else old, False) for oid, old, _ in MACHINE.extensions()]
        leaf = make.sign("SEV-VCEK", MACHINE.key(), ask, ca=None, extra=extra)
        with pytest.raises(EvidenceError) as caught:
            read_chip_key(snp.load_der(leaf.der, where="vcek", check="N-3"), "vcek", check="N-3")
        assert caught.value.check == "N-3", (place, value)
    tagged = [
        (oid, b"\x04\x40" + old if oid == f"{maker.OID}.4" else old, False) for oid, old, _ in MACHINE.extensions()
    ]
    leaf = make.sign("SEV-VCEK", MACHINE.key(), ask, ca=None, extra=tagged)
    found = read_chip_key(snp.load_der(leaf.der, where="vcek", check="N-3"), "vcek", check="N-3")
    assert found.hardware_id == MACHINE.chip_id
