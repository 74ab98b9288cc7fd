"""Two trusted processes train over attested channels: the same numbers, to the bit, as over gloo."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    )
"""
# One import of torch for all: each process of each world is a fork of this one, made before anything has threads.
SCRIPT = r"""
import json, os, sys, hashlib, traceback
from pathlib import Path
import torch, torch.distributed
import torch._dynamo  # DistributedDataParallel loads it, slowly
from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.platforms import simulated
from motte.attest.policy import AllOf, Fresh, InsecureAllowSimulated, Measurement
from motte.errors import MotteError
from motte.train.attested_star import AttestedCollectives
from motte.train.loop import train
from motte.train.settings import TrainSettings

torch.set_num_threads(1)
folder, port, signing, public = Path(sys.argv[1]), int(sys.argv[2]), *map(bytes.fromhex, sys.argv[3:])
configuration = RunConfiguration(
    bundle_id=b"i" * 16, release=1, signer=b"s" * 32, scheme="trusted", placement="all", noise=None, integrity="off",
    ranks=2,
)
measurement = b"m" * 32


def one(world, rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    attested = None
    if world == "attested":
        attested = AttestedCollectives(
            configuration=configuration,
            issue=lambda data: simulated.issue(data, private=signing, measurement=measurement),
            policy=AllOf(InsecureAllowSimulated(), Measurement(frozenset({measurement.hex()})), Fresh(60)),
            anchors=Anchors(simulated_signers=(public,)),
            address=f"unix:{folder / 'meet.sock'}",
        )
    settings = TrainSettings(
        model=f"{folder / 'net.py'}:net", data="mnist", data_dir=folder, image_size=8, batch_size=8, epochs=2, lr=0.05,
        threads=1, scheme="trusted", attested_collectives=attested, insecure_plaintext_collectives=attested is None,
        checkpoint_dir=folder / world, insecure_plaintext_checkpoint=True,
    )
    result = train(settings)
    state = hashlib.sha256()
    for name, tensor in result.model.state_dict().items():
        state.update(name.encode() + tensor.numpy().tobytes())
    return {
        "curve": [point.loss.hex() for point in result.curve], "test": result.test_loss.hex(),
        "accuracy": result.test_accuracy, "state": state.hexdigest(), "processes": result.processes,
        "spent": str(result.spent),
    }


for world in ("gloo", "attested"):
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                found = one(world, rank)
            except BaseException:
                found = {"error": traceback.format_exc()}
            (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


def test_the_same_numbers_as_over_gloo(trusted: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name, count in (("train", 24), ("t10k", 8)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    (tmp_path / "net.py").write_text(NET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (public,) = trusted.anchors.simulated_signers
    arguments = [str(tmp_path), str(port), trusted.signing.hex(), public.hex()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    names = [f"{world}-{rank}" for world in ("gloo", "attested") for rank in range(2)]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    assert not any("error" in each for each in found.values()), found
    for rank in range(2):  # BatchNorm's statistics are each process's own, so states of two processes may differ
        plain, attested = (
            {key: found[f"{world}-{rank}"][key] for key in ("curve", "test", "accuracy", "state", "processes")}
            for world in ("gloo", "attested")
        )
        assert plain == attested
        assert len(set(plain["curve"])) == 6
        assert plain["processes"] == 2
    assert found["attested-0"]["curve"] == found["attested-1"]["curve"]
    assert "unencrypted" in found["gloo-0"]["spent"]
    assert "unencrypted" not in found["attested-0"]["spent"]
