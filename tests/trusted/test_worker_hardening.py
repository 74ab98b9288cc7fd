"""What holds for a worker that runs, as the kernel says of it from outside; and that root finds no opened weights."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from motte.errors import FrameError, InputError, LinkError
from motte.link.frames import Frame, Kind, WireTensor
from motte.trusted import landlock, seccomp
from motte.trusted.secret_memory import why_no_secret_memory

PLAIN = {"keys": "recipient", "channel": "plain"}
X = torch.arange(3 * 16 * 16, dtype=torch.float32).reshape(1, 3, 16, 16) / 768
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory takes root")
needs_secret = pytest.mark.skipif(why_no_secret_memory() is not None, reason=str(why_no_secret_memory()))


def _has_landlock() -> bool:
    try:
        return landlock.abi() > 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def loaded(sealed) -> Iterator[Any]:
    with sealed.load() as model:
        model(X)
        yield model


@pytest.mark.skipif(seccomp.unsupported() is not None, reason=str(seccomp.unsupported()))
def test_every_thread_is_filtered_and_the_worker_says_the_same(loaded) -> None:
    tasks = list(Path(f"/proc/{loaded.pid}/task").iterdir())
    modes = [line.split()[1] for t in tasks for line in (t / "status").read_text().splitlines() if "Seccomp:" in line]
    assert len(modes) == len(tasks)
    assert set(modes) == {"2"}
    assert loaded.hardening.seccomp_mode == 2
    assert "seccomp" not in loaded.hardening.lacking


@pytest.mark.skipif(not _has_landlock(), reason="this kernel has no Landlock")
def test_the_worker_gave_up_files(loaded) -> None:
    assert loaded.hardening.landlock_abi > 0
    assert "Landlock" not in loaded.hardening.lacking


@needs_root
@needs_secret
def test_root_reads_no_opened_weight_in_all_of_the_workers_memory(sealed, loaded) -> None:
    # The torch engine computes on the opened parts where they lie: there is no second copy to be found.
    assert loaded.memory["weight_secret_bytes"] == loaded.memory["weight_arena_bytes"] > 0
    own = bytes(range(1, 65))
    assert own in _memory(os.getpid(), find=own), "the search finds what is there"
    assert sealed.canary not in _memory(loaded.pid, find=sealed.canary)
    unreadable = [each for each in _maps(loaded.pid) if "secretmem" in each[2]]
    assert unreadable
    with open(f"/proc/{loaded.pid}/mem", "rb", buffering=0) as file:
        file.seek(unreadable[0][0])
        with pytest.raises(OSError, match=r"."):
            file.read(16)


def _maps(pid: int) -> list[tuple[int, int, str]]:
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, flags, *_, name = [*line.split(maxsplit=5), ""][:6]
        if flags.startswith("rw"):
            start, stop = (int(each, 16) for each in place.split("-"))
            found.append((start, stop, name))
    return found


def _memory(pid: int, *, find: bytes) -> bytes:
    """``find``, where it stands in writable memory that can be read; else nothing."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for start, stop, _ in _maps(pid):
            before = b""
            for at in range(start, stop, 1 << 24):
                try:
                    file.seek(at)
                    data = before + file.read(min(1 << 24, stop - at))
                except (OSError, ValueError):
                    break
                if find in data:
                    return find
                before = data[-len(find) :]
    return b""


def test_a_host_that_hands_over_nothing_is_refused_in_time(sealed) -> None:
    from motte.enclave.process import WorkerProcess
    from motte.run.model import _open_meta
    from motte.run.settings import LoadSettings
    from motte.run.told import reported

    worker = WorkerProcess(threads=1, engine="onnxruntime")
    try:
        meta = {
            "bundle_bytes": 0,
            **_open_meta(sealed.signer.public, LoadSettings(threads=1), PLAIN),
        }
        worker.send(Frame(Kind.OPEN, meta), timeout_s=30)
        # A message without a descriptor: the worker waits no longer for one.
        assert worker._files is not None
        worker._files.send(b"b")
        problem, fatal = reported(worker.receive(timeout_s=60))
    finally:
        worker.kill()
    assert isinstance(problem, FrameError)
    assert "handed over" in problem.message
    assert fatal


@pytest.mark.parametrize(
    ("announced", "tensors"),
    [
        (10, [WireTensor("u8", (11,), bytes(11))]),
        (10, [WireTensor("u8", (0,), b"")]),
        (10, []),
        (10, [WireTensor("u8", (5,), bytes(5)), WireTensor("u8", (5,), bytes(5))]),
    ],
)
def test_bytes_that_were_not_announced_are_refused(announced: int, tensors: list[WireTensor]) -> None:
    from motte.link.local import Link
    from motte.trusted.bundle_arrival import receive_bytes

    ours, theirs = socket.socketpair()
    sender, receiver = Link(ours, peer="worker"), Link(theirs, peer="client")
    sender.send(Frame(Kind.BUNDLE, {}, tensors))
    with pytest.raises(FrameError, match=r"announced|wrong state"):
        receive_bytes(receiver, announced)
    sender.close()
    receiver.close()


WORKER_IN_A_VM = """
import os, socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(sys.argv[1])
listener.listen(1)
print("listening", flush=True)
connection, _ = listener.accept()
subprocess.run([sys.executable, "-P", "-m", "motte.trusted", "--fd", "0", "--threads", "1", "--engine", "torch",
                "--enclave", "vm"], stdin=connection, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
"""


def test_a_worker_behind_a_socket_gets_the_bundle_over_its_link(sealed, tmp_path: Path, caplog) -> None:
    place = tmp_path / "vm.sock"
    script = tmp_path / "vm.py"
    script.write_text(WORKER_IN_A_VM, encoding="utf-8")
    vm = subprocess.Popen([sys.executable, str(script), str(place)], stdout=subprocess.PIPE, text=True)
    try:
        assert vm.stdout is not None
        assert vm.stdout.readline() == "listening\n"
        with (
            caplog.at_level(logging.WARNING, logger="motte"),
            sealed.load(threads=0, enclave="vm", vm=f"unix:{place}", mode="streamed", weight_memory_bytes=1 << 20) as m,
            torch.inference_mode(),
        ):
            assert m.enclave == "vm"
            assert torch.equal(m(X), sealed.model(X))
        # There is no confidential VM here, and it says so.
        assert m.simulated == (not Path("/sys/kernel/config/tsm/report").is_dir())
        assert ("SIMULATED" in caplog.text) == m.simulated
        assert vm.wait(30) == 0
    finally:
        vm.kill()
        vm.communicate()


def test_addresses_of_vms_that_are_none(sealed, tmp_path: Path) -> None:
    for address in ("tcp:host:1", "vsock:3", "vsock:a:1", "unix:", "vsock:5000000000:1"):
        with pytest.raises(InputError, match="not the address of a VM's worker"):
            sealed.load(enclave="vm", vm=address)
    with pytest.raises(LinkError, match="no worker listens there"):
        sealed.load(enclave="vm", vm=f"unix:{tmp_path}/nobody")
    with pytest.raises(InputError, match="needs another setting"):
        sealed.load(enclave="vm")
    with pytest.raises(InputError, match="needs another setting"):
        sealed.load(enclave="gramine-sgx")


def test_a_stream_can_be_changed_between_two_frames() -> None:
    from motte.link.local import Link

    ours, theirs = socket.socketpair()
    late_ours, late_theirs = socket.socketpair()
    sender, receiver = Link(ours, peer="b"), Link(theirs, peer="a")
    sender.send(Frame(Kind.HELLO, {"n": 1}))
    assert receiver.receive(timeout_s=5).meta == {"n": 1}
    sender.change_stream(lambda stream: late_ours)
    receiver.change_stream(lambda stream: late_theirs)
    thread = threading.Thread(target=lambda: sender.send(Frame(Kind.HELLO, {"n": 2})))
    thread.start()
    assert receiver.receive(timeout_s=5).meta == {"n": 2}
    thread.join()
    for each in (sender, receiver):
        each.close()
    ours.close()
    theirs.close()
