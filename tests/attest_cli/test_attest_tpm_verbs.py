"""motte attest tpm: a real software TPM, an owner and a host as two processes that exchange files."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

soft: Any = importlib.import_module("attest_makers.software_tpm")
pytestmark = pytest.mark.skipif(soft.absent() is not None, reason=str(soft.absent()))
Motte = Callable[..., Any]
NONCE = "5a" * 32


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """A software TPM with endorsement certificates: how to reach it, its root, its issuer."""
    folder = tmp_path_factory.mktemp("made")
    state, root, issuer = soft.manufacture(folder)
    (folder / "root.der").write_bytes(root)
    (folder / "issuer.der").write_bytes(issuer)
    with soft.swtpm(state) as tcti:
        yield tcti, folder / "root.der", folder / "issuer.der"


@pytest.fixture(scope="module")
def foreign() -> Iterator[str]:
    with soft.swtpm() as tcti:
        yield tcti


def owner(folder: Path, *words: object) -> subprocess.Popen[str]:
    """``motte attest tpm enroll`` as a process; returns once it has written the challenge, or ended."""
    command = [sys.executable, "-m", "motte", "attest", "tpm", "enroll", folder / "request", "-o", folder / "record"]
    command += ["--challenge", folder / "challenge", "--json", *words]
    process = subprocess.Popen(
        [str(each) for each in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    while process.poll() is None and not (folder / "challenge").exists():
        time.sleep(0.02)
    return process


def test_enrolment_evidence_and_verdict(
    motte: Motte, machine: tuple[str, Path, Path], foreign: str, tmp_path: Path
) -> None:
    tcti, root, issuer = machine
    made = motte("attest", "tpm", "request", "-o", tmp_path / "request", "--tcti", tcti, "--json")
    assert (made.code, made.json["manufacturer"], made.json["certificates"]) == (0, "IBM", 1), made.err
    # Its maker is no maker of hardware: refused by number, and nothing is written.
    pinned = ("--tpm-root", root, "--intermediate", issuer)
    refused = owner(tmp_path, *pinned)
    assert json.loads(refused.communicate(timeout=60)[0])["error"]["check"] == "T-18"
    assert not (tmp_path / "record").exists()
    assert not (tmp_path / "challenge").exists()
    # Enrolled as simulated: the answer travels as a file.
    waiting = owner(tmp_path, *pinned, "--insecure-allow-simulated", "--answer", tmp_path / "answer")
    words: tuple[object, ...] = ("attest", "tpm", "activate", tmp_path / "challenge", "--tcti")
    assert motte(*words, foreign).code == 1
    answered = motte(*words, tcti, "-o", tmp_path / "answer")
    assert answered.code == 0, answered.err
    said, told = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, told
    assert json.loads(said)["simulated"] is True
    assert "SIMULATED" in told
    assert not (tmp_path / "challenge").exists()
    # Evidence by the enrolled key, decided on.
    evidence = tmp_path / "e.json"
    words = ("attest", "evidence", "--platform", "tpm", "--tcti", tcti, "--nonce", NONCE, "--pcrs", "0,7")
    assert motte(*words, "-o", evidence).code == 0
    policy = tmp_path / "policy"
    condition: dict[str, Any] = {"platform_instance": [json.loads(said)["instance"]]}
    for members, code, check in (
        ([condition, {"insecure_allow_simulated": {}}], 0, None),
        ([condition], 1, "P-1"),
        ([{"platform_instance": ["00" * 32]}, {"insecure_allow_simulated": {}}], 1, "P-8"),
    ):
        policy.write_text(json.dumps({"format": "motte-policy-1", "policy": {"all_of": members}}))
        words = ("attest", "verify", evidence, "--policy", policy, "--nonce", NONCE, "--json")
        found = motte(*words, "--tpm-enrolled", tmp_path / "record")
        assert found.code == code
        assert check is None or found.json["error"]["check"] == check
    assert motte(*words).json["error"]["check"] == "T-4"


def test_a_wrong_answer_enrolls_nothing(motte: Motte, machine: tuple[str, Path, Path], tmp_path: Path) -> None:
    tcti = machine[0]
    elsewhere = ("--tcti", tcti, "--handle", "0x81010300", "--ek", "ecc")
    made = motte("attest", "tpm", "request", "-o", tmp_path / "request", *elsewhere)
    assert made.code == 0, made.err
    again = motte("attest", "tpm", "request", "-o", tmp_path / "request", "--tcti", tcti, "--existing")
    assert again.code == 2
    waiting = owner(tmp_path, "--insecure-allow-simulated")
    said, _ = waiting.communicate("00" * 32 + "\n", timeout=60)
    assert waiting.returncode == 1
    assert json.loads(said)["error"]["check"] == "T-19"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["request"]
    # None at all.
    waiting = owner(tmp_path, "--insecure-allow-simulated", "--answer", tmp_path / "never", "--wait", 1)
    assert json.loads(waiting.communicate(timeout=60)[0])["error"]["kind"] == "ResourceError"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["request"]
    # The right one, typed.
    waiting = owner(tmp_path, "--insecure-allow-simulated")
    answer = motte("attest", "tpm", "activate", tmp_path / "challenge", *elsewhere).out
    said, told = waiting.communicate(answer, timeout=60)
    assert waiting.returncode == 0, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record", "request"]
