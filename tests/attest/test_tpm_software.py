"""A real TPM 2.0 in software (swtpm): enrolment by credential activation, quotes, and why it stays SIMULATED."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from motte.attest.anchors import Anchors
from motte.attest.platforms import tpm, tpm_tools
from motte.attest.platforms.tpm_enrol import Challenge, Enrolment, Request, activate, collect, enrol
from motte.attest.platforms.tpm_tools import Tpm, make_credential
from motte.attest.policy import AllOf, InsecureAllowSimulated, Measurement
from motte.attest.report_data import Binding
from motte.attest.verify import verify
from motte.errors import AttestationError, InputError, ResourceError


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
needs_swtpm = pytest.mark.skipif(soft.absent() is not None, reason=str(soft.absent()))
BINDING = Binding(nonce=b"n" * 32, public_key=b"k" * 32, tls_spki_digest=b"t" * 32, configuration_digest=b"c" * 32)
DATA = BINDING.report_data()
FOREIGN_HANDLE = 0x81010200


def clock() -> datetime:
    return datetime.now(UTC)


class Machine:
    """A software TPM as a cloud makes it (with endorsement certificates) and an owner who enrolled it as simulated."""

    def __init__(self, folder: Path, tcti: str, root: bytes, issuer: bytes) -> None:
        self.tpm, self.root, self.issuer = Tpm(tcti), root, issuer
        self.tcti = tcti
        self.request = Request.decode(collect(self.tpm).encode())
        self.record = self.enrol(self.request, insecure_allow_simulated=True)
        self.anchors = Anchors(tpm_enrolled=(self.record.encode(),))

    def enrol(self, request: Request, **options: Any) -> Enrolment:
        settings = {"roots": (self.root,), "clock": clock, "intermediates": (self.issuer,), **options}
        return enrol(request, lambda blob: activate(self.tpm, blob), **settings)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("manufactured")
    state, root, issuer = soft.manufacture(folder)
    with soft.swtpm(state) as tcti:
        yield Machine(folder, tcti, root, issuer)


@pytest.fixture(scope="module")
def foreign() -> Iterator[Tpm]:
    """The software TPM of any root: it has an attestation key too."""
    with soft.swtpm() as tcti:
        it = Tpm(tcti)
        it.create_attestation_key(tpm_tools.DEFAULT_HANDLE, ek="ecc")
        yield it


@needs_swtpm
def test_an_enrolled_software_tpm_quotes_what_was_measured_and_is_marked_simulated(machine: Machine) -> None:
    event = hashlib.sha256(b"kernel").hexdigest()
    before = tpm.verify(tpm.issue(DATA, tpm=machine.tpm), machine.anchors, clock())
    assert list(before.measurements) == ["pcrs", *(f"pcr{number}" for number in tpm.DEFAULT_PCRS)]
    old = bytes.fromhex(before.measurements["pcr9"])
    subprocess.run(["tpm2_pcrextend", f"--tcti={machine.tcti}", f"9:sha256={event}"], check=True, timeout=60)
    evidence = tpm.issue(DATA, tpm=machine.tpm)
    expected = hashlib.sha256(old + bytes.fromhex(event)).hexdigest()
    policy = Measurement(frozenset({expected}), name="pcr9")
    verdict = verify(
        evidence, AllOf(policy, InsecureAllowSimulated()), clock(), anchors=machine.anchors, binding=BINDING
    )
    assert verdict.claims.simulated
    assert verdict.claims.instance == hashlib.sha256(machine.request.ek.spki).hexdigest()
    assert verdict.claims.details["manufacturer"] == "IBM"
    assert verdict.claims.measurements["pcrs"] != before.measurements["pcrs"]
    with pytest.raises(AttestationError) as caught:
        verify(evidence, policy, clock(), anchors=machine.anchors)
    assert caught.value.check == "P-1"


@needs_swtpm
def test_a_software_tpm_is_no_hardware_even_under_a_pinned_root(machine: Machine) -> None:
    assert machine.record.simulated
    assert len(machine.request.certificates) == 1
    for request in (machine.request, Request(*_parts(machine.request)[:3], "IFX", "SLB9670")):
        with pytest.raises(AttestationError) as caught:
            machine.enrol(request)
        assert caught.value.check == "T-18"
    # A maker's root that lies, and a host that lies: the firmware's own number in the quote still tells.
    maker = soft.Maker()
    certificate = maker.certify(serialization.load_der_public_key(machine.request.ek.spki))
    ek, ak, *_ = _parts(machine.request)
    lied = machine.enrol(
        Request(ek, ak, (certificate,), "IFX", ""), roots=(maker.root,), intermediates=(), clock=lambda: soft.NOW
    )
    assert not lied.simulated
    anchors = Anchors(tpm_roots=(maker.root,), tpm_enrolled=(lied.encode(),))
    assert tpm.verify(tpm.issue(DATA, tpm=machine.tpm), anchors, soft.NOW).simulated


def _parts(request: Request) -> tuple[Any, ...]:
    return request.ek, request.ak, request.certificates, request.manufacturer, request.vendor


@needs_swtpm
def test_any_roots_software_tpm_does_not_pass(machine: Machine, foreign: Tpm) -> None:
    """Neither its quote, nor its key beside the endorsement key of the enrolled machine, nor a plain key's."""
    with pytest.raises(AttestationError) as caught:
        tpm.verify(tpm.issue(DATA, tpm=foreign, pcrs=(0, 1)), machine.anchors, clock())
    assert caught.value.check == "T-4"
    ek, _, certificates, *names = _parts(machine.request)
    for ak in (foreign.public(tpm_tools.DEFAULT_HANDLE), soft.FakeTpm().ak):
        request = Request(ek, ak, certificates, *names)
        with pytest.raises(ResourceError, match="tpm2_activatecredential failed"):
            machine.enrol(request, insecure_allow_simulated=True)
        challenge = Challenge.for_request(request, roots=(), now=clock(), insecure_allow_simulated=True)
        with pytest.raises(AttestationError) as caught:
            challenge.finish(b"\x00" * 32, clock())
        assert caught.value.check == "T-19"
    blob = make_credential(machine.request.ek, machine.request.ak.name, b"secret")
    with pytest.raises(ResourceError, match="failed"):
        activate(foreign, blob)


@needs_swtpm
def test_a_challenge_takes_one_answer_in_time(machine: Machine) -> None:
    def challenge() -> Challenge:
        return Challenge.for_request(machine.request, roots=(), now=clock(), insecure_allow_simulated=True)

    first = challenge()
    answer = activate(machine.tpm, first.blob)
    assert first.finish(answer, clock()).simulated
    late = challenge()
    for it, when in ((first, clock()), (late, clock() + timedelta(seconds=601)), (challenge(), clock() - timedelta(1))):
        with pytest.raises(AttestationError) as caught:
            it.finish(answer, when)
        assert caught.value.check == "T-20"
    other = challenge()
    with pytest.raises(AttestationError) as caught:
        other.finish(answer, clock())
    assert caught.value.check == "T-19"


@needs_swtpm
def test_an_rsa_key_quotes_too_and_a_taken_handle_is_kept(foreign: Tpm) -> None:
    request = collect(foreign, handle=FOREIGN_HANDLE, ek="ecc", create="rsapss")
    assert request.certificates == ()
    assert request.vendor.startswith("SW")

    def answer(blob: bytes) -> bytes:
        return activate(foreign, blob, handle=FOREIGN_HANDLE, ek="ecc")

    record = enrol(request, answer, roots=(), clock=clock, insecure_allow_simulated=True)
    evidence = tpm.issue(DATA, tpm=foreign, handle=FOREIGN_HANDLE, pcrs=(7, 0))
    claims = tpm.verify(evidence, Anchors(tpm_enrolled=(record.encode(),)), clock())
    assert list(claims.measurements) == ["pcrs", "pcr0", "pcr7"]
    with pytest.raises(ResourceError, match="tpm2_evictcontrol failed"):
        collect(foreign, handle=FOREIGN_HANDLE, ek="ecc", create="rsapss")
    assert collect(foreign, handle=FOREIGN_HANDLE, ek="ecc", create=None).ak == request.ak
    foreign.remove_key(FOREIGN_HANDLE)
    with pytest.raises(ResourceError, match="tpm2_readpublic failed"):
        tpm.issue(DATA, tpm=foreign, handle=FOREIGN_HANDLE)


@needs_swtpm
def test_a_bank_that_is_off_and_a_tpm_that_is_absent_are_said(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the bank is not active"):
        tpm.issue(DATA, tpm=machine.tpm, bank="sha384")
    with pytest.raises(ResourceError, match="tpm2_readpublic failed") as caught:
        tpm.issue(DATA, tpm=Tpm(f"swtpm:path={tmp_path}/none"))
    assert caught.value.hint is not None


@pytest.mark.parametrize("pcrs", [(), (1, 1), (24,), (-1,), (16,), (23, 0)])
def test_issuing_refuses_registers_that_say_nothing(pcrs: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="not registers"):
        tpm.issue(DATA, pcrs=pcrs)


def test_issuing_refuses_other_report_data_and_ways_that_run_programs() -> None:
    with pytest.raises(InputError, match="not report data"):
        tpm.issue(DATA[:32])
    for tcti in ("cmd:sh -c true", "none", "/tmp/evil.so", "", "device:/dev/tpm0\n"):
        with pytest.raises(InputError, match="not a way"):
            Tpm(tcti)
    with pytest.raises(InputError, match="not a persistent handle"):
        Tpm().public(0x80000000)
    with pytest.raises(InputError, match="not a time limit"):
        Tpm(timeout_s=0)


def test_tools_that_hang_fail_or_are_absent_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, programs = tmp_path / "temporary", tmp_path / "programs"
    temporary.mkdir()
    programs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(tpm_tools, "_PATH", str(programs))
    with pytest.raises(ResourceError, match="not installed") as caught:
        Tpm().public(tpm_tools.DEFAULT_HANDLE)
    assert "tpm2-tools" in str(caught.value.hint)
    tool = programs / "tpm2_readpublic"
    scripts = {
        "did not end in time": "exec /bin/sleep 60",
        "tpm2_readpublic failed": "/bin/ls -ld . >&2; echo ERROR: no; exit 3",
        "wrote no answer": "exit 0",
        "too long": "/usr/bin/head -c 5000 /dev/zero > key.pub",
    }
    for message, script in scripts.items():
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o700)
        limit = 0.2 if "time" in message else 60.0
        with pytest.raises(ResourceError, match=message):
            Tpm(timeout_s=limit).public(tpm_tools.DEFAULT_HANDLE)
        assert list(temporary.iterdir()) == []
    seen = tmp_path / "seen"
    tool.write_text(f"#!/bin/sh\n/usr/bin/stat -c %a . > {seen}; /usr/bin/env >> {seen}; exit 1\n")
    monkeypatch.setenv("TPM2TOOLS_TCTI", "device:/elsewhere")
    with pytest.raises(ResourceError):
        Tpm().public(tpm_tools.DEFAULT_HANDLE)
    text = seen.read_text()
    assert text.startswith("700\n")
    assert "elsewhere" not in text
