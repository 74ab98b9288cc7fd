"""Opening: descriptors, destinations, threads, and a host that changes the file under the reader's eyes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from motte.errors import (
    BundleError,
    DecryptError,
    InputError,
    KeyAccessError,
    MotteError,
    RollbackError,
    SettingError,
    SignatureError,
)
from motte.limits import CHUNK_BYTES
from motte.seal import BytesPart, KeyEncryptionKey, RecipientPrivateKey, SignerPrivateKey, open_bundle, write_bundle
from motte.seal.reader import UnlockedBundle


def read_part(unlocked: UnlockedBundle, index: int, threads: int = 1) -> bytes:
    into = bytearray(unlocked.part_bytes(index))
    unlocked.open_part(index, memoryview(into), threads=threads)
    return bytes(into)


def unlocked(sealed: Any) -> UnlockedBundle:
    bundle = open_bundle(sealed.path, signer=sealed.signer.public)
    return bundle.unlock(bundle.unwrap(sealed.alice))


def section_start(sealed: Any, section: int) -> int:
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle:
        return os.path.getsize(sealed.path) - sum(each.ciphertext_bytes for each in bundle.header.sections[section:])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """As the host would: the same file, other bytes."""
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.close(fd)


def test_everything_comes_back(sealed: Any) -> None:
    assert sealed.read_all() == sealed.parts


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_part_alone_on_threads(sealed: Any, threads: int) -> None:
    with unlocked(sealed) as bundle:
        assert read_part(bundle, 2, threads) == sealed.parts[2]
        assert read_part(bundle, 3, threads) == sealed.parts[3]
        bundle.signed.close()


def test_parts_are_opened_by_several_threads_at_once(sealed: Any) -> None:
    with unlocked(sealed) as bundle:
        found: dict[int, bytes] = {}
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, read_part(bundle, i % 4, 2)))  # type: ignore[misc]
            for i in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {i: sealed.parts[i % 4] for i in range(12)}
        bundle.signed.close()


def test_the_destination_may_be_part_of_a_larger_buffer(sealed: Any) -> None:
    arena = bytearray(b"\xee" * (2 * len(sealed.parts[2])))
    with unlocked(sealed) as bundle:
        bundle.open_part(2, memoryview(arena)[100 : 100 + bundle.part_bytes(2)])
        bundle.signed.close()
    size = len(sealed.parts[2])
    assert arena == b"\xee" * 100 + sealed.parts[2] + b"\xee" * (size - 100)


def test_the_destination_may_have_another_shape(sealed: Any) -> None:
    into = memoryview(bytearray(CHUNK_BYTES)).cast("d")
    with unlocked(sealed) as bundle:
        bundle.open_part(3, into)
        bundle.signed.close()
    assert into.tobytes() == sealed.parts[3]


@pytest.mark.parametrize(
    "into",
    [
        memoryview(bytes(300)),
        memoryview(bytearray(299)),
        memoryview(bytearray(301)),
        memoryview(bytearray(600))[::2],
        memoryview(bytearray(0)),
    ],
)
def test_other_destinations_are_refused(sealed: Any, into: memoryview) -> None:
    with unlocked(sealed) as bundle:
        with pytest.raises(InputError, match="not a destination"):
            bundle.open_part(0, into)
        bundle.signed.close()


@pytest.mark.parametrize("index", [-1, 4, True, 1.0, None])
def test_parts_that_are_none(sealed: Any, index: int) -> None:
    with unlocked(sealed) as bundle:
        with pytest.raises(InputError, match="no such part"):
            bundle.part_bytes(index)
        bundle.signed.close()


@pytest.mark.parametrize("threads", [0, -1, 257, True, 1.5])
def test_threads_that_are_none(sealed: Any, threads: int) -> None:
    with unlocked(sealed) as bundle:
        with pytest.raises(SettingError):
            bundle.open_part(0, memoryview(bytearray(300)), threads=threads)
        bundle.signed.close()


def test_a_descriptor_stays_open(sealed: Any) -> None:
    fd = os.open(sealed.path, os.O_RDONLY)
    os.lseek(fd, 33, os.SEEK_SET)
    with open_bundle(fd, signer=sealed.signer.public) as bundle:
        assert read_part(bundle.unlock(bundle.unwrap(sealed.alice)), 0) == sealed.parts[0]
    with pytest.raises(SignatureError):
        open_bundle(fd, signer=SignerPrivateKey.new().public)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 33
    os.close(fd)
    with pytest.raises(InputError):
        open_bundle(fd, signer=sealed.signer.public)


def test_descriptors_are_not_leaked(sealed: Any) -> None:
    before = os.listdir("/proc/self/fd")
    sealed.read_all()
    with pytest.raises(SignatureError):
        open_bundle(sealed.path, signer=SignerPrivateKey.new().public)
    with pytest.raises(RollbackError):
        open_bundle(sealed.path, signer=sealed.signer.public, min_release=6)
    assert os.listdir("/proc/self/fd") == before


def test_what_is_no_file(tmp_path: Path) -> None:
    signer = SignerPrivateKey.new().public
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(BundleError) as caught:
            open_bundle(path, signer=signer)
        assert caught.value.check == "B-1"
    with pytest.raises(InputError):
        open_bundle(tmp_path / "missing", signer=signer)


@pytest.mark.parametrize("release", [-1, 1 << 53, True, 1.0])
def test_minimum_releases_that_are_none(sealed: Any, release: int) -> None:
    with pytest.raises(SettingError):
        open_bundle(sealed.path, signer=sealed.signer.public, min_release=release)


def test_the_key_of_another_bundle(sealed: Any) -> None:
    """B-18: also if somebody relabels it, when B-19 stops it."""
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle:
        kek = bundle.unwrap(sealed.alice)
        assert KeyEncryptionKey.from_bytes(kek.to_bytes()) == kek
        assert kek.secret.hex() not in repr(kek)
        for other in (
            KeyEncryptionKey(bytes(16), kek.release, kek.secret),
            KeyEncryptionKey(kek.bundle_id, kek.release + 1, kek.secret),
        ):
            with pytest.raises(KeyAccessError) as caught:
                bundle.unlock(other)
            assert caught.value.check == "B-18"
        with pytest.raises(DecryptError) as refused:
            bundle.unlock(KeyEncryptionKey(kek.bundle_id, kek.release, bytes(32)))
        assert refused.value.check == "B-19"
    with pytest.raises(InputError):
        KeyEncryptionKey.from_bytes(bytes(55))


def test_the_wrong_recipient_is_named(sealed: Any) -> None:
    mallory = RecipientPrivateKey.new()
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle, pytest.raises(KeyAccessError) as caught:
        bundle.unwrap(mallory)
    assert mallory.public.key_id in str(caught.value)
    assert sealed.alice.public.key_id in str(caught.value)


# --- a host that changes the file ---------------------------------------------------------------------------------


def test_a_header_changed_after_opening_changes_nothing(sealed: Any) -> None:
    with unlocked(sealed) as bundle:
        overwrite(sealed.path, 0, bytes(500))
        assert read_part(bundle, 0) == sealed.parts[0]
        bundle.signed.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0, 10])
def test_a_file_cut_off_after_opening(sealed: Any, threads: int, size: int) -> None:
    start = section_start(sealed, 3)
    into = bytearray(b"\xee" * len(sealed.parts[2]))
    with unlocked(sealed) as bundle:
        os.truncate(sealed.path, start + (CHUNK_BYTES + 16) + size)
        with pytest.raises(BundleError, match=r"part 3, chunk 1 of 3") as caught:
            bundle.open_part(2, memoryview(into), threads=threads)
        assert caught.value.check == "B-20"
        assert not any(into)
        with pytest.raises(BundleError):
            bundle.signed.verify_digests()
        bundle.signed.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_late_bad_chunk_leaves_nothing_of_the_earlier_ones(sealed: Any, threads: int) -> None:
    overwrite(sealed.path, section_start(sealed, 3) + 2 * (CHUNK_BYTES + 16), b"?")
    into = bytearray(b"\xee" * len(sealed.parts[2]))
    with unlocked(sealed) as bundle:
        with pytest.raises(DecryptError, match=r"part 3, chunk 2 of 3") as caught:
            bundle.open_part(2, memoryview(into), threads=threads)
        assert caught.value.check == "B-21"
        assert not any(into)
        assert read_part(bundle, 3) == sealed.parts[3], "another part still opens"
        bundle.signed.close()


def test_a_forged_chunk_put_in_after_the_digests_were_verified(sealed: Any) -> None:
    """B-22: an insider forges with the true data key, and the host waits until the digests were looked at."""
    bundle = unlocked(sealed)
    forged = bytearray(316)
    bundle._ciphers[1].seal(0, True, memoryview(b"\x66" * 300), memoryview(forged))
    start = section_start(sealed, 1)
    true = sealed.path.read_bytes()[start : start + 316]

    overwrite(sealed.path, start, forged)
    assert read_part(bundle, 0) == b"\x66" * 300, (
        "without the digests an insider's chunk opens: the specification says so"
    )

    overwrite(sealed.path, start, true)
    bundle.signed.verify_digests()
    assert read_part(bundle, 0) == sealed.parts[0]
    overwrite(sealed.path, start, forged)
    into = bytearray(b"\xee" * 300)
    with pytest.raises(SignatureError) as caught:
        bundle.open_part(0, memoryview(into))
    assert caught.value.check == "B-22"
    assert not any(into)
    with pytest.raises(SignatureError) as caught:
        bundle.signed.verify_digests(threads=2)
    assert caught.value.check == "B-23"
    assert caught.value.where == "part 1"
    bundle.signed.close()


def test_a_forged_manifest_is_refused_without_asking(sealed: Any) -> None:
    """B-23 on section 0: an insider forges it with the true data key."""
    with unlocked(sealed) as first:
        true = first.manifest()
        first.signed.close()
    bundle = unlocked(sealed)
    forged = bytearray(len(true) + 16)
    bundle._ciphers[0].seal(0, True, memoryview(b"\x66" * len(true)), memoryview(forged))
    start = section_start(sealed, 0)
    kept = sealed.path.read_bytes()[start : start + len(forged)]
    # Once it was read, the digests of its chunks are known, and a chunk put in later is found by them.
    for check in ("B-23", "B-22"):
        overwrite(sealed.path, start, forged)
        with pytest.raises(SignatureError) as caught:
            bundle.manifest()
        assert caught.value.check == check
        overwrite(sealed.path, start, kept)
        assert bundle.manifest() == true
    bundle.signed.close()


def test_what_is_closed_stays_closed(sealed: Any) -> None:
    bundle = unlocked(sealed)
    bundle.close()
    with pytest.raises(InputError, match="closed"):
        bundle.manifest()
    bundle = unlocked(sealed)
    bundle.signed.close()
    bundle.signed.close()
    with pytest.raises(InputError, match="closed"):
        bundle.manifest()


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_adds_up(sealed: Any, threads: int) -> None:
    done: list[int] = []
    with unlocked(sealed) as bundle:
        bundle.open_part(2, memoryview(bytearray(len(sealed.parts[2]))), threads=threads, progress=done.append)
        assert sum(done) == len(sealed.parts[2])
        assert len(done) == 3
        done.clear()
        bundle.signed.verify_digests(done.append, threads=threads)
        assert sum(done) == sum(each.ciphertext_bytes for each in bundle.signed.header.sections)
        bundle.signed.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_leaves_zeros(sealed: Any, threads: int) -> None:
    into = bytearray(b"\xee" * len(sealed.parts[2]))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with unlocked(sealed) as bundle:
        with pytest.raises(KeyboardInterrupt):
            bundle.open_part(2, memoryview(into), threads=threads, progress=interrupt)
        bundle.signed.close()
    assert not any(into)
    assert not [each for each in threading.enumerate() if each.name == "motte-chunks"]


def test_a_signed_header_of_the_largest_size(tmp_path: Path) -> None:
    """4,096 parts: as many as there may be."""
    signer, alice = SignerPrivateKey.new(), RecipientPrivateKey.new()
    path = tmp_path / "many.motte"
    write_bundle(
        path, release=0, manifest=b"", parts=[BytesPart(b"x")] * 4096, recipients=[alice.public], signer=signer
    )
    with open_bundle(path, signer=signer.public) as bundle:
        assert bundle.header.parts == 4096
        assert read_part(bundle.unlock(bundle.unwrap(alice)), 4095) == b"x"
    with pytest.raises(MotteError):
        write_bundle(
            tmp_path / "more",
            release=0,
            manifest=b"",
            parts=[BytesPart(b"x")] * 4097,
            recipients=[alice.public],
            signer=signer,
        )
