"""Every vector of tests/vectors: the failure is of the expected class, at the expected check, and nothing got out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from motte import errors
from motte.errors import MotteError, SignatureError
from motte.seal import RecipientPrivateKey, SignerPrivateKey, inspect, open_bundle
from motte.seal.checks import CHECKS
from motte.seal.reader import SignedBundle, UnlockedBundle

FOLDER = Path(__file__).parent.parent / "vectors"
INDEX: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
SECRETS = {name: bytes.fromhex(value) for name, value in json.loads((FOLDER / "keys.json").read_text()).items()}
UNTOUCHED = 0xEE


def vector_bytes(vector: dict[str, Any]) -> bytes:
    if "file" in vector:
        return (FOLDER / vector["file"]).read_bytes()
    pieces = []
    for piece in vector["pieces"]:
        if "hex" in piece:
            pieces.append(bytes.fromhex(piece["hex"]))
        else:
            pieces.append((FOLDER / piece["file"]).read_bytes()[piece["start"] : piece["stop"]])
    return b"".join(pieces)


@pytest.fixture(params=INDEX, ids=[each["name"] for each in INDEX])
def vector(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    path = tmp_path / "vector.motte"
    path.write_bytes(vector_bytes(request.param))
    return request.param, path


def opened(facts: dict[str, Any], path: Path) -> SignedBundle:
    signer = SignerPrivateKey(SECRETS[facts.get("signer", "signer")]).public
    return open_bundle(path, signer=signer, min_release=facts.get("min_release", 0))


def expected_plaintext(facts: dict[str, Any], section: int, size: int) -> bytes:
    if section in facts.get("altered", []):
        return b"\x66" * size
    return hashlib.shake_256(b"motte vector section %d" % section).digest(size)


def read_section(bundle: UnlockedBundle, section: int, threads: int) -> bytes:
    """The section's plaintext; if it cannot be had, the destination must hold nothing but zeros."""
    if section == 0:
        return bundle.manifest(threads=threads)
    into = bytearray([UNTOUCHED]) * bundle.part_bytes(section - 1)
    try:
        bundle.open_part(section - 1, memoryview(into), threads=threads)
    except MotteError:
        assert not any(into), "plaintext of a part that was refused is in the destination"
        raise
    return bytes(into)


def read_all(facts: dict[str, Any], bundle: SignedBundle, threads: int, reached: list[str]) -> None:
    """Go as far as it goes; ``reached`` ends with the stage that was tried last."""
    reached.append("unwrap")
    kek = bundle.unwrap(RecipientPrivateKey(SECRETS[facts.get("recipient", "alice")]))
    reached.append("unlock")
    with bundle.unlock(kek) as unlocked:
        for section in range(unlocked.parts + 1):
            reached.append(str(section))
            found = read_section(unlocked, section, threads)
            assert found == expected_plaintext(facts, section, len(found))
    reached.append("ok")


def outcome(facts: dict[str, Any], path: Path, threads: int) -> tuple[str, MotteError | None]:
    reached = ["open"]
    try:
        with opened(facts, path) as bundle:
            read_all(facts, bundle, threads, reached)
    except MotteError as problem:
        return reached[-1], problem
    return reached[-1], None


@pytest.mark.parametrize("threads", [1, 3])
def test_vector_meets_its_failure(vector: tuple[dict[str, Any], Path], threads: int) -> None:
    facts, path = vector
    stage, problem = outcome(facts, path, threads)
    assert stage == facts["stage"], f"{facts['flaw']}: {problem!r}"
    if stage == "ok":
        return
    assert problem is not None
    assert type(problem) is getattr(errors, facts["error"])
    assert problem.check == facts["check"], str(problem)
    assert facts["check"] in str(problem)
    if "chunk" in facts:
        assert problem.where is not None
        name = "the manifest" if stage == "0" else f"part {stage}"
        assert problem.where.startswith(f"{name}, chunk {facts['chunk']} of")


def test_digests_of_vector(vector: tuple[dict[str, Any], Path]) -> None:
    facts, path = vector
    if facts["stage"] == "open":
        with pytest.raises(MotteError):
            opened(facts, path)
        return
    with opened(facts, path) as bundle:
        if "digests" in facts:
            with pytest.raises(SignatureError) as caught:
                bundle.verify_digests()
            assert caught.value.check == facts["digests"]
        else:
            bundle.verify_digests()


def test_inspection_of_vector(vector: tuple[dict[str, Any], Path]) -> None:
    facts, path = vector
    expected = facts["inspect"]
    if expected.startswith("B-"):
        with pytest.raises(MotteError) as caught:
            inspect(path)
        assert caught.value.check == expected, str(caught.value)
        return
    found = inspect(path, digests=True)
    assert found.signature == ("invalid" if expected == "invalid" else "by the signer that it names")
    damaged = facts.get("digests") is not None
    assert bool(found.damaged_sections) == damaged


def test_the_collection_is_complete() -> None:
    """At least sixty, every check of the specification that a file alone can fail, and no file without an entry."""
    assert len(INDEX) >= 60
    names = [each["name"] for each in INDEX]
    assert len(set(names)) == len(names)
    used = {piece["file"] for each in INDEX for piece in each.get("pieces", []) if "file" in piece}
    used |= {each["file"] for each in INDEX if "file" in each}
    assert used == {path.name for path in FOLDER.glob("*.motte")}
    met = {each[key] for each in INDEX for key in ("check", "digests", "inspect") if key in each}
    # B-18, B-20 and B-22 need a key or a file that changes after it was opened: test_seal_reader.py.
    assert set(CHECKS) - met == {"B-18", "B-20", "B-22"}


def test_the_collection_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_500_000
