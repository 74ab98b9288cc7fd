"""What the broker's owner does: the verbs, keys at rest, rotation, backup and restore."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from motte.cli import main
from motte.errors import InputError, KeyAccessError, MotteError, RollbackError, TrustError
from motte.provision.broker import answers, backup, enroll, state
from motte.provision.broker.policies import read_policy
from motte.provision.broker.wrapping import Unlock, check_wrapper, new_wrapper, open_wrapper, wrapper_check
from motte.provision.heads import save_head
from motte.provision.messages import Resume
from motte.provision.registration import Registration
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.seal.keys import new as new_key


def motte(capsys: pytest.CaptureFixture[str], *words: object) -> object:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr()
    return json.loads(capsys.readouterr().out)


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) != 0
    return capsys.readouterr().err


def test_a_brokers_life_on_the_command_line(place, tmp_path, capsys) -> None:
    folder, key = tmp_path / "second", tmp_path / "second.key"
    opened = ("--key-file", key)
    made = motte(capsys, "broker", "init", folder, *opened)
    (tmp_path / "policy.json").write_text(
        '{"format": "motte-policy-1", "policy": {"all_of": [{"platform": ["tdx"]}, {"fresh": {"max_age_s": 60}}]}}'
    )
    assert motte(capsys, "broker", "policy", "check", tmp_path / "policy.json")["allows_simulated"] is False
    motte(capsys, "broker", "policy", "set", folder, "production", tmp_path / "policy.json", *opened)
    place.broker.recipient = RecipientPrivateKey.new()
    client = new_key(tmp_path, "client", RecipientPrivateKey)
    place.broker.recipient = client
    bundle = place.seal(4)
    (tmp_path / "owner.pub").write_text(f"{place.owner.public}\n")
    digest = place.configuration(place.header(bundle)).hex()
    terms = ("--model", "net", "--policy", "production", "--signer", tmp_path / "owner.pub", "--configuration", digest)
    assert "not sealed to this key" in failing(capsys, "broker", "add", folder, bundle, *terms, *opened)
    added = motte(
        capsys, "broker", "add", folder, bundle, *terms, *opened, "--key", tmp_path / "client.key", "--run-budget", 10
    )
    assert (added["release"], added["min_release"], len(added["run"])) == (4, 4, 32)
    motte(capsys, "broker", "revoke", folder, "net", "--release", 4, *opened)
    rotated = motte(capsys, "broker", "rotate", folder, *opened, "--new-key-file", tmp_path / "new.key")
    assert rotated == {"folder": str(folder), "wrapping": "file"}
    assert "not the broker's wrapping key" in failing(capsys, "broker", "backup", folder, tmp_path / "b", *opened)
    opened = ("--key-file", tmp_path / "new.key")
    saved = motte(capsys, "broker", "backup", folder, tmp_path / "copy.db", *opened)
    save_head(tmp_path / "kept.head", saved["head"])
    shown = motte(capsys, "broker", "audit", "show", folder)["entries"]
    assert [each["kind"] for each in shown] == [
        "made",
        "policy set",
        "registered",
        "run enrolled",
        "revoked",
        "rotated",
        "backup",
    ]
    verified = motte(
        capsys, "broker", "audit", "verify", folder, "--head", tmp_path / "kept.head", "--broker-key", made["key"]
    )
    assert (verified["entries"], verified["heads_compared"]) == (7, 1)
    back = motte(
        capsys, "broker", "restore", tmp_path / "copy.db", tmp_path / "third", *opened, "--head", tmp_path / "kept.head"
    )
    assert (back["key"], back["runs_held"], back["head"]["era"]) == (made["key"], 1, 2)
    assert motte(capsys, "broker", "audit", "verify", tmp_path / "third")["era"] == 2
    (tmp_path / "pass").write_text("correct horse\n")
    (tmp_path / "pass").chmod(0o600)
    motte(capsys, "broker", "rotate", folder, *opened, "--new-passphrase-file", tmp_path / "pass")
    assert "of another kind" in failing(capsys, "broker", "backup", folder, tmp_path / "b", *opened)
    assert "no way to open" in failing(capsys, "broker", "backup", folder, tmp_path / "b")


def test_a_wrong_passphrase_and_a_file_that_others_read(tmp_path) -> None:
    made = new_wrapper(Unlock(passphrase=b"one"), log2_n=10)
    check = wrapper_check(made)
    check_wrapper(open_wrapper(dict(made.parameters), Unlock(passphrase=b"one")), check)
    with pytest.raises(KeyAccessError):
        check_wrapper(open_wrapper(dict(made.parameters), Unlock(passphrase=b"two")), check)
    with pytest.raises(InputError):
        new_wrapper(Unlock(passphrase=b""), log2_n=10)
    with pytest.raises(InputError):
        new_wrapper(Unlock(passphrase=b"one", key_file=tmp_path / "k"))
    new_wrapper(Unlock(key_file=tmp_path / "k"))
    (tmp_path / "k").chmod(0o640)
    with pytest.raises(InputError, match="by others"):
        open_wrapper({"kind": "file"}, Unlock(key_file=tmp_path / "k"))
    (tmp_path / "k").chmod(0o600)
    (tmp_path / "k").write_text("00" * 32 + "\n")
    other = open_wrapper({"kind": "file"}, Unlock(key_file=tmp_path / "k"))
    with pytest.raises(KeyAccessError):
        check_wrapper(other, check)


def test_no_key_lies_in_the_store_and_no_kek_in_an_answer(place, tmp_path) -> None:
    path = place.seal(3)
    place.register(path)
    header = place.header(path)
    kek = enroll._kek(header, place.broker.recipient)
    data_keys = enroll.unwrap_data_keys(header, kek)
    handshake = place.handshake(header)
    challenge = answers.ask(place.broker, handshake.ask())
    answer = answers.prove(place.broker, handshake.prove(challenge))
    release, _ = handshake.finish(answer)
    assert release.data_keys == data_keys
    backup.backup(place.broker, tmp_path / "copy.db")
    stored = b"".join(each.read_bytes() for each in [*place.folder.iterdir(), tmp_path / "copy.db"])
    broker = place.broker
    secrets = [kek, *data_keys, release.session, broker.signer.secret, broker.recipient.secret, broker.sessions]
    for secret in secrets:
        for form in (secret, secret.hex().encode()):
            assert form not in stored
            assert form not in challenge + answer
    assert broker.tls.key not in stored


def test_rotation_keeps_every_key_and_ends_the_old_one(place, header, tmp_path) -> None:
    place.register(place.seal(4), model="data")
    enroll.enroll_run(place.broker, "data", b"r" * 16, 5)
    with state.open_broker(place.folder, place.unlock) as server:
        state.rotate_wrapping(place.broker, Unlock(key_file=tmp_path / "new.key"))
        place.obtain(header)
        # A server that was not started again says so, and gives nothing.
        other, place.broker = place.broker, server
        with pytest.raises(answers.Refused, match="a stored key does not open"):
            place.obtain(header)
        place.broker = other
    with pytest.raises(KeyAccessError):
        state.open_broker(place.folder, place.unlock)
    with state.open_broker(place.folder, Unlock(key_file=tmp_path / "new.key")) as again:
        assert again.signer == place.broker.signer


def test_a_restored_broker_forgets_no_use_and_is_noticed(place, header, tmp_path) -> None:
    data = place.seal(4)
    place.register(data, model="data")
    enroll.enroll_run(place.broker, "data", b"r" * 16, 5)
    open_nonce = place.handshake(header)
    challenge = answers.ask(place.broker, open_nonce.ask())
    backup.backup(place.broker, tmp_path / "copy.db")
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir() if "copy.db" in each.name] == ["copy.db"]
    proof = open_nonce.prove(challenge)
    release, _ = open_nonce.finish(answers.prove(place.broker, proof))
    with pytest.raises(InputError):
        backup.restore(tmp_path / "copy.db", place.folder, place.unlock)
    save_head(tmp_path / "kept", release.head_document)
    document, held = backup.restore(tmp_path / "copy.db", tmp_path / "again", place.unlock, [tmp_path / "kept"])
    assert (document["era"], held) == (2, 1)
    place.broker.close()
    place.broker = state.open_broker(tmp_path / "again", place.unlock)
    assert place.entries()[-1].facts["entries_known_lost"] == 1
    # The nonce was open in the backup, and used since: it opens nothing.
    with pytest.raises(KeyAccessError, match="not a nonce of ours"):
        answers.prove(place.broker, proof)
    known = place.handshake(header, head=release.head)
    with pytest.raises(RollbackError, match="restored from a backup"):
        known.prove(answers.ask(place.broker, known.ask()))
    with pytest.raises(KeyAccessError, match="nobody knows what it released") as found:
        place.obtain(place.header(data), Resume(b"r" * 16, 0))
    assert found.value.check == "K-11"
    place.obtain(header)


def test_a_backup_of_an_altered_log_is_not_restored(place, tmp_path) -> None:
    import sqlite3

    backup.backup(place.broker, tmp_path / "copy.db")
    with sqlite3.connect(tmp_path / "copy.db") as db:
        db.execute("DROP TRIGGER audit_no_update")
        db.execute("UPDATE audit SET entry = replace(entry, 'made', 'mode') WHERE idx = 1")
    db.close()
    with pytest.raises(TrustError) as found:
        backup.restore(tmp_path / "copy.db", tmp_path / "again", place.unlock)
    assert found.value.check == "A-2"
    assert list((tmp_path / "again").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "motte-policy-1", "policy": {"all_of": []}}',
        '{"format": "motte-policy-1", "policy": {"platform": ["tdx"]}}',
        '{"format": "motte-policy-1", "policy": {"all_of": [{"platform": ["tdx"]}], "note": 1}}',
        '{"format": "motte-policy-1", "policy": {"any_of": [{"fresh": {"max_age_s": 9}}, {"platform": ["tdx"]}]}}',
        "not json",
    ],
)
def test_a_policy_that_would_not_protect_is_refused(tmp_path, text) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(MotteError):
        read_policy(tmp_path / "p")


def test_a_release_number_stands_for_one_header_and_a_model_for_one_signer(place, header) -> None:
    first = place.register(place.seal(5))
    again = enroll.register(place.broker, first, place.broker.recipient)
    assert again.known_already
    with pytest.raises(TrustError) as found:
        place.register(place.seal(5, "other.motte"))
    assert found.value.check == "K-15"
    other = replace(first, configurations=(b"\x01" * 32,))
    with pytest.raises(TrustError):
        enroll.register(place.broker, other, place.broker.recipient)
    place.owner = SignerPrivateKey.new()
    with pytest.raises(TrustError) as found:
        place.register(place.seal(6, "stolen.motte"))
    assert found.value.check == "K-15"


def test_a_registration_from_afar(place) -> None:
    header = place.header(place.seal(3))
    order = Registration(
        header=header, model="far", policy="development", configurations=(place.configuration(header),)
    )
    enroll.register_remote(place.broker, order.encode(place.owner, place.broker.signer.public))
    place.obtain(header)
    with pytest.raises(MotteError, match="another broker"):
        enroll.register_remote(place.broker, order.encode(place.owner, SignerPrivateKey.new().public))
    stranger = SignerPrivateKey.new()
    with pytest.raises(InputError, match="only the signer"):
        order.encode(stranger, place.broker.signer.public)
    place.owner = stranger
    header = place.header(place.seal(4))
    foreign = replace(order, header=header)
    with pytest.raises(KeyAccessError) as found:
        enroll.register_remote(place.broker, foreign.encode(stranger, place.broker.signer.public))
    assert found.value.check == "K-14"
