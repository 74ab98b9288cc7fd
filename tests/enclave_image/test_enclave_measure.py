"""Signing through a planted stand-in for Gramine's own tool, and the policy that comes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from motte.attest.claims import Claims
from motte.attest.policy import with_nonce
from motte.attest.policy_text import loads
from motte.enclave.gramine import GramineWorker, check_folder
from motte.enclave.manifest import dumps
from motte.enclave.measure import SIGSTRUCT_BYTES, measure, read_sigstruct
from motte.errors import (
    AttestationError,
    FormatError,
    InputError,
    MismatchError,
    ResourceError,
    SettingError,
    TrustError,
    UnsupportedError,
)
from motte.measure.clock import Clock

MRENCLAVE = "5f" * 32
MODULUS = bytes(range(256)) + bytes(128)
# What v1.9 prints (python/graminelibos/sgx_sign.py), and what it writes: the manifest with its defaults, and SIGSTRUCT.
SIGN = """
import json, struct, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
facts = json.load(open({facts!r}))
if facts.get("fails"):
    sys.exit("Error: key is not RSA-3072")
sig = bytearray(1808)
sig[:16] = bytes.fromhex("06000000e10000000000010000000000")
sig[24:40] = bytes.fromhex("01010000600000006000000001000000")
sig[128:512] = bytes(range(256)) + bytes(128)
struct.pack_into("<I", sig, 512, 3)
struct.pack_into("<Q", sig, 928, 6 if facts["debug"] else 4)
sig[960:992] = bytes.fromhex(facts["mrenclave"])
struct.pack_into("<HH", sig, 1024, facts["product"], facts["svn"])
text = open(words["--manifest"]).read()
open(words["--key"]).read()
open(words["--output"], "w").write(text + "# expanded\\n")
open(words["--sigfile"], "wb").write(sig)
print("Attributes:")
print("    size:        0x20000000")
print("    edmm:        False")
print("    max_threads: 6")
print("    isv_prod_id: %d" % facts["product"])
print("    isv_svn:     %d" % facts["svn"])
print("Memory:")
print("    000000001fffd000-0000000020000000 [REG:R--] (manifest) measured")
print("Measurement:")
print("    " + facts["printed"])
"""


@pytest.fixture
def image(tmp_path: Path, clean: dict[str, Any]) -> Path:
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "worker.manifest").write_text(dumps(clean), encoding="utf-8")
    (tmp_path / "key.pem").write_text("planted", encoding="utf-8")
    return folder


@pytest.fixture
def signs(tmp_path: Path, plant_program: Callable[[str, str], Path]) -> Callable[..., None]:
    facts = tmp_path / "facts.json"
    plant_program("gramine-sgx-sign", SIGN.format(facts=str(facts)))

    def set_facts(**changes: Any) -> None:
        stated = {"mrenclave": MRENCLAVE, "printed": MRENCLAVE, "product": 3, "svn": 7, "debug": False, **changes}
        facts.write_text(json.dumps(stated), encoding="utf-8")

    return set_facts


CLAIMS = Claims(
    platform="sgx",
    simulated=False,
    report_data=bytes(64),
    measurements={"mrenclave": MRENCLAVE},
    signer=hashlib.sha256(MODULUS).hexdigest(),
    svn=7,
    tcb_status="UpToDate",
    details={"isvprodid": "3"},
)


def test_the_measurement_becomes_a_policy_that_a_broker_takes(
    image: Path, tmp_path: Path, signs: Callable[..., None]
) -> None:
    signs()
    clock = Clock()
    found = measure(image, tmp_path / "key.pem", clock=clock)
    assert (found.mrenclave, found.product, found.svn, found.debug) == (MRENCLAVE, 3, 7, False)
    assert found.mrsigner == hashlib.sha256(MODULUS).hexdigest()
    assert [item.name for item in clock.segments().items] == ["sign image"]
    policy = loads((image / "policy.json").read_bytes())
    assert policy == found.policy()
    assert read_sigstruct((image / "worker.sig").read_bytes()) == found
    assert (image / "worker.manifest.sgx").read_text().endswith("# expanded\n")
    now = datetime(2026, 1, 1, tzinfo=UTC)
    asked = with_nonce(policy, bytes(32), now)
    for change, check in (
        ({"measurements": {"mrenclave": "00" * 32}}, "P-3"),
        ({"signer": "00" * 32}, "P-4"),
        ({"details": {"isvprodid": "4"}}, "P-4"),
        ({"svn": 6}, "P-5"),
        ({"debug": True}, "P-6"),
        ({"tcb_status": "OutOfDate"}, "P-7"),
        ({"platform": "tdx"}, "P-2"),
        ({"simulated": True}, "P-1"),
        ({}, "P-10"),
    ):
        with pytest.raises(AttestationError) as refused:
            asked.check(replace(CLAIMS, **change), now)
        assert refused.value.check == check
    with pytest.raises(InputError, match="measured already"):
        measure(image, tmp_path / "key.pem")


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"printed": "00" * 32}, MismatchError),
        ({"product": 4}, MismatchError),
        ({"svn": 8}, MismatchError),
        ({"debug": True}, MismatchError),
        ({"fails": True}, ResourceError),
    ],
)
def test_nothing_is_written_where_signing_went_wrong(
    facts: dict[str, Any], error: type[Exception], image: Path, tmp_path: Path, signs: Callable[..., None]
) -> None:
    signs(**facts)
    with pytest.raises(error):
        measure(image, tmp_path / "key.pem")
    assert [path.name for path in image.iterdir()] == ["worker.manifest"]


def test_an_unsafe_manifest_is_not_signed(
    image: Path, tmp_path: Path, clean: dict[str, Any], signs: Callable[..., None]
) -> None:
    signs()
    clean["sgx"]["allowed_files"] = ["file:/etc/passwd"]
    (image / "worker.manifest").write_text(dumps(clean), encoding="utf-8")
    with pytest.raises(TrustError, match="unsafe"):
        measure(image, tmp_path / "key.pem")


def test_without_gramine_it_says_how_to_install_it(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for act in (lambda: measure(image, tmp_path / "key.pem"), lambda: GramineWorker(image, kind="gramine-direct")):
        with pytest.raises(UnsupportedError, match="not installed") as refused:
            act()
        assert "apt-get install gramine" in str(refused.value.hint)


def test_a_folder_that_cannot_be_started_is_refused(image: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an image") as refused:
        check_folder(image, "gramine-sgx")
    assert "measure" in str(refused.value.hint)
    with pytest.raises(InputError, match="not an image"):
        check_folder(tmp_path, "gramine-direct")
    with pytest.raises(SettingError):
        check_folder(image, "gramine-tdx")  # type: ignore[arg-type]
    check_folder(image, "gramine-direct")


def test_a_signature_structure_is_read_strictly() -> None:
    good = bytearray(SIGSTRUCT_BYTES)
    good[:16] = bytes.fromhex("06000000e10000000000010000000000")
    good[24:40] = bytes.fromhex("01010000600000006000000001000000")
    good[512] = 3
    identity = read_sigstruct(bytes(good))
    assert not identity.debug
    for flaw in (
        good[:-1],
        good + b"x",
        b"\0" + good[1:],
        good[:24] + b"\0" + good[25:],
        good[:512] + b"\1" + good[513:],
    ):
        with pytest.raises(FormatError):
            read_sigstruct(bytes(flaw))
    with pytest.raises(TrustError, match="debug"):
        replace(identity, debug=True).policy()
