"""A GPU with its guest: synthetic evidence meets every check; the real H100 report's own signature and chain hold."""

from __future__ import annotations

import ctypes
import hashlib
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
from motte.attest.certificates import load_der, load_pem_chain, verify_ecdsa
from motte.attest.evidence import Evidence
from motte.attest.platforms import nvidia, nvml, snp
from motte.attest.platforms.nvidia_reference import GpuReference
from motte.attest.platforms.nvidia_report import parse_report
from motte.attest.platforms.vendor_roots import NVIDIA_DEVICE_ROOT
from motte.attest.policy import AllOf, InsecureAllowSimulated, Measurement, NotDebug
from motte.attest.verify import verify
from motte.errors import AttestationError, EvidenceError, FormatError, InputError, MotteError, ResourceError

sys.modules.setdefault("attest_makers", ModuleType("attest_makers")).__path__ = [str(Path(__file__).parent)]
make: Any = importlib.import_module("attest_makers.certificate_maker")
snp_maker: Any = importlib.import_module("attest_makers.snp_maker")
maker: Any = importlib.import_module("attest_makers.nvidia_maker")

NOW = make.NOW
DATA = bytes(range(64))
GPU = maker.Gpu()
GOOD, ANCHORS = GPU.evidence(DATA)
SAMPLES = Path(os.environ.get("MOTTE_EVIDENCE_DIR", Path(__file__).resolve().parents[3] / "shared/data/evidence"))
SAMPLE_TIME = datetime(2025, 6, 20, tzinfo=UTC)
needs_samples = pytest.mark.skipif(
    not (SAMPLES / "nvidia_h100_report.txt").exists(), reason=f"no real NVIDIA evidence in {SAMPLES}"
)


def refusal(evidence: Evidence, anchors: Anchors, now: datetime = NOW) -> str | None:
    with pytest.raises((AttestationError, EvidenceError)) as caught:
        nvidia.verify(evidence, anchors, now)
    return caught.value.check


def with_documents(evidence: Evidence, **documents: bytes | None) -> Evidence:
    kept = {name: data for name, data in {**evidence.documents, **documents}.items() if data is not None}
    return Evidence(evidence.platform, kept)


def vouched(report: bytes, certificates: bytes, *, machine: Any = None, data: bytes = DATA) -> Evidence:
    """Evidence whose guest vouches for exactly these bytes: what a guest of an attacker can have made."""
    bound = nvidia.composite_report_data(data, report, certificates)
    guest = (machine or GPU.machine).evidence(bound)[0]
    documents = {"report": report, "certificates": certificates, "cpu": guest.encode(), "report_data": data}
    return Evidence("nvidia", documents)


def of_gpu(gpu: Any, data: bytes = DATA) -> tuple[Evidence, Anchors]:
    """Evidence of another made-up GPU, all of it consistent, with anchors of the same made-up vendors."""
    chain = gpu.chain()
    report = gpu.report(nvidia.gpu_nonce(data))
    anchors = replace(ANCHORS, amd_arks=(gpu.machine.ark().der,), nvidia_root=chain[-1].der)
    made = vouched(report, b"".join(each.pem for each in chain), machine=gpu.machine, data=data)
    arks = (Evidence.decode(made.documents["cpu"]).documents["ark"],)
    return made, replace(anchors, amd_arks=arks)


def test_a_gpu_with_its_guest_verifies_and_the_claims_are_merged() -> None:
    claims = nvidia.verify(Evidence.decode(GOOD.encode()), ANCHORS, NOW)
    assert claims.platform == "nvidia"
    assert claims.simulated
    assert claims.report_data == DATA
    assert next(iter(claims.measurements)) == "measurement"
    assert claims.measurements["gpu"] == parse_report(GOOD.documents["report"], check="V-2").record_digest.hex()
    assert len(claims.measurements["gpu_device"]) == 64
    assert (claims.signer, claims.svn, claims.debug) == ("11" * 48, 7, False)
    assert claims.tcb_status == "NoMinimum"
    assert claims.instance == GPU.machine.chip_id.hex()
    assert claims.details["cpu_platform"] == "snp"
    assert claims.details["gpu_vbios"] == maker.VBIOS
    named = AllOf(
        InsecureAllowSimulated(),
        NotDebug(),
        Measurement(frozenset({claims.measurements["gpu_device"]}), name="gpu_device"),
    )
    assert verify(GOOD, named, NOW, anchors=ANCHORS).claims.report_data == DATA


def test_a_gpu_without_a_reference_counts_as_one_that_can_be_debugged() -> None:
    evidence, anchors = GPU.evidence(DATA, measured=False)
    claims = nvidia.verify(evidence, anchors, NOW)
    assert claims.debug
    assert claims.tcb_status == nvidia.GPU_NOT_MEASURED
    with pytest.raises(AttestationError) as caught:
        verify(evidence, AllOf(InsecureAllowSimulated(), NotDebug()), NOW, anchors=anchors)
    assert caught.value.check == "P-6"


def test_simulated_if_either_is() -> None:
    # No real pair exists here, so the two halves are put together behind the checks.
    guest = snp.verify(*GPU.machine.evidence(DATA), NOW)
    report = parse_report(GOOD.documents["report"], check="V-2")
    chain = [load_der(each.der, where="chain", check="V-3") for each in GPU.chain()]
    pinned = load_der(NVIDIA_DEVICE_ROOT, where="pinned", check="V-3")
    for gpu_real, guest_real in ((True, False), (False, True), (True, True)):
        path = (*chain[:-1], pinned if gpu_real else chain[-1])
        claims = nvidia._merged(replace(guest, simulated=not guest_real), report, path, DATA, None, True)
        assert claims.simulated is not (gpu_real and guest_real)


def lies() -> dict[str, tuple[str, Callable[[], tuple[Evidence, Anchors]]]]:
    nonce = nvidia.gpu_nonce(DATA)
    report, certificates = GOOD.documents["report"], GOOD.documents["certificates"]
    foreign = maker.Gpu(vendor="foreign")
    foreign_pem = b"".join(each.pem for each in foreign.chain())
    leaf, device, provisioner, product, root = GPU.chain()
    chain_pem = b"".join(each.pem for each in (leaf, device, provisioner, product, root))
    guest = Evidence.decode(GOOD.documents["cpu"])

    def documents(**changed: bytes | None) -> tuple[Evidence, Anchors]:
        return with_documents(GOOD, **changed), ANCHORS

    def made(report_: bytes, pem: bytes = certificates, **changed: Any) -> tuple[Evidence, Anchors]:
        evidence = vouched(report_, pem, **changed)
        arks = (Evidence.decode(evidence.documents["cpu"]).documents["ark"],)
        return evidence, replace(ANCHORS, amd_arks=arks)

    def changed_gpu(**changed: Any) -> tuple[Evidence, Anchors]:
        return of_gpu(replace(GPU, **changed))

    def lists(*given: bytes, demand: bool = False) -> tuple[Evidence, Anchors]:
        evidence, anchors = made(GPU.report(nonce), chain_pem)
        return evidence, replace(anchors, nvidia_root=root.der, revocation_lists=given, demand_revocation=demand)

    def old(end: datetime) -> tuple[Evidence, Anchors]:
        extra = [("2.23.133.5.4.1", b"\x04\x30" + maker.FWID, False)]
        expired = make.sign("GSP FMC", make.ec_key("gpuleaf"), device, ca=False, extra=extra, end=end)
        pem = b"".join(each.pem for each in (expired, device, provisioner, product))
        evidence, anchors = made(GPU.report(nonce), pem)
        return evidence, replace(anchors, nvidia_root=root.der)

    def references(*given: bytes) -> tuple[Evidence, Anchors]:
        return GOOD, replace(ANCHORS, nvidia_rim=given)

    other = GPU.reference(measurements={1: frozenset({"00" * 48})})
    newer = GpuReference("999.1", maker.VBIOS, {1: frozenset({"01" * 48})}).encode()
    return {
        "a report alone": ("V-1", lambda: documents(cpu=None)),
        "a guest alone": ("V-1", lambda: (guest, ANCHORS)),
        "an unknown document": ("V-1", lambda: documents(rim=b"x")),
        "short report data": ("V-1", lambda: documents(report_data=DATA[:32])),
        "no report": ("V-2", lambda: documents(report=b"")),
        "a report that goes on": ("V-2", lambda: documents(report=report + b"\x00")),
        "no signature asked for": ("V-2", lambda: made(GPU.report(nonce, request=b"\x11\xe0\x00\xff"))),
        "one measurement asked for": ("V-2", lambda: made(GPU.report(nonce, request=b"\x11\xe0\x01\x01"))),
        "another SPDM version": ("V-2", lambda: made(GPU.report(nonce, response=b"\x12\x60\x00\x00"))),
        "an error for an answer": ("V-2", lambda: made(GPU.report(nonce, response=b"\x11\x7f\x00\x00"))),
        "no certificates": ("V-3", lambda: documents(certificates=b"")),
        "an issuer for a device": ("V-3", lambda: documents(certificates=device.pem + provisioner.pem)),
        "NVIDIA's own root": ("V-4", lambda: (GOOD, replace(ANCHORS, nvidia_root=None))),
        "another vendor's root": ("V-4", lambda: (GOOD, replace(ANCHORS, nvidia_root=foreign.chain()[-1].der))),
        "a foreign chain": ("V-4", lambda: made(foreign.report(nonce), foreign_pem)),
        "another product": ("V-4", lambda: changed_gpu(product="NVIDIA LS10 Identity")),
        "an expired device": ("V-5", lambda: old(NOW - timedelta(days=1))),
        "a provisioner revoked": ("V-6", lambda: lists(make.revocation_list(product, [provisioner.certificate]))),
        "no revocation lists": ("V-6", lambda: lists(demand=True)),
        "one revocation list of two": ("V-6", lambda: lists(make.revocation_list(root), demand=True)),
        "another device's report": ("V-7", lambda: made(foreign.report(nonce))),
        "a measurement replaced": ("V-7", lambda: made(report.replace(b"\x01" * 48, b"\x09" * 48))),
        "another firmware than certified": ("V-8", lambda: changed_gpu(fwid=bytes(48))),
        "a key for another firmware": ("V-8", lambda: changed_gpu(certified_fwid=bytes(48))),
        "another nonce": ("V-9", lambda: made(GPU.report(bytes(32)))),
        "a replayed report": ("V-9", lambda: made(report, data=bytes(64))),
        "a guest that vouches for something else": (
            "V-10",
            lambda: documents(report=GPU.report(nonce)),
        ),
        "the guest of somebody else": ("V-10", lambda: documents(cpu=made(foreign.report(nonce))[0].documents["cpu"])),
        "a guest that is none": ("V-10", lambda: documents(cpu=b"{}")),
        "a GPU for a guest": ("V-10", lambda: documents(cpu=GOOD.encode())),
        "a simulation for a guest": ("V-10", lambda: documents(cpu=Evidence("simulated", {}).encode())),
        "measurements of another state": ("V-11", lambda: references(other)),
        "a reference for another driver": ("V-11", lambda: references(newer)),
        "a guest in a low privilege level": (
            "N-12",
            lambda: documents(
                cpu=GPU.machine.evidence(nvidia.composite_report_data(DATA, report, certificates), at_0x30=2)[
                    0
                ].encode()
            ),
        ),
    }


def test_each_lie_meets_its_check() -> None:
    table = lies()
    for label, (check, build) in table.items():
        evidence, anchors = build()
        if label in ("the guest of somebody else", "a guest in a low privilege level"):
            arks = (Evidence.decode(evidence.documents["cpu"]).documents["ark"],)
            anchors = replace(anchors, amd_arks=arks)
        assert refusal(evidence, anchors) == check, label


def test_revocation_lists_end_the_claims() -> None:
    chain = GPU.chain()
    evidence = vouched(GPU.report(nvidia.gpu_nonce(DATA)), b"".join(each.pem for each in chain))
    ark = Evidence.decode(evidence.documents["cpu"]).documents["ark"]
    until = NOW + timedelta(days=2)
    given = (make.revocation_list(chain[-1], end=until), make.revocation_list(chain[-2]))
    anchors = replace(ANCHORS, amd_arks=(ark,), nvidia_root=chain[-1].der, revocation_lists=given)
    assert nvidia.verify(evidence, anchors, NOW).collateral_until == until
    # SEV-SNP's own chain is held to the same demand.
    assert refusal(evidence, replace(anchors, demand_revocation=True)) == "N-6"


def test_every_kind_of_flip_is_refused() -> None:
    # The guest's digest is over the bytes as they travel; so a flip that the GPU's own checks cannot see meets V-10.
    allowed = {"report": {"V-2", "V-7"}, "certificates": {"V-3", "V-4", "V-10"}, "report_data": {"V-9"}}
    for name, checks in allowed.items():
        data = GOOD.documents[name]
        for at in range(0, len(data), 29):
            altered = bytearray(data)
            altered[at] ^= 1 << at % 8
            assert refusal(with_documents(GOOD, **{name: bytes(altered)}), ANCHORS) in checks, (name, at)


def test_no_two_bindings_share_an_encoding() -> None:
    found = {
        nvidia.composite_report_data(DATA, report, certificates)
        for report, certificates in ((b"", b"ab"), (b"a", b"b"), (b"ab", b""))
    }
    assert len(found) == 3
    assert nvidia.gpu_nonce(DATA) != nvidia.gpu_nonce(bytes(64))
    assert len(nvidia.gpu_nonce(DATA)) == 32

    def prefixed(value: bytes) -> bytes:
        return len(value).to_bytes(8, "big") + value

    expected = hashlib.sha512(b"motte-gpu-composite-1\x00" + prefixed(DATA) + prefixed(b"r") + prefixed(b"c")).digest()
    assert nvidia.composite_report_data(DATA, b"r", b"c") == expected


def test_references() -> None:
    reference = GpuReference.decode(GPU.reference())
    report = parse_report(GOOD.documents["report"], check="V-2")
    assert reference.differing(report) == ()
    wanted = {**reference.measurements, 35: frozenset({"00" * 48}), 7: frozenset({"77" * 48})}
    assert replace(reference, measurements=wanted).differing(report) == (7, 35)
    off = parse_report(replace(GPU, nvdec=b"\x55").report(bytes(32)), check="V-2")
    assert replace(reference, measurements=wanted).differing(off) == (7,)
    with pytest.raises(InputError):
        GpuReference("1", "2", {})
    with pytest.raises(InputError):
        GpuReference("1", "2", {1: frozenset()})
    good = GPU.reference()
    for bad in (
        b"",
        good.replace(b'"driver"', b'"drover"'),
        good.replace(b"3535", b"35", 1),
        good.replace(b'"35"', b'"-1"'),
    ):
        with pytest.raises(FormatError):
            GpuReference.decode(bad)


# --- the real report ----------------------------------------------------------------------------------------------


@needs_samples
def test_the_real_report_and_chain_hold_and_alone_are_not_accepted() -> None:
    report = bytes.fromhex((SAMPLES / "nvidia_h100_report.txt").read_text())
    certificates = (SAMPLES / "nvidia_h100_cert_chain.txt").read_bytes()
    parsed = parse_report(report, check="V-2")
    assert (parsed.driver, parsed.vbios, len(parsed.measurements)) == ("550.90.07", "96.00.9F.00.01", 64)
    path = nvidia._device_chain(load_pem_chain(certificates, where="c", check="V-3"), Anchors(), SAMPLE_TIME)
    assert path[-1].der == NVIDIA_DEVICE_ROOT
    assert [each.names_a_revocation_list for each in path] == [False, False, True, True, False]
    verify_ecdsa(path[0].spki, parsed.signature, parsed.signed, hash_name="sha384", where="r", check="V-7")
    nvidia._firmware_of_the_key(path[0], parsed)
    # Its nonce is not ours, so a guest that vouches for it gets no further than there; alone not even so far.
    relayed = vouched(report, certificates)
    assert refusal(relayed, Anchors(), SAMPLE_TIME) == "V-9"
    assert refusal(with_documents(relayed, cpu=None), Anchors(), SAMPLE_TIME) == "V-1"
    assert refusal(relayed, Anchors(), datetime(2020, 1, 1, tzinfo=UTC)) == "V-5"
    assert refusal(relayed, ANCHORS, SAMPLE_TIME) == "V-4"
    for at in range(3, len(report), 83):
        altered = bytearray(report)
        altered[at] ^= 1 << at % 8
        assert refusal(vouched(bytes(altered), certificates), Anchors(), SAMPLE_TIME) in ("V-2", "V-7"), at
    for at in range(5, len(certificates), 83):
        altered = bytearray(certificates)
        altered[at] ^= 1 << at % 8
        assert refusal(with_documents(relayed, certificates=bytes(altered)), Anchors(), SAMPLE_TIME) in (
            "V-3",
            "V-4",
            "V-9",
        )


# --- issuing ------------------------------------------------------------------------------------------------------


class PlantedNvml:
    """Answers as the driver's library does: a status, and what was asked for through pointers."""

    def __init__(self, report: bytes, certificates: bytes, status: int = 0, size: int | None = None) -> None:
        self.report, self.certificates, self.status = report, certificates, status
        self.size = len(report) if size is None else size
        self.nonce, self.open = b"", 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        return 0 if index.value == 0 else 6

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, device: Any, pointer: Any) -> int:
        found = pointer._obj
        self.nonce = bytes(found.nonce)
        ctypes.memmove(found.report, self.report, len(self.report))
        found.size = self.size
        return self.status

    def nvmlDeviceGetConfComputeGpuCertificate(self, device: Any, pointer: Any) -> int:
        found = pointer._obj
        ctypes.memmove(found.attestation_chain, self.certificates, len(self.certificates))
        found.attestation_chain_size = len(self.certificates)
        return 0


def test_the_driver_is_asked_through_nvml() -> None:
    chain = b"".join(each.pem for each in GPU.chain())
    nonce = nvidia.gpu_nonce(DATA)
    planted = PlantedNvml(GPU.report(nonce), chain + b"\x00")
    answer = nvml.read_gpu(nonce, library=planted)
    assert (answer.report, answer.certificates, planted.nonce, planted.open) == (planted.report, chain, nonce, 0)
    for broken, index in (
        (PlantedNvml(b"r", chain, status=3), 0),
        (PlantedNvml(b"r", chain, size=0x2001), 0),
        (PlantedNvml(b"r", chain), 1),
    ):
        with pytest.raises(ResourceError):
            nvml.read_gpu(nonce, index=index, library=broken)
        assert broken.open == 0
    with pytest.raises(ResourceError) as caught:
        nvml.read_gpu(nonce, library=object())
    assert "too old" in str(caught.value)


def test_issuing_needs_a_gpu_and_a_guest() -> None:
    with pytest.raises(InputError):
        nvidia.issue(b"short", gpu=GPU.answer)
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(ResourceError):
            nvidia.issue(DATA)
    if not Path("/sys/kernel/config/tsm/report").exists():
        for platform in ("snp", "tdx"):
            with pytest.raises(ResourceError):
                nvidia.issue(DATA, cpu=platform, gpu=GPU.answer)


# --- fuzz ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    at=st.integers(0, 5000),
    what=st.binary(min_size=1, max_size=16),
    names=st.sets(st.sampled_from(["report", "certificates", "cpu", "report_data"]), min_size=1),
    data=st.binary(max_size=200),
)
def test_no_bytes_crash_the_verifier(at: int, what: bytes, names: set[str], data: bytes) -> None:
    changed = {}
    for name in names:
        old = GOOD.documents[name]
        changed[name] = old[: at % len(old)] + what + old[at % len(old) + len(what) :]
    try:
        nvidia.verify(with_documents(GOOD, **changed), ANCHORS, NOW)
    except (AttestationError, EvidenceError) as problem:
        refused = str(problem.check)
    else:
        refused = "V-" if all(new == GOOD.documents[name] for name, new in changed.items()) else "nothing"
    assert refused[:2] in ("V-", "N-")
    for candidate in (data, GOOD.documents["report"][:37] + data):
        with pytest.raises(EvidenceError):
            parse_report(candidate, check="V-2")
    with pytest.raises(MotteError):
        GpuReference.decode(data)
