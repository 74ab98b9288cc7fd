"""``motte train`` from its words to its exit code, and what lies on the host's disk afterwards."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from motte.cli import main
from motte.seal import keys
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.train.owner import derived_signer
from motte.train.result import Progress

Words = Callable[..., list[str]]
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def words(digits: Path, net: str) -> Words:
    """The words of a tiny run; ``checkpoint_every=2`` becomes ``--checkpoint-every 2``."""

    def made(**options: Any) -> list[str]:
        given: dict[str, Any] = {
            "model": f"{net}:sure",
            "data": "mnist",
            "data_dir": digits,
            "image_size": 8,
            "batch_size": 8,
            "epochs": 1,
            "lr": 0.05,
            "threads": 1,
            **options,
        }
        found = ["train"]
        for name, value in given.items():
            if value is not None and value is not False:
                found += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return found

    return made


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    keys.new(tmp_path / "keys", "owner", RecipientPrivateKey)
    return tmp_path / "keys" / "owner.key"


def answer(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    found = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert found == status, err
    document: dict[str, Any] = json.loads(out)
    return document


@pytest.mark.parametrize("scheme", ["asymmetric", "trusted", "accelerator", "lowrank", "residual"])
def test_every_scheme_from_end_to_end(words: Words, capsys: pytest.CaptureFixture[str], scheme: str) -> None:
    noise = "none" if scheme in ("asymmetric", "residual") else None
    rank = "fixed:2" if scheme in ("asymmetric", "residual", "lowrank") else None
    found = answer(capsys, words(scheme=scheme, noise=noise, rank=rank))
    assert found["scheme"] == scheme
    assert found["steps"] == 3
    assert 0 <= found["test_accuracy"] <= 1
    assert len(found["curve"]) == 3
    assert (found["bytes_out"] > 0) is (scheme == "asymmetric")
    leaves_nothing = scheme in ("trusted", "lowrank", "residual")
    assert found["privacy"]["epsilon"] == (None if leaves_nothing else "infinite")
    assert found["simulated"] is (scheme != "accelerator")


@pytest.mark.slow
@pytest.mark.usefixtures("real_accelerator")
def test_with_an_accelerator_process_of_its_own(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer(capsys, words(scheme="trusted"))
    split = answer(capsys, words(noise="none", rank="fixed:2"))
    assert split["bytes_out"] > 0
    for one, other in zip(plain["curve"], split["curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_what_people_see(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(scheme="accelerator")) == 0
    out, err = capsys.readouterr()
    assert "NOT PROTECTED" in out
    assert "NOT PROTECTED" in err
    assert "test accuracy" in out
    assert "epoch 1/1: train loss" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a word about noise"),
        ({"noise": "gaussian"}, "not a kind of noise"),
        ({"noise": "none", "rank": "fixed"}, "not a rank rule"),
        ({"scheme": "trusted", "noise": "none"}, "adds no noise"),
        ({"scheme": "trusted", "resume": True}, "checkpoints need a directory"),
        ({"scheme": "trusted", "checkpoint_dir": "x"}, "checkpoints need a key"),
        ({"scheme": "trusted", "model": "resnet21"}, "resnet21"),
        ({"scheme": "trusted", "data": "mnists"}, "mnists"),
        ({"scheme": "trusted", "data": "sealed:x", "data_dir": None}, "sealed data needs"),
        ({"scheme": "trusted", "scheduler": "cos", "decay_period": 3}, "step scheduler"),
        ({"scheme": "trusted", "memory": "4GB"}, "4GB"),
        ({"noise": "none", "trusted_layers": "nowhere"}, "nowhere"),
        ({"scheme": "trusted", "made_up": True}, "made-up"),
    ],
)
def test_wrong_words_are_one_clear_error(
    words: Words, capsys: pytest.CaptureFixture[str], options: dict[str, Any], said: str
) -> None:
    assert main(words(**options)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    words: Words,
    owner: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
) -> None:
    run = words(scheme="trusted", checkpoint_dir=tmp_path / "c", checkpoint_key=owner, epochs=2)

    def interrupting(*_: object, **__: object) -> Callable[[Progress], None]:
        return lambda now: os.kill(os.getpid(), number) if now.step == 2 else None

    with monkeypatch.context() as patched:
        patched.setattr("motte.cli.train._teller", interrupting)
        assert main(run) == status
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if "--resume" in line] == [
        line for line in err.splitlines() if line.startswith("warning: stopped by")
    ]
    assert "--resume" in err
    found = answer(capsys, [*run, "--resume"])
    assert found["steps"] == 6
    assert found["test_accuracy"] == answer(capsys, words(scheme="trusted", epochs=2))["test_accuracy"]


def test_stopped_without_a_folder_nothing_is_kept_and_it_says_so(
    words: Words, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "motte.cli.train._teller",
        lambda *_, **__: lambda now: os.kill(os.getpid(), signal.SIGINT) if now.step == 1 else None,
    )
    assert main(words(scheme="trusted")) == 130
    assert "nothing was kept" in capsys.readouterr().err


def test_weights_and_plaintext_checkpoints(
    words: Words, owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, words(scheme="trusted", checkpoint_dir=tmp_path / "a", checkpoint_key=owner))
    answer(capsys, words(scheme="trusted", checkpoint_dir=tmp_path / "b", insecure_plaintext_checkpoint=True))
    sealed = ["train-weights", str(tmp_path / "a" / "last.checkpoint"), "--key", str(owner), "-o", str(tmp_path / "1")]
    assert main(sealed) == 2
    assert "--insecure-plaintext" in capsys.readouterr().err
    assert main([*sealed, "--insecure-plaintext"]) == 0
    plain = ["train-weights", str(tmp_path / "b" / "last.insecure-plaintext"), "-o", str(tmp_path / "2")]
    assert main([*plain, "--insecure-plaintext"]) == 0
    first, second = load_file(tmp_path / "1"), load_file(tmp_path / "2")
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def seal_photos(folder: Path, signer: Path, recipient: str) -> tuple[Path, list[bytes], list[str]]:
    """A sealed set of 8 x 8 photos of two classes; the rows of pixels and the class names that must not be seen."""
    rng = np.random.default_rng(3)
    rows, classes = [], ["canary-sickle", "canary-thalassa"]
    for split, count in (("train", 8), ("val", 2)):
        for name in classes:
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                values = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                rows.append(values.tobytes()[:48])
                Image.fromarray(values).save(folder / "photos" / split / name / f"{number}.png")
    sealed = folder / "photos.motte"
    arguments = ["seal-data", f"folder:{folder / 'photos'}", "-o", str(sealed), "--recipient", recipient]
    assert main([*arguments, "--signer-key", str(signer)]) == 0
    return sealed, rows, classes


@pytest.mark.slow
def test_private_data_leaves_no_plaintext_anywhere(tmp_path: Path, owner: Path, net: str) -> None:
    """Checkpoints, logs, output: nothing tells an image, a label's name, a weight, an accuracy or a loss."""
    signer = keys.new(tmp_path / "keys", "signer", SignerPrivateKey)
    opener = keys.load(owner, RecipientPrivateKey)
    sealed, rows, classes = seal_photos(tmp_path, tmp_path / "keys" / "signer.key", str(opener.public))
    model = tmp_path / "net.py"
    model.write_text(
        Path(net.partition(":")[0]).read_text().replace("Conv2d(1, 6", "Conv2d(3, 6").replace("16, 10)", "16, 2)")
    )
    text = (
        f"train --model {model}:smooth --data sealed:{sealed} --data-key {owner} --data-signer {signer.public}"
        " --noise gaussian:residual=5/0.5,gradient=0.1/0.5,update=1/0.5 --rank fixed:2 --lr 0.05 --batch-size 4"
        f" --epochs 2 --threads 1 --checkpoint-dir {tmp_path / 'run'} --log-dir {tmp_path / 'run'} --profile --json"
    )
    done = subprocess.run(
        [sys.executable, "-m", "motte", *shlex.split(text)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 8
    assert not {"test_accuracy", "test_loss", "train_loss", "history", "curve"} & set(found)
    assert "accuracy" not in done.stderr
    assert "SIMULATED" in done.stderr
    assert isinstance(found["privacy"]["epsilon"], float)

    from motte.train.checkpoint import read_checkpoint
    from motte.train.sealed_log import read_log

    demanded = derived_signer(opener).public
    last, _ = read_checkpoint(tmp_path / "run" / "last.checkpoint", (opener, demanded))
    log = read_log(tmp_path / "run" / "train-0001.motte-log", opener, signer=demanded)
    assert log.closed
    assert {entry["kind"] for entry in log.entries} == {"scalars", "ranks", "profile"}
    assert last.session is not None
    weights = [tensor.numpy().tobytes()[:32] for name, tensor in last.tensors.items() if name.startswith("m")]
    secrets = [*rows, *(name.encode() for name in classes), *weights, last.session.noise_key]
    secrets += [last.session.noise_key.hex().encode(), b"accuracy", b"loss/"]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best.checkpoint", "last.checkpoint", "newest-release", "train-0001.motte-log"]
    for path in (tmp_path / "run").iterdir():
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret in data], path.name
    # The owner reads it.
    assert main(["train-log", str(tmp_path / "run" / "train-0001.motte-log"), "--key", str(owner)]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("real_accelerator")
def test_two_halves_of_a_batch_on_two_processes_are_the_batch(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    alone = answer(capsys, words(scheme="trusted", checkpoint_dir=whole, insecure_plaintext_checkpoint=True))
    halves = words(noise="none", rank="fixed:2", checkpoint_dir=tmp_path / "halves", insecure_plaintext_checkpoint=True)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "motte"]
    done = subprocess.run(
        [*start, *halves, "--insecure-plaintext-collectives", "--json"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["processes"] == 2
    assert together["bytes_out"] > 0
    assert together["privacy"] == {
        "epsilon": "infinite",
        "because": "gradients between the trusted processes cross the network unencrypted",
        "statement": None,
    }
    for one, other in zip(alone["curve"], together["curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert together["test_loss"] == pytest.approx(alone["test_loss"], abs=1e-5)
    first, second = (load_file(folder / "last.insecure-plaintext") for folder in (whole, tmp_path / "halves"))
    for name in first:
        if name.startswith("model/"):
            assert torch.allclose(first[name], second[name], atol=1e-5), name
