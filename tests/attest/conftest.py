"""The makers of this folder as the package ``attest_makers``, and the folder of real evidence."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

if "attest_makers" not in sys.modules:
    _package = ModuleType("attest_makers")
    _package.__path__ = [str(Path(__file__).parent)]
    sys.modules["attest_makers"] = _package


@pytest.fixture(scope="session")
def evidence_dir() -> Path:
    """Real evidence: the folder that ``MOTTE_EVIDENCE_DIR`` names, else one beside the repository; absent: skip."""
    named = os.environ.get("MOTTE_EVIDENCE_DIR")
    folder = Path(named) if named else Path(__file__).parents[3] / "shared/data/evidence"
    if not folder.is_dir():
        pytest.skip(f"no real evidence at {folder} (MOTTE_EVIDENCE_DIR names another folder)")
    return folder
