"""motte attest evidence, verify, simulated new-key: synthetic evidence of every platform under test roots."""

from __future__ import annotations

import importlib
import json
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from motte.attest.evidence import Evidence
from motte.attest.platforms import sgx, tdx
from motte.attest.report_data import Binding
from motte.cli import attest as verbs
from motte.cli.attest_tpm import TpmOptions

Motte = Callable[..., Any]
NONCE = "ab" * 32
OTHER = "cd" * 32
BINDING = Binding(bytes.fromhex(NONCE), bytes(32), b"", bytes(32))
OF_DEVELOPMENT: dict[str, Any] = {"insecure_allow_simulated": {}}


def policy(path: Path, *members: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": "motte-policy-1", "policy": {"all_of": list(members)}}))
    return path


def utc(**ago: float) -> str:
    return (datetime.now(UTC) - timedelta(**ago)).isoformat()


@pytest.fixture
def signed(motte: Motte, tmp_path: Path) -> tuple[Path, str]:
    """Simulated evidence for NONCE, and the development key's public half."""
    public = motte("attest", "simulated", "new-key", tmp_path / "dev.key", "--json").json["public"]
    made = motte(
        *("attest", "evidence", "--platform", "simulated", "--nonce", NONCE, "-o", tmp_path / "e.json"),
        *("--simulated-key", tmp_path / "dev.key", "--measurement", "77" * 32),
    )
    assert made.code == 0, made.err
    assert "SIMULATED" in made.err
    return tmp_path / "e.json", public


def test_a_development_key_is_private_and_never_overwritten(motte: Motte, tmp_path: Path) -> None:
    path = tmp_path / "dev.key"
    first = motte("attest", "simulated", "new-key", path)
    assert first.code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = path.read_bytes()
    assert motte("attest", "simulated", "new-key", path).code == 2
    assert path.read_bytes() == kept
    words = ("attest", "evidence", "--platform", "simulated", "--nonce", NONCE, "-o", tmp_path / "e.json")
    path.chmod(0o644)
    refused = motte(*words, "--simulated-key", path)
    assert (refused.code, "0644" in refused.err) == (2, True)
    path.chmod(0o600)
    path.write_bytes(kept + b"\n")
    malformed = motte(*words, "--simulated-key", path, "--json")
    assert malformed.json["error"]["kind"] == "FormatError"
    assert kept.decode().split("secret: ")[1].strip() not in malformed.out + malformed.err
    assert motte(*words).code == 2
    assert not (tmp_path / "e.json").exists()


def test_a_verdict_says_what_was_verified(motte: Motte, signed: tuple[Path, str], tmp_path: Path) -> None:
    evidence, public = signed
    asked = policy(
        tmp_path / "p.json", {"measurement": {"allowed": ["77" * 32]}}, {"fresh": {"max_age_s": 60}}, OF_DEVELOPMENT
    )
    words = ("attest", "verify", evidence, "--policy", asked, "--simulated-signer", public, "--nonce", NONCE)
    found = motte(*words, "--issued", utc(seconds=5), "--json")
    assert found.code == 0, found.err
    assert found.json["accepted"] is True
    assert found.json["simulated"] is True
    assert found.json["measurements"] == {"measurement": "77" * 32}
    assert found.json["bound"] is True
    assert "SIMULATED" in found.err
    shown = motte(*words, "--issued", utc(seconds=5))
    assert "accepted: SIMULATED evidence of platform simulated" in shown.out
    assert "does not demand fresh" not in shown.err


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ((), "P-10"),
        (("--nonce", NONCE), "P-10"),
        (("--nonce", OTHER, "--issued", "NOW"), "R-2"),
        (("--nonce", NONCE, "--issued", "OLD"), "P-11"),
        (("--nonce", NONCE, "--issued", "NOW", "--public-key", "11" * 32), "R-2"),
        (("--nonce", NONCE, "--issued", "NOW", "--configuration", "11" * 32), "R-2"),
        (("--nonce", NONCE, "--issued", "NOW", "--tls-spki", "11" * 32), "R-2"),
    ],
)
def test_what_is_stale_or_made_for_another_is_refused_by_its_number(
    motte: Motte, signed: tuple[Path, str], tmp_path: Path, changes: tuple[str, ...], check: str
) -> None:
    evidence, public = signed
    asked = policy(tmp_path / "p.json", {"platform": ["simulated"]}, {"fresh": {"max_age_s": 60}}, OF_DEVELOPMENT)
    times = {"NOW": utc(seconds=1), "OLD": utc(seconds=120)}
    words = [times.get(each, each) for each in changes]
    found = motte("attest", "verify", evidence, "--policy", asked, "--simulated-signer", public, *words, "--json")
    assert found.code == 1
    assert found.json["error"]["check"] == check


def test_simulated_evidence_passes_by_name_only(motte: Motte, signed: tuple[Path, str], tmp_path: Path) -> None:
    evidence, public = signed
    asked = policy(tmp_path / "p.json", {"platform": ["simulated"]})
    refused = motte("attest", "verify", evidence, "--policy", asked, "--simulated-signer", public)
    assert refused.code == 1
    assert "[check P-1]" in refused.err
    permitted = policy(tmp_path / "q.json", {"platform": ["simulated"]}, OF_DEVELOPMENT)
    assert "[check S-2]" in motte("attest", "verify", evidence, "--policy", permitted).err
    passed = motte("attest", "verify", evidence, "--policy", permitted, "--simulated-signer", public)
    assert passed.code == 0
    assert "does not demand fresh evidence" in passed.err
    assert "compared with no nonce" in passed.err
    altered = Evidence.decode(evidence.read_bytes())
    broken = bytes([altered.documents["statement"][0] ^ 1]) + altered.documents["statement"][1:]
    evidence.write_bytes(Evidence("simulated", {**altered.documents, "statement": broken}).encode())
    got = motte("attest", "verify", evidence, "--policy", permitted, "--simulated-signer", public, "--json")
    assert got.json["error"]["check"] == "S-3"


def test_synthetic_snp_and_a_gpu_with_its_guest(motte: Motte, tmp_path: Path) -> None:
    make: Any = importlib.import_module("attest_makers.certificate_maker")
    gpu = importlib.import_module("attest_makers.nvidia_maker").Gpu()
    found, anchors = gpu.evidence(BINDING.report_data())
    roots = {"ark.der": anchors.amd_arks[0], "nvidia.der": anchors.nvidia_root, "rim.json": anchors.nvidia_rim[0]}
    for name, data in {**roots, "gpu.json": found.encode(), "snp.json": found.documents["cpu"]}.items():
        (tmp_path / name).write_bytes(data)
    asked = policy(tmp_path / "p.json", {"not_debug": {}}, {"tcb_status": ["UpToDate"]}, OF_DEVELOPMENT)
    words = ["attest", "verify", tmp_path / "gpu.json", "--policy", asked, "--at", make.NOW.isoformat()]
    words += ["--amd-ark", tmp_path / "ark.der", "--nvidia-root", tmp_path / "nvidia.der", "--json", "--nonce", NONCE]
    unmeasured = motte(*words)
    assert unmeasured.json["error"]["check"] == "P-6"
    words += ["--nvidia-rim", tmp_path / "rim.json"]
    assert motte(*words).json["error"]["check"] == "P-7"
    good = motte(*words, "--amd-min-tcb", "Milan=snp:22,microcode:213")
    assert good.code == 0, good.out
    assert (good.json["platform"], good.json["simulated"], good.json["debug"]) == ("nvidia", True, False)
    assert motte(*words, "--amd-min-tcb", "Milan=snp:23").json["error"]["got"] == "OutOfDate"
    assert motte(*words, "--amd-min-tcb", "Milan=sn:23").code == 2
    # The guest's evidence alone is for the composite, not for this nonce; and under AMD's own root it is nobody's.
    words[2] = tmp_path / "snp.json"
    assert motte(*words).json["error"]["check"] == "R-2"
    assert motte("attest", "verify", tmp_path / "snp.json", "--policy", asked, "--json").json["error"]["check"] == "N-4"


def test_evidence_of_sgx_and_tdx_comes_from_their_devices(
    motte: Motte, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that behaves as Gramine's: what was written is what the quote is for."""
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "user_report_data").touch()
    (tmp_path / "device" / "quote").write_bytes(b"a quote")
    monkeypatch.setattr(
        sgx.issue, "__kwdefaults__", {**(sgx.issue.__kwdefaults__ or {}), "device": tmp_path / "device"}
    )
    words = ("attest", "evidence", "--nonce", NONCE, "-o", tmp_path / "e.json")
    (tmp_path / "collateral").write_bytes(b"{}")
    made = motte(*words, "--platform", "sgx", "--bring-collateral", tmp_path / "collateral")
    assert made.code == 0, made.err
    assert (tmp_path / "device" / "user_report_data").read_bytes() == BINDING.report_data()
    found = Evidence.decode((tmp_path / "e.json").read_bytes())
    assert dict(found.documents) == {"quote": b"a quote", "collateral": b"{}"}
    assert motte(*words, "--platform", "sgx").code == 2
    (tmp_path / "e.json").unlink()
    monkeypatch.setattr(tdx.issue, "__kwdefaults__", {"root": tmp_path / "none", "collateral": None})
    refused = motte(*words, "--platform", "tdx")
    assert refused.code == 1
    assert "confidential VM" in refused.err
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--nonce", "ab", "--platform", "simulated"),
        ("--nonce", "zz" * 32, "--platform", "simulated"),
        ("--nonce", NONCE, "--platform", "simulated", "--pcrs", "1"),
        ("--nonce", NONCE, "--platform", "tpm", "--simulated-key", "x"),
        ("--nonce", NONCE, "--platform", "snp", "--cpu", "tdx"),
        ("--nonce", NONCE, "--platform", "tdx", "--tcti", "device:/dev/tpmrm0"),
        ("--nonce", NONCE, "--platform", "tpm", "--pcrs", "one"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(motte: Motte, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert motte("attest", "evidence", "-o", tmp_path / "e.json", *words).code == 2
    assert not (tmp_path / "e.json").exists()


def test_times_without_a_zone_and_bindings_without_a_nonce_are_refused(
    motte: Motte, signed: tuple[Path, str], tmp_path: Path
) -> None:
    asked = policy(tmp_path / "p.json", {"platform": ["simulated"]}, OF_DEVELOPMENT)
    words = ("attest", "verify", signed[0], "--policy", asked)
    for more in (("--at", "2026-03-04T05:06:07"), ("--at", "yesterday"), ("--public-key", NONCE), ("--issued", utc())):
        assert motte(*words, *more).code == 2
    assert sorted(verbs._READ_BY) == sorted(
        [*verbs.IssueOptions.__dataclass_fields__, *TpmOptions.__dataclass_fields__]
    )
