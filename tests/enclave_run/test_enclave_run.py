"""motte enclave run: the kind process for real; Gramine and a guest through stand-ins that do what they do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motte.trusted import landlock

Motte = Callable[..., Any]
PEERS = ("tcp:127.0.0.1:7001", "tcp:127.0.0.1:7002")
TRIES = """
import os, socket, subprocess, sys, tempfile
def attempt(name, act):
    try:
        act()
        print(name, "done")
    except OSError as problem:
        print(name, problem.errno)
readable, writable, port = sys.argv[1:4]
attempt("read-named", lambda: open(f"{readable}/x").read())
attempt("read-other", lambda: open(f"{readable}/../secret").read())
attempt("write-named", lambda: open(f"{writable}/made", "w").write("made"))
attempt("write-readable", lambda: open(f"{readable}/made", "w"))
attempt("temporary", lambda: tempfile.TemporaryFile().write(b"x"))
attempt("connect", lambda: socket.create_connection(("127.0.0.1", int(port))).close())
attempt("listen", lambda: socket.socket().bind(("127.0.0.1", 0)))
attempt("program", lambda: subprocess.run(["/bin/true"]))
attempt("parent", lambda: os.kill(os.getppid(), 0))
"""


def words(owner: Any, configuration: Path, *more: object, kind: str = "process") -> tuple[object, ...]:
    return ("enclave", "run", "--enclave", kind, "--configuration", configuration, "--signer", owner.public, *more)


def python(owner: Any, *arguments: object) -> tuple[object, ...]:
    return ("--", "python", owner.script, *arguments)


def test_rank_and_peers_come_from_the_owner_and_not_from_the_host(
    motte: Motte, owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "9", "MASTER_ADDR": "evil", "SECRET": "x", "LD_PRELOAD": ""}.items():
        monkeypatch.setenv(name, value)
    configuration = owner.signed("run.json", "0", "--lr", "1", rank=1, ranks=2, peers=PEERS)
    found = motte(*words(owner, configuration), *python(owner, "0", "--lr", "1"))
    assert found.code == 0, found.err
    said = found.json
    assert (said["arguments"], said["name"], said["beside"]) == (["0", "--lr", "1"], "__main__", 7)
    assert (said["rank"], said["ranks"], said["peers"], said["stdin"]) == (1, 2, list(PEERS), "")
    given = said["environment"]
    assert (given["RANK"], given["WORLD_SIZE"], given["LOCAL_RANK"]) == ("1", "2", "0")
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("127.0.0.1", "7001")
    assert not {"SECRET", "LD_PRELOAD", "MOTTE_DEBUG", "PYTEST_CURRENT_TEST"} & set(given)
    assert "SIMULATED: no hardware protection" in found.err
    assert "RANK, WORLD_SIZE, MASTER_ADDR of the environment: dropped" in found.err
    assert "not hardened: seccomp: not for scripts" in found.err
    # Alone, it has no rank at all.
    alone = motte(*words(owner, owner.signed("alone.json", "3")), "--json", *python(owner, "3"))
    assert (alone.code, alone.json["exit_status"], alone.json["ranks"]) == (3, 3, 1)
    assert '"RANK"' not in alone.err


def test_what_the_owner_did_not_sign_does_not_run(motte: Motte, owner: Any) -> None:
    configuration = owner.signed("run.json", "0")
    assert "other arguments" in motte(*words(owner, configuration), *python(owner, "1")).err
    for command in (("python", "-c", "1"), ("sh", owner.script), ("python",), ("python", owner.folder / "none.py")):
        assert motte(*words(owner, configuration), "--", *command).code == 2
    stranger = owner.folder / "stranger.pub"
    from motte.seal.keys import SignerPrivateKey, new

    new(owner.folder, "stranger", SignerPrivateKey)
    refused = motte(
        "enclave", "run", "--enclave", "process", "--configuration", configuration, "--signer", stranger, "--json",
        *python(owner, "0"),
    )  # fmt: skip
    assert refused.json["error"]["kind"] == "SignatureError"
    owner.script.write_text(owner.script.read_text() + "\n# one byte more\n")
    changed = motte(*words(owner, configuration), *python(owner, "0"))
    assert (changed.code, "another script than the owner signed" in changed.err, changed.out) == (2, True, "")


def test_the_process_checks_for_itself(owner: Any) -> None:
    """A host that leaves out our launcher, and its checks, gets no further."""
    from motte.enclave.script_main import REFUSED
    from motte.seal.keys import SignerPublicKey, load_public

    configuration = owner.signed("run.json", "0")
    signer = load_public(owner.public, SignerPublicKey).raw.hex()
    main = [sys.executable, "-m", "motte.enclave.script_main", "--fd", "0", "--script", str(owner.script)]
    for line, given, reason in (
        ([*main, "--signer", "11" * 32], configuration.read_bytes(), "not signed by the demanded key"),
        ([*main, "--signer", signer], configuration.read_bytes()[:-1], "not valid JSON"),
        ([*main, "--signer", signer, "--rank", "0"], configuration.read_bytes(), "not an argument"),
    ):
        done = subprocess.run(line, input=given, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout) == (REFUSED, b"")
        assert reason in done.stderr.decode()


def test_the_script_has_what_it_is_named_and_nothing_else(motte: Motte, owner: Any) -> None:
    try:
        landlock.abi()
    except OSError as problem:
        pytest.skip(landlock.why_not(problem))
    # Its own folder is readable, so it has one of its own.
    script = owner.folder / "code" / "tries.py"
    script.parent.mkdir()
    script.write_text(TRIES)
    place = owner.folder / "place"
    for folder in ("readable", "writable"):
        (place / folder).mkdir(parents=True)
    (place / "readable" / "x").write_text("x")
    (place / "secret").write_text("s")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        arguments = (str(place / "readable"), str(place / "writable"), port)
        results = []
        for accelerator in ("", f"tcp:127.0.0.1:{port}"):
            configuration = owner.signed(
                f"run{bool(accelerator)}.json", *arguments, script=script, accelerator=accelerator
            )
            found = motte(
                *words(owner, configuration, "--read", place / "readable", "--write", place / "writable"),
                *("--", "python", script, *arguments),
            )
            assert found.code == 0, found.err
            results.append(dict(line.rsplit(" ", 1) for line in found.out.splitlines()))
    closed = "13"
    expected = {
        "read-named": "done", "read-other": closed, "write-named": "done", "write-readable": closed,
        "temporary": "done", "program": closed,
    }  # fmt: skip
    for result in results:
        assert {name: result[name] for name in expected} == expected
    assert (place / "writable" / "made").read_text() == "made"
    if landlock.abi() >= 4:
        assert [result["connect"] for result in results] == [closed, "done"]
        assert [result["listen"] for result in results] == [closed, closed]
    if landlock.abi() >= 6:
        assert results[0]["parent"] == "1"


def test_a_split_model_trains_in_it_with_its_accelerator(motte: Motte, owner: Any) -> None:
    pytest.importorskip("torch")
    script = owner.folder / "train.py"
    script.write_text(
        "import torch, motte\n"
        "from motte.enclave.script_run import current\n"
        "run = current()\n"
        "torch.manual_seed(0)\n"
        "layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 3)]\n"
        "model = motte.protect(torch.nn.Sequential(*layers), run.asymmetric(), accelerator=run.accelerator)\n"
        "model(torch.randn(2, 3, 8, 8)).sum().backward()\n"
        "layer = model.motte_session.layers['1']\n"
        "print('split', layer.last_rank, float(layers[1].weight.grad.abs().sum()) > 0)\n"
    )
    with accelerator(owner.folder) as address:
        configuration = owner.signed("run.json", script=script, accelerator=address, noise="gaussian:1.0,0.5")
        found = motte(*words(owner, configuration), "--", "python", script)
    assert found.code == 0, found.err
    assert found.out == "split 2 True\n"


class accelerator:
    """``motte accelerator serve`` on a Unix socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "a.sock"

    def __enter__(self) -> str:
        line = [
            sys.executable,
            "-m",
            "motte",
            "accelerator",
            "serve",
            "--listen",
            f"unix:{self.path}",
            "--threads",
            "1",
        ]
        self.process = subprocess.Popen([*line, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self.path.exists():
            assert self.process.poll() is None
            time.sleep(0.05)
        return f"unix:{self.path}"

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def test_ctrl_c_ends_the_script_and_leaves_nothing(owner: Any, tmp_path: Path) -> None:
    script = owner.folder / "waits.py"
    script.write_text(
        "import os, time, tempfile\nprint(os.getpid(), tempfile.gettempdir(), flush=True)\ntime.sleep(600)\n"
    )
    configuration = owner.signed("run.json", script=script)
    line = [sys.executable, "-m", "motte", *words(owner, configuration), "--", "python", script]
    process = subprocess.Popen([str(each) for each in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, place = process.stdout.readline().split()
    assert Path(place).is_dir()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not Path(place).exists()
    assert not Path(f"/proc/{pid}").exists()


def test_each_kind_reads_its_own_options(motte: Motte, owner: Any, tmp_path: Path) -> None:
    configuration = owner.signed("run.json", "0")
    for kind, option, value in (
        ("process", "--image", tmp_path),
        ("process", "--vm-address", "vsock:3:7443"),
        ("gramine-direct", "--read", tmp_path),
        ("vm", "--image", tmp_path),
    ):
        assert motte(*words(owner, configuration, option, value, kind=kind), *python(owner, "0")).code == 2
    for kind in ("gramine-direct", "gramine-sgx", "vm"):
        assert motte(*words(owner, configuration, kind=kind), *python(owner, "0")).code == 2
    for address in ("tcp:1.2.3.4:5", "vsock:3", "vsock:a:b"):
        found = motte(*words(owner, configuration, "--vm-address", address, kind="vm"), *python(owner, "0"))
        assert found.code == 2
    missing = motte(*words(owner, configuration, "--read", tmp_path / "none"), *python(owner, "0"))
    assert (missing.code, missing.out) == (2, "")


def test_without_gramine_the_refusal_says_how_it_is_installed(
    motte: Motte, owner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configuration = owner.signed("run.json", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind in ("gramine-direct", "gramine-sgx"):
        found = motte(*words(owner, configuration, "--image", tmp_path, kind=kind), *python(owner, "0"))
        assert found.code == 1
        assert "apt-get install gramine" in found.err


def test_a_guest_gets_what_was_signed_and_says_what_the_script_prints(motte: Motte, owner: Any) -> None:
    """A stand-in for the guest's service: it reads to the end, answers, and closes."""
    configuration = owner.signed("run.json", "0")
    heard: list[bytes] = []
    path = owner.folder / "v.sock"

    def serve(server: socket.socket) -> None:
        link, _ = server.accept()
        with link, link.makefile("rb") as file:
            heard.append(file.read())
            link.sendall(b"from the guest\n")

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        found = motte(*words(owner, configuration, "--vm-address", f"unix:{path}", kind="vm"), *python(owner, "0"))
        thread.join()
    assert (found.code, found.out) == (0, "from the guest\n"), found.err
    assert heard == [configuration.read_bytes()]
    gone = motte(*words(owner, configuration, "--vm-address", f"unix:{path}.none", kind="vm"), *python(owner, "0"))
    assert gone.code == 1


def test_the_owner_signs_a_run_on_the_command_line(motte: Motte, owner: Any) -> None:
    line = ("enclave", "configure", "--signer-key", owner.key, "-o", owner.folder / "r.json")
    command = python(owner, "0", "--epochs", "2")
    for wrong in (("--noise", "none"), ("--accelerator", "unix:/a"), ("--rank", "1"), ("--peer", "unix:/a")):
        assert motte(*line, *wrong, *command).code == 2
    made = motte(
        *line, "--rank", "1", "--peer", PEERS[0], "--peer", PEERS[1], "--accelerator", "unix:/a", "--noise", "none",
        "--json", *command,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert (made.json["rank"], made.json["ranks"]) == (1, 2)
    from motte.enclave.script_run import ScriptRun
    from motte.seal.keys import SignerPublicKey, load_public

    signer = load_public(owner.public, SignerPublicKey)
    run = ScriptRun.decode((owner.folder / "r.json").read_bytes(), signer)
    assert (run.arguments, run.accelerator, run.noise) == (("0", "--epochs", "2"), "unix:/a", None)
    assert run.configuration().digest().hex() == made.json["digest"]
    assert motte(*line, *command).code == 2
    assert os.listdir(owner.folder).count("r.json") == 1
