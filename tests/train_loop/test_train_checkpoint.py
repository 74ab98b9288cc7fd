"""Checkpoints: what was written is read back, by the right key only, and nothing else is."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import (
    BundleError,
    FormatError,
    InputError,
    KeyAccessError,
    MotteError,
    ResourceError,
    RollbackError,
    SignatureError,
)
from motte.offload.releases import ReleaseCount
from motte.offload.session import SessionState
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.seal.writer import BytesPart, write_bundle
from motte.strict_json import canonical
from motte.train.checkpoint import CheckpointStore, read_checkpoint, refuse_other_run, write_weights
from motte.train.owner import OwnerKeys, derived_signer
from motte.train.state import EpochResult, Position, Snapshot, Tally, read_state

OPENER = RecipientPrivateKey.new()
FRIEND = RecipientPrivateKey.new()
KEYS = OwnerKeys(OPENER, (FRIEND.public,), derived_signer(OPENER))
READING = (OPENER, KEYS.signer.public)
NOISE_KEY = bytes(range(100, 132))


def snapshot(**changes: Any) -> Snapshot:
    generator = torch.Generator().manual_seed(5)
    made = Snapshot(
        run_id=bytes(16),
        facts={"model": "resnet20", "lr": 0.1, "epochs": 3, "subset": None},
        position=Position(1, 2, 5),
        tally=Tally(3.25, 4, 8),
        history=(EpochResult(0, 3, 0.1, 2.5, 0.1, 2.25, 0.125),),
        best=0.125,
        session=SessionState(NOISE_KEY, 5, {("conv1", "residual"): ReleaseCount(5, 5)}),
        tensors={
            "model/w": torch.randn(300, 7, generator=generator),
            "model/count": torch.tensor(3),
            "generator/cpu/0": torch.arange(16, dtype=torch.uint8),
        },
    )
    return replace(made, **changes)


def same(first: Snapshot, second: Snapshot) -> bool:
    plain = all(
        getattr(first, name) == getattr(second, name)
        for name in ("run_id", "facts", "position", "tally", "history", "best", "session")
    )
    return plain and all(
        torch.equal(first.tensors[name], second.tensors[name]) and first.tensors[name].dtype == tensor.dtype
        for name, tensor in second.tensors.items()
    )


@pytest.mark.parametrize("keys", [KEYS, None], ids=["sealed", "plaintext"])
def test_what_was_written_is_read_back(tmp_path: Path, keys: OwnerKeys | None) -> None:
    store = CheckpointStore(tmp_path / "c", keys)
    assert store.save(snapshot(), best=True) == 1
    assert store.save(snapshot(position=Position(2, 0, 6)), best=False) == 2
    again = CheckpointStore(tmp_path / "c", keys)
    assert same(again.load(), snapshot(position=Position(2, 0, 6)))
    best, release = read_checkpoint(store.best, None if keys is None else READING)
    assert same(best, snapshot())
    assert release == 1
    assert again.save(snapshot(), best=False) == 3
    assert sorted(os.listdir(tmp_path / "c")) == sorted([store.best.name, store.last.name, "newest-release"])


def test_the_file_is_opened_by_its_recipients_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=False)
    assert same(read_checkpoint(store.last, (FRIEND, KEYS.signer.public))[0], snapshot())
    with pytest.raises(KeyAccessError):
        read_checkpoint(store.last, (RecipientPrivateKey.new(), KEYS.signer.public))
    with pytest.raises(SignatureError):
        read_checkpoint(store.last, (OPENER, SignerPrivateKey.new().public))


def test_a_signer_is_derived_from_the_opener_and_from_nobody_else() -> None:
    assert derived_signer(OPENER) == derived_signer(OPENER) != derived_signer(FRIEND)
    assert derived_signer(OPENER).secret != OPENER.secret
    noise = KEYS.noise_key(bytes(16), 0)
    assert len({noise, KEYS.noise_key(bytes(16), 1), KEYS.noise_key(b"\1" * 16, 0), derived_signer(OPENER).secret}) == 4


def test_no_plaintext_is_in_a_sealed_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=True)
    secrets = [NOISE_KEY, NOISE_KEY.hex().encode(), b"resnet20", b"conv1", b"test_accuracy", b"model/w"]
    secrets.append(snapshot().tensors["model/w"].numpy().tobytes()[:64])
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret in data], path
    # The search can find something: in the open form it does.
    open_store = CheckpointStore(tmp_path / "open", None)
    open_store.save(snapshot(), best=False)
    data = open_store.last.read_bytes()
    assert all(secret in data for secret in secrets[1:])


@pytest.mark.parametrize("place", [0.02, 0.2, 0.5, 0.98])
def test_an_altered_checkpoint_is_refused(tmp_path: Path, place: float) -> None:
    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=False)
    data = bytearray(store.last.read_bytes())
    data[int(place * len(data))] ^= 1
    store.last.write_bytes(data)
    with pytest.raises(MotteError) as caught:
        store.load()
    assert not isinstance(caught.value, InputError)


def test_another_recipient_cannot_forge_a_chunk(tmp_path: Path) -> None:
    # Whoever opens it knows the data keys; the signed digests are compared.
    from motte.seal.reader import open_bundle

    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=False)
    data = bytearray(store.last.read_bytes())
    with open_bundle(store.last, signer=KEYS.signer.public) as signed:
        key = signed.data_keys(signed.unwrap(FRIEND))[1]
        section = signed.header.sections[1]
        header = signed.header
    from motte.seal import primitives

    cipher = primitives.SectionCipher(key, bundle_id=header.bundle_id, section=1)
    forged = bytearray(section.ciphertext_bytes)
    cipher.seal(0, True, memoryview(bytes(section.plaintext_bytes)), memoryview(forged))
    data[-len(forged) :] = forged
    store.last.write_bytes(data)
    with pytest.raises(SignatureError, match="not what was signed"):
        store.load()


def test_other_sealed_files_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for manifest, parts in (
        (canonical({"kind": "data"}), [b""]),
        (canonical({"graph": ""}), [b""]),
        (canonical(snapshot().state(1)), [b"", b""]),
        (canonical(snapshot().state(1)), [b"no tensors"]),
        (b"not JSON", [b""]),
    ):
        people = (OPENER.public,)
        pieces = [BytesPart(part) for part in parts]
        write_bundle(
            path, release=1, manifest=manifest, parts=pieces, recipients=people, signer=KEYS.signer, overwrite=True
        )
        with pytest.raises(FormatError):
            read_checkpoint(path, READING)
    assert issubclass(BundleError, FormatError)


def test_a_state_of_another_release_than_its_header_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=False)
    from motte.train.checkpoint import _tensor_bytes

    part = [BytesPart(_tensor_bytes(snapshot().tensors))]
    people = (OPENER.public,)
    state = canonical(snapshot().state(7))
    write_bundle(
        store.last, release=8, manifest=state, parts=part, recipients=people, signer=KEYS.signer, overwrite=True
    )
    with pytest.raises(FormatError, match="another release"):
        store.load()


def test_rollback(tmp_path: Path) -> None:
    for number, keys in enumerate((KEYS, None)):
        folder = tmp_path / str(number)
        store = CheckpointStore(folder, keys)
        store.save(snapshot(), best=False)
        old = store.last.read_bytes()
        store.save(snapshot(), best=False)
        store.last.write_bytes(old)
        with pytest.raises(RollbackError):
            CheckpointStore(folder, keys).load()
        (folder / "newest-release").unlink()
        assert same(CheckpointStore(folder, keys).load(), snapshot())
        with pytest.raises(RollbackError):
            CheckpointStore(folder, keys, min_release=2).load()


@pytest.mark.parametrize("text", [b"", b"x\n", b"1", b"-1\n", b"1\n\n", b"99999999999999999999\n"])
def test_a_counter_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "newest-release").write_bytes(text)
    with pytest.raises(FormatError, match="counter of releases"):
        CheckpointStore(tmp_path, KEYS)


def test_a_failed_write_leaves_the_checkpoint_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise ResourceError("no room for the file")

    monkeypatch.setattr("motte.seal.writer.write_front", full)
    with pytest.raises(ResourceError):
        store.save(snapshot(position=Position(9, 9, 9)), best=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_where_links_are_not_to_be_had_the_best_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("motte.train.checkpoint.os.link", refused)
    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=True)
    assert store.best.read_bytes() == store.last.read_bytes()


def test_the_weights_are_written_for_their_owner(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(), best=True)
    written = write_weights(store.best, tmp_path / "w.safetensors", READING)
    assert (written.tensors, written.steps, written.release) == (2, 5, 1)
    found = load_file(tmp_path / "w.safetensors")
    assert sorted(found) == ["count", "w"]
    assert torch.equal(found["w"], snapshot().tensors["model/w"])
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="exists"):
        write_weights(store.best, tmp_path / "w.safetensors", READING)


def test_tied_weights_are_written_twice_and_read_back(tmp_path: Path) -> None:
    shared = torch.randn(4)
    store = CheckpointStore(tmp_path, KEYS)
    store.save(snapshot(tensors={"model/a": shared, "model/b": shared}), best=False)
    assert torch.equal(store.load().tensors["model/b"], shared)


def test_facts_must_agree() -> None:
    from motte.errors import SettingError

    facts = dict(snapshot().facts)
    refuse_other_run(snapshot(), facts)
    refuse_other_run(snapshot(), {**facts, "epochs": 4}, growing=("epochs",))
    for change in ({"lr": 0.2}, {"epochs": 4}, {"subset": 1}, {"more": 1}, {"lr": None}):
        with pytest.raises(SettingError):
            refuse_other_run(snapshot(), {**facts, **change})
    with pytest.raises(SettingError):
        refuse_other_run(snapshot(), {**facts, "epochs": 2}, growing=("epochs",))


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [each for key, item in items for each in paths(item, (*at, key))]


STATE = json.loads(canonical(snapshot().state(1)))


@given(st.sampled_from(paths(STATE)), st.sampled_from([None, "x", -1, 1.5, [], {}, True, "00", "drop", "extra"]))
def test_a_mutated_state_is_read_as_it_is_or_refused(place: tuple[Any, ...], value: Any) -> None:
    state = json.loads(canonical(snapshot().state(1)))
    target = state
    for key in place[:-1]:
        target = target[key]
    if value == "drop":
        del target[place[-1]]
    elif value == "extra" and isinstance(target, dict):
        target["extra"] = 1
    else:
        target[place[-1]] = value
    try:
        found, release = read_state(state, {}, where="test")
    except FormatError:
        return
    # Whatever passes says exactly what was written.
    assert json.loads(canonical(found.state(release))) == state
