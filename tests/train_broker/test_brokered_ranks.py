"""Two trusted processes on one run of a broker: one asks for keys, the other gets them over its attested channel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motte.attest.configuration import RunConfiguration
from motte.train.admission import granted
from motte.train.attested_star import AttestedCollectives
from motte.train.books import Charges
from motte.train.distributed import World
from motte.train.meeting import Meeting

STEP = 6
# One import of torch for both: each process is a fork of this one, made before anything has threads.
SCRIPT = r"""
import contextlib, io, json, os, sys, time
from pathlib import Path
import torch, torch.distributed
import torch._dynamo  # DistributedDataParallel loads it, slowly
import motte.accelerator.process, motte.enclave.process_measurement, motte.train.loop
from motte.accelerator.in_process import InProcessAccelerator
from motte.cli import main

torch.set_num_threads(1)
folder, measured, words = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), json.loads(sys.argv[3])
motte.enclave.process_measurement.measure_process = lambda: measured


@contextlib.contextmanager
def here(device, *, threads, retries, recorder):
    link = InProcessAccelerator(device, recorder)
    link.link = link
    yield link
    link.close()


motte.accelerator.process.LocalAccelerator = here
for start in range(2):
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            out, err = io.StringIO(), io.StringIO()
            sys.stdout, sys.stderr = out, err
            status = main([*words, *(["--resume"] if start else ["--max-steps", "2"])])
            found = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
            (folder / f"{start}-{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def pair(estate: Any) -> str:
    """Data for runs of two processes."""
    layers = [word for name in ("stage1.0.conv1", "stage1.0.conv2") for word in ("--offload-layers", name)]
    who = ["--ranks", "2", "--verify", str(estate.policy_file()), "--simulated-signer", estate.development]
    estate.seal("pair", "--noise", "none", "--integrity", "off", *layers, *who)
    return "pair"


@pytest.fixture
def together(estate: Any, pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options that both processes are given. In this process nobody waits long for the other."""
    patient = Meeting.collectives

    def impatient(meeting: Meeting, configuration: RunConfiguration) -> AttestedCollectives:
        return replace(patient(meeting, configuration), connect_timeout_s=0.3)

    monkeypatch.setattr(Meeting, "collectives", impatient)
    return {
        "data": f"sealed:{estate.sealed[pair]}",
        "noise": "none",
        "integrity": "off",
        "verify": estate.policy_file(),
        "simulated_signer": estate.development,
        "meet": f"unix:{tmp_path / 'meet.sock'}",
    }


def test_two_processes_train_and_go_on(
    estate: Any, words: Any, together: dict[str, Any], measured: bytes, tmp_path: Path
) -> None:
    run = estate.run("pair", 100)
    before = estate.entries("released")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), measured.hex(), json.dumps(words(run, **together))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [[json.loads((tmp_path / f"{start}-{rank}.json").read_text()) for rank in range(2)] for start in range(2)]
    assert [[each["status"] for each in start] for start in found] == [[0, 0], [0, 0]], found
    first, second = (json.loads(start[0]["out"]) for start in found)
    assert first["processes"] == 2
    assert first["broker"] == {"run": run.hex(), "charged": 2 * 2 * STEP, "checkpoint": 2}
    # The other process has no books and writes nothing.
    assert [start[1]["out"] for start in found] == ["", ""]
    assert second["steps"] == 3
    assert estate.books(run) == (3 * 2 * STEP, 3)
    assert estate.entries("released") - before == 2  # one handshake for each start, not for each process


@pytest.mark.parametrize("what", ["policy", "root", "none", "plaintext"])
def test_a_host_does_not_choose_whom_process_0_believes(
    estate: Any, train: Any, together: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def issue(*_: object, **__: object) -> None:
        raise AssertionError("evidence was made")

    monkeypatch.setattr("motte.attest.platforms.simulated.issue", issue)
    monkeypatch.setenv("WORLD_SIZE", "2")
    changed: dict[str, Any] = {
        "policy": {"verify": estate.policy_file(86_400)},
        "root": {"simulated_signer": "00" * 32},
        "none": {"verify": None, "meet": None, "simulated_signer": None},
        "plaintext": {"verify": None, "meet": None, "simulated_signer": None, "insecure_plaintext_collectives": True},
    }[what]
    status, _, err = train(b"r" * 16, **{**together, **changed})
    assert status == 2
    wanted = {"none": "several processes that prove themselves", "plaintext": "no host decides"}
    assert wanted.get(what, "where: the policy that processes demand of each other\n") in err


def test_without_all_processes_no_key_is_asked_for(
    estate: Any, train: Any, together: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = estate.entries("released")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = train(estate.run("pair", 100), **together)
    assert status == 1
    assert "trusted processes of this run are missing (X-12)" in err
    assert "none for 1" in err
    assert estate.entries("released") == before


def test_a_process_alone_takes_no_place_of_two(train: Any, together: dict[str, Any]) -> None:
    status, _, err = train(b"r" * 16, **together)
    assert status == 2
    assert "where: ranks\n  expected: 2\n  got: 1\n" in err


def test_nothing_of_it_crosses_in_the_clear() -> None:
    from motte.errors import KeyAccessError, SettingError

    with pytest.raises(KeyAccessError, match="plaintext"):
        Charges(None, World(1, 2))
    with pytest.raises(SettingError, match="attested channels only"), granted(*[None] * 4, World(1, 2)):  # type: ignore[arg-type]
        pass
