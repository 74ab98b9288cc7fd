"""No plaintext weight, key or activation is written to a file or sent over the link: searched, not believed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

INPUT_CANARY = b"CANARY-INPUT-55d0b1e6-this-is-a-private-photo-0002"


def canary_input() -> torch.Tensor:
    data = (INPUT_CANARY * 70)[: 3 * 16 * 16 * 4]
    values = np.frombuffer(data, dtype=np.float32).copy()
    return torch.from_numpy(values).reshape(1, 3, 16, 16)


def recently_written(roots: list[Path], since: float) -> list[Path]:
    found = []
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder) / name
                try:
                    facts = path.lstat()
                except OSError:
                    continue
                recent = facts.st_mtime >= since and facts.st_size < 1 << 28
                if recent and path.is_file() and not path.is_symlink():
                    found.append(path)
    return found


def holders(paths: list[Path], needles: list[bytes]) -> list[Path]:
    return [path for path in paths if any(needle in path.read_bytes() for needle in needles)]


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_no_plaintext_leaves_the_worker(sealed, tmp_path: Path, monkeypatch, mode: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(home))
    frames: list[bytes] = []
    since = time.time() - 1
    with sealed.load(mode=mode, weight_memory_bytes=1 << 20, recorder=lambda _, data: frames.append(data)) as model:
        outputs = [model(canary_input()) for _ in range(2)]
        held = writable_files(model.pid)
    needles = [sealed.canary, INPUT_CANARY, sealed.recipient.secret, sealed.recipient.secret.hex().encode()]
    needles += [output.numpy().tobytes() for output in outputs]
    needles += [weight.detach().numpy().tobytes()[:64] for weight in sealed.model.parameters()]
    needles += [b"aten.conv2d", b"planted", b"stem.weight"]

    stream = b"".join(frames)
    assert len(frames) >= 6
    assert [needle for needle in needles if needle in stream] == []
    written = recently_written([home, sealed.path.parent, Path("/dev/shm"), Path("/var/tmp")], since)
    assert holders(written, needles) == []
    assert held == []


def writable_files(pid: int) -> list[str]:
    """Regular files on a disk that the process holds open for writing (its stderr is a memory file)."""
    if os.geteuid() != 0:
        return []
    found = []
    proc = Path("/proc") / str(pid)
    for entry in (proc / "fd").iterdir():
        target = os.readlink(entry)
        lines = (proc / "fdinfo" / entry.name).read_text().splitlines()
        flags = int(next(line for line in lines if line.startswith("flags")).split()[1], 8)
        on_disk = target.startswith("/") and "memfd:" not in target and target != "/dev/null"
        if on_disk and flags & os.O_ACCMODE != os.O_RDONLY:
            found.append(target)
    return found


def test_the_search_finds_a_planted_canary(sealed, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(sealed.model.state_dict(), tmp_path / "leak.safetensors")
    written = recently_written([tmp_path], time.time() - 60)
    assert holders(written, [sealed.canary]) == [tmp_path / "leak.safetensors"]


def test_the_frame_search_finds_an_unsealed_frame(sealed) -> None:
    import socket

    from motte.link.frames import Frame, Kind
    from motte.link.local import Link

    frames: list[bytes] = []
    a, b = socket.socketpair()
    with a, b:
        Link(a, peer="a", recorder=lambda _, data: frames.append(data)).send(
            Frame(Kind.HELLO, {"leak": sealed.canary.decode()})
        )
    assert sealed.canary in b"".join(frames)


def test_the_bundle_holds_no_plaintext(sealed) -> None:
    data = sealed.path.read_bytes()
    for needle in (sealed.canary, b"aten.", b"planted", b"stem", b"tiny"):
        assert needle not in data
