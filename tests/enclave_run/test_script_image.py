"""A closed image of a script that needs no torch: built once, looked at, started by a stand-in for Gramine."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motte.enclave.image import ROOT
from motte.enclave.manifest import Choices, loads
from motte.enclave.manifest_rules import check
from motte.enclave.script_image import PLAIN, Request, build
from motte.enclave.script_main import REFUSED
from motte.errors import InputError, SettingError, WorkerDied

Motte = Callable[..., Any]
GRAMINE = """
import os, sys, tomllib
# As Gramine does: the host's arguments and variables are dropped, descriptors 0, 1 and 2 are all that is handed on.
manifest = tomllib.load(open(sys.argv[1] + ".manifest", "rb"))
loader = manifest["loader"]
words = [sys.executable, "-I", "-S", "-B", {bare!r}, {place!r}, os.path.abspath("root"), "--"]
os.execve(words[0], words + loader["argv"], loader["env"])
"""


def request(own: Any, *arguments: str, **changes: Any) -> Request:
    from motte.seal.keys import SignerPublicKey, load_public

    made = Request(own.script, arguments, load_public(own.public, SignerPublicKey), Choices())
    return replace(made, **changes)


def built_request(own: Any) -> Request:
    """What the image of the fixture was made from."""
    return request(own, "0", choices=Choices(product=3, svn=7), include=(own.folder / "data.bin",))


def test_the_image_is_closed_and_small(image: tuple[Any, Any]) -> None:
    built, own = image
    assert built.why_not_proved is None or "namespace" in built.why_not_proved
    assert built.record.engine == PLAIN
    paths = {file.path for file in built.record.files}
    assert str(own.folder / "data.bin").lstrip("/") in paths
    assert len(paths) < 60
    assert built.record.bytes < 40e6
    modules = {module.path.rpartition("/")[2] for module in built.record.modules}
    assert {"says.pyc", "beside.pyc"} <= modules
    assert not any(path.endswith(".py") or "torch" in path for path in paths)
    assert built.left_out == ()


def test_the_manifest_fixes_script_signer_and_arguments(image: tuple[Any, Any]) -> None:
    from motte.seal.keys import SignerPublicKey, load_public

    built, own = image
    manifest = loads((built.folder / "worker.manifest").read_bytes())
    assert check(manifest) == ()
    assert "allowed_files" not in manifest["sgx"]
    argv = manifest["loader"]["argv"]
    assert argv[argv.index("--digest") + 1] == hashlib.sha256(own.script.read_bytes()).hexdigest()
    assert argv[argv.index("--signer") + 1] == load_public(own.public, SignerPublicKey).raw.hex()
    assert argv[argv.index("--module") + 1] == "says"
    assert not {"--script", "--read", "--write"} & set(argv)
    data = str(own.folder / "data.bin")
    assert {"path": data, "uri": f"file:{ROOT}{data}"} in manifest["fs"]["mounts"]
    assert (manifest["sgx"]["isvprodid"], manifest["sgx"]["isvsvn"]) == (3, 7)
    size = int(manifest["sgx"]["enclave_size"].removesuffix("M")) << 20
    assert size >= built.sizes.needed_bytes * 1.25
    unit = (built.folder / "vm" / "motte-script@.service").read_text()
    assert "StandardInput=socket" in unit
    assert own.script.stem in unit


def test_what_gramine_would_start_runs_what_was_signed(
    motte: Motte, image: tuple[Any, Any], tmp_path: Path, plant_program: Callable[[str, str], Path]
) -> None:
    import motte.enclave.bare as bare

    built, own = image
    if built.why_not_proved is not None:
        pytest.skip(built.why_not_proved)
    (tmp_path / "place").mkdir()
    plant_program("gramine-direct", GRAMINE.format(bare=bare.__file__, place=str(tmp_path / "place")))
    peers = ("tcp:10.0.0.1:7000", "tcp:10.0.0.2:7000")
    configuration = own.signed("gramine.json", "4", "--x", rank=1, ranks=2, peers=peers)
    line = ("enclave", "run", "--enclave", "gramine-direct", "--image", built.folder, "--signer", own.public)
    command = ("--configuration", configuration, "--", "python", "says.py", "4")
    found = motte(*line, *command, "--x")
    assert found.code == 4, found.err
    said = found.json
    assert (said["rank"], said["arguments"], said["beside"], said["stdin"]) == (1, ["4", "--x"], 7, "")
    assert said["environment"]["MASTER_ADDR"] == "10.0.0.1"
    assert "SIMULATED" in found.err
    assert "other arguments" in motte(*line, *command).err
    # A script that the owner signed and that is not the image's; what another owner signed, past our own checks.
    (own.folder / "other.py").write_text("print(1)")
    other = own.signed("other.json", script=own.folder / "other.py")
    wrong = motte(*line, "--configuration", other, "--", "python", "other.py")
    assert "another script than the owner signed" in wrong.err
    from motte.enclave.script_start import run_gramine

    with pytest.raises(WorkerDied, match="nothing of the script ran"):
        run_gramine(built.folder, "gramine-direct", other.read_bytes())


def run_alone(built: Any, signed: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """A command of the image, with nothing but it in sight; what the owner signed is its standard input."""
    import motte.enclave.bare as bare

    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-I", "-S", "-B", str(bare.__file__), place, str(built.folder / ROOT), "--", *words]
        with signed.open("rb") as stdin:
            return subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=60, env={})


def test_a_container_holds_the_image_and_its_one_command_and_confines_the_script(image: tuple[Any, Any]) -> None:
    built, own = image
    lines = (built.folder / "Containerfile").read_text().splitlines()
    assert [line.split()[0] for line in lines if line and not line.startswith(("#", " "))] == [
        "FROM", "COPY", "ENV", "USER", "WORKDIR", "ENTRYPOINT",
    ]  # fmt: skip
    assert {"FROM scratch", "COPY root/ /", "USER 65534:65534"} <= set(lines)
    assert f"{len(built.record.files)} files" in lines[0]
    assert (built.folder / ".containerignore").read_text() == "*\n!root\n"
    command = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).partition(" ")[2])
    manifest = loads((built.folder / "worker.manifest").read_bytes())
    data = str(own.folder / "data.bin")
    # As in an enclave, and then what an enclave has no kernel to ask for.
    assert command == [*manifest["loader"]["argv"], "--enclave", "process", "--read", data]
    unit = (built.folder / "vm" / "motte-script@.service").read_text()
    started = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).removeprefix("ExecStart=")
    guest = shlex.split(started)
    assert guest == [*manifest["loader"]["argv"], "--enclave", "vm", "--read", data]
    if built.why_not_proved is not None:
        pytest.skip(built.why_not_proved)
    signed = own.signed("container.json", "3", "--try", data, "--run")
    for words in (command, guest):
        done = run_alone(built, signed, words)
        assert done.returncode == 3, done.stderr
        assert "not hardened: seccomp: not for scripts" in done.stderr
        tried = json.loads(done.stdout)["tried"]
        assert tried.pop("read what is included")
        if "Landlock" not in done.stderr:
            assert tried == {"write": False, "read other files": False, "run": False}
    # Without those words, as in an enclave, it is kept from nothing here.
    free = run_alone(built, own.signed("free.json", "3", "--try", data), manifest["loader"]["argv"])
    assert set(json.loads(free.stdout)["tried"].values()) == {True}
    assert run_alone(built, signed, [*command[:-4], "--enclave", "moat"]).returncode == REFUSED


def test_the_same_script_gives_the_same_image_wherever_it_is_built(image: tuple[Any, Any], tmp_path: Path) -> None:
    built, own = image
    there = tmp_path / "another place" / "with a longer name"
    there.mkdir(parents=True)
    for name in ("beside.py", "says.py"):
        shutil.copyfile(own.folder / name, there / name)
        os.utime(there / name, (10, 10))
    before = os.umask(0o077)
    try:
        again = build(there / "image", replace(built_request(own), script=there / "says.py"), lambda text: None)
    finally:
        os.umask(before)
    assert again.record == built.record

    def contents(folder: Path) -> dict[str, tuple[bytes, int, float]]:
        found = [path for path in folder.rglob("*") if path.is_file() and path != folder / "build.json"]
        return {
            str(path.relative_to(folder)): (
                path.read_bytes(),
                path.stat().st_mode if path.is_relative_to(folder / ROOT) else 0,
                path.stat().st_mtime if path.is_relative_to(folder / ROOT) else 0,
            )
            for path in found
        }

    # Files, record, manifest, container and guest: byte for byte. Another letter in the script is another image.
    assert contents(again.folder) == contents(built.folder)
    (there / "beside.py").write_text("VALUE = 8\n")
    changed = build(there / "other", replace(built_request(own), script=there / "says.py"), lambda text: None)
    assert changed.record.files != built.record.files


def test_what_cannot_be_an_image_leaves_nothing(owner: Any) -> None:
    folder = owner.folder / "image"
    with pytest.raises(WorkerDied, match="in its trial") as caught:
        build(folder, request(owner, "5"), lambda text: None)
    assert "exit status 5" in str(caught.value.got)
    for name in ("random.py", "no-name.py", "script"):
        with pytest.raises(SettingError, match="not a name"):
            request(owner, script=owner.folder / name)
    with pytest.raises(InputError, match="cannot be read"):
        build(folder, request(owner, script=owner.folder / "none.py"), lambda text: None)
    with pytest.raises(InputError, match="include"):
        build(folder, request(owner, "0", include=(owner.folder / "none.bin",)), lambda text: None)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(InputError, match="exists"):
        build(folder, request(owner, "0"), lambda text: None)


def test_data_of_the_trial_is_named_and_left_out(motte: Motte, owner: Any) -> None:
    script = owner.folder / "reads.py"
    data = owner.folder / "data.bin"
    data.write_bytes(b"x")
    # In the image it is not there: the script that needs it fails alone, and says so.
    script.write_text(f"open({str(data)!r}, 'rb').read()\n")
    line = ("enclave", "build", "--script", script, "--signer", owner.public, "-o", owner.folder / "image")
    needed = motte(*line)
    if "no namespace" not in needed.err:
        assert (needed.code, "failed alone" in needed.err) == (1, True)
        assert not (owner.folder / "image").exists()
    script.write_text(f"import os\nif os.path.exists({str(data)!r}): open({str(data)!r}, 'rb').read()\n")
    made = motte(*line, "--memory", "64MiB", "--json") if needed.code else needed
    assert made.code == 0, made.err
    assert str(data) in made.err
    assert made.json["left_out"] == [str(data)]
    for wrong in (("--engine", "torch"), ("--key", owner.key), ("--trial", '"')):
        assert motte(*line, *wrong).code == 2
    assert motte("enclave", "build", "-o", owner.folder / "i", "--trial", "x").code == 2
    assert motte("enclave", "build", "-o", owner.folder / "i", "--script", script).code == 2
