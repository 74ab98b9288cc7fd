"""What was run: the revision of the source, the versions of the packages, the command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from motte.limits import MAX_RECORD_ENTRIES, MAX_RECORD_TEXT_BYTES

PACKAGES: Final = (
    "motte",
    "torch",
    "torchvision",
    "numpy",
    "cryptography",
    "safetensors",
    "pillow",
    "tokenizers",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
)
"""Distributions whose version can change a figure; those that are not installed are left out of a record."""

_GIT_TIMEOUT_S = 20


@dataclass(frozen=True)
class Revision:
    """A git commit; ``dirty`` when a file differs from it, an untracked one included (it may have been imported)."""

    commit: str
    dirty: bool


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The installed ones of ``names`` and ``python``, with their versions; imports none of them."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision(file: Path = Path(__file__)) -> Revision | None:
    """The revision of the checkout that ``file`` belongs to.

    None when ``file`` is no tracked file of a git checkout (an installed wheel), even where the folder around it is
    one: the revision of somebody else's repository says nothing about this code.
    """
    folder = file.resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    if commit is None or changes is None:
        return None
    return Revision(commit.strip(), bool(changes.strip()))


def command_line() -> tuple[str, ...]:
    """The command that started this process, interpreter included; very long ones are cut, with a word that says so."""
    words = [_cut(word) for word in sys.orig_argv]
    if len(words) > MAX_RECORD_ENTRIES:
        left_out = len(words) - (MAX_RECORD_ENTRIES - 1)
        words = [*words[: MAX_RECORD_ENTRIES - 1], f"... and {left_out} more"]
    return tuple(words)


def _cut(word: str) -> str:
    # surrogateescape: a path that is no UTF-8 becomes one that every reader takes.
    data = os.fsencode(word)
    if len(data) <= MAX_RECORD_TEXT_BYTES // 4:
        return data.decode("utf-8", "replace")
    return data[: MAX_RECORD_TEXT_BYTES // 4].decode("utf-8", "replace") + f"... ({len(data)} bytes)"


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None when it fails, is not installed, or takes too long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
