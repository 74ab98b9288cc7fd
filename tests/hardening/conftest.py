"""Children that harden themselves and then try one thing each; none of them outlives its test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
TIMEOUT_S = 60


def _words(script: str) -> list[str]:
    return [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{script}"]


# Nobody may be unable to read this interpreter's files: what is needed is imported before root is given up.
BECOME_ORDINARY = """
import os, signal, socket, subprocess, tempfile, threading
import motte.measure.memory, motte.trusted.arena, motte.trusted.harden
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""


def run_child(script: str, *, ordinary_user: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python text to its end; ``ordinary_user``: as nobody, which takes root."""
    text = BECOME_ORDINARY + script if ordinary_user else script
    return subprocess.run(_words(text), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@contextmanager
def held_child(script: str) -> Iterator[subprocess.Popen[str]]:
    """A child that runs Python text and then waits; killed at the end."""
    child = subprocess.Popen(
        _words(f"{script}\nsys.stdin.read()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=TIMEOUT_S)


@pytest.fixture(scope="session")
def child() -> Callable[..., subprocess.CompletedProcess[str]]:
    """See :func:`run_child`."""
    return run_child


@pytest.fixture(scope="session")
def held() -> Callable[[str], object]:
    """See :func:`held_child`."""
    return held_child
