"""``motte seal-data`` on the command line: it seals, it says what, and it leaves nothing when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from motte.cli import main
from motte.seal import RecipientPrivateKey, SignerPrivateKey
from motte.seal.keys import new
from motte.train.data import DataKeys, open_data


@pytest.fixture
def command(tmp_path: Path, makers: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    makers.photos(tmp_path / "set", {"": 10})
    new(tmp_path / "keys", "owner", RecipientPrivateKey)
    new(tmp_path / "keys", "signer", SignerPrivateKey)
    return ["--recipient", "keys/owner.pub", "--signer-key", "keys/signer.key", "-o", "sealed.motte"]


@pytest.mark.parametrize("source", ["set", "folder:set"])
def test_a_folder_is_sealed_and_opens(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], source: str
) -> None:
    assert main(["seal-data", source, "--seed", "4", "--release", "7", "--json", *command]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == {"train": 27, "test": 3}
    assert report["release"] == 7
    assert report["file_bytes"] == (tmp_path / "sealed.motte").stat().st_size
    from motte.seal.keys import load, load_public

    keys = DataKeys(
        load(tmp_path / "keys" / "owner.key", RecipientPrivateKey),
        load_public(tmp_path / "keys" / "signer.pub", type(SignerPrivateKey.new().public)),
    )
    with open_data(f"sealed:{tmp_path / 'sealed.motte'}", seed=0, keys=keys) as data:
        assert data.classes == ("cat", "dog", "owl")
        assert len(data.train) == 27


def test_people_are_told_what_was_sealed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seal-data", "set", *command]) == 0
    shown = capsys.readouterr()
    assert "3 classes" in shown.out
    assert "27" in shown.out
    assert "motte train --data sealed:sealed.motte" in shown.err


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (["absent:thing"], 2),
        (["nowhere"], 2),
        (["folder:nowhere"], 2),
        (["set", "--data-dir", "elsewhere"], 2),
    ],
)
def test_failures_leave_nothing(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], change: list[str], code: int
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["seal-data", *change, *command]) == code
    assert "error:" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_file_is_kept_unless_said(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sealed.motte").write_bytes(b"mine")
    assert main(["seal-data", "set", *command]) == 2
    assert (tmp_path / "sealed.motte").read_bytes() == b"mine"
    assert main(["seal-data", "set", "--overwrite", *command]) == 0
    assert (tmp_path / "sealed.motte").read_bytes() != b"mine"
    capsys.readouterr()


def test_the_help_says_that_folders_are_public(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seal-data", "--help"]) == 0
    assert "Plain folders are for public data" in " ".join(capsys.readouterr().out.split())
