"""Gives tests of this folder the module ``random_graphs`` of tests/plan."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def random_graphs() -> ModuleType:
    name = "motte_tests_random_graphs"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "plan" / "random_graphs.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
