"""SGX and TDX quotes under a root of our own, whole and with every kind of lie, each refused by its numbered check."""

from __future__ import annotations

import struct
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from attest_makers.dcap_maker import AT, Maker
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.attest.anchors import Anchors
from motte.attest.claims import Claims
from motte.attest.evidence import Evidence
from motte.attest.platforms import sgx, tdx
from motte.attest.platforms.dcap import SGX, TDX, framed
from motte.errors import AttestationError, EvidenceError, MotteError

VERIFIERS = {"sgx": sgx.verify, "tdx": tdx.verify}
LETTERS = {"sgx": "G", "tdx": "D"}
HONEST = {name: Maker(platform=name) for name in VERIFIERS}
DOCUMENTS = {name: maker.evidence().documents for name, maker in HONEST.items()}


def claims_of(maker: Maker, evidence: Evidence, anchors: Anchors | None = None, now: datetime = AT) -> Claims:
    return VERIFIERS[maker.platform](evidence, anchors or maker.anchors(), now)


def refused(maker: Maker, evidence: Evidence, anchors: Anchors | None = None, now: datetime = AT) -> str:
    with pytest.raises((AttestationError, EvidenceError)) as caught:
        claims_of(maker, evidence, anchors, now)
    assert caught.value.check is not None
    return caught.value.check.removeprefix(LETTERS[maker.platform] + "-")


def with_quote(platform: str, quote: bytes) -> Evidence:
    return Evidence(platform, {**DOCUMENTS[platform], "quote": quote})


def test_an_sgx_quote_says_what_the_enclave_is() -> None:
    maker = HONEST["sgx"]
    claims = claims_of(maker, maker.evidence())
    assert claims.simulated  # a root of our own is no hardware
    assert claims.report_data == maker.report_data
    assert dict(claims.measurements) == {"mrenclave": b"E".hex() * 32}
    assert (claims.signer, claims.svn, claims.details["isvprodid"]) == (b"S".hex() * 32, 9, "7")
    assert (claims.debug, claims.tcb_status, claims.advisories) == (False, "UpToDate", ("INTEL-SA-0",))
    assert claims.instance == maker.ppid.hex()
    assert claims.collateral_until == maker.until


def test_a_tdx_quote_says_what_the_guest_is() -> None:
    maker = HONEST["tdx"]
    claims = claims_of(maker, maker.evidence())
    names = ["mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mrconfigid", "mrowner", "mrownerconfig", "mrseam"]
    assert list(claims.measurements) == names
    assert claims.measurements["mrtd"] == b"E".hex() * 48
    assert [claims.measurements[f"rtmr{index}"] for index in range(4)] == [
        f"{index + 4:02x}" * 48 for index in range(4)
    ]
    assert (claims.signer, claims.svn, claims.debug, claims.report_data) == (None, None, False, maker.report_data)


def regions(platform: str) -> list[tuple[str, int, set[str]]]:
    """Name, offset and the checks that may refuse a flip there."""
    sgx_body = [("cpusvn", 0), ("attributes", 48), ("mrenclave", 64), ("mrsigner", 128), ("isvsvn", 258), ("data", 330)]
    tdx_body = [("tcb svn", 0), ("mrseam", 20), ("attributes", 120), ("mrtd", 140), ("rtmr2", 430), ("data", 530)]
    body, length = (sgx_body, 384) if platform == "sgx" else (tdx_body, 584)
    found = [("version", 0, {"1"}), ("key type", 2, {"1"}), ("TEE type", 4, {"1"}), ("QE svn", 8, {"10"})]
    found += [("vendor", 12, {"1"}), ("user data", 30, {"10"})]
    found += [(name, 48 + offset, {"10"}) for name, offset in body]
    at = 48 + length
    found += [("signature bytes", at, {"1"}), ("signature", at + 4, {"10"}), ("attestation key", at + 68, {"8"})]
    at += 132
    if platform == "tdx":
        found += [("outer type", at, {"1"}), ("outer bytes", at + 2, {"1"})]
        at += 6
    found += [("QE report", at + 70, {"7"}), ("QE report data", at + 330, {"7"}), ("QE signature", at + 390, {"7"})]
    at += 448
    found += [("QE data bytes", at, {"1"}), ("QE data", at + 2, {"8"}), ("chain type", at + 34, {"1"})]
    found += [("chain bytes", at + 36, {"1"}), ("chain", at + 100, {"1", "5"}), ("last byte", -1, {"1"})]
    return found


def flip_every_region(maker: Maker, evidence: Evidence, anchors: Anchors, now: datetime) -> None:
    for name, offset, checks in regions(maker.platform):
        flipped = bytearray(evidence.documents["quote"])
        flipped[offset] ^= 0x40 if name == "last byte" else 0x01
        lie = Evidence(maker.platform, {**evidence.documents, "quote": bytes(flipped)})
        assert refused(maker, lie, anchors, now) in checks, name


@pytest.mark.parametrize("platform", VERIFIERS)
def test_every_region_flipped_is_refused_by_its_check(platform: str) -> None:
    flip_every_region(HONEST[platform], HONEST[platform].evidence(), HONEST[platform].anchors(), AT)


@pytest.mark.parametrize("platform", VERIFIERS)
def test_no_flipped_byte_changes_what_is_claimed(platform: str) -> None:
    quote = DOCUMENTS[platform]["quote"]
    honest = claims_of(HONEST[platform], with_quote(platform, quote))
    signed = 48 + len(HONEST[platform].body())
    for offset in range(0, len(quote), 23):
        flipped = bytearray(quote)
        flipped[offset] ^= 1 << offset % 8
        try:
            found = claims_of(HONEST[platform], with_quote(platform, bytes(flipped)))
        except (AttestationError, EvidenceError):
            continue
        assert offset >= signed  # an encoding of the certificates that says the same, such as another white space
        assert found == honest


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"attributes": bytes([7]) + bytes(15)}, "12"),
        ({"cpu_svn": bytes(16)}, "11"),  # below every level
        ({"status": "Revoked"}, "11"),
        ({"fmspc": bytes(6)}, "11"),  # collateral of another kind of platform
        ({"qe_signer": b"X" * 32}, "9"),
        ({"revoked": (4711,)}, "5"),
        ({"tcb_common": "Intel SGX PCK Certificate"}, "6"),  # a platform's key must not sign statements about platforms
        ({"changes": {"issueDate": "2031-05-02T00:00:00Z"}}, "4"),
        ({"changes": {"nextUpdate": "2031-04-30T00:00:00Z"}}, "4"),
        ({"certificates_until": AT - timedelta(days=1)}, "4"),
    ],
)
def test_what_the_vendor_would_not_vouch_for(changes: dict[str, Any], check: str) -> None:
    maker = Maker(**changes)
    assert refused(maker, maker.evidence()) == check


@pytest.mark.parametrize("attributes", ["0100001000000000", "1000001000000000", "0000003000000000", "0000000000000000"])
def test_a_guest_that_can_be_looked_into(attributes: str) -> None:
    # debug; profiled; migratable; a host that may take pages away unseen
    maker = Maker(platform="tdx", td_attributes=bytes.fromhex(attributes))
    assert refused(maker, maker.evidence()) == "12"


def test_an_older_state_is_a_status_for_the_policy() -> None:
    maker = Maker(cpu_svn=bytes([2]) * 16)
    assert claims_of(maker, maker.evidence()).tcb_status == "OutOfDate"


@pytest.mark.parametrize("platform", VERIFIERS)
def test_roots_chains_and_collateral_of_somebody_else(platform: str) -> None:
    ours, theirs = HONEST[platform], Maker(platform=platform, world="theirs")
    quote, collateral = DOCUMENTS[platform]["quote"], DOCUMENTS[platform]["collateral"]
    evidence = ours.evidence()
    assert refused(ours, evidence, theirs.anchors()) == "3"
    assert refused(ours, evidence, Anchors()) == "3"  # Intel's root, the default
    foreign_chain = Evidence(platform, {"quote": theirs.quote(), "collateral": collateral})
    assert refused(ours, foreign_chain) == "5"
    swapped = Evidence(platform, {"quote": quote, "collateral": theirs.collateral().encode()})
    assert refused(ours, swapped) == "3"
    other = Maker(platform="tdx" if platform == "sgx" else "sgx")
    of_other_tee = Evidence(platform, {"quote": quote, "collateral": other.collateral().encode()})
    assert refused(ours, of_other_tee) in {"9", "11"}


def test_every_signed_part_of_the_collateral() -> None:
    maker, whole = HONEST["sgx"], HONEST["sgx"].collateral()

    def check(**changes: Any) -> str:
        documents = {"quote": DOCUMENTS["sgx"]["quote"], "collateral": replace(whole, **changes).encode()}
        return refused(maker, Evidence("sgx", documents))

    def flipped(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    assert check(tcb_info=whole.tcb_info.replace('"svn":3', '"svn":2', 1)) == "6"
    assert check(tcb_info_signature=flipped(whole.tcb_info_signature)) == "6"
    assert check(qe_identity=whole.qe_identity.replace('"isvsvn":8', '"isvsvn":7')) == "6"
    assert check(qe_identity_signature=flipped(whole.qe_identity_signature)) == "6"
    assert check(root_ca_crl=flipped(whole.root_ca_crl)) == "3"
    assert check(pck_crl=flipped(whole.pck_crl)) == "5"
    assert check(pck_crl=whole.root_ca_crl) == "5"  # a PCK that no list speaks about
    assert check(tcb_info_issuer_chain=maker.pck_chain().decode()) == "6"
    theirs = Maker(world="theirs").collateral()
    assert check(tcb_info_issuer_chain=theirs.tcb_info_issuer_chain) == "5"
    assert check(qe_identity_issuer_chain="") == "2"


@pytest.mark.parametrize("platform", VERIFIERS)
def test_time(platform: str) -> None:
    maker = HONEST[platform]
    for days in (-40, 40, -30_000):
        assert refused(maker, maker.evidence(), now=AT + timedelta(days=days)) == "4"


def test_the_lowest_revision_of_collateral() -> None:
    maker = HONEST["sgx"]
    assert claims_of(maker, maker.evidence(), maker.anchors(intel_min_evaluation=20)).details["tcb_evaluation"] == "20"
    assert refused(maker, maker.evidence(), maker.anchors(intel_min_evaluation=21)) == "13"


def test_documents() -> None:
    maker, quote = HONEST["sgx"], DOCUMENTS["sgx"]["quote"]
    assert refused(maker, Evidence("sgx", {"quote": quote})) == "2"
    assert refused(maker, Evidence("sgx", {"collateral": b"x"})) == "E-2"
    assert refused(maker, Evidence("sgx", {"quote": quote, "more": b"x"})) == "E-2"
    assert refused(maker, Evidence("tdx", {"quote": quote})) == "E-2"
    assert refused(maker, Evidence("sgx", {"quote": quote, "collateral": b"{}"})) == "2"
    not_hexadecimal = DOCUMENTS["sgx"]["collateral"].replace(b'"pck_crl":"30', b'"pck_crl":"zz')
    assert refused(maker, Evidence("sgx", {"quote": quote, "collateral": not_hexadecimal})) == "2"


def test_zeros_behind_a_quote_are_cut_and_nothing_else_is() -> None:
    quote = DOCUMENTS["tdx"]["quote"]
    assert framed(quote + bytes(70), TDX) == quote
    assert claims_of(HONEST["tdx"], with_quote("tdx", quote + bytes(70))).report_data == b"r" * 64
    assert refused(HONEST["tdx"], with_quote("tdx", quote + bytes(70) + b"x")) == "1"


def test_other_certification_data_is_refused() -> None:
    quote = DOCUMENTS["sgx"]["quote"]
    at = 48 + 384 + 4 + 128 + 448 + 34
    for kind in (1, 2, 3, 4, 6, 7):
        assert refused(HONEST["sgx"], with_quote("sgx", quote[:at] + struct.pack("<H", kind) + quote[at + 2 :])) == "1"


@settings(max_examples=60)
@given(st.data())
def test_no_quote_and_no_collateral_crashes_the_reader(data: st.DataObject) -> None:
    platform = data.draw(st.sampled_from(sorted(VERIFIERS)))
    documents = dict(DOCUMENTS[platform])
    name = data.draw(st.sampled_from(["quote", "collateral"]))
    whole = documents[name]
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 8)))
    documents[name] = whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:]
    if data.draw(st.booleans()):
        documents[name] = documents[name][: data.draw(st.integers(0, len(whole)))]
    try:
        found = claims_of(HONEST[platform], Evidence(platform, documents))
    except MotteError:
        return
    assert found.report_data == b"r" * 64


@given(st.binary(max_size=700))
def test_the_frame_takes_any_bytes(data: bytes) -> None:
    for kind, head in ((SGX, "030002000000"), (TDX, "040002008100"), (TDX, "050002008100")):
        with pytest.raises(EvidenceError) as caught:
            framed(bytes.fromhex(head) + data, kind)
        assert caught.value.check == kind.check(1)


@pytest.mark.parametrize(("platform", "status"), [("sgx", "ConfigurationAndSWHardeningNeeded"), ("tdx", "UpToDate")])
def test_real_samples(evidence_dir: Any, platform: str, status: str) -> None:
    at = datetime.fromisoformat("2025-06-20T00:00:00+00:00")
    quote = (evidence_dir / f"{platform}_quote.bin").read_bytes()
    collateral = (evidence_dir / f"{platform}_quote_collateral.json").read_bytes()
    evidence = Evidence.decode(Evidence(platform, {"quote": quote, "collateral": collateral}).encode())
    claims = VERIFIERS[platform](evidence, Anchors(), at)
    assert not claims.simulated
    assert claims.tcb_status == status
    maker = HONEST[platform]
    assert refused(maker, evidence, Anchors(), datetime.fromisoformat("2026-11-22T00:00:00+00:00")) == "4"
    assert refused(maker, evidence, maker.anchors(), at) == "3"
    flip_every_region(maker, evidence, Anchors(), at)


def test_a_chain_whose_leaf_was_replaced_is_refused() -> None:
    ours, theirs = HONEST["sgx"], Maker(world="theirs")
    chain, other = ours.pck_chain(), theirs.pck_chain()
    end = b"-----END CERTIFICATE-----\n"
    mixed = other.split(end)[0] + end + end.join(chain.split(end)[1:])
    quote = ours.quote()
    at = quote.index(b"-----BEGIN")
    tail = struct.pack("<I", len(mixed)) + mixed
    total = 48 + 384
    data = quote[total + 4 : at - 4] + tail
    lie = quote[:total] + struct.pack("<I", len(data)) + data
    assert refused(ours, with_quote("sgx", lie)) == "5"
