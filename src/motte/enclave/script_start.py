"""Starts a script in an enclave, with what its owner signed: kinds ``process``, ``gramine-*`` and ``vm``.

What the script prints goes where our own output goes: to the host, who reads it. A script prints no secret.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from motte.enclave.gramine import Kind, check_folder, program
from motte.enclave.manifest import NAME, loads
from motte.enclave.process import SIMULATED, worker_environment
from motte.enclave.script_main import REFUSED
from motte.enclave.script_run import ScriptRun, source_digest
from motte.errors import FormatError, InputError, ResourceError, SettingError, UnsupportedError, WorkerDied
from motte.limits import MAX_SCRIPT_BYTES, MAX_SCRIPT_RUN_BYTES
from motte.seal.keys import SignerPublicKey
from motte.trusted.harden import Hardening

KINDS: Final = ("process", "gramine-direct", "gramine-sgx", "vm")
INTERPRETERS: Final = ("python", "python3")
_END_WAIT_S: Final = 5.0
_COPY_BYTES: Final = 65_536
_MAX_REPORT_BYTES: Final = 65_536
_TEMPORARY: Final = "motte-script-"
Tell = Callable[[Hardening], None]


@dataclass(frozen=True, slots=True)
class Command:
    """``python train.py ARGUMENTS``: the script, and what it finds in ``sys.argv`` behind its name."""

    script: Path
    arguments: tuple[str, ...]

    @staticmethod
    def parse(words: Sequence[str]) -> Command:
        """Raises: SettingError: another program than Python, an option of it, or no script."""
        if len(words) < 2 or words[0] not in INTERPRETERS or words[1].startswith("-"):
            raise SettingError(
                "not a script of Python",
                expected="-- python SCRIPT.py ARGUMENTS",
                got=" ".join(words)[:120] or "nothing",
                hint="options of Python itself are not taken: they would change what runs",
            )
        return Command(Path(words[1]), tuple(words[2:]))

    def source(self) -> bytes:
        """The script's source.

        Raises:
            InputError: it cannot be read, or is too large.
        """
        return _read(self.script, MAX_SCRIPT_BYTES, "the script")


def read_run(path: Path, signer: SignerPublicKey) -> tuple[ScriptRun, bytes]:
    """What ``signer`` signed in ``path``, and its bytes as they go to the process, which verifies them itself.

    Raises:
        InputError: no such file. FormatError, SignatureError: as of :meth:`ScriptRun.decode`.
    """
    data = _read(path, MAX_SCRIPT_RUN_BYTES, "the configuration")
    return ScriptRun.decode(data, signer), data


def run_process(
    command: Command,
    signed: bytes,
    signer: SignerPublicKey,
    *,
    threads: int,
    read: Sequence[Path] = (),
    write: Sequence[Path] = (),
    stdout: int | None = None,
    tell: Tell | None = None,
) -> int:
    """Run the script as a hardened process of this machine, in a closed environment; its exit status.

    A **simulation**: root reads its memory and can inject code into it.

    Args:
        signed: bytes of :func:`read_run`.
        read, write: what it may read, and folders in which it may write, beside one of its own for temporary files.
        stdout: descriptor for what it prints; None: ours.
        tell: is told what holds of the process, before the script begins.

    Raises:
        InputError: a path that is not there. WorkerDied: nothing of the script ran.
    """
    for path in (*read, *write):
        if not path.exists() or (path in write and not path.is_dir()):
            raise InputError("no such file or folder for the script", where=str(path))
    passing = tempfile.mkdtemp(prefix=_TEMPORARY)
    try:
        words = ["--script", str(command.script.resolve()), "--signer", signer.raw.hex()]
        for name, paths in (("--read", read), ("--write", (*write, Path(passing)))):
            words += [word for path in paths for word in (name, str(path.resolve()))]
        return _run_process(words, signed, threads, passing, stdout, tell)
    finally:
        shutil.rmtree(passing, ignore_errors=True)


def _run_process(
    words: list[str], signed: bytes, threads: int, passing: str, stdout: int | None, tell: Tell | None
) -> int:
    given = _sealed_memory(signed)
    reading, writing = os.pipe()
    try:
        # -P: the folder of the script is added by the program itself, once it has compared the script's digest.
        line = [sys.executable, "-P", "-m", "motte.enclave.script_main", "--fd", str(given)]
        process = subprocess.Popen(
            [*line, "--report_fd", str(writing), *words],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            pass_fds=(given, writing),
            env={**worker_environment(threads), "TMPDIR": passing},
            start_new_session=True,
        )
    except OSError as problem:
        os.close(reading)
        raise ResourceError("the script cannot be started", got=str(problem)) from problem
    finally:
        os.close(given)
        os.close(writing)
    with _ended(process), open(reading, "rb") as file:
        report = file.read(_MAX_REPORT_BYTES)
        if report and tell is not None:
            tell(Hardening.from_json(json.loads(report)))
        return _status(process.wait())


def run_gramine(folder: Path, kind: Kind, signed: bytes, *, stdout: int | None = None) -> int:
    """Run the script of the image in ``folder`` under Gramine; its exit status.

    Raises:
        UnsupportedError: Gramine is not installed, or there is no SGX. InputError: no such image, or not signed.
        WorkerDied: nothing of the script ran.
    """
    gramine = program(kind)
    check_folder(folder, kind)
    given = _sealed_memory(signed)
    try:
        process = subprocess.Popen(
            [str(gramine), NAME],
            cwd=folder,
            stdin=given,
            stdout=stdout,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            start_new_session=True,
        )
    except OSError as problem:
        raise ResourceError("Gramine cannot be started", got=str(problem)) from problem
    finally:
        os.close(given)
    with _ended(process):
        return _status(process.wait())


def run_vm(address: str, signed: bytes, *, stdout: int | None = None, timeout_s: float = 30.0) -> None:
    """Send what was signed to the script's service in a guest, and copy what it prints until it ends.

    A socket tells no exit status.

    Args:
        address: ``vsock:CID:PORT``, or ``unix:PATH`` where the hypervisor shows vsock as one.

    Raises:
        SettingError: not an address. ResourceError: nobody listens there, or the connection broke.
    """
    family, target = _vm_address(address)
    out = 1 if stdout is None else stdout
    try:
        with socket.socket(family, socket.SOCK_STREAM) as link:
            link.settimeout(timeout_s)
            link.connect(target)
            link.sendall(signed)
            link.shutdown(socket.SHUT_WR)
            link.settimeout(None)
            while data := link.recv(_COPY_BYTES):
                while data:
                    data = data[os.write(out, data) :]
    except OSError as problem:
        hint = "is the guest up, and motte-script.socket started in it?"
        raise ResourceError("no script's service there", where=address, got=str(problem), hint=hint) from problem


def script_of_image(folder: Path) -> bytes:
    """SHA-256 of the source of an image's script, as its manifest states and as is measured.

    Raises:
        InputError: not the image of a script. ResourceError: it cannot be read.
    """
    path = folder / f"{NAME}.manifest"
    try:
        arguments = loads(path.read_bytes(), where=str(path)).get("loader", {}).get("argv", [])
        return bytes.fromhex(arguments[arguments.index("--digest") + 1])
    except OSError as problem:
        raise ResourceError("the manifest cannot be read", where=str(path), got=problem.strerror) from problem
    except (ValueError, IndexError, AttributeError, TypeError, FormatError) as problem:
        hint = "make one: motte enclave build --script SCRIPT.py -o DIR"
        raise InputError("not the image of a script", where=str(path), got=str(problem)[:120], hint=hint) from problem


def require_image(folder: Path | None, kind: str) -> Path:
    """Raises: SettingError: ``kind`` starts from an image, and none is named."""
    if folder is None:
        hint = "make one: motte enclave build --script SCRIPT.py -o DIR"
        raise SettingError(f"{kind} starts a script from its image", expected="--image DIR", hint=hint)
    return folder


def simulated(kind: str) -> str | None:
    """What has to be said of a start of this kind; None: nothing."""
    return f"{SIMULATED} (enclave kind: {kind})" if kind in ("process", "gramine-direct") else None


def digest_of(command: Command) -> bytes:
    """SHA-256 of the script's source.

    Raises:
        InputError: it cannot be read.
    """
    return source_digest(command.source())


class _ended:
    """The process, and all that it started, has ended when the block has."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=_END_WAIT_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        # Its own session: the group is its, and nobody else's.
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def _status(code: int) -> int:
    if code == REFUSED:
        raise WorkerDied(
            "the process refused, and nothing of the script ran",
            got=f"exit status {code}",
            hint="its own words stand above",
        )
    # As a shell says it.
    return code if code >= 0 else 128 - code


def _sealed_memory(data: bytes) -> int:
    fd = os.memfd_create("motte-script-run", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _vm_address(text: str) -> tuple[int, str | tuple[int, int]]:
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return socket.AF_UNIX, rest
    cid, _, port = rest.partition(":")
    if kind != "vsock" or not cid.isdecimal() or not port.isdecimal():
        raise SettingError("not the address of a guest", expected="vsock:CID:PORT or unix:PATH", got=repr(text)[:120])
    if not hasattr(socket, "AF_VSOCK"):
        raise UnsupportedError("this Python knows no vsock")
    return socket.AF_VSOCK, (int(cid), int(port))


def _read(path: Path, max_bytes: int, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as problem:
        raise InputError(f"{what} cannot be read", where=str(path), got=problem.strerror) from problem
    if len(data) > max_bytes:
        raise InputError(f"{what} is too large", where=str(path), expected=f"at most {max_bytes} bytes")
    return data
