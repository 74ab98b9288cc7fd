"""A training run: charged before anything leaves, and only its newest checkpoint gets a key."""

from __future__ import annotations

import json

import pytest

from motte.errors import HandshakeError, KeyAccessError, RollbackError
from motte.provision.broker import enroll, training
from motte.provision.messages import Resume
from motte.provision.runs import RunSession
from motte.strict_json import canonical

RUN = b"r" * 16


@pytest.fixture
def data(place):
    path = place.seal(1, "data.motte")
    place.register(path, model="data")
    enroll.enroll_run(place.broker, "data", RUN, 100)
    return place.header(path)


def session(place, data, checkpoint: int = 0, carry=None) -> RunSession:
    release, private = place.obtain(data, Resume(RUN, checkpoint))
    made = RunSession(
        release, private, place.broker.signer.public, carry or (lambda order: training.run_order(place.broker, order))
    )
    made.release = release
    return made


def test_a_run_from_start_to_resume(place, data) -> None:
    first = session(place, data)
    assert first.charge(10).charged == 10
    one = first.prepare(1)
    assert first.commit(1).checkpoint == 1
    two = first.prepare(2)  # ... and then a crash: its file was never whole
    assert one != two
    again = session(place, data, 1)
    assert again.release.checkpoint_key == one
    assert (again.state.charged, again.state.checkpoint) == (10, 1)
    assert again.charge(5).charged == 15
    assert again.prepare(2) == two
    again.commit(2)
    assert again.commit(2).checkpoint == 2  # told twice: its answer may have been lost
    for old in (0, 1, 3):
        with pytest.raises(RollbackError) as found:
            session(place, data, old)
        assert found.value.check == "K-11"
    assert session(place, data, 2).release.checkpoint_key == two
    assert place.verify().index == len(place.entries())


def test_no_second_enclave_goes_on_beside_the_first(place, data) -> None:
    first = session(place, data)
    second = session(place, data)
    second.charge(1)
    for order in (lambda: first.charge(1), lambda: first.prepare(1), lambda: first.commit(1)):
        with pytest.raises(KeyAccessError) as found:
            order()
        assert found.value.check == "K-12"


def test_the_budget_ends_it_and_checkpoints_go_one_by_one(place, data) -> None:
    run = session(place, data)
    run.charge(99)
    with pytest.raises(KeyAccessError) as found:
        run.charge(2)
    assert found.value.check == "K-13"
    assert run.charge(1).charged == 100
    for order in (lambda: run.prepare(2), lambda: run.commit(2)):
        with pytest.raises(RollbackError) as wrong:
            order()
        assert wrong.value.check == "K-13"


def test_keys_of_training_data_go_to_enrolled_runs_only(place, data, header) -> None:
    for resume in (None, Resume(b"x" * 16, 0)):
        with pytest.raises(KeyAccessError) as found:
            place.obtain(data, resume)
        assert found.value.check == "K-11"
    with pytest.raises(KeyAccessError):
        place.obtain(header, Resume(RUN, 0))  # a run of another model
    release, private = place.obtain(header)
    with pytest.raises(HandshakeError):
        RunSession(release, private, place.broker.signer.public, lambda order: order)


def test_a_host_in_between_changes_replays_and_forges_in_vain(place, data) -> None:
    sent: list[bytes] = []
    answered: list[bytes] = []

    def carry(order: bytes) -> bytes:
        sent.append(order)
        answered.append(training.run_order(place.broker, order))
        return answered[-1]

    run = session(place, data, carry=carry)
    run.charge(3)
    # Another value, run or action under the code of this one; no lease of ours.
    for name, value in (("value", 1), ("action", "commit"), ("lease", "00" * 16), ("echo", "00" * 32)):
        with pytest.raises(KeyAccessError) as found:
            training.run_order(place.broker, canonical({**json.loads(sent[0]), name: value}))
        assert found.value.check == "K-12"
    # The order itself, once more: charged twice, which is too much and never too little.
    training.run_order(place.broker, sent[0])
    # An answer that was kept, to a later order.
    replaying = session(place, data, carry=lambda order: answered[0])
    with pytest.raises(HandshakeError) as found:
        replaying.charge(3)
    assert found.value.check == "H-5"
    silent = session(place, data, carry=lambda order: answered[0][:-2] + b"}")
    with pytest.raises(HandshakeError):
        silent.charge(3)


def test_a_lease_that_ended_orders_nothing(place, data, monkeypatch) -> None:
    run = session(place, data)
    now = training.time.time()
    monkeypatch.setattr(training.time, "time", lambda: now + 3601)
    with pytest.raises(KeyAccessError) as found:
        run.charge(1)
    assert found.value.check == "K-12"
    with pytest.raises(HandshakeError) as over:
        run.release.lease.check(now + 3601)
    assert over.value.check == "H-7"
    run.release.lease.check(now)


def test_a_revoked_model_ends_its_runs(place, data) -> None:
    run = session(place, data)
    enroll.revoke(place.broker, "data")
    with pytest.raises(KeyAccessError):
        run.charge(1)
    with pytest.raises(KeyAccessError):
        session(place, data)
