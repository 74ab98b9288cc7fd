"""The real thing: an image of a worker with onnxruntime, made from what one loads, and run with nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import motte
from motte.doctor.image_trial import ask
from motte.enclave.gramine import GramineWorker
from motte.enclave.image import ROOT
from motte.enclave.manifest import loads
from motte.enclave.manifest_rules import check
from motte.enclave.process import WorkerProcess
from motte.enclave.sizes import ENGINE_BYTES, aim_of
from motte.enclave.vm_worker import VmWorker
from motte.enclave.workers import BareWorker
from motte.errors import InputError, WorkerDied

GRAMINE = """
import os, sys, tomllib
# As Gramine does: the host's arguments and variables are dropped, descriptors 0, 1 and 2 are all that is handed on.
manifest = tomllib.load(open(sys.argv[1] + ".manifest", "rb"))
loader = manifest["loader"]
words = [sys.executable, "-I", "-S", "-B", {bare!r}, {place!r}, os.path.abspath("root"), {bundle!r}, "--"]
os.execve(words[0], words + loader["argv"], loader["env"])
"""


def bare(built: Any, trial: Any, root: Path) -> BareWorker:
    return BareWorker(root, (trial.path,), threads=1, engine="onnxruntime", precision="f32")


def needs_namespace(built: Any) -> None:
    if not built.closed.proved:
        pytest.skip(built.closed.why)


def test_the_image_is_closed_small_and_answers_as_outside(built: Any) -> None:
    aim = aim_of("onnxruntime", slim=True)
    assert aim is not None
    assert aim.met_by(built.record), (len(built.record.files), built.record.bytes)
    assert built.closed.proved or built.closed.why
    assert [segment.name for segment in built.clock.segments().items] == ["trace", "make image", "prove closed"]


def test_the_record_lists_every_file_as_it_lies_there(built: Any) -> None:
    root = built.folder / ROOT
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if not path.is_dir()}
    assert set(found) == {file.path for file in built.record.files}
    for file in built.record.files:
        path = found[file.path]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
        assert path.stat().st_mtime == 0
        assert path.stat().st_mode & 0o777 in (0o644, 0o755)
        assert not file.path.endswith(".py")


def test_the_manifest_allows_the_image_and_nothing_else(built: Any) -> None:
    manifest = loads((built.folder / "worker.manifest").read_bytes())
    assert check(manifest) == ()
    assert "allowed_files" not in manifest["sgx"]
    own = {file["uri"]: file["sha256"] for file in manifest["sgx"]["trusted_files"] if "sha256" in file}
    assert own == {f"file:{ROOT}/{file.path}": file.sha256 for file in built.record.hashed()}
    assert str(built.folder) not in (built.folder / "worker.manifest").read_text()
    size = int(manifest["sgx"]["enclave_size"].removesuffix("M")) << 20
    assert size >= built.sizes.needed_bytes * 1.25
    assert size & (size - 1) == 0


def test_a_file_that_is_missing_is_found_missing(built: Any, trial: Any, tmp_path: Path) -> None:
    """That the image ran alone says something only if one that lacks a file does not."""
    needs_namespace(built)
    root = tmp_path / "root"
    gone = next(file.path for file in built.record.files if "_multiarray_umath" in file.path)
    for file in built.record.files:
        target = root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.path != gone:
            os.link(built.folder / ROOT / file.path, target)
    with pytest.raises(WorkerDied, match="_multiarray_umath"):
        bare(built, trial, root)


def test_the_memory_set_aside_for_the_engine_is_enough(built: Any, trial: Any) -> None:
    needs_namespace(built)
    asked = ask(trial, bare(built, trial, built.folder / ROOT), "resident")
    assert asked.anonymous_bytes < ENGINE_BYTES["onnxruntime"]
    listed = {file.path for package in asked.tcb.packages for file in package.files}
    assert listed <= {f"/{file.path}" for file in built.record.files}


def test_a_worker_that_gramine_starts_answers(
    built: Any, trial: Any, tmp_path: Path, plant_program: Callable[[str, str], Path]
) -> None:
    """A planted stand-in for gramine-direct gives it what Gramine gives: an image and three descriptors."""
    needs_namespace(built)
    import motte.enclave.bare as script

    place = tmp_path / "place"
    place.mkdir()
    text = GRAMINE.format(bare=script.__file__, place=str(place), bundle=str(trial.path))
    plant_program("gramine-direct", text)
    worker = GramineWorker(built.folder, kind="gramine-direct")
    assert worker.hello.engine == "onnxruntime"
    assert ask(trial, worker, "resident").answer


class ContainerWorker(VmWorker):
    """The worker of a container behind a Unix socket: kind ``process``, which gets its bundle over the link too."""

    kind = "process"


@pytest.mark.parametrize(
    ("text", "mark", "connect"),
    [("vm/motte-worker@.service", "ExecStart=", VmWorker), ("Containerfile", "ENTRYPOINT ", ContainerWorker)],
    ids=["guest", "container"],
)
def test_what_a_guest_or_container_starts_answers_and_has_given_up_every_file(
    built: Any, trial: Any, tmp_path: Path, text: str, mark: str, connect: type[VmWorker]
) -> None:
    """The command that stands beside the image, with nothing but the image in sight; a Unix socket to it."""
    needs_namespace(built)
    import motte.enclave.bare as script
    from motte.run.inputs import read_inputs
    from motte.run.tensors import to_wire
    from motte.zoo.shipped_models import images

    lines = (built.folder / text).read_text(encoding="utf-8").splitlines()
    stated = next(line for line in lines if line.startswith(mark)).removeprefix(mark)
    command = json.loads(stated) if stated.startswith("[") else stated.split()
    (tmp_path / "place").mkdir()
    words = [sys.executable, "-I", "-S", "-B", str(script.__file__), str(tmp_path / "place"), str(built.folder / ROOT)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vm.sock"))
        listener.listen(1)
        worker: list[Any] = []
        client = threading.Thread(target=lambda: worker.append(connect(f"unix:{tmp_path}/vm.sock")))
        client.start()
        connection, _ = listener.accept()
    with connection:
        guest = subprocess.Popen([*words, "--", *command], stdin=connection.fileno(), stdout=subprocess.DEVNULL, env={})
    client.join(60)
    assert worker, "it did not come up"
    hardening = worker[0].hello.hardening
    with motte.load(trial.path, keys=trial.recipient, signer=trial.signer.public, worker=worker[0]) as model:
        (item,) = read_inputs([images()[-1].path], model.signature, model.inputs)
        answer = model.run([to_wire(item.arrays[0], where=item.name)])
        assert {file.path for package in model.tcb().packages for file in package.files} <= {
            f"/{file.path}" for file in built.record.files
        }
    assert guest.wait(30) == 0
    assert len(answer.outputs[0].data) == 4 * len(trial.signature.labels)
    # What this kernel lacks is said; what it has holds.
    here = WorkerProcess(threads=1, engine="onnxruntime")
    there = here.hello.hardening
    here.kill()
    assert hardening.lacking.keys() == there.lacking.keys()
    assert (hardening.landlock_abi, hardening.seccomp_mode) == (there.landlock_abi, there.seccomp_mode)


def test_nothing_is_overwritten(built: Any, trial: Any) -> None:
    from motte.doctor.image_build import Request, build
    from motte.enclave.manifest import Choices

    before = (built.folder / "image.json").read_bytes()
    with pytest.raises(InputError, match="exists"):
        build(built.folder, Request("onnxruntime", True, Choices()), lambda text: None, trial=trial)
    assert (built.folder / "image.json").read_bytes() == before
