"""Sealed logs: read by their owner, whole; by nobody else; and no entry can be changed, moved or left out unseen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import (
    DecryptError,
    FormatError,
    InputError,
    KeyAccessError,
    MotteError,
    SettingError,
    SignatureError,
    UnsupportedError,
)
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.train import logs
from motte.train.logs import EntryLog, NoLog, TensorBoardLog, open_log
from motte.train.owner import OwnerKeys, derived_signer
from motte.train.sealed_log import MAGIC, SealedLogWriter, read_log

OPENER = RecipientPrivateKey.new()
FRIEND = RecipientPrivateKey.new()
KEYS = OwnerKeys(OPENER, (FRIEND.public,), derived_signer(OPENER))
SIGNER = KEYS.signer.public


def write(path: Path, count: int = 3, *, close: bool = True) -> bytes:
    log = SealedLogWriter(path, KEYS)
    for number in range(count):
        log.write({"kind": "scalars", "step": number, "values": {"loss/train_step": 0.123456789 + number}})
    if close:
        log.close()
    return path.read_bytes()


def pieces(data: bytes) -> tuple[bytes, list[bytes]]:
    """The front, and each entry with its length."""
    at = len(MAGIC) + 4 + int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "big") + 64
    front, entries = data[:at], []
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        entries.append(data[at:end])
        at = end
    return front, entries


def test_what_was_written_is_read_by_its_recipients_only(tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = write(path)
    for person in (OPENER, FRIEND):
        found = read_log(path, person, signer=SIGNER)
        assert found.closed
        assert [entry["step"] for entry in found.entries] == [0, 1, 2]
        assert found.entries[1]["values"] == {"loss/train_step": 1.123456789}
    assert b"loss" not in data
    assert b"scalars" not in data
    with pytest.raises(KeyAccessError):
        read_log(path, RecipientPrivateKey.new(), signer=SIGNER)
    with pytest.raises(SignatureError):
        read_log(path, OPENER, signer=SignerPrivateKey.new().public)
    assert path.stat().st_mode & 0o077 == 0


def test_lengths_say_little(tmp_path: Path) -> None:
    log = SealedLogWriter(tmp_path / "log", KEYS)
    for text in ("", "x" * 100, "x" * 200):
        log.write({"text": text})
    lengths = {len(entry) for entry in pieces((tmp_path / "log").read_bytes())[1]}
    assert lengths == {4 + 256 + 16}


def test_a_log_that_was_cut_off_says_so(tmp_path: Path) -> None:
    path = tmp_path / "log"
    front, entries = pieces(write(path))
    assert len(entries) == 4
    for kept in range(4):
        for rest in (b"", entries[kept][:1], entries[kept][:20]):
            path.write_bytes(front + b"".join(entries[:kept]) + rest)
            found = read_log(path, OPENER, signer=SIGNER)
            assert (len(found.entries), found.closed) == (kept, False)
    write(tmp_path / "open", close=False)
    assert not read_log(tmp_path / "open", OPENER, signer=SIGNER).closed


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [0, 2, 3], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3]])
def test_entries_that_were_moved_left_out_or_repeated(tmp_path: Path, order: list[int]) -> None:
    path = tmp_path / "log"
    front, entries = pieces(write(path))
    path.write_bytes(front + b"".join(entries[number] for number in order))
    with pytest.raises((DecryptError, FormatError)):
        read_log(path, OPENER, signer=SIGNER)


def test_entries_of_another_log_are_refused(tmp_path: Path) -> None:
    front, _ = pieces(write(tmp_path / "a"))
    _, entries = pieces(write(tmp_path / "b"))
    (tmp_path / "a").write_bytes(front + b"".join(entries))
    with pytest.raises(DecryptError):
        read_log(tmp_path / "a", OPENER, signer=SIGNER)


@given(st.data())
def test_any_flipped_bit_is_refused_or_leaves_an_unclosed_log(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        whole = bytearray(write(path, 1))
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        try:
            found = read_log(path, OPENER, signer=SIGNER)
        except MotteError:
            return
        # A length that was altered looks like a cut: nothing false is told, and the end is missing.
        assert not found.closed


def test_a_closed_log_takes_nothing_and_no_file_is_replaced(tmp_path: Path) -> None:
    log = SealedLogWriter(tmp_path / "log", KEYS)
    log.close()
    log.close()
    with pytest.raises(InputError, match="closed"):
        log.write({})
    with pytest.raises(InputError, match="exists"):
        SealedLogWriter(tmp_path / "log", KEYS)
    with pytest.raises(InputError, match="too large"):
        SealedLogWriter(tmp_path / "other", KEYS).write({"text": "x" * (1 << 20)})


def test_the_specification_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "spec" / "training.md").read_text()
    for word in (
        "motte-log-1\\n",
        "motte-log-1 header\\0",
        "motte-derived-key-1\\0",
        "motte-log/1",
        "motte-checkpoint/1",
    ):
        assert f'"{word}"' in text, word
    for word in ("signer of training checkpoints and logs", "noise key of a training run", "training log key\\0"):
        assert f'"{word}"' in text, word
    assert MAGIC == b"motte-log-1\n"


def test_a_signature_of_one_kind_is_none_of_another() -> None:
    from motte.seal import primitives

    secret, public = primitives.new_ed25519()
    primitives.verify_log(public, primitives.sign_log(secret, b"x"), b"x")
    with pytest.raises(SignatureError):
        primitives.verify_log(public, primitives.sign_header(secret, b"x"), b"x")
    with pytest.raises(SignatureError):
        primitives.verify_header(public, primitives.sign_log(secret, b"x"), b"x")
    with pytest.raises(SignatureError):
        primitives.verify_log(b"\1" + bytes(31), bytes(64), b"x")
    assert len({primitives.derived_key(secret, purpose) for purpose in (b"a", b"b", b"")}) == 3
    with pytest.raises(InputError):
        primitives.derived_key(b"short", b"a")


# --- which log ------------------------------------------------------------------------------------------------------
def test_what_is_written_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    assert isinstance(open_log(None, private=True, insecure_plaintext=False, keys=KEYS), NoLog)
    other = open_log(tmp_path / "o", private=True, insecure_plaintext=False, keys=KEYS, main=False)
    assert isinstance(other, NoLog)
    public = open_log(tmp_path / "a", private=False, insecure_plaintext=False, keys=None)
    assert isinstance(public, TensorBoardLog)
    public.close()
    told = open_log(tmp_path / "b", private=True, insecure_plaintext=True, keys=None)
    assert isinstance(told, TensorBoardLog)
    told.close()
    for number in (1, 2):
        sealed = open_log(tmp_path / "c", private=True, insecure_plaintext=False, keys=KEYS)
        assert isinstance(sealed, EntryLog)
        assert sealed.writer.path == tmp_path / "c" / f"train-{number:04d}.motte-log"
        sealed.close()
    with pytest.raises(SettingError, match="no key to seal it to"):
        open_log(tmp_path / "d", private=True, insecure_plaintext=False, keys=None)
    # Inside an enclave figures on public data are sealed too.
    monkeypatch.setattr(logs, "_ENCLAVE_MARK", tmp_path)
    inside = open_log(tmp_path / "e", private=False, insecure_plaintext=False, keys=KEYS)
    assert isinstance(inside, EntryLog)
    inside.close()


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnsupportedError) as caught:
        open_log(tmp_path / "a", private=False, insecure_plaintext=False, keys=None)
    assert "pip install tensorboard" in str(caught.value.hint)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path)
    for step in (1, 2):
        log.scalars(step, {"loss/train_step": 1.0 / step})
    log.ranks(2, {"conv1": [2, 2, 4]})
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("loss/train_step")] == [1.0, 0.5]
    assert events.Histograms("rank/conv1")[0].histogram_value.num == 3
