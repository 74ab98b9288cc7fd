"""Keys, recipients, inspect and unseal, from the command line."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from motte.seal.keys import RecipientPublicKey, SignerPublicKey


@pytest.fixture
def copy(place: Any, tmp_path: Path) -> Path:
    target = tmp_path / "copy.motte"
    shutil.copy(place.bundle, target)
    return target


def test_a_key_is_made_shown_and_rotated(motte: Any, tmp_path: Path) -> None:
    made = motte("keys", "new", "me", "--folder", tmp_path)
    assert made.code == 0
    assert made.err == ""
    word = made.out.splitlines()[-1]
    assert RecipientPublicKey.parse(word)
    assert stat.S_IMODE((tmp_path / "me.key").stat().st_mode) == 0o600
    secret = (tmp_path / "me.key").read_text().splitlines()[-1].removeprefix("secret: ")
    assert len(secret) == 64
    assert secret not in made.out

    assert motte("keys", "show", "me", "--folder", tmp_path).out == word + "\n"
    rotated = motte("keys", "rotate", "me", "--folder", tmp_path, "--json").json
    assert rotated["old"] == word
    assert rotated["new"] != word
    assert Path(rotated["old_kept_as"]).is_file()
    assert rotated["next_steps"]
    listed = motte("keys", "show", "--folder", tmp_path, "--json")
    assert secret not in listed.out
    assert {each["name"]: each["public"] for each in listed.json["keys"]} == {"me": rotated["new"], "me.1": word}
    table = motte("keys", "show", "--folder", tmp_path).out
    assert all(each["id"] in table for each in listed.json["keys"])


def test_a_signer_is_another_kind(motte: Any, tmp_path: Path) -> None:
    made = motte("keys", "new", "boss", "--kind", "signer", "--folder", tmp_path, "--json").json
    assert made["kind"] == "signer"
    assert str(SignerPublicKey.parse(made["public"])) == made["public"]
    assert motte("keys", "rotate", "boss", "--folder", tmp_path, "--json").json["kind"] == "signer"


def test_a_key_is_never_overwritten(motte: Any, tmp_path: Path) -> None:
    assert motte("keys", "new", "me", "--folder", tmp_path).code == 0
    before = (tmp_path / "me.key").read_bytes()
    again = motte("keys", "new", "me", "--folder", tmp_path)
    assert again.code == 2
    assert again.err.startswith("error: ")
    assert (tmp_path / "me.key").read_bytes() == before


@pytest.mark.parametrize("name", ["../me", "", "a/b", "-x"])
def test_a_name_that_is_a_path_is_refused(motte: Any, tmp_path: Path, name: str) -> None:
    assert motte("keys", "new", "--folder", tmp_path, "--", name).code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_no_error(motte: Any, tmp_path: Path) -> None:
    shown = motte("keys", "show", "--folder", tmp_path)
    assert (shown.code, shown.out) == (0, "")
    assert "no keys" in shown.err
    assert motte("keys", "show", "--folder", tmp_path, "--quiet").err == ""
    assert motte("keys", "show", "nobody", "--folder", tmp_path).code == 2


def test_recipients_come_and_go(motte: Any, place: Any, copy: Path, tmp_path: Path) -> None:
    other = motte("keys", "new", "other", "--folder", tmp_path, "--json").json
    keys = ("--key", place.folder / "client.key", "--signer-key", place.folder / "owner.key")
    added = motte("recipients", "add", copy, other["public"], *keys)
    assert added.code == 0
    assert other["public"] in added.out
    assert "--min-release 2" in added.out
    seen = motte("inspect", copy, "--json").json
    assert seen["release"] == 2
    assert other["public"] in [each["key"] for each in seen["recipients"]]

    assert motte("recipients", "add", copy, other["public"], *keys).code == 2
    removed = motte("recipients", "remove", copy, tmp_path / "other.pub", *keys, "--release", "7", "--json")
    assert removed.code == 0
    assert removed.json["release"] == 7
    assert other["public"] not in [each["key"] for each in removed.json["recipients"]]
    assert "warning: " in removed.err
    assert motte("recipients", "remove", copy, place.folder / "client.pub", *keys).code == 2, "nobody would be left"
    assert motte("recipients", "add", copy, other["public"], *keys, "--release", "7").code == 2


def test_inspect_shows_what_is_known(motte: Any, place: Any) -> None:
    shown = motte("inspect", place.bundle, "--signer", place.folder / "owner.pub", "--verify-digests")
    assert shown.code == 0
    assert "valid, by the demanded signer" in shown.out
    assert "all ciphertext is as the header says" in shown.out
    assert (place.folder / "client.pub").read_text().strip() in shown.out
    document = motte("inspect", place.bundle, "--json").json
    assert document["parts"] == 3
    assert document["signature"] == "by the signer that it names"
    assert document["damaged_sections"] is None
    assert [each["kind"] for each in document["sections"]] == ["manifest", "part", "part", "part"]


def test_inspect_fails_for_another_signer(motte: Any, place: Any, tmp_path: Path) -> None:
    other = motte("keys", "new", "other", "--kind", "signer", "--folder", tmp_path, "--json").json["public"]
    shown = motte("inspect", place.bundle, "--signer", other)
    assert shown.code == 1
    assert "NOT BY THE DEMANDED SIGNER" in shown.out


def test_inspect_finds_damage(motte: Any, copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert motte("inspect", copy).code == 0, "nobody asked for the digests"
    shown = motte("inspect", copy, "--verify-digests")
    assert shown.code == 1
    assert "DAMAGED: section 3" in shown.out
    assert motte("inspect", copy, "--verify-digests", "--json").json["damaged_sections"] == [3]


def test_inspect_refuses_what_is_no_bundle(motte: Any, tmp_path: Path, copy: Path) -> None:
    wrong = tmp_path / "wrong.motte"
    wrong.write_bytes(b"\x1b]0;title\x07" * 100)
    found = motte("inspect", wrong, "--json")
    assert found.code == 1
    assert found.json["error"]["check"] == "B-2"
    assert "error: not a motte bundle [check B-2]" in found.err
    assert "\x1b" not in found.err
    copy.write_bytes(copy.read_bytes()[:-1])
    assert motte("inspect", copy, "--json").json["error"]["check"] == "B-14"
    assert motte("inspect", tmp_path / "nowhere.motte").code == 2


def test_unseal_asks_for_its_dangerous_word(motte: Any, place: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    refused = motte("unseal", place.bundle, "-o", folder, *place.run_keys)
    assert refused.code == 2
    assert "hint: say --insecure-plaintext" in refused.err
    assert not folder.exists()
    done = motte("unseal", place.bundle, "-o", folder, *place.run_keys, "--insecure-plaintext")
    assert done.code == 0
    assert "in the clear" in done.err
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.bin", "part-0001.bin", "part-0002.bin", "part-0003.bin"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert motte("unseal", place.bundle, "-o", folder, *place.run_keys, "--insecure-plaintext").code == 2


def test_unseal_needs_the_key(motte: Any, place: Any, tmp_path: Path) -> None:
    motte("keys", "new", "thief", "--folder", tmp_path)
    keys = ("--key", tmp_path / "thief.key", "--signer", place.folder / "owner.pub")
    refused = motte("unseal", place.bundle, "-o", tmp_path / "plain", *keys, "--insecure-plaintext", "--json")
    assert refused.code == 1
    assert refused.json["error"]["kind"] == "KeyAccessError"
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--signer", "motte-signer-1-00"),
        ("--signer", "CLIENT.pub"),
        ("--signer", "nowhere.pub"),
        ("--key", "OWNER.key"),
        ("--key", "nowhere.key"),
        ("--key", "CLIENT.pub"),
    ],
)
def test_a_wrong_key_is_wrong_use(motte: Any, place: Any, tmp_path: Path, option: str, value: str) -> None:
    value = value.replace("CLIENT", str(place.folder / "client")).replace("OWNER", str(place.folder / "owner"))
    keys = dict(zip(place.run_keys[::2], place.run_keys[1::2], strict=True)) | {option: value}
    words = [word for pair in keys.items() for word in pair]
    refused = motte("unseal", place.bundle, "-o", tmp_path / "plain", *words, "--insecure-plaintext")
    assert refused.code == 2
    assert refused.err.startswith("error: ")
    secret = (place.folder / "owner.key").read_text().splitlines()[-1].removeprefix("secret: ")
    assert secret not in refused.err


def test_a_key_that_others_can_read_is_refused(motte: Any, place: Any, tmp_path: Path) -> None:
    loose = tmp_path / "loose.key"
    shutil.copy(place.folder / "client.key", loose)
    loose.chmod(0o644)
    keys = ("--key", loose, "--signer", place.folder / "owner.pub")
    refused = motte("unseal", place.bundle, "-o", tmp_path / "plain", *keys, "--insecure-plaintext")
    assert refused.code == 2
    assert f"hint: chmod 600 {loose}" in refused.err
