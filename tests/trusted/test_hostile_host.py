"""A host that kills, stops, swaps and alters: each time one clear error in time, no output, and a fresh start works."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from motte.errors import (
    BundleError,
    DecryptError,
    FrameError,
    KeyAccessError,
    MotteError,
    RollbackError,
    SignatureError,
    WorkerClosed,
    WorkerDied,
    WorkerStalled,
)
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey

PLAIN = {"keys": "recipient", "channel": "plain"}
X = torch.zeros(1, 3, 16, 16)


def test_killed_while_it_runs(sealed) -> None:
    model = sealed.load(timeout_s=60)
    os.kill(model.pid, signal.SIGSTOP)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            model(X)
        except MotteError as problem:
            failures.append(problem)

    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(0.2)
    os.kill(model.pid, signal.SIGKILL)
    caller.join(30)
    assert not caller.is_alive()
    assert isinstance(failures[0], WorkerDied)
    assert "SIGKILL" in str(failures[0])
    with pytest.raises(WorkerClosed):
        model(X)
    with sealed.load() as again:
        assert again(X).shape == (1, 10)


def test_stopped_while_it_runs_is_a_stall_within_the_time_limit_and_leaves_no_process(sealed) -> None:
    model = sealed.load(timeout_s=20)
    model._settings = type(model._settings)(timeout_s=0.5)
    os.kill(model.pid, signal.SIGSTOP)
    with pytest.raises(WorkerStalled, match=r"within 0.5 s"):
        model(X)
    with pytest.raises(ProcessLookupError):
        os.kill(model.pid, 0)
    with sealed.load() as again:
        assert again(X).shape == (1, 10)


def test_the_worker_ends_when_its_client_closes_the_link(sealed) -> None:
    model = sealed.load()
    pid = model.pid
    model.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def altered(sealed, tmp_path: Path, offset: int) -> Path:
    path = tmp_path / "altered.motte"
    data = bytearray(sealed.path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("offset", [-1, -20, -5000])
def test_an_altered_part_is_refused_and_nothing_is_answered(sealed, tmp_path: Path, offset: int) -> None:
    with pytest.raises(DecryptError) as caught:
        sealed.load(path=altered(sealed, tmp_path, offset))
    assert caught.value.check == "B-21"
    assert "part" in str(caught.value)


def test_an_altered_header_is_refused_before_a_worker_starts(sealed, tmp_path: Path) -> None:
    with pytest.raises((SignatureError, BundleError)):
        sealed.load(path=altered(sealed, tmp_path, 60))


def test_altered_between_two_answers_in_streamed_mode(sealed, tmp_path: Path) -> None:
    path = tmp_path / "streamed.motte"
    shutil.copy(sealed.path, path)
    with sealed.load(path=path, mode="streamed", weight_memory_bytes=1 << 20) as model:
        assert model(X).shape == (1, 10)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        with pytest.raises(DecryptError, match="does not authenticate") as caught:
            model(X)
        assert caught.value.check == "B-21"
        with pytest.raises(WorkerClosed):
            model(X)


def test_cut_off_between_two_answers_in_streamed_mode(sealed, tmp_path: Path) -> None:
    path = tmp_path / "streamed.motte"
    shutil.copy(sealed.path, path)
    with sealed.load(path=path, mode="streamed", weight_memory_bytes=1 << 20) as model:
        model(X)
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises((BundleError, DecryptError)):
            model(X)


def test_rollback_wrong_signer_and_wrong_key(sealed) -> None:
    with pytest.raises(RollbackError, match=r"3"):
        sealed.load(min_release=4)
    with sealed.load(min_release=3) as model:
        assert model(X).shape == (1, 10)
    with pytest.raises(SignatureError):
        sealed.load(signer=SignerPrivateKey.new().public)
    with pytest.raises(KeyAccessError):
        sealed.load(keys=RecipientPrivateKey.new())


def test_another_bundle_at_the_same_path_does_not_open_with_this_grant(sealed, seal_parts, tmp_path: Path) -> None:
    # The host swaps the file between the client's look and the worker's: the grant is bound to the first one.
    from motte.enclave.process import WorkerProcess
    from motte.link.frames import Frame, Kind
    from motte.provision.grant import make_grant
    from motte.run.model import _open_meta, offer_bundle
    from motte.run.settings import LoadSettings
    from motte.run.told import reported
    from motte.seal.reader import open_bundle

    other = seal_parts(2)
    with open_bundle(sealed.path, signer=sealed.signer.public) as bundle:
        header, kek = bundle.header, bundle.unwrap(sealed.recipient)
    worker = WorkerProcess(threads=1)
    try:
        grant, _ = make_grant(kek, worker.hello.public_key, bundle_id=header.bundle_id, release=header.release)
        settings = LoadSettings(threads=1)
        offer_bundle(
            worker,
            other.path,
            _open_meta(other.signer.public, settings, PLAIN),
            settings,
        )
        worker.send(Frame(Kind.GRANT, {"sealed": grant.hex()}), timeout_s=30)
        problem, fatal = reported(worker.receive(timeout_s=60))
    finally:
        worker.kill()
    assert isinstance(problem, DecryptError)
    assert fatal


def test_the_worker_takes_no_order_out_of_turn(sealed) -> None:
    from motte.enclave.process import WorkerProcess
    from motte.link.frames import Frame, Kind
    from motte.run.told import reported

    worker = WorkerProcess(threads=1)
    try:
        worker.send(Frame(Kind.GRANT, {"sealed": "00"}), timeout_s=30)
        problem, fatal = reported(worker.receive(timeout_s=60))
    finally:
        worker.kill()
    assert isinstance(problem, FrameError)
    assert fatal


@pytest.mark.parametrize("sealed_grant", ["00", "zz" * 168, "00" * 168, 7])
def test_a_grant_that_is_none_is_refused(sealed, sealed_grant: object) -> None:
    from motte.enclave.process import WorkerProcess
    from motte.link.frames import Frame, Kind
    from motte.run.model import _open_meta, offer_bundle
    from motte.run.settings import LoadSettings
    from motte.run.told import reported

    worker = WorkerProcess(threads=1)
    try:
        settings = LoadSettings(threads=1)
        offer_bundle(
            worker,
            sealed.path,
            _open_meta(sealed.signer.public, settings, PLAIN),
            settings,
        )
        worker.send(Frame(Kind.GRANT, {"sealed": sealed_grant}), timeout_s=30)
        problem, fatal = reported(worker.receive(timeout_s=60))
    finally:
        worker.kill()
    assert isinstance(problem, (FrameError, DecryptError))
    assert fatal


def test_noise_instead_of_frames_ends_the_worker(sealed) -> None:
    from motte.enclave.process import WorkerProcess
    from motte.link.frames import Kind

    worker = WorkerProcess(threads=1)
    try:
        worker.link._socket.sendall(b"\xff" * 4096)
        assert worker.receive(timeout_s=60).kind is Kind.ERROR
        with pytest.raises(WorkerDied):
            worker.receive(timeout_s=60)
    finally:
        worker.kill()


def test_every_start_says_that_it_is_simulated(sealed, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="motte"), sealed.load() as model:
        assert model.simulated
    assert "SIMULATED: no hardware protection" in caplog.text


def test_the_worker_is_hardened_and_keeps_its_own_threads(sealed) -> None:
    with sealed.load(threads=1) as model:
        proc = Path("/proc") / str(model.pid)
        limits = (proc / "limits").read_text()
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
        status = (proc / "status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert not model._worker.hello.hardening.dumpable
        assert model._worker.hello.threads == 1
        if os.geteuid() == 0:
            environment = (proc / "environ").read_bytes()
            assert b"OMP_WAIT_POLICY=PASSIVE" in environment
            assert b"OMP_NUM_THREADS=1" in environment


def test_the_worker_sees_none_of_our_environment(sealed, monkeypatch) -> None:
    monkeypatch.setenv("MOTTE_SECRET_OF_THE_CLIENT", "value")
    if os.geteuid() != 0:
        pytest.skip("reading the environment of a non-dumpable process needs root")
    with sealed.load() as model:
        assert b"MOTTE_SECRET_OF_THE_CLIENT" not in (Path("/proc") / str(model.pid) / "environ").read_bytes()
