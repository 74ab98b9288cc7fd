"""The model of the handshake (docs/spec/model/handshake.pml), checked exhaustively; seeded mistakes in it are found."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[2] / "docs" / "spec" / "model" / "handshake.pml"


@pytest.fixture(autouse=True)
def _tools() -> None:
    for each in ("spin", "gcc"):
        if shutil.which(each) is None:
            pytest.skip(f"{each} is not installed (apt install {each})")


def checked(folder: Path, *defines: str) -> str:
    """What the exhaustive search says."""
    options = [f"-D{each}" for each in defines]
    subprocess.run(["spin", *options, "-a", str(MODEL)], cwd=folder, check=True, capture_output=True, timeout=60)
    subprocess.run(
        ["gcc", "-w", "-O0", "-DSAFETY", "-o", "pan", "pan.c"], cwd=folder, check=True, capture_output=True, timeout=60
    )
    # -E: that nothing is left to do at the end is no error here.
    found = subprocess.run(["./pan", "-E", "-m200000"], cwd=folder, capture_output=True, text=True, timeout=60)
    return found.stdout


def test_the_handshake_holds_against_an_attacker_who_relays_replays_reorders_and_diverts(tmp_path) -> None:
    text = checked(tmp_path)
    assert "errors: 0" in text
    assert "max search depth too small" not in text
    states = re.search(r"(\d+) states, stored", text)
    assert states is not None
    assert int(states[1]) > 10_000
    # Not because nothing can happen: an honest handshake comes to its end.
    assert "assertion violated" in checked(tmp_path, "REACHABLE")


@pytest.mark.parametrize(
    ("mistake", "broken"),
    [
        ("NONCE_NOT_BOUND", "made_nonce"),
        ("KEY_NOT_BOUND", "k!=0"),
        ("NONCE_NOT_CONSUMED", "released"),
        ("ANSWER_NOT_SIGNED", "kb=="),
    ],
)
def test_a_seeded_mistake_is_found(tmp_path, mistake, broken) -> None:
    text = checked(tmp_path, mistake)
    assert "errors: 0" not in text
    violated = re.search(r"assertion violated (.*) \(at depth", text)
    assert violated is not None
    assert broken in violated[1]
