"""Every claim of THREAT_MODEL.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CITED = re.compile(r"`((?:tests/[\w/]+\.py)?)::(\w+)`")


def missing(text: str, root: Path) -> list[str]:
    """What ``text`` cites and ``root`` does not have. ``::name`` alone belongs to the file cited before it."""
    found, file = [], ""
    for path, name in CITED.findall(text):
        file = path or file
        source = (root / file).read_text() if (root / file).is_file() else ""
        if not re.search(rf"^def {name}\(", source, re.MULTILINE):
            found.append(f"{file}::{name}")
    return found


def claims(text: str) -> dict[str, str]:
    """The numbered claims and their whole text."""
    pieces = re.split(r"^\* \*\*([A-H]\d+)\.\*\*", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], (piece.split("\n* **")[0] for piece in pieces[2::2]), strict=True))


def test_every_cited_test_exists() -> None:
    text = (REPOSITORY / "THREAT_MODEL.md").read_text()
    assert len(CITED.findall(text)) > 30
    assert missing(text, REPOSITORY) == []


def test_every_claim_cites_a_test() -> None:
    found = claims((REPOSITORY / "THREAT_MODEL.md").read_text())
    assert len(found) >= 32
    # D4 is a warning, not a protection: there is nothing that could break it.
    assert [number for number, body in found.items() if not CITED.search(body)] == ["D4"]


def test_a_missing_test_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("def test_there():\n    pass\n")
    text = "`tests/test_a.py::test_there`, `::test_gone`, `tests/test_b.py::test_there`"
    assert missing(text, tmp_path) == ["tests/test_a.py::test_gone", "tests/test_b.py::test_there"]
