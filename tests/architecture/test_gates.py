"""The resource gates of tests/conftest.py: absent = skipped with the reason, required = failed, misspelt = refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONFTEST = REPOSITORY / "tests" / "conftest.py"


def run_pytest(folder: Path, test: str, require: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``test`` under this repository's settings and conftest, with a fifth resource that is never there."""
    text = CONFTEST.read_text(encoding="utf-8")
    (folder / "conftest.py").write_text(text + '\nRESOURCES["tpm"] = lambda: "planted absence"\n', encoding="utf-8")
    (folder / "test_planted.py").write_text(test, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MOTTE_"))}
    if require is not None:
        environment["MOTTE_REQUIRE"] = require
    command = [sys.executable, "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", str(folder / "test_planted.py")]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


MARKED = "import pytest\n\n\n@pytest.mark.tpm\ndef test_it():\n    raise SystemExit('the body ran')\n"


PLAIN = """
import warnings


def test_warning():
    warnings.warn('planted', UserWarning, stacklevel=1)


def test_plain():
    assert True
"""


def test_an_absent_resource_skips_with_the_reason_and_a_warning_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, MARKED + PLAIN)
    assert done.returncode == 1
    assert "tpm: planted absence" in done.stdout
    assert "UserWarning: planted" in done.stdout
    assert "1 failed, 1 passed, 1 skipped" in done.stdout


def test_an_absent_resource_that_is_required_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, MARKED, require="tpm")
    assert done.returncode == 1
    assert "MOTTE_REQUIRE names tpm, but planted absence" in done.stdout


def test_a_misspelt_requirement_is_refused(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, MARKED, require="tmp")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unknown ['tmp']" in done.stderr


def test_an_unknown_marker_is_refused(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, MARKED.replace("mark.tpm", "mark.tmp"))
    assert done.returncode != 0
    assert "'tmp' not found in `markers`" in done.stdout
