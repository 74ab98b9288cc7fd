"""Recipients added and removed; inspection; unsealing."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from motte.errors import InputError, KeyAccessError, RollbackError, SettingError, SignatureError
from motte.limits import CHUNK_BYTES
from motte.seal import (
    RecipientPrivateKey,
    SignerPrivateKey,
    add_recipients,
    inspect,
    open_bundle,
    remove_recipients,
)
from motte.seal.unseal import unseal


def ciphertext(path: Path, signer: SignerPrivateKey) -> bytes:
    with open_bundle(path, signer=signer.public) as bundle:
        size = sum(each.ciphertext_bytes for each in bundle.header.sections)
    return path.read_bytes()[-size:]


def test_adding_keeps_the_ciphertext_and_raises_the_release(sealed: Any) -> None:
    bob, carol = RecipientPrivateKey.new(), RecipientPrivateKey.new()
    before = ciphertext(sealed.path, sealed.signer)
    sealed.path.chmod(0o640)
    report = add_recipients(sealed.path, [bob.public, carol.public], opener=sealed.alice, signer=sealed.signer)
    assert (report.old_release, report.release) == (5, 6)
    assert set(report.recipients) == {sealed.alice.public, bob.public, carol.public}
    assert ciphertext(sealed.path, sealed.signer) == before
    assert stat.S_IMODE(sealed.path.stat().st_mode) == 0o640
    for each in (sealed.alice, bob, carol):
        assert sealed.read_all(each, min_release=6) == sealed.parts
    assert inspect(sealed.path, digests=True).damaged_sections == ()


def test_removing_takes_a_fresh_key(sealed: Any, tmp_path: Path) -> None:
    bob = RecipientPrivateKey.new()
    add_recipients(sealed.path, [bob.public], opener=sealed.alice, signer=sealed.signer)
    (tmp_path / "kept.motte").write_bytes(sealed.path.read_bytes())
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle:
        known_to_bob = bundle.unwrap(bob)
    report = remove_recipients(sealed.path, [bob.public], opener=sealed.alice, signer=sealed.signer)
    assert report.release == 7
    assert sealed.read_all(min_release=7) == sealed.parts
    with pytest.raises(KeyAccessError):
        sealed.read_all(bob)
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle:
        assert bundle.unwrap(sealed.alice).secret != known_to_bob.secret
        with pytest.raises(KeyAccessError):
            bundle.unlock(known_to_bob)
    # What the documentation says that removal cannot do: a kept copy still opens, unless a release is demanded.
    with open_bundle(tmp_path / "kept.motte", signer=sealed.signer.public) as bundle:
        assert bundle.unlock(bundle.unwrap(bob)).manifest() == sealed.manifest
    with pytest.raises(RollbackError):
        open_bundle(tmp_path / "kept.motte", signer=sealed.signer.public, min_release=7)


def test_changes_that_are_refused(sealed: Any) -> None:
    bob, before = RecipientPrivateKey.new(), sealed.path.read_bytes()
    keys = {"opener": sealed.alice, "signer": sealed.signer}
    with pytest.raises(InputError, match="already"):
        add_recipients(sealed.path, [sealed.alice.public], **keys)
    with pytest.raises(InputError, match="not a recipient"):
        remove_recipients(sealed.path, [bob.public], **keys)
    with pytest.raises(InputError, match="number of recipients"):
        remove_recipients(sealed.path, [sealed.alice.public], **keys)
    for release in (5, 4):
        with pytest.raises(SettingError, match="must rise"):
            add_recipients(sealed.path, [bob.public], release=release, **keys)
    with pytest.raises(SettingError):
        add_recipients(sealed.path, [bob.public], release=1 << 53, **keys)
    with pytest.raises(KeyAccessError):
        add_recipients(sealed.path, [bob.public], opener=bob, signer=sealed.signer)
    with pytest.raises(SignatureError):
        add_recipients(sealed.path, [bob.public], opener=sealed.alice, signer=SignerPrivateKey.new())
    assert sealed.path.read_bytes() == before


def test_damage_is_not_signed_again(sealed: Any) -> None:
    data = bytearray(sealed.path.read_bytes())
    data[-100] ^= 1
    sealed.path.write_bytes(data)
    with pytest.raises(SignatureError) as caught:
        add_recipients(
            sealed.path, [RecipientPrivateKey.new().public], opener=sealed.alice, signer=sealed.signer, release=9
        )
    assert caught.value.check == "B-23"
    assert sealed.path.read_bytes() == data


def test_an_interrupt_leaves_the_old_bundle(sealed: Any) -> None:
    before = sealed.path.read_bytes()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_recipients(
            sealed.path,
            [RecipientPrivateKey.new().public],
            opener=sealed.alice,
            signer=sealed.signer,
            progress=interrupt,
        )
    assert sealed.path.read_bytes() == before


# --- inspection ---------------------------------------------------------------------------------------------------


def test_inspection_says_whose_signature(sealed: Any) -> None:
    found = inspect(sealed.path)
    assert found.signature == "by the signer that it names"
    assert found.damaged_sections is None
    assert found.header.release == 5
    assert found.plaintext_bytes == len(sealed.manifest) + sum(map(len, sealed.parts))
    assert found.file_bytes == sealed.path.stat().st_size
    assert inspect(sealed.path, signer=sealed.signer.public).signature == "by the demanded signer"
    assert inspect(sealed.path, signer=SignerPrivateKey.new().public).signature == "by another signer"


def test_inspection_names_damaged_sections(sealed: Any) -> None:
    data = bytearray(sealed.path.read_bytes())
    data[-1] ^= 1
    data[-(CHUNK_BYTES + 17)] ^= 1
    sealed.path.write_bytes(data)
    done: list[int] = []
    assert inspect(sealed.path, digests=True, progress=done.append).damaged_sections == (3, 4)
    assert sum(done) == sum(each.ciphertext_bytes for each in inspect(sealed.path).header.sections)


def test_inspection_as_plain_values(sealed: Any) -> None:
    shown = inspect(sealed.path, digests=True).to_json()
    assert shown["recipients"] == [{"key": str(sealed.alice.public), "id": sealed.alice.public.key_id}]
    assert shown["public_weights"] == ["a", "b"]
    assert [each["kind"] for each in shown["sections"]] == ["manifest", "part", "part", "part", "part"]
    assert shown["damaged_sections"] == []
    assert "wrapped" not in str(shown)


# --- unsealing ----------------------------------------------------------------------------------------------------


def test_unsealing_must_be_asked_for_by_name(sealed: Any, tmp_path: Path) -> None:
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle:
        unlocked = bundle.unlock(bundle.unwrap(sealed.alice))
        for answer in (False, None, 1, "yes"):
            with pytest.raises(SettingError, match="in the clear"):
                unseal(unlocked, tmp_path / "plain", insecure_plaintext=answer)
        assert not (tmp_path / "plain").exists()
        files = unseal(unlocked, tmp_path / "plain", insecure_plaintext=True, threads=2)
        assert [each.read_bytes() for each in files] == [sealed.manifest, *sealed.parts]
        assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o700
        assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o600}
        with pytest.raises(InputError, match="exists"):
            unseal(unlocked, tmp_path / "plain", insecure_plaintext=True)


def test_unsealing_is_all_or_nothing(sealed: Any, tmp_path: Path) -> None:
    data = bytearray(sealed.path.read_bytes())
    data[-1] ^= 1
    sealed.path.write_bytes(data)
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle:
        unlocked = bundle.unlock(bundle.unwrap(sealed.alice))
        with pytest.raises(SignatureError):
            unseal(unlocked, tmp_path / "plain", insecure_plaintext=True)

        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        data[-1] ^= 1
        sealed.path.write_bytes(data)
        with pytest.raises(KeyboardInterrupt):
            unseal(unlocked, tmp_path / "plain", insecure_plaintext=True, progress=interrupt)
    assert os.listdir(tmp_path) == ["model.motte"]
