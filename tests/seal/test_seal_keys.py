"""keys: strict text, private files, rotation that loses nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.errors import FormatError, InputError, MotteError
from motte.seal import keys
from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey, SignerPublicKey

KINDS = [(RecipientPrivateKey, RecipientPublicKey), (SignerPrivateKey, SignerPublicKey)]


@pytest.mark.parametrize(("private", "public"), KINDS)
def test_public_text_round_trips(private: type, public: type) -> None:
    key = private.new().public
    text = str(key)
    assert public.parse(text) == key
    assert text.startswith(f"motte-{key.kind}-1-")
    assert text.count("-") == 3
    assert len(key.key_id) == 16


@given(place=st.integers(0, 71), digit=st.sampled_from("0123456789abcdef"))
def test_one_wrong_digit_is_noticed(place: int, digit: str) -> None:
    text = "motte-signer-1-" + KNOWN
    changed = text[: 15 + place] + digit + text[16 + place :]
    if changed == text:
        assert SignerPublicKey.parse(changed).raw.hex() == KNOWN[:64]
    else:
        with pytest.raises(FormatError):
            SignerPublicKey.parse(changed)


KNOWN = str(SignerPrivateKey(bytes(range(32))).public)[15:]


@settings(max_examples=200)
@given(
    text=st.one_of(st.text(max_size=100), st.from_regex(r"motte-(signer|recipient)-1-[0-9a-f]{70,74}", fullmatch=True))
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        SignerPublicKey.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.upper(),
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.replace("signer", "recipient"),
        lambda text: text.replace("-1-", "-2-"),
        lambda text: text[:-1],
        lambda text: text[:15] + "٣" + text[16:],
    ],
)
def test_public_text_is_strict(change: object) -> None:
    with pytest.raises(FormatError):
        SignerPublicKey.parse(change(f"motte-signer-1-{KNOWN}"))  # type: ignore[operator]


def test_keys_of_small_order_are_refused() -> None:
    with pytest.raises(FormatError, match="small order"):
        SignerPublicKey(b"\x01" + bytes(31))
    with pytest.raises(FormatError, match="small order"):
        RecipientPublicKey(bytes(32))
    with pytest.raises(FormatError, match="expected 32 bytes"):
        RecipientPublicKey(bytes(31))


@pytest.mark.parametrize(("private", "public"), KINDS)
def test_files_round_trip(tmp_path: Path, private: type, public: type) -> None:
    key = keys.new(tmp_path / "new" / "folder", "alice", private)
    path, public_path = keys.key_paths(tmp_path / "new" / "folder", "alice")
    assert keys.load(path, private) == key
    assert keys.load_public(public_path, public) == key.public
    assert keys.load_public(str(key.public), public) == key.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == key.file_text()
    assert sorted(each.name for each in path.parent.iterdir()) == ["alice.key", "alice.pub"]


def test_the_secret_is_not_printed() -> None:
    for kind in (RecipientPrivateKey, SignerPrivateKey):
        key = kind.new()
        shown = repr(key) + str(key)
        assert key.secret.hex() not in shown
        assert repr(key.secret)[2:-1] not in shown


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o666])
def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    keys.new(tmp_path, "alice", RecipientPrivateKey)
    path, _ = keys.key_paths(tmp_path, "alice")
    path.chmod(mode)
    with pytest.raises(InputError, match="read by others") as caught:
        keys.load(path, RecipientPrivateKey)
    assert caught.value.hint == f"chmod 600 {path}"


def test_a_key_of_the_other_kind_is_said_to_be_so(tmp_path: Path) -> None:
    keys.new(tmp_path, "alice", RecipientPrivateKey)
    with pytest.raises(InputError, match="other kind"):
        keys.load(keys.key_paths(tmp_path, "alice")[0], SignerPrivateKey)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text[:-1],
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("kind: recipient", "kind: Recipient"),
        lambda text: "# mine\n" + text.split("\n", 1)[1],
        lambda text: text.replace("secret: ", "secret:  "),
        lambda text: text[: text.index("secret: ") + 8] + "00" * 32 + "\n",
        lambda text: text.replace("public: motte-recipient-1-", "public: motte-recipient-1-0"),
        lambda text: "",
        lambda text: "\xff" * 300,
        lambda text: text * 50,
    ],
)
def test_private_files_are_strict(tmp_path: Path, change: object) -> None:
    key = keys.new(tmp_path, "alice", RecipientPrivateKey)
    path, _ = keys.key_paths(tmp_path, "alice")
    path.write_text(change(key.file_text()), encoding="latin-1")  # type: ignore[operator]
    with pytest.raises(FormatError) as caught:
        keys.load(path, RecipientPrivateKey)
    assert key.secret.hex() not in str(caught.value)


def test_odd_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.key", 0o600)
    for path in (tmp_path / "pipe.key", tmp_path, tmp_path / "missing.key"):
        with pytest.raises(MotteError):
            keys.load(path, RecipientPrivateKey)
    (tmp_path / "two.pub").write_text(f"motte-signer-1-{KNOWN}\nmotte-signer-1-{KNOWN}\n")
    with pytest.raises(FormatError, match="one line"):
        keys.load_public(tmp_path / "two.pub", SignerPublicKey)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-x", "a b", "a" * 101, "ä", "a\n"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not a name"):
        keys.new(tmp_path, name, RecipientPrivateKey)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    key = keys.new(tmp_path, "alice", RecipientPrivateKey)
    with pytest.raises(InputError, match="exists"):
        keys.new(tmp_path, "alice", SignerPrivateKey)
    (tmp_path / "bob.pub").write_text("something")
    with pytest.raises(InputError, match="exists"):
        keys.new(tmp_path, "bob", RecipientPrivateKey)
    assert not (tmp_path / "bob.key").exists()
    assert keys.load(tmp_path / "alice.key", RecipientPrivateKey) == key


def test_rotation_keeps_every_old_key(tmp_path: Path) -> None:
    made = [keys.new(tmp_path, "alice", RecipientPrivateKey)]
    for number in (1, 2, 3):
        done = keys.rotate(tmp_path, "alice", RecipientPrivateKey)
        assert done.kept_as == tmp_path / f"alice.{number}.key"
        assert done.old == made[-1].public
        made.append(keys.load(tmp_path / "alice.key", RecipientPrivateKey))
        assert done.new == made[-1].public
        assert any(str(done.new) in step and str(done.old) in step for step in done.next_steps)
    assert len(set(made)) == 4
    for number, key in enumerate(made[:-1], 1):
        assert keys.load(tmp_path / f"alice.{number}.key", RecipientPrivateKey) == key
        assert keys.load_public(tmp_path / f"alice.{number}.pub", RecipientPublicKey) == key.public
        assert stat.S_IMODE((tmp_path / f"alice.{number}.key").stat().st_mode) == 0o600


def test_rotation_of_a_signer_says_what_follows(tmp_path: Path) -> None:
    keys.new(tmp_path, "owner", SignerPrivateKey)
    done = keys.rotate(tmp_path, "owner", SignerPrivateKey)
    assert any("--signer" in step for step in done.next_steps)
    assert any("higher release" in step for step in done.next_steps)


def test_a_failed_rotation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keys.new(tmp_path, "alice", RecipientPrivateKey)
    monkeypatch.setattr(RecipientPrivateKey, "new", classmethod(lambda cls: (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        keys.rotate(tmp_path, "alice", RecipientPrivateKey)
    assert keys.load(tmp_path / "alice.key", RecipientPrivateKey) == key
    assert not list(tmp_path.glob(".*"))
