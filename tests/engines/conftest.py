"""Gives tests of this folder the plain interpreter, and the maker of small lowered programs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"motte_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def interpret() -> Callable[..., Any]:
    found: Callable[..., Any] = _load("plain").interpret
    return found


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module tiny_onnx."""
    return _load("tiny_onnx")
