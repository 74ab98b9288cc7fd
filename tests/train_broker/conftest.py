"""A key broker in a thread of this process, data that was sealed for it, and an accelerator that counts what comes."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the extra motte[broker] is not installed")
pytest.importorskip("fastapi", reason="the extra motte[broker] is not installed")
pytest.importorskip("uvicorn", reason="the extra motte[broker] is not installed")

import torch
import typer
import uvicorn
from sqlalchemy import select
from torch import Tensor

from motte.accelerator.in_process import InProcessAccelerator
from motte.attest.anchors import Anchors
from motte.attest.policy_text import loads
from motte.cli import main
from motte.enclave.process_measurement import measure_process
from motte.provision.address import BrokerAddress
from motte.provision.broker import enroll, log, policies, state, tables
from motte.provision.broker.app import make_app
from motte.provision.broker.wrapping import Unlock
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey, load, new
from motte.seal.tls import parse_pin, server_context

TRAIN, TEST = 24, 8
LAYERS = ("stage1.0.conv1", "stage1.0.conv2")
NOISE = "gaussian:residual=1.0/2.0,gradient=0.1/2.0,update=1.0/2.0"
STEP = 3 * len(LAYERS)
"""Releases of one step of one process."""
Answer = tuple[int, dict[str, Any], str]


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


@dataclass
class Estate:
    """A broker that serves, and what the owner, the broker and the host have on their disks."""

    folder: Path
    broker: state.Broker
    address: BrokerAddress
    measurement: str
    signer: str
    development: str
    sealed: dict[str, Path] = field(default_factory=dict)

    def run(self, model: str, budget: int) -> bytes:
        """A new run on the data ``model``."""
        name = np.random.default_rng().bytes(16)
        enroll.enroll_run(self.broker, model, name, budget)
        return name

    def books(self, run: bytes) -> tuple[int, int]:
        """Releases charged, and the newest checkpoint."""
        with self.broker.store.read() as db:
            row = db.execute(select(tables.runs).where(tables.runs.c.run == run)).one()
            return int(row.charged), int(row.checkpoint)

    def entries(self, kind: str) -> int:
        """Entries of the audit log."""
        with self.broker.store.read() as db:
            return sum(each.kind == kind for each in log.entries(db))

    def seal(self, name: str, *words: str) -> Path:
        """Seal the digits for this broker as the data ``name``."""
        path = self.folder / f"{name}.motte-data"
        keys = self.folder / "keys"
        given = ["seal-data", "mnist", "--data-dir", str(self.folder / "digits"), "-o", str(path), "--quiet"]
        given += ["--signer-key", str(keys / "signer.key"), "--recipient", str(keys / "owner.pub")]
        given += ["--broker", str(self.address), "--broker-policy", "training", "--broker-model", name]
        assert main([*given, "--model", "resnet20", "--width", "0.125", *words]) == 0
        self.sealed[name] = path
        return path

    def policy_file(self, seconds: int = 120) -> Path:
        """What each process demands of evidence."""
        path = self.folder / f"policy-{seconds}.json"
        path.write_text(policy_text(self.measurement, seconds))
        return path


def policy_text(measurement: str, seconds: int) -> str:
    wanted = [{"insecure_allow_simulated": {}}, {"platform": ["simulated"]}, {"not_debug": {}}]
    wanted += [{"measurement": {"allowed": [measurement]}}, {"fresh": {"max_age_s": seconds}}]  # type: ignore[list-item]
    return json.dumps({"format": "motte-policy-1", "policy": {"all_of": wanted}})


@pytest.fixture(scope="session")
def measured() -> Iterator[bytes]:
    """The measurement of this code, taken once: it counts every source file, and somebody may be writing one."""
    found = measure_process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motte.enclave.process_measurement.measure_process", lambda: found)
        yield found


@contextlib.contextmanager
def _served(broker: state.Broker) -> Iterator[BrokerAddress]:
    """The broker's service in a thread: the same application and TLS as ``motte broker serve``."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        config = uvicorn.Config(
            make_app(broker),
            ssl_context_factory=lambda config, default: server_context(broker.tls),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        yield BrokerAddress("127.0.0.1", sock.getsockname()[1], parse_pin(broker.tls.pin), broker.signer.public)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def estate(tmp_path_factory: pytest.TempPathFactory, measured: bytes) -> Iterator[Estate]:
    """One broker for all, under a policy that takes simulated evidence of this very code."""
    folder = tmp_path_factory.mktemp("estate")
    digits = folder / "digits"
    digits.mkdir()
    rng = np.random.default_rng(1)
    for name, count in (("train", TRAIN), ("t10k", TEST)):
        write_idx(digits / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(digits / f"{name}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    new(folder / "keys", "owner", RecipientPrivateKey)
    new(folder / "keys", "signer", SignerPrivateKey)
    signer = load(folder / "keys" / "signer.key", SignerPrivateKey)
    assert main(["attest", "simulated", "new-key", str(folder / "development.key"), "--quiet"]) == 0
    from motte.attest.platforms.simulated_key import read_key

    development = read_key(folder / "development.key").public
    measurement = measured.hex()
    broker = state.create(folder / "broker", Unlock(key_file=folder / "wrapping.key"))
    policies.set_policy(
        broker,
        "training",
        loads(policy_text(measurement, 120)),
        anchors=Anchors(simulated_signers=(development,)),
        owners=[signer.public],
    )
    with _served(broker) as address:
        yield Estate(folder, broker, address, measurement, str(signer.public), development.hex())
    broker.close()


@pytest.fixture(scope="session")
def data(estate: Estate) -> str:
    """Data for runs that split two layers under noise, on an accelerator that they start themselves."""
    layers = [word for name in LAYERS for word in ("--offload-layers", name)]
    estate.seal("digits", "--noise", NOISE, "--accelerator", "local", *layers)
    return "digits"


class Watched(InProcessAccelerator):
    """Notes, at every tensor that arrives, how many have come and what the broker had charged by then."""

    seen: tuple[list[int], Callable[[], int]] | None = None

    def forward(self, *given: Any, **more: Any) -> Any:
        self.arrived(1)
        return super().forward(*given, **more)

    def backward(self, *given: Any, **more: Any) -> Any:
        self.arrived(2)  # the gradient, and with it the update that the next weight shows
        return super().backward(*given, **more)

    @staticmethod
    def arrived(tensors: int) -> None:
        if Watched.seen is not None:
            found, charged = Watched.seen
            found.append(found[-1] + tensors if found else tensors)
            assert found[-1] <= charged(), "a tensor left before it was charged"

    def answer(self, layer: str, y: Tensor) -> Tensor:
        return y


class _Here:
    """Stands for :class:`motte.accelerator.process.LocalAccelerator`: the same frames, without a process."""

    def __init__(self, device: str, *, threads: int, retries: int, recorder: Any) -> None:
        self.link = Watched(device, recorder)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()


_COMMAND = functools.cache(typer.main.get_command)
"""Made once: it takes longer to make than a run here takes."""


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.main.get_command", _COMMAND)
    monkeypatch.setattr(Watched, "seen", None)
    torch.set_num_threads(1)
    monkeypatch.setattr("motte.accelerator.process.LocalAccelerator", _Here)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def watched() -> type[Watched]:
    """Set ``seen`` to follow what arrives at the accelerator."""
    return Watched


Train = Callable[..., Answer]


@pytest.fixture
def words(estate: Estate, data: str, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of ``motte train`` for a run of the broker. ``name=None`` leaves an option out."""

    def made(run: bytes, **options: Any) -> list[str]:
        given: dict[str, Any] = {
            "model": "resnet20",
            "width": "0.125",
            "data": f"sealed:{estate.sealed[data]}",
            "data_signer": estate.signer,
            "noise": NOISE,
            "offload_layers": LAYERS,
            "image_size": 8,
            "batch_size": 8,
            "epochs": 1,
            "lr": 0.01,
            "threads": 1,
            "checkpoint_dir": tmp_path / "run",
            "broker": estate.address,
            "broker_run": run.hex(),
            "evidence": "simulated",
            "simulated_key": estate.folder / "development.key",
            **options,
        }
        found = ["train", "--json"]
        for name, value in given.items():
            for each in value if isinstance(value, tuple) else (value,):
                if each is not None and each is not False:
                    found += [f"--{name.replace('_', '-')}"] + ([] if each is True else [str(each)])
        return found

    return made


@pytest.fixture
def train(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> Train:
    """``motte train`` for a run of the broker: its status, its JSON, its errors."""

    def made(run: bytes, **options: Any) -> Answer:
        given = words(run, **options)
        capsys.readouterr()
        status = main(given)
        out, err = capsys.readouterr()
        return status, json.loads(out) if out.startswith("{") else {}, err

    return made
