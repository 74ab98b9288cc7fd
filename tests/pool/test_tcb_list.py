"""What the onnxruntime worker loads: a list that grows only when somebody says so here, and how large it may be."""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import motte
from motte.doctor.tcb import strippable_bytes
from motte.enclave.process import WorkerProcess
from motte.measure.memory import read_memory
from motte.trusted.tcb import INTERPRETER, OTHER_FILES, STANDARD_LIBRARY, SYSTEM_LIBRARIES, Tcb

pytestmark = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")

PACKAGES = {
    *(INTERPRETER, STANDARD_LIBRARY, SYSTEM_LIBRARIES, OTHER_FILES),
    *("numpy", "cryptography", "_cffi_backend", "onnxruntime", "motte"),
}
OURS = {
    "motte", "motte.digests", "motte.errors", "motte.limits", "motte.strict_json",
    "motte.capture", "motte.capture.binding", "motte.capture.checks", "motte.capture.graph", "motte.capture.ops",
    "motte.capture.ops_table", "motte.capture.signature", "motte.capture.sizes", "motte.capture.text",
    "motte.engines", "motte.engines.checks", "motte.engines.interface", "motte.engines.numpy_arrays",
    "motte.engines.onnxruntime_engine", "motte.engines.select", "motte.engines.settled",
    "motte.linear", "motte.linear.nodes", "motte.linear.operation",
    "motte.link", "motte.link.frames", "motte.link.local", "motte.link.standard_streams",
    "motte.lower", "motte.lower.lowered",
    "motte.measure", "motte.measure.memory", "motte.measure.self_report",
    "motte.offload", "motte.offload.graph_layers", "motte.offload.placement", "motte.offload.settings",
    "motte.plan", "motte.plan.costs", "motte.plan.flops", "motte.plan.linear_nodes", "motte.plan.lines",
    "motte.plan.offload", "motte.plan.offload_text", "motte.plan.plan", "motte.plan.rules", "motte.plan.storage",
    "motte.plan.streamed", "motte.plan.text", "motte.plan.tile",
    "motte.provision", "motte.provision.grant",
    "motte.seal", "motte.seal.atomic", "motte.seal.checks", "motte.seal.header", "motte.seal.keys", "motte.seal.kinds",
    "motte.seal.manifest", "motte.seal.pool", "motte.seal.primitives", "motte.seal.reader",
    "motte.seal.run_terms",
    "motte.split", "motte.split.chain", "motte.split.layout", "motte.split.split",
    "motte.trusted", "motte.trusted.__main__", "motte.trusted.arena",
    "motte.trusted.execution",
    "motte.trusted.harden", "motte.trusted.kernel", "motte.trusted.landlock", "motte.trusted.seccomp",
    "motte.trusted.secret_memory", "motte.trusted.surroundings", "motte.trusted.tcb", "motte.trusted.weights",
    "motte.trusted.worker", "motte.trusted.host_channel",
}  # fmt: skip
MAX_FILE_BYTES = 110_000_000
"""Without symbols and debug information: some builds of Python carry 20 MB of them, which no process maps."""
MAX_RSS_AFTER_IMPORT_BYTES = 60_000_000


@pytest.fixture(scope="module")
def worker(net) -> tuple[Tcb, int]:
    """The files of a worker after an answer in each mode, and its resident set before it had a bundle."""
    # As an installation does; a worker writes nothing, and would compile our source at every start.
    compileall.compile_dir(os.path.dirname(motte.__file__), quiet=2)
    started = WorkerProcess(threads=1, engine="onnxruntime")
    empty = read_memory(started.pid).rss_bytes
    with motte.load(net.lowered, **net.keys, worker=started) as model:
        model(net.x)
        return model.tcb(), empty


@pytest.fixture(scope="module")
def environment() -> set[str]:
    """Packages that a bare interpreter loads here: ``.pth`` files of the environment, which are none of ours."""
    script = "import json, os, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_no_package_is_loaded_that_is_not_on_the_list(worker: tuple[Tcb, int], environment: set[str]) -> None:
    tcb, _ = worker
    assert {package.name for package in tcb.packages} - environment == PACKAGES - environment


def test_the_list_of_our_own_modules_is_exactly_what_is_loaded(worker: tuple[Tcb, int]) -> None:
    tcb, _ = worker
    assert set(tcb.package("motte").modules) == OURS


def test_no_data_is_mapped_but_the_languages_of_the_system(worker: tuple[Tcb, int]) -> None:
    tcb, _ = worker
    paths = [Path(file.path) for file in tcb.package(OTHER_FILES).files]
    assert [path for path in paths if not {"locale", "gconv"} & set(path.parts)] == []


def test_at_most_110_mb_of_files_interpreter_and_libraries_together(worker: tuple[Tcb, int]) -> None:
    tcb, _ = worker
    files = [file for package in tcb.packages for file in package.files]
    mapped = {file.path: file.bytes - strippable_bytes(file.path) for file in files}
    largest = sorted(mapped.items(), key=lambda each: -each[1])[:8]
    assert 50_000_000 < sum(mapped.values()) <= MAX_FILE_BYTES, largest


def test_at_most_60_mb_resident_after_import(worker: tuple[Tcb, int]) -> None:
    _, empty = worker
    assert 20_000_000 < empty <= MAX_RSS_AFTER_IMPORT_BYTES


def test_the_streamed_worker_loads_nothing_more(net, worker: tuple[Tcb, int]) -> None:
    tcb, _ = worker
    options = {"engine": "onnxruntime", "mode": "streamed", "weight_memory_bytes": 1 << 20, "dims": {"batch": 4}}
    with motte.load(net.lowered, **net.keys, **options) as model:
        model(net.x)
        streamed = model.tcb()
    listed = {file.path for package in tcb.packages for file in package.files}
    assert {file.path for package in streamed.packages for file in package.files} - listed == set()
