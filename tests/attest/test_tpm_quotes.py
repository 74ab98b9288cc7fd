"""Quotes of a TPM, forged with plain keys: what verifies, and which numbered check refuses each lie."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.platforms import tpm
from motte.attest.platforms.tpm_enrol import Challenge, Enrolment, Request
from motte.attest.platforms.tpm_structures import parse_public, parse_quote, parse_signature
from motte.attest.policy import AllOf, InsecureAllowSimulated, Measurement, NotDebug, PlatformInstance, Policy
from motte.attest.report_data import Binding
from motte.attest.verify import verify
from motte.errors import AttestationError, EvidenceError


def _load() -> Any:
    name = "motte_tests_software_tpm"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("software_tpm.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


soft = _load()
NOW = soft.NOW
BINDING = Binding(nonce=b"n" * 32, public_key=b"k" * 32, tls_spki_digest=b"", configuration_digest=b"c" * 32)
DATA = BINDING.report_data()


class Stage:
    """A maker, a TPM of its own, and the anchors of an owner who enrolled it."""

    def __init__(self, algorithm: str = soft.ALGORITHMS[0]) -> None:
        self.maker = soft.Maker()
        self.tpm = soft.FakeTpm(algorithm)
        self.record = self.tpm.record((self.maker.certify(self.tpm.ek_key.public_key()),))
        self.anchors = self.given(self.record.encode())
        self.evidence = self.tpm.evidence(DATA)

    def given(self, *enrolled: bytes) -> Anchors:
        return Anchors(tpm_roots=(self.maker.root,), tpm_enrolled=enrolled)

    def refused(self, evidence: Evidence, anchors: Anchors | None = None, *, now: Any = NOW) -> str | None:
        with pytest.raises((AttestationError, EvidenceError)) as caught:
            tpm.verify(evidence, anchors or self.anchors, now)
        return caught.value.check


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage()


def replaced(evidence: Evidence, **documents: bytes) -> Evidence:
    return Evidence(evidence.platform, {**evidence.documents, **documents})


@pytest.mark.parametrize("algorithm", soft.ALGORITHMS)
def test_an_enrolled_certified_tpm_verifies_and_says_what_it_measured(algorithm: str) -> None:
    stage = Stage(algorithm)
    travelled = Evidence.decode(stage.evidence.encode())
    code = tpm.composite("sha256", stage.tpm.registers)
    policy = AllOf(
        Measurement(frozenset({code})),
        Measurement(frozenset({"0b" * 32}), name="pcr11"),
        PlatformInstance(frozenset({hashlib.sha256(stage.tpm.ek.spki).hexdigest()})),
        NotDebug(),
    )
    claims = verify(travelled, policy, NOW, anchors=stage.anchors, binding=BINDING).claims
    assert not claims.simulated
    assert claims.report_data == DATA
    assert list(claims.measurements) == ["pcrs", "pcr0", "pcr4", "pcr7", "pcr11"]
    assert claims.collateral_until == NOW + timedelta(days=365)
    assert claims.details["reset_count"] == "3"
    assert claims.details["restart_count"] == "1"
    assert claims.details["clock_ms"] == "123456"
    assert claims.details["clock_safe"] == "yes"
    assert claims.details["firmware_version"] == "0x00070055000011c8"


def test_what_is_not_proved_to_be_hardware_is_simulated(stage: Stage) -> None:
    bare = tpm.verify(stage.evidence, stage.given(stage.tpm.ak.spki), NOW)
    said = tpm.verify(stage.evidence, stage.given(stage.tpm.record(simulated=True).encode()), NOW)
    emulated = soft.FakeTpm(key=stage.tpm.key, ek_key=stage.tpm.ek_key, firmware=0x2019102300163636)
    known = tpm.verify(emulated.evidence(DATA), stage.anchors, NOW)
    assert bare.simulated
    assert bare.instance is None
    assert said.simulated
    assert known.simulated
    twice = stage.given(stage.record.encode(), stage.tpm.record(simulated=True).encode())
    assert tpm.verify(stage.evidence, twice, NOW).simulated
    policy: Policy = Measurement(frozenset({bare.measurements["pcrs"]}))
    for anchors in (stage.given(stage.tpm.ak.spki), stage.given(stage.tpm.record(simulated=True).encode())):
        with pytest.raises(AttestationError) as caught:
            verify(stage.evidence, policy, NOW, anchors=anchors)
        assert caught.value.check == "P-1"
        verify(stage.evidence, AllOf(policy, InsecureAllowSimulated()), NOW, anchors=anchors)


def test_every_flipped_byte_is_refused_by_a_check_of_its_document(stage: Stage) -> None:
    allowed = {
        "ak_public": {"T-2", "T-3", "T-4"},
        "attest": {"T-8", "T-9", "T-11"},
        "pcrs": {"T-15"},
        "report_data": {"T-13"},
        "signature": {"T-10", "T-11"},
    }
    for name, data in stage.evidence.documents.items():
        seen = set()
        # Of a key's public area every bit: each attribute is one.
        bits = range(8) if name == "ak_public" else (3,)
        for index, bit in ((index, bit) for index in range(len(data)) for bit in bits):
            flipped = bytearray(data)
            flipped[index] ^= 1 << bit
            check = stage.refused(replaced(stage.evidence, **{name: bytes(flipped)}))
            assert check in allowed[name], (name, index, check)
            assert name != "attest" or (check == "T-9") == (index < 6), index
            seen.add(check)
        assert seen == allowed[name]
        for other in (data[:-1], data + b"\x00", b""):
            assert stage.refused(replaced(stage.evidence, **{name: other})) in allowed[name] | {"T-1", "T-14"}


def test_a_lie_signed_by_the_enrolled_key_is_refused_by_its_own_check(stage: Stage) -> None:
    host = stage.tpm
    values = stage.evidence.documents["pcrs"]
    lies: list[tuple[str, dict[str, Any]]] = [
        ("T-9", {"magic": b"\x00TCG"}),
        ("T-9", {"kind": struct.pack(">H", 0x8017)}),
        ("T-8", {"clock": struct.pack(">QIIB", 1, 2, 3, 2)}),
        ("T-8", {"selection": soft.selection(())}),
        ("T-8", {"selection": struct.pack(">I", 2) + 2 * soft.selection((0,))[4:]}),
        ("T-8", {"selection": struct.pack(">IHB", 1, 0x0004, 3) + b"\x91\x08\x00"}),
        ("T-8", {"selection": soft.selection((0, 4, 7, 11), size=5)}),
        ("T-8", {"digest": soft.sized(b"short")}),
        ("T-12", {"signer": soft.sized(b"\x00\x0b" + b"q" * 32)}),
        ("T-12", {"signer": soft.sized(host.ak.name)}),
        ("T-13", {"extra": soft.sized(DATA)}),
        ("T-13", {"extra": soft.sized(b"")}),
        ("T-14", {"selection": soft.selection((0, 4, 7, 16))}),
        ("T-14", {"selection": soft.selection((0, 4, 7, 23))}),
        ("T-14", {"selection": soft.selection((0, 4, 7))}),
        ("T-14", {"selection": soft.selection((0, 4, 7, 11), bank="sha384")}),
        ("T-14", {"pcrs": values[:-32]}),
        ("T-15", {"pcrs": values[32:] + values[:32]}),
        ("T-15", {"digest": soft.sized(hashlib.sha384(values).digest())}),
    ]
    for check, changes in lies:
        assert stage.refused(host.evidence(DATA, **changes)) == check, changes
    signature = stage.evidence.documents["signature"]
    sha1 = b"\x00\x18\x00\x04" + signature[4:]
    assert stage.refused(replaced(stage.evidence, signature=sha1)) == "T-10"
    assert stage.refused(replaced(stage.evidence, signature=b"\x00\x10")) == "T-10"
    assert stage.refused(replaced(stage.evidence, signature=b"\x00\x18\x00\x0c" + signature[4:])) == "T-11"
    # A good signature by the right key, but with a hash that its public area does not name.
    other = soft.FakeTpm("ecdsa-p256-sha384", key=host.key).sign(stage.evidence.documents["attest"])
    assert stage.refused(replaced(stage.evidence, signature=other)) == "T-11"


def test_equal_values_of_other_registers_are_another_measurement(stage: Stage) -> None:
    host = soft.FakeTpm(key=stage.tpm.key, ek_key=stage.tpm.ek_key)
    wanted = Measurement(frozenset({tpm.composite("sha256", host.registers)}))
    host.registers = dict(zip((1, 3, 5, 17), host.registers.values(), strict=True))
    with pytest.raises(AttestationError) as caught:
        verify(host.evidence(DATA), wanted, NOW, anchors=stage.anchors)
    assert caught.value.check == "P-3"


def test_replayed_and_diverted_evidence_is_refused(stage: Stage) -> None:
    policy = Measurement(frozenset({tpm.composite("sha256", stage.tpm.registers)}))
    asked = Binding(nonce=b"N" * 32, public_key=b"k" * 32, tls_spki_digest=b"", configuration_digest=b"c" * 32)
    with pytest.raises(AttestationError) as caught:
        verify(stage.evidence, policy, NOW, anchors=stage.anchors, binding=asked)
    assert caught.value.check == "R-2"
    assert stage.refused(replaced(stage.evidence, report_data=asked.report_data())) == "T-13"


def test_other_documents_are_refused(stage: Stage) -> None:
    documents = dict(stage.evidence.documents)
    assert stage.refused(Evidence("tpm", {**documents, "enrolment": stage.record.encode()})) == "T-1"
    assert stage.refused(Evidence("snp", documents)) == "T-1"
    assert stage.refused(replaced(stage.evidence, pcrs=bytes(5000))) == "T-1"
    del documents["pcrs"]
    assert stage.refused(Evidence("tpm", documents)) == "T-1"


def test_only_enrolled_restricted_keys_count(stage: Stage) -> None:
    foreign = soft.FakeTpm()
    assert stage.refused(foreign.evidence(DATA)) == "T-4"
    assert stage.refused(stage.evidence, Anchors()) == "T-4"
    # A key that is enrolled is not enrolled with other attributes: the name covers them.
    other = soft.FakeTpm(key=stage.tpm.key, ek_key=stage.tpm.ek_key, attributes=soft.AK_ATTRIBUTES | 1 << 10)
    assert stage.refused(other.evidence(DATA)) == "T-4"
    without = {"fixedTPM": 1, "fixedParent": 4, "sensitiveDataOrigin": 5, "restricted": 16, "sign": 18}
    weak = {name: soft.AK_ATTRIBUTES & ~(1 << bit) for name, bit in without.items()}
    weak["decrypt"] = soft.AK_ATTRIBUTES | 1 << 17
    for name, attributes in weak.items():
        host = soft.FakeTpm(key=stage.tpm.key, ek_key=stage.tpm.ek_key, attributes=attributes)
        # Even an owner who pinned the key itself is not taken in.
        assert stage.refused(host.evidence(DATA), stage.given(host.ak.spki)) == "T-3", name
        with pytest.raises(AttestationError) as caught:
            Enrolment.decode(host.record().encode())
        assert caught.value.check == "T-5"
    open_scheme = soft.public_area(stage.tpm.key, soft.AK_ATTRIBUTES)
    assert stage.refused(replaced(stage.evidence, ak_public=open_scheme)) == "T-3"
    reserved = soft.public_area(stage.tpm.key, soft.AK_ATTRIBUTES | 1, scheme=stage.tpm.scheme_bytes)
    assert stage.refused(replaced(stage.evidence, ak_public=reserved)) == "T-2"


def test_hardware_is_proved_again_under_the_roots_of_today(stage: Stage) -> None:
    key = stage.tpm.ek_key.public_key()
    certify = stage.maker.certify
    unproved: list[tuple[str, tuple[bytes, ...], tuple[bytes, ...]]] = [
        ("no root", stage.record.certificates, ()),
        ("another root", stage.record.certificates, (soft.Maker().root,)),
        ("no certificate", (), (stage.maker.root,)),
        ("another key", (certify(soft.make_key("p256").public_key()),), (stage.maker.root,)),
        ("another maker signed", (soft.Maker().certify(key),), (stage.maker.root,)),
        ("not for endorsement", (certify(key, usage="1.3.6.1.5.5.7.3.1"),), (stage.maker.root,)),
        ("swtpm", (certify(key, maker="id:00001014", model="swtpm"),), (stage.maker.root,)),
        ("IBM", (certify(key, maker="id:49424D00"),), (stage.maker.root,)),
        ("a cloud's virtual TPM", (certify(key, maker="id:474F4F47"),), (stage.maker.root,)),
        ("nobody", (certify(key, maker="Infineon"),), (stage.maker.root,)),
        ("swtpm under a maker's name", (certify(key, model="swtpm"),), (stage.maker.root,)),
        ("not a certificate", (b"\x30\x03\x02\x01\x01",), (stage.maker.root,)),
    ]
    for what, certificates, roots in unproved:
        anchors = Anchors(tpm_roots=roots, tpm_enrolled=(stage.tpm.record(certificates).encode(),))
        assert stage.refused(stage.evidence, anchors) == "T-6", what
        request = stage.tpm.request(certificates)
        with pytest.raises((AttestationError, EvidenceError)) as caught:
            Challenge.for_request(request, roots=roots, now=NOW)
        assert caught.value.check == "T-18", what
    assert stage.refused(stage.evidence, now=NOW + timedelta(days=400)) == "T-7"
    assert stage.refused(stage.evidence, now=NOW - timedelta(days=400)) == "T-7"


def test_enrolment_refuses_keys_of_the_wrong_kind_and_makers_of_software(stage: Stage) -> None:
    certificates = stage.record.certificates
    unrestricted = soft.FakeTpm(attributes=soft.AK_ATTRIBUTES & ~(1 << 16))
    swapped = Request(stage.tpm.ak, stage.tpm.ak, certificates, "IFX", "")
    for check, request in (
        ("T-3", unrestricted.request(certificates)),
        ("T-17", swapped),
        ("T-18", stage.tpm.request(certificates, manufacturer="IBM")),
        ("T-18", stage.tpm.request(certificates * 5)),
    ):
        with pytest.raises(AttestationError) as caught:
            Challenge.for_request(request, roots=(stage.maker.root,), now=NOW)
        assert caught.value.check == check


def test_records_and_requests_are_read_strictly(stage: Stage) -> None:
    record, request = stage.record.encode(), stage.tpm.request(stage.record.certificates).encode()
    assert Enrolment.decode(record) == stage.record
    assert Request.decode(request).encode() == request
    for old, new in (
        (b'"simulated":false', b'"simulated":0'),
        (b'"simulated":false', b'"simulated":false,"hardware":true'),
        (b'"ak":"', b'"ak":"*'),
        (b'"certificates":["', b'"certificates":[1,"'),
        (b'"enrolled_at":', b'"enrolled_at":-'),
        (b"enrolment-1", b"enrolment-2"),
        (b"{", b""),
    ):
        assert old in record
        assert stage.refused(stage.evidence, stage.given(b"{" + record.replace(old, new, 1)[1:])) == "T-5", new
    for data in (b"", b"[]", request + b" {}", request.replace(b'"vendor"', b'"seller"'), bytes(600_000)):
        with pytest.raises(EvidenceError) as caught:
            Request.decode(data)
        assert caught.value.check == "T-16"


_BASE = Stage()
_SAMPLES = [*_BASE.evidence.documents.values(), _BASE.record.encode(), _BASE.tpm.request().encode()]


@st.composite
def _mangled(draw: st.DrawFn) -> bytes:
    """Random bytes, or a real document with a piece replaced by others."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    data = draw(st.sampled_from(_SAMPLES))
    begin = draw(st.integers(0, len(data)))
    return data[:begin] + draw(st.binary(max_size=12)) + data[begin + draw(st.integers(0, 12)) :]


@settings(max_examples=150)
@given(data=_mangled(), name=st.sampled_from(sorted(tpm.DOCUMENTS)))
def test_no_bytes_make_a_reader_fail_otherwise_than_with_its_error(data: bytes, name: str) -> None:
    readers: list[Any] = [
        lambda: parse_public(data, where="fuzz", check="T-2"),
        lambda: parse_quote(data, where="fuzz", check="T-8", magic_check="T-9"),
        lambda: parse_signature(data, where="fuzz", check="T-10"),
        lambda: Request.decode(data),
        lambda: Enrolment.decode(data),
        lambda: tpm.verify(replaced(_BASE.evidence, **{name: data}), _BASE.anchors, NOW),
        lambda: tpm.verify(_BASE.evidence, _BASE.given(b"{" + data), NOW),
    ]
    for read in readers:
        try:
            read()
        except (EvidenceError, AttestationError) as problem:
            check = problem.check
        else:
            continue  # a replaced piece may be the one that stood there
        assert check is not None
