"""Sealing: arguments, atomicity, threads, and an independent reader that knows only docs/spec/bundle.md."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motte.errors import InputError, MotteError, ResourceError, SettingError
from motte.limits import CHUNK_BYTES
from motte.seal import BytesPart, RecipientPrivateKey, SealReport, SignerPrivateKey, open_bundle, write_bundle

ALICE, OWNER = RecipientPrivateKey.new(), SignerPrivateKey.new()


def seal(path: Path, parts: list[Any], **options: Any) -> SealReport:
    arguments = {"release": 1, "manifest": b"graph", "recipients": [ALICE.public], "signer": OWNER, **options}
    sources = [BytesPart(each) if isinstance(each, bytes) else each for each in parts]
    return write_bundle(path, parts=sources, **arguments)


def slow_read(data: bytes, recipient: bytes, signer: bytes) -> list[bytes]:
    """The specification written out with nothing of motte.seal: the plaintext of every section."""
    assert data[:8] == b"\x89MOTTE\r\n"
    length = int.from_bytes(data[8:12], "big")
    encoded, signature, at = data[12 : 12 + length], data[12 + length : 76 + length], 76 + length
    Ed25519PublicKey.from_public_bytes(signer).verify(signature, b"motte-bundle-1 header\x00" + data[: 12 + length])
    header = json.loads(encoded)
    bundle_id, release = bytes.fromhex(header["bundle_id"]), header["release"].to_bytes(8, "big")
    private = X25519PrivateKey.from_private_bytes(recipient)
    entry = next(e for e in header["recipients"] if bytes.fromhex(e["key"]) == private.public_key().public_bytes_raw())
    info = b"motte-hpke-1\x00motte-bundle-1 key-encryption key\x00" + bundle_id + release
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    kek = AESGCM(suite.decrypt(bytes.fromhex(entry["sealed_kek"]), private, info))
    sections = []
    for number, section in enumerate(header["sections"]):
        wrapped, place = bytes.fromhex(section["wrapped_key"]), number.to_bytes(4, "big")
        data_key = AESGCM(
            kek.decrypt(wrapped[:12], wrapped[12:], b"motte-bundle-1 data key\x00" + bundle_id + release + place)
        )
        ciphertext = data[at : at + section["ciphertext_bytes"]]
        at += len(ciphertext)
        chunks = [ciphertext[i : i + (1 << 20) + 16] for i in range(0, len(ciphertext), (1 << 20) + 16)]
        digests = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
        assert hashlib.sha256(b"motte-bundle-1 section digest\x00" + digests).hexdigest() == section["digest"]
        plaintext = b""
        for index, chunk in enumerate(chunks):
            nonce = index.to_bytes(11, "big") + (b"\x01" if index == len(chunks) - 1 else b"\x00")
            plaintext += data_key.decrypt(nonce, chunk, b"motte-bundle-1 chunk\x00" + bundle_id + place + nonce)
        assert len(plaintext) == section["plaintext_bytes"]
        sections.append(plaintext)
    assert at == len(data)
    return sections


SIZES = st.one_of(
    st.integers(0, 2000), st.sampled_from([CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3_000_000])
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(SIZES, min_size=1, max_size=3), threads=st.integers(1, 4), seed=st.integers(0, 255))
def test_an_independent_reader_reads_it(tmp_path: Path, sizes: list[int], threads: int, seed: int) -> None:
    parts = [hashlib.shake_256(bytes([seed, i])).digest(size) for i, size in enumerate(sizes)]
    seal(tmp_path / "x.motte", parts, threads=threads, overwrite=True)
    found = slow_read((tmp_path / "x.motte").read_bytes(), ALICE.secret, OWNER.public.raw)
    assert found == [b"graph", *parts]


def test_nothing_repeats_between_two_bundles(tmp_path: Path) -> None:
    parts = [bytes(1000), bytes(1000)]
    seal(tmp_path / "a", parts)
    seal(tmp_path / "b", parts)
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    assert len(a) == len(b)
    pieces = {data[at : at + 16] for data in (a, b) for at in range(len(data) - 2060, len(data), 16)}
    assert len(pieces) == 2 * len(range(len(a) - 2060, len(a), 16)), "equal plaintext shows in the ciphertext"


def test_plaintext_is_nowhere_in_the_file(tmp_path: Path) -> None:
    canary = os.urandom(64)
    seal(tmp_path / "x.motte", [canary * 100], manifest=canary)
    data = (tmp_path / "x.motte").read_bytes()
    for form in (canary[:16], hashlib.sha256(canary * 100).digest(), hashlib.sha256(canary).digest()):
        assert form not in data
        assert form.hex().encode() not in data


def test_the_report(tmp_path: Path) -> None:
    done: list[int] = []
    report = seal(tmp_path / "x.motte", [b"abc", b"", bytes(CHUNK_BYTES + 1)], progress=done.append, threads=2)
    assert report.file_bytes == os.path.getsize(tmp_path / "x.motte")
    assert [each.plaintext_bytes for each in report.sections] == [5, 3, 0, CHUNK_BYTES + 1]
    assert [each.ciphertext_bytes for each in report.sections] == [21, 19, 16, CHUNK_BYTES + 33]
    assert report.plaintext_bytes == sum(done) == CHUNK_BYTES + 9
    assert 0 < sum(each.seconds for each in report.sections) <= report.seconds
    assert report.bytes_per_second > 0
    with open_bundle(tmp_path / "x.motte", signer=OWNER.public) as bundle:
        assert (bundle.header.bundle_id.hex(), bundle.header.release) == (report.bundle_id, report.release)


def test_order_and_repetitions_of_recipients_do_not_matter(tmp_path: Path) -> None:
    people = [RecipientPrivateKey.new() for _ in range(5)]
    publics = [each.public for each in people]
    seal(tmp_path / "x.motte", [b"p"], recipients=[*publics, *publics[::-1]], public_weights=["b", "a", "b"])
    for each in people:
        with open_bundle(tmp_path / "x.motte", signer=OWNER.public) as bundle:
            assert bundle.unlock(bundle.unwrap(each)).manifest() == b"graph"
            assert bundle.header.public_weights == ("a", "b")
            assert len(bundle.header.recipients) == 5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"release": -1}, SettingError),
        ({"release": True}, SettingError),
        ({"release": 1 << 53}, SettingError),
        ({"threads": 0}, SettingError),
        ({"recipients": []}, InputError),
        ({"parts": []}, InputError),
        ({"public_weights": ["a" * 513]}, MotteError),
        ({"public_weights": ["\ud800"]}, MotteError),
        ({"public_weights": [f"{i:06d}" * 80 for i in range(9000)]}, InputError),
    ],
)
def test_arguments_out_of_bounds(tmp_path: Path, change: dict[str, Any], error: type[MotteError]) -> None:
    with pytest.raises(error):
        seal(tmp_path / "x.motte", **{"parts": [b"p"], **change})
    assert not list(tmp_path.iterdir())


def test_a_part_beyond_its_bound(tmp_path: Path) -> None:
    class Endless:
        bytes = 64 * (1 << 30) + 1

        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise AssertionError("read although it is too large")

    with pytest.raises(InputError, match="part 1 is too large"):
        seal(tmp_path / "x.motte", [Endless()])


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "x.motte"
    seal(path, [b"old"])
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        seal(path, [b"new"])
    assert path.read_bytes() == before
    seal(path, [b"new"], overwrite=True)
    assert slow_read(path.read_bytes(), ALICE.secret, OWNER.public.raw)[1] == b"new"
    (tmp_path / "link.motte").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists"):
        seal(tmp_path / "link.motte", [b"new"])


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.motte"

    class Racing:
        bytes = 3

        def read_into(self, offset: int, buffer: memoryview) -> None:
            path.write_bytes(b"theirs")
            buffer[:] = b"abc"

    with pytest.raises(InputError, match="exists"):
        seal(path, [Racing()])
    assert path.read_bytes() == b"theirs"
    assert [each.name for each in tmp_path.iterdir()] == ["x.motte"]


def test_inputs_are_not_replaced(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"precious")
    os.link(weights, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(weights)
    for path in (weights, tmp_path / "hard", tmp_path / "soft", tmp_path / "." / "weights.safetensors"):
        with pytest.raises(InputError, match="made from"):
            seal(path, [b"p"], inputs=[tmp_path / "other", weights], overwrite=True)
    assert weights.read_bytes() == b"precious"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError, MemoryError, SystemExit])
def test_nothing_is_left_after_a_failure(tmp_path: Path, problem: type[BaseException], threads: int) -> None:
    class Failing:
        bytes = 3 * CHUNK_BYTES

        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == CHUNK_BYTES:
                raise problem
            buffer[:] = bytes(len(buffer))

    (tmp_path / "old.motte").write_bytes(b"old")
    with pytest.raises(problem):
        seal(tmp_path / "new.motte", [b"first", Failing()], threads=threads)
    with pytest.raises(problem):
        seal(tmp_path / "old.motte", [b"first", Failing()], threads=threads, overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["old.motte"]
    assert (tmp_path / "old.motte").read_bytes() == b"old"
    assert not [each for each in threading.enumerate() if each.name == "motte-chunks"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MotteError):
        seal(tmp_path / "no" / "x.motte", [b"p"])


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        seal(tmp_path / "x.motte", [b"p"])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.motte").stat().st_mode) == 0o640


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(ResourceError, match="no room"):
            seal(tmp_path / "x.motte", [bytes(200_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())
