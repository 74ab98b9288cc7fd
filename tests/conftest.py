"""What holds for every test: markers are gates on resources, and no test depends on how fast the machine is.

A test marked ``gpu``, ``enclave``, ``tpm`` or ``browser`` is skipped, with the reason, where that resource is absent.
``MOTTE_REQUIRE=gpu,tpm`` says which ones must be there: then absence fails instead of skipping, so that a machine which
was set up for them cannot lose them silently.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything loads an OpenMP runtime: idle threads that spin would steal the cores of the worker under test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell that starts us in the background has us ignore Ctrl-C, and every process that a test starts would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline or a too-slow check would make a test depend on timing. Derandomised in CI: a run can be repeated.
settings.register_profile(
    "motte",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("motte")

_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def _no_gpu() -> str | None:
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA device node (/dev/nvidiactl)"
    import torch

    return None if torch.cuda.is_available() else "this torch sees no CUDA device"


def _no_enclave() -> str | None:
    nodes = ("/dev/sgx_enclave", "/dev/tdx_guest", "/dev/sev-guest")
    return (
        None
        if any(os.access(node, os.R_OK | os.W_OK) for node in nodes)
        else f"none of {', '.join(nodes)} can be opened"
    )


def _no_tpm() -> str | None:
    return None if os.access("/dev/tpmrm0", os.R_OK | os.W_OK) else "/dev/tpmrm0 is absent or may not be opened"


def _no_browser() -> str | None:
    return None if any(map(shutil.which, _CHROMIUMS)) else f"none of {', '.join(_CHROMIUMS)} is on the PATH"


RESOURCES: Mapping[str, Callable[[], str | None]] = {
    "gpu": _no_gpu,
    "enclave": _no_enclave,
    "tpm": _no_tpm,
    "browser": _no_browser,
}
"""Marker -> a check that returns why the resource is absent, None when it is there."""


def required(text: str) -> frozenset[str]:
    """The names in ``MOTTE_REQUIRE``; an unknown one raises, since a typo would switch its gate off."""
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if unknown := names - set(RESOURCES):
        raise pytest.UsageError(f"MOTTE_REQUIRE: unknown {sorted(unknown)}; known: {', '.join(RESOURCES)}")
    return names


def pytest_configure(config: pytest.Config) -> None:
    required(os.environ.get("MOTTE_REQUIRE", ""))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, absent in RESOURCES.items():
        if item.get_closest_marker(name) is None:
            continue
        reason = absent()
        if reason is None:
            continue
        if name in required(os.environ.get("MOTTE_REQUIRE", "")):
            pytest.fail(f"MOTTE_REQUIRE names {name}, but {reason}", pytrace=False)
        pytest.skip(f"{name}: {reason}")
