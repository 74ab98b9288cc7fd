"""What is written beside an image for containers and confidential VMs, and the stream that Gramine gives a worker."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from motte.enclave import container, vm
from motte.enclave.image import ImageFile, ImageRecord
from motte.errors import InputError
from motte.link.standard_streams import inherited_stream

RECORD = ImageRecord(
    "onnxruntime", False, (ImageFile("usr/bin/python3", 5, "ab" * 32, "copied"),), (), {}, None, None, None
)
WORKER = """
import os, sys
from motte.link.frames import Frame, Kind
from motte.link.local import Link
from motte.link.standard_streams import StandardStreams, inherited_stream
stream = inherited_stream(0)
assert isinstance(stream, StandardStreams)
print("printed by a library", flush=True)
sys.stderr.write("a traceback")
os.system("echo from a child; echo from a child >&2")
link = Link(stream, peer="client")
link.send(Frame(Kind.HELLO, {"said": link.receive().meta["word"]}))
"""


def test_the_container_holds_the_image_and_its_one_command() -> None:
    text = container.containerfile(RECORD, threads=3, precision="f32")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if line and not line.startswith(("#", " "))] == [
        "FROM", "COPY", "ENV", "USER", "WORKDIR", "ENTRYPOINT",
    ]  # fmt: skip
    assert "FROM scratch" in lines
    command = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).partition(" ")[2])
    assert command[0] == "/usr/bin/python3"
    assert command[-10:] == [
        "--fd", "0", "--threads", "3", "--engine", "onnxruntime", "--precision", "f32", "--enclave", "process",
    ]  # fmt: skip
    assert "USER 65534:65534" in lines
    assert container.ignore_file() == "*\n!root\n"


def test_the_units_of_a_guest_are_what_its_init_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    for name, text in vm.files(RECORD, threads=2, precision="f32").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    units = [str(tmp_path / name) for name in ("motte-worker.socket", "motte-worker@.service")]

    # The program lies in the guest's image, not here; everything else that is said is a mistake.
    def said() -> list[str]:
        done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
        return [line for line in done.stderr.splitlines() if "motte-worker" in line and "not executable" not in line]

    assert said() == []
    service = tmp_path / "motte-worker@.service"
    service.write_text(service.read_text().replace("ProtectSystem=strict", "ProtectSystem=mostly"), encoding="utf-8")
    assert said() != []


def test_the_recipe_for_the_launch_measurement_runs(tmp_path: Path) -> None:
    script = tmp_path / "expected-snp.sh"
    script.write_text(vm.snp_recipe(), encoding="utf-8")
    fake = tmp_path / "sev-snp-measure"
    fake.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = ["sh", str(script), "OVMF.fd", "uki.efi", "4"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [
        "--mode", "snp", "--vcpus", "4", "--vcpu-type", "EPYC-v4", "--ovmf", "OVMF.fd", "--kernel", "uki.efi",
    ]  # fmt: skip
    fake.unlink()
    assert subprocess.run(words, capture_output=True, env={"PATH": "/usr/bin:/bin"}).returncode == 1


def test_a_worker_speaks_through_its_standard_streams_undisturbed(tmp_path: Path) -> None:
    """What it prints, and what a child prints, on output or error, never comes between frames."""
    from motte.link.frames import Frame, Kind
    from motte.link.local import Link

    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    ours, theirs = socket.socketpair()
    to_worker, from_client = os.pipe()
    with theirs:
        # Error goes where output goes, as in Gramine.
        process = subprocess.Popen([sys.executable, str(script)], stdin=to_worker, stdout=theirs, stderr=theirs)
        os.close(to_worker)
    sender, receiver = Link(PipeEnd(from_client), peer="worker"), Link(ours, peer="worker")  # type: ignore[arg-type]
    sender.send(Frame(Kind.OPEN, {"word": "well"}))
    assert receiver.receive(timeout_s=30).meta == {"said": "well"}
    sender.close()
    receiver.close()
    assert process.wait(30) == 0


def test_a_socket_stays_one() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = inherited_stream(os.dup(theirs.fileno()))
        assert isinstance(stream, socket.socket)
        stream.close()


class PipeEnd:
    """The writing end of a pipe, as a socket."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def settimeout(self, value: float | None) -> None:
        pass

    def sendmsg(self, buffers: list[memoryview]) -> int:
        return os.writev(self._fd, buffers)

    def close(self) -> None:
        os.close(self._fd)


def test_a_descriptor_that_is_no_stream_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(InputError, match="not a socket"):
        inherited_stream(file.fileno())
    with pytest.raises(InputError, match="not an open"):
        inherited_stream(9999)
