"""Exit codes, the form of errors, Ctrl-C, a reader that has gone."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from motte import errors
from motte.cli import root
from motte.cli import zoo as zoo_verbs
from motte.cli.verb import exit_code
from motte.errors import MotteError

SOURCE = str(Path(root.__file__).parents[2])
WRONG_USE = {"InputError", "SettingError"}


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "MOTTE_DEBUG"}
    return {**kept, "PYTHONPATH": SOURCE, "COLUMNS": "80"}


def test_every_error_has_its_exit_code() -> None:
    found = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, MotteError)]
    assert len(found) > 20
    assert {each.__name__ for each in found if exit_code(each("x")) == 2} == WRONG_USE
    assert {exit_code(each("x")) for each in found} == {1, 2}


@pytest.mark.parametrize(
    "words",
    [
        ["frob"],
        ["plan"],
        ["keys"],
        ["keys", "new"],
        ["plan", "m", "--parts", "none"],
        ["plan", "m", "--parts", "0"],
        ["plan", "m", "--nonsense"],
        ["plan", "m", "--max-part-memory", "64MB"],
        ["plan", "m", "--cuts", "mine"],
        ["plan", "m", "extra", "--parts", "2"],
        ["run", "b.motte", "--mode", "flying", "--key", "k", "--signer", "s"],
        ["run", "b.motte", "--key", "k"],
        ["--nonsense"],
    ],
)
def test_wrong_use_is_2_with_a_hint(motte: Any, words: list[str]) -> None:
    found = motte(*words)
    assert found.code == 2
    assert found.out == ""
    lines = found.err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("hint: motte ")
    assert lines[-1].endswith("--help shows what it takes")
    assert "Traceback" not in found.err


def test_no_words_at_all_show_the_help(motte: Any) -> None:
    found = motte()
    assert (found.code, found.err) == (0, "")
    assert "Usage: motte" in found.out


def test_the_version(motte: Any) -> None:
    import motte as package

    assert motte("--version").out == motte("version").out == f"motte {package.__version__}\n"
    assert motte("version", "--json").json == {"version": package.__version__}


def fail_with(problem: BaseException) -> Any:
    def list_models(**options: Any) -> None:
        raise problem

    return list_models


@pytest.fixture
def failing(motte: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`motte zoo list` with a library that raises."""
    assert zoo_verbs.app

    def run(problem: BaseException, *words: str) -> Any:
        monkeypatch.setattr("motte.zoo.registry.list_models", fail_with(problem))
        return motte("zoo", "list", *words)

    return run


def test_an_error_of_motte_has_no_traceback(failing: Any) -> None:
    found = failing(errors.ResourceError("no room", where="/tmp", hint="make some"))
    assert (found.code, found.out) == (1, "")
    assert found.err == "error: no room\n  where: /tmp\nhint: make some\n"


def test_debug_shows_the_traceback(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in failing(errors.ResourceError("no room"), "--debug").err
    monkeypatch.setenv("MOTTE_DEBUG", "1")
    assert "Traceback" in failing(errors.ResourceError("no room")).err


def test_an_error_with_json_is_one_document(failing: Any) -> None:
    found = failing(errors.BundleError("bad", check="B-2", where="magic"), "--json")
    assert found.code == 1
    assert found.json == {"error": {"kind": "BundleError", "message": "bad", "where": "magic", "check": "B-2"}}
    assert found.err.startswith("error: bad [check B-2]\n")


def test_a_bug_is_not_hidden(failing: Any) -> None:
    found = failing(ZeroDivisionError("oops"))
    assert found.code == 1
    assert "Traceback" in found.err
    assert "error: unexpected, and a bug in motte" in found.err


def test_out_of_memory_is_said(failing: Any) -> None:
    found = failing(MemoryError())
    assert found.code == 1
    assert found.err.startswith("error: out of memory\n")


def test_ctrl_c_is_130(failing: Any) -> None:
    found = failing(KeyboardInterrupt())
    assert found.code == 130
    assert found.err == "error: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_half_written(tmp_path: Path, number: int, code: int) -> None:
    model = tmp_path / "slow.py"
    model.write_text("import pathlib, time\ndef net():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n")
    started = subprocess.Popen(
        [sys.executable, "-m", "motte", "plan", f"{model}:net", "--parts", "2", "-o", "plan.txt"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert not {path.name for path in tmp_path.iterdir()} - {"slow.py", "started", "__pycache__"}


def test_a_reader_that_has_gone_is_no_noise(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "motte", "zoo", "list"],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
            text=True,
        )
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["--json"], []])
def test_the_module_is_the_command(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "motte", "version", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "0." in done.stdout
