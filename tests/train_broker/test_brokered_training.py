"""A training run under a key broker: keys against evidence, releases charged before they leave, one checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from motte.attest.configuration import RunConfiguration
from motte.cli import main
from motte.errors import BrokerRefused, KeyAccessError, LinkError
from motte.offload.releases import KINDS, Releases
from motte.seal.keys import SignerPublicKey
from motte.seal.reader import open_bundle
from motte.train.admission import BrokerRun, granted
from motte.train.booked_checkpoint import BookedCheckpoints
from motte.train.books import Books, ChargedReleases, Charges
from motte.train.distributed import World

STEP = 6
"""Releases of one step: two layers, three kinds."""


def test_from_enrolling_to_the_owners_weights(
    estate: Any, data: str, train: Any, watched: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["broker", "run", "enroll", str(estate.broker.folder), data, "--budget", "100", "--json"]
    assert main([*words, "--key-file", str(estate.folder / "wrapping.key")]) == 0
    enrolled = json.loads(capsys.readouterr().out)
    assert (enrolled["model"], enrolled["budget"]) == (data, 100)
    run = bytes.fromhex(enrolled["run"])
    arrived: list[int] = []
    watched.seen = (arrived, lambda: estate.books(run)[0])
    status, first, err = train(run, max_steps=2, checkpoint_every=1, log_dir=tmp_path / "log")
    assert status == 0, err
    # Before a step, after each of two, and no more; as many releases as the accountant counts, all of them charged.
    assert first["broker"] == {"run": run.hex(), "charged": 2 * STEP, "checkpoint": 3}
    assert estate.books(run) == (2 * STEP, 3)
    assert arrived[-1] == 2 * STEP
    assert "test_accuracy" not in first
    watched.seen = None
    status, second, err = train(run, resume=True)
    assert status == 0, err
    assert second["steps"] == 3
    assert estate.books(run)[0] == 3 * STEP
    assert second["broker"]["charged"] == 3 * STEP
    # What the run wrote opens with the owner's key, by way of the data that it opens, and with no other.
    owner = ["--key", str(estate.folder / "keys" / "owner.key"), "--signer", estate.signer]
    owner += ["--data", str(estate.sealed[data]), "--broker-run", run.hex()]
    capsys.readouterr()
    assert main(["train-log", str(tmp_path / "log" / "train-0001.motte-log"), "--json", *owner]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert {"loss/train_step", "lr"} <= entries[0]["values"].keys()
    weights = tmp_path / "weights.safetensors"
    words = ["train-weights", str(tmp_path / "run" / "best.checkpoint"), "-o", str(weights), "--insecure-plaintext"]
    assert main([*words, *owner[:2]]) == 1
    assert main([*words, *owner[:-1], "0" * 32]) == 1
    assert not weights.exists()
    assert main([*words, *owner]) == 0
    assert "stem.0.weight" in load_file(weights)


def test_the_budget_ends_a_run_before_anything_leaves(estate: Any, data: str, train: Any, watched: Any) -> None:
    run = estate.run(data, 2 * STEP - 1)
    arrived: list[int] = []
    watched.seen = (arrived, lambda: estate.books(run)[0])
    status, _, err = train(run, checkpoint_every=1)
    assert status == 1
    assert "has released all that the owner of its data allowed" in err
    assert "K-13" in err
    assert arrived[-1] == STEP
    assert estate.books(run) == (STEP, 2)
    watched.seen = None
    status, found, err = train(run, resume=True, max_steps=1)  # its last checkpoint stands
    assert status == 0, err
    assert found["steps"] == 1


def test_an_older_checkpoint_gets_no_key(estate: Any, data: str, train: Any, tmp_path: Path) -> None:
    run = estate.run(data, 100)
    last, old = tmp_path / "run" / "last.checkpoint", tmp_path / "old"
    assert train(run, max_steps=1)[0] == 0
    shutil.copy(last, old)
    assert train(run, max_steps=2, resume=True)[0] == 0
    proofs = estate.entries("released")
    newest = last.read_bytes()
    shutil.copy(old, last)
    status, _, err = train(run, resume=True)
    assert status == 1
    assert "it is not the newest of the run" in err
    assert "[check K-11]" in err
    # Nor does it help to call it the newest: what it says of itself is signed.
    renamed = old.read_bytes().replace(b'"release":2', b'"release":3', 1)
    assert renamed != old.read_bytes()
    last.write_bytes(renamed)
    status, _, err = train(run, resume=True)
    assert status == 1
    assert "not signed" in err
    # Nor to begin anew.
    status, _, err = train(run, checkpoint_dir=tmp_path / "anew")
    assert status == 1
    assert "[check K-11]" in err
    assert "--resume" in err
    assert estate.entries("released") == proofs + 1  # only the second of the three had a handshake
    last.write_bytes(newest)
    assert train(run, resume=True)[0] == 0


@pytest.mark.parametrize("late", [False, True], ids=["before-commit", "after-commit"])
def test_a_crash_while_a_checkpoint_is_written(
    estate: Any, data: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    run = estate.run(data, 100)
    assert train(run, max_steps=1)[0] == 0
    assert estate.books(run) == (STEP, 2)
    with monkeypatch.context() as patch:

        def crash(*_: object) -> None:
            raise LinkError("the lights went out")

        patch.setattr(*((BookedCheckpoints, "_promote") if late else (Books, "commit")), crash)
        status, _, err = train(run, max_steps=2, resume=True)
    assert status == 1
    assert "the lights went out" in err
    assert {each.name for each in (tmp_path / "run").iterdir()} == {"last.checkpoint", "next.checkpoint"}
    assert estate.books(run) == (2 * STEP, 3 if late else 2)
    status, found, err = train(run, max_steps=2, resume=True)
    assert status == 0, err
    # After a commit there is nothing to do again; before it the step is run, and charged, once more.
    assert found["broker"]["charged"] == (2 if late else 3) * STEP
    assert found["steps"] == 2


def test_a_lease_that_ends_is_followed_by_another(
    estate: Any, data: str, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = estate.run(data, 100), estate.entries("released")
    monkeypatch.setattr("motte.train.books._RENEW_AT", 0.0)  # each order finds the lease at its end
    status, found, err = train(run)
    assert status == 0, err
    assert found["broker"]["charged"] == 3 * STEP
    orders = 1 + 2 * 2  # three steps at once; the checkpoints before the first and after the last
    assert estate.entries("released") - before == 1 + orders


REFUSED = {
    "scheme": {"scheme": "trusted", "noise": None, "offload_layers": ()},
    "noise": {"noise": "none"},
    "integrity": {"integrity": "off"},
    "accelerator": {"accelerator": "tcp:127.0.0.1:7000"},
    "rank": {"rank": "fixed:2"},
    "offload_layers": {"offload_layers": "stage1.0.conv1"},
    "model": {"model": "resnet32"},
    "width": {"width": "0.25"},
}


@pytest.mark.parametrize("name", [*REFUSED, "broker", "ranks"])
def test_what_the_owner_did_not_sign_is_refused_by_name(
    estate: Any, data: str, train: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def issue(*_: object, **__: object) -> None:
        raise AssertionError("evidence was made")

    monkeypatch.setattr("motte.attest.platforms.simulated.issue", issue)
    changed: dict[str, Any] = dict(REFUSED.get(name, {}))
    if name == "broker":
        from motte.seal.keys import SignerPrivateKey

        changed["broker"] = f"{str(estate.address).partition('+')[0]}+{SignerPrivateKey.new().public}"
    if name == "ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
        changed["accelerator"] = None
    status, _, err = train(b"r" * 16, **changed)
    assert status == 2
    assert "the owner of the data signed another setting" in err
    assert f"where: {name}\n" in err


def test_signed_terms_bind_whoever_holds_a_key_too(estate: Any, data: str, train: Any) -> None:
    key = {"data_key": estate.folder / "keys" / "owner.key", "broker": None, "broker_run": None}
    alone = {**key, "evidence": None, "simulated_key": None}
    status, _, err = train(b"r" * 16, **alone, residual_dtype="bfloat16")
    assert status == 2
    assert "where: residual_dtype\n" in err
    status, found, err = train(b"r" * 16, **alone, max_steps=1)
    assert status == 0, err
    assert found["broker"] is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"data_key": "owner"}, "the broker gives the keys of the data"),
        ({"checkpoint_key": "owner"}, "the broker gives the keys of checkpoints"),
        ({"checkpoint_recipient": "owner"}, "to nobody whom a host names"),
        ({"insecure_plaintext_log": True}, "no host decides that private data lies open"),
        ({"insecure_plaintext_checkpoint": True}, "no host decides that private data lies open"),
        ({"insecure_plaintext_collectives": True}, "no host decides that private data lies open"),
        ({"min_release": 1}, "the broker says which checkpoint is the newest"),
        ({"data_signer": None}, "its signer"),
        ({"data": "mnist"}, "a broker holds keys of sealed data"),
        ({"evidence": None, "simulated_key": None}, "has to prove itself"),
        ({"broker_run": None}, "a run has its books at a broker"),
        ({"broker_run": "12"}, "not the name of a run"),
        ({"model": "net.py:make"}, "the code of a model of one's own"),
        ({"evaluate": "split"}, "released anew in every epoch"),
        ({"meet": "tcp:127.0.0.1:7001"}, "processes meet somewhere, under a policy"),
    ],
)
def test_what_does_not_go_with_a_broker(estate: Any, train: Any, change: dict[str, Any], why: str) -> None:
    for name, value in change.items():
        if value == "owner":
            ending = "pub" if name.endswith("recipient") else "key"
            change = {name: estate.folder / "keys" / f"owner.{ending}"}
    status, _, err = train(b"r" * 16, **change)
    assert status == 2, err
    assert why in err.replace("\n", " ")


def test_terms_that_no_run_could_keep_are_not_sealed(estate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["seal-data", "mnist", "--data-dir", str(estate.folder / "digits"), "-o", str(estate.folder / "x")]
    words += ["--signer-key", str(estate.folder / "keys" / "signer.key")]
    held = ["--broker", str(estate.address), "--broker-policy", "training"]
    known = ["--model", "resnet20", "--scheme", "trusted"]
    before = sorted(estate.folder.iterdir())
    for more, why in (
        ([], "nobody could open it"),
        (held, "runs whose terms are signed"),
        ([*held, "--noise", "none"], "terms of runs need the model"),
        ([*held, "--model", "resnet20"], "needs a word about noise"),
        ([*held, "--model", "net.py:make", "--noise", "none"], "code of a model of one's own"),
        ([*held, "--model", "resnet21", "--noise", "none"], "no model of that name"),
        ([*held, "--model", "resnet20", "--scheme", "accelerator"], "no owner signs this scheme"),
        ([*held, *known, "--ranks", "2"], "demand evidence of each other"),
        ([*held, *known, "--accelerator", "local"], "nothing leaves under this scheme"),
        ([*held[:2], *known, "--broker-policy", "nobody"], "no policy"),
    ):
        assert main([*words, *more]) in (1, 2), more
        assert why in " ".join(capsys.readouterr().err.split()), more
    assert sorted(estate.folder.iterdir()) == before


@pytest.fixture
def plan(estate: Any, data: str, measured: bytes) -> Iterator[Any]:
    """What :func:`granted` takes for a new run of one process, but for the run's checkpoints."""
    from motte.attest.platforms import simulated
    from motte.attest.platforms.simulated_key import read_key

    secret = read_key(estate.folder / "development.key").secret
    run = BrokerRun(
        address=estate.address,
        run=estate.run(data, 50),
        issue=lambda bound: simulated.issue(bound, private=secret, measurement=measured),
    )
    with open_bundle(estate.sealed[data], signer=SignerPublicKey.parse(estate.signer)) as signed:
        yield run, signed, RunConfiguration.of(signed.header)


def test_after_a_charge_that_failed_nothing_leaves_any_more(estate: Any, plan: Any) -> None:
    with granted(*plan, (), World()) as first, granted(*plan, (), World()) as second:
        assert first.books is not None
        assert second.books is not None
        assert first.data_keys == second.data_keys
        second.books.charge(1)
        ledger = ChargedReleases({}, Charges(first.books, World()))
        with pytest.raises(BrokerRefused) as refused:  # another enclave was given the run
            ledger.count("layer", "residual", b"first try")
        assert refused.value.check == "K-12"
        with pytest.raises(KeyAccessError, match="after its charge failed"):
            ledger.count("layer", "residual", b"another")
    assert estate.books(plan[0].run)[0] == 1


def test_what_is_charged_is_what_the_accountant_counts(estate: Any, plan: Any) -> None:
    draw = random.Random(5)
    with granted(*plan, (), World()) as given:
        plain, charged = Releases(), ChargedReleases({}, Charges(given.books, World()))
        for _ in range(60):
            if draw.random() < 0.1:
                plain.new_step()
                charged.new_step()
            piece, noisy = draw.randrange(2), draw.random() < 0.8
            told = {"release_id": bytes([draw.randrange(8)]) if noisy else None, "piece": piece}
            layer, kind = draw.choice("ab"), draw.choice(KINDS)
            assert plain.count(layer, kind, **told) == charged.count(layer, kind, **told)  # type: ignore[arg-type]
        assert plain.counts == charged.counts
        total = sum(each.total for each in plain.counts.values())
        assert 5 < total < 50
        assert given.books is not None
        assert given.books.charged == estate.books(plan[0].run)[0] == total
