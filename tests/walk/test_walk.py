"""docs/walk.md runs as it is written: three folders, three shells, a real software TPM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from motte.zoo.shipped_models import images

pytest.importorskip("sqlalchemy", reason="the extra motte[broker] is not installed")
pytest.importorskip("fastapi", reason="the extra motte[broker] is not installed")
pytest.importorskip("uvicorn", reason="the extra motte[broker] is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "walk.md"
LINE = re.compile(r"^(owner|broker|host)\$ (.*)$")
TOOLS = ("swtpm", "tpm2_quote", "bash")
MISSING = [name for name in TOOLS if shutil.which(name) is None]


class Terminals:
    """One bash for each party, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        programs = folder / "bin"
        programs.mkdir()
        (programs / "motte").write_text(f'#!/bin/sh\nexec {sys.executable} -m motte "$@"\n')
        (programs / "motte").chmod(0o755)
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "200"}
        self.shells: dict[str, subprocess.Popen[str]] = {}
        for name in ("owner", "broker", "host"):
            (folder / name).mkdir()
            self.shells[name] = subprocess.Popen(
                ["bash", "--norc"],
                cwd=folder / name,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def type(self, name: str, words: str) -> tuple[int, str]:
        """Type one line and wait for it: its status, and what it printed."""
        shell = self.shells[name]
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(f'{words}\necho "status-of-it $?"\n')
        shell.stdin.flush()
        seen = ""
        for line in shell.stdout:
            if line.startswith("status-of-it "):
                return int(line.split()[1]), seen
            seen += line
        raise AssertionError(f"the terminal of the {name} ended: {seen}")

    def close(self) -> None:
        for name in self.shells:
            if name == "broker":
                self.type(name, "kill %1")
            if name == "host":
                self.type(name, 'pkill -f "swtpm socket .*tpmstate dir=$PWD"')
        for shell in self.shells.values():
            shell.kill()
            # What a shell left running in the background holds its output open: nothing is read of it any more.
            for stream in (shell.stdin, shell.stdout):
                assert stream is not None
                stream.close()
            shell.wait()


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt install swtpm tpm2-tools)")
def test_the_walk_runs_as_written(tmp_path: Path) -> None:
    typed = [found.groups() for line in PAGE.read_text(encoding="utf-8").splitlines() if (found := LINE.match(line))]
    assert len(typed) > 20
    terminals = Terminals(tmp_path)
    image = images()[9]
    (tmp_path / "host" / "image.png").write_bytes(image.path.read_bytes())
    said: list[str] = []
    try:
        for name, words in typed:
            status, seen = terminals.type(name, words)
            assert status == 0, f"{name}$ {words}\n{seen}"
            said.append(seen)
    finally:
        terminals.close()
    answers = [seen for (_, words), seen in zip(typed, said, strict=True) if words.startswith("motte run")]
    assert len(answers) == 2
    assert all("ankle boot" in seen and "SIMULATED" in seen for seen in answers)
    assert "verified: tpm" in answers[1]
    refused = [seen for (_, words), seen in zip(typed, said, strict=True) if words.startswith("! motte run")]
    assert "[check T-" in refused[0] or "enrolled" in refused[0]
    assert "release" in refused[1]
