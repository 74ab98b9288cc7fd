"""``motte accelerator serve``: it comes up, says where, serves, and goes with Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from motte.accelerator.connect import connect
from motte.cli import accelerator
from motte.linear.operation import LinearOperation

LINEAR = LinearOperation("linear", 5, 3)
SCRIPT = "import sys; from motte.cli import accelerator; accelerator.app(sys.argv[1:])"


def serve(*options: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SCRIPT, "serve", *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)


def test_it_serves_until_ctrl_c_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    process = serve("--listen", f"unix:{path}", "--threads", "1", "--shared-memory", "16MiB")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"listening at unix:{path}" in line
    assert "cpu, 1 threads" in line
    with connect(f"unix:{path}") as client:
        client.register("layer", LINEAR)
        client.put_weight("layer", torch.ones(LINEAR.weight_shape))
        assert float(client.forward("layer", torch.ones(1, 5), step=1, hold=False).result()[0, 0]) == 5.0
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not path.exists()


def test_json_and_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.main.get_command(accelerator.app)
    command.main(["cert", "server", "--folder", str(tmp_path), "--json"], standalone_mode=False)
    pin = json.loads(capsys.readouterr().out)["pin"]
    keys = ["--tls-cert", f"{tmp_path}/server.crt", "--tls-key", f"{tmp_path}/server.key"]
    process = serve("--listen", "tcp:127.0.0.1:0", *keys, "--json")
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        text += process.stdout.readline()
    document = json.loads(text)
    assert document["pin"] == pin
    with connect(document["address"], pin=pin) as client:
        assert client.greeting.shared_memory == "none"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--listen", "tcp:0.0.0.0:0"], "TLS only"),
        (["--listen", "tcp:0.0.0.0:0", "--tls"], "only known clients"),
        (["--listen", "nonsense"], "not an address"),
        (["--listen", "unix:/tmp/x", "--device", "cuda:99"], "no such device"),
        (["--listen", "tcp:127.0.0.1:0", "--tls-cert", "x"], "go together"),
        (["--listen", "tcp:127.0.0.1:0", "--tls", "--tls-cert", "x", "--tls-key", "x"], "a new key, or one from files"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert typer.main.get_command(accelerator.app).main(["serve", *options], standalone_mode=False) == 2
    assert said in capsys.readouterr().err
