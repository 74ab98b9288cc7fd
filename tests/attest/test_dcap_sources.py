"""Where collateral comes from, and the devices that quotes come from."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent

import pytest
from attest_makers.dcap_maker import AT, Maker

from motte.attest.evidence import Evidence
from motte.attest.platforms import sgx, tdx
from motte.attest.platforms.dcap_collateral import Collateral, CollateralCache, fetch
from motte.attest.platforms.tsm import read_report
from motte.errors import AttestationError, EvidenceError, InputError, MotteError, ResourceError, SettingError

MAKER = Maker()
QUOTE_ONLY = Evidence("sgx", {"quote": MAKER.quote()})


class Pccs(ThreadingHTTPServer):
    """What a PCCS answers (Intel's PCS API, version 4), for one kind of platform."""

    daemon_threads = True

    def __init__(self, collateral: Collateral) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.collateral = collateral
        self.asked: list[str] = []
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str) -> tuple[dict[str, str], bytes] | None:
        found = self.collateral
        if path.startswith("/nowhere"):
            return None
        if "pckcrl" in path:
            return {"SGX-PCK-CRL-Issuer-Chain": percent(found.pck_crl_issuer_chain)}, found.pck_crl
        if "rootcacrl" in path:
            return {}, found.root_ca_crl.hex().encode()
        if "/tcb?" in path:
            body = {"tcbInfo": json.loads(found.tcb_info), "signature": found.tcb_info_signature.hex()}
            return {"TCB-Info-Issuer-Chain": percent(found.tcb_info_issuer_chain)}, _compact(body)
        if "qe/identity" in path:
            body = {"enclaveIdentity": json.loads(found.qe_identity), "signature": found.qe_identity_signature.hex()}
            return {"SGX-Enclave-Identity-Issuer-Chain": percent(found.qe_identity_issuer_chain)}, _compact(body)
        return None


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Pccs)
        server.asked.append(self.path)
        if server.stalled.is_set():
            threading.Event().wait(5)
        found = server.answer(self.path)
        self.send_response(404 if found is None else 200)
        for name, value in (found or ({}, b""))[0].items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write((found or ({}, b""))[1])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def pccs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pccs]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Pccs(MAKER.collateral())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_pccs_fills_the_cache_and_is_asked_again_when_it_has_expired(pccs: Pccs, tmp_path: Path) -> None:
    anchors = MAKER.anchors(intel_pccs=pccs.url, intel_cache=tmp_path / "cache")
    assert sgx.verify(QUOTE_ONLY, anchors, AT).tcb_status == "UpToDate"
    asked = len(pccs.asked)
    assert asked >= 4
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sgx-112233445566-platform.json"]
    sgx.verify(QUOTE_ONLY, anchors, AT)
    assert len(pccs.asked) == asked  # from the cache
    later = AT + timedelta(days=40)
    renewed = MAKER.but(issued=later - timedelta(days=1), until=later + timedelta(days=20))
    pccs.collateral = renewed.collateral()
    assert sgx.verify(QUOTE_ONLY, anchors, later).collateral_until == renewed.until
    assert len(pccs.asked) > asked
    # a revision that became known to be too old is fetched anew too, and refused if there is no newer one
    with pytest.raises(AttestationError) as caught:
        sgx.verify(QUOTE_ONLY, MAKER.anchors(intel_pccs=pccs.url, intel_min_evaluation=21), later)
    assert caught.value.check == "G-13"


def test_the_verifiers_own_sources_come_before_the_evidences(pccs: Pccs, tmp_path: Path) -> None:
    # The host brings collateral of an older state of knowledge, under which its platform was still fine.
    pccs.collateral = MAKER.but(status="OutOfDate", evaluation=21).collateral()
    evidence = MAKER.evidence()
    assert sgx.verify(evidence, MAKER.anchors(), AT).tcb_status == "UpToDate"
    assert sgx.verify(evidence, MAKER.anchors(intel_pccs=pccs.url), AT).tcb_status == "OutOfDate"
    given = MAKER.but(status="SWHardeningNeeded").collateral().encode()
    assert sgx.verify(evidence, MAKER.anchors(intel_collateral=given), AT).tcb_status == "SWHardeningNeeded"
    cache = CollateralCache(tmp_path, ("sgx", "112233445566", "platform"))
    cache.store(MAKER.but(status="ConfigurationNeeded").collateral())
    assert sgx.verify(evidence, MAKER.anchors(intel_cache=tmp_path), AT).tcb_status == "ConfigurationNeeded"
    assert [path.name for path in tmp_path.iterdir()] == [cache.path.name]  # nothing half-written beside it


def test_a_pccs_that_fails_is_an_error_and_never_a_reason_to_take_the_hosts(pccs: Pccs, tmp_path: Path) -> None:
    evidence = MAKER.evidence()
    pccs.stalled.set()
    slow = MAKER.anchors(intel_pccs=pccs.url, intel_pccs_timeout_s=0.2, intel_cache=tmp_path)
    with pytest.raises(ResourceError, match="in time"):
        sgx.verify(evidence, slow, AT)
    pccs.stalled.clear()
    with pytest.raises(ResourceError, match="no collateral"):
        sgx.verify(evidence, MAKER.anchors(intel_pccs=f"{pccs.url}/nowhere"), AT)
    pccs.collateral = Maker(world="theirs").collateral()
    with pytest.raises(AttestationError) as caught:
        sgx.verify(evidence, MAKER.anchors(intel_pccs=pccs.url, intel_cache=tmp_path), AT)
    assert caught.value.check == "G-3"
    assert list(tmp_path.iterdir()) == []  # what did not verify is not kept
    with pytest.raises(SettingError):
        fetch("file:///etc/passwd", b"", timeout_s=1, check="G-2")
    with pytest.raises(SettingError):
        fetch("https://localhost", b"", timeout_s=0, check="G-2")


def test_a_malformed_cache_says_which_file(tmp_path: Path) -> None:
    cache = CollateralCache(tmp_path, ("sgx", "112233445566", "platform"))
    cache.path.write_bytes(MAKER.collateral().encode()[:-20])
    with pytest.raises(EvidenceError) as caught:
        sgx.verify(QUOTE_ONLY, MAKER.anchors(intel_cache=tmp_path), AT)
    assert caught.value.check == "G-2"
    assert str(cache.path) in str(caught.value.hint)
    with pytest.raises(SettingError):
        CollateralCache(tmp_path, ("..", "x"))


def test_collateral_as_json() -> None:
    whole = MAKER.collateral()
    assert Collateral.decode(whole.encode(), check="G-2") == whole
    value = json.loads(whole.encode())
    assert Collateral.decode(json.dumps({**value, "pck_certificate_chain": "x"}), check="G-2") == whole
    for wrong in ({**value, "more": 1}, {**value, "pck_crl": "0"}, {**value, "tcb_info": 1}, []):
        with pytest.raises(EvidenceError) as caught:
            Collateral.decode(json.dumps(wrong), check="G-2")
        assert caught.value.check == "G-2"


# --- devices ------------------------------------------------------------------------------------------------------


def test_gramine_gives_a_quote(tmp_path: Path) -> None:
    (tmp_path / "user_report_data").touch()
    (tmp_path / "quote").write_bytes(MAKER.quote())
    evidence = sgx.issue(MAKER.report_data, device=tmp_path, collateral=MAKER.collateral().encode())
    assert (tmp_path / "user_report_data").read_bytes() == MAKER.report_data
    assert sgx.verify(Evidence.decode(evidence.encode()), MAKER.anchors(), AT).report_data == MAKER.report_data
    (tmp_path / "quote").write_bytes(b"")
    with pytest.raises(ResourceError):
        sgx.issue(MAKER.report_data, device=tmp_path)
    with pytest.raises(ResourceError) as caught:
        sgx.issue(MAKER.report_data, device=tmp_path / "none")
    assert "gramine-direct" in str(caught.value.hint)
    with pytest.raises(InputError):
        sgx.issue(b"short", device=tmp_path)


class FakeConfigfs(type(Path())):  # type: ignore[misc]
    """A folder that behaves as configfs: a new folder has its files, and writing the data makes the report."""

    provider = "tdx_guest"
    disturbed = 0
    refusal: int | None = None

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        super().mkdir(*args, **kwargs)
        for name, data in (("provider", self.provider + "\n"), ("generation", "0\n"), ("outblob", "")):
            (self / name).write_text(data)

    def write_bytes(self, data: Any) -> int:
        kind = type(self)
        if kind.refusal is not None:
            raise OSError(kind.refusal, os.strerror(kind.refusal))
        count = super().write_bytes(data)
        steps = 2 if kind.disturbed else 1
        kind.disturbed = max(0, kind.disturbed - 1)
        generation = self.parent / "generation"
        generation.write_text(f"{int(generation.read_text()) + steps}\n")
        Path(self.parent / "outblob").write_bytes(b"report for " + bytes(data))
        return count

    def rmdir(self) -> None:
        for each in self.iterdir():
            each.unlink()
        super().rmdir()


@pytest.fixture
def configfs(tmp_path: Path) -> Iterator[FakeConfigfs]:
    yield FakeConfigfs(tmp_path)
    FakeConfigfs.provider, FakeConfigfs.disturbed, FakeConfigfs.refusal = "tdx_guest", 0, None
    assert list(tmp_path.iterdir()) == []  # every folder is removed, whatever happened


def test_configfs_gives_a_report(configfs: FakeConfigfs) -> None:
    assert tdx.issue(b"d" * 64, root=configfs).documents["quote"] == b"report for " + b"d" * 64
    FakeConfigfs.disturbed = 2  # somebody else wrote in between: asked again
    assert read_report(b"e" * 64, root=configfs, expected_provider="tdx_guest") == b"report for " + b"e" * 64


def test_configfs_that_gives_none(configfs: FakeConfigfs, tmp_path: Path) -> None:
    def refused(root: Path = configfs, data: bytes = b"d" * 64) -> str:
        with pytest.raises(MotteError) as caught:
            tdx.issue(data, root=root)
        return str(caught.value)

    assert "64 bytes" in refused(data=b"short")
    assert "no report device" in refused(root=tmp_path / "none" / "none")
    FakeConfigfs.disturbed = 100
    assert "keeps writing" in refused()
    FakeConfigfs.disturbed = 0
    FakeConfigfs.refusal = errno.EBUSY
    assert "keeps writing" in refused()
    FakeConfigfs.refusal = errno.EINVAL
    assert "gave no report" in refused()
    FakeConfigfs.refusal = None
    FakeConfigfs.provider = "sev_guest"
    assert "sev_guest" in refused()
