"""Made-up results, one report of them for the whole session, and a browser."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from motte.bench.results import Results, write_results
from motte.report.write import Report, make_report

HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=window.broken=2>\"'&%{x} $a$ \u202e"


@pytest.fixture(scope="session")
def made_up() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "made_up_results.py"
    spec = importlib.util.spec_from_file_location("made_up_results", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def results(made_up: ModuleType) -> Results:
    """Two models in every mode, hostile text wherever a text may stand."""
    return made_up.results(
        ("resnet50", "vgg16"),
        modes=("native", "resident", "streamed", "asymmetric", "accelerator"),
        parts=(1, 4),
        enclaves=("process", "gramine-sgx"),
        trace_points=40,
        words=HOSTILE,
    )


@pytest.fixture(scope="session")
def folder(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report") / "out"
    write_results(place, results)
    return place


@pytest.fixture(scope="session")
def made(folder: Path) -> Report:
    """The page alone; figures as files have tests of their own."""
    return make_report(folder, figures=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    executable = next(found for name in names if (found := shutil.which(name)))
    with sync_api.sync_playwright() as playwright:
        # No sandbox: in a container the browser's own cannot be set up, and the page is ours.
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()
