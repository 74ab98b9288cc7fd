"""The ``gramine-*`` kinds: the worker of a closed image, started by Gramine; ``direct`` without SGX, ``sgx`` in it.

The link is one end of a socket pair that is the worker's standard input *and* output, since Gramine hands on no other
descriptor, cannot reach a Unix socket of the host by its path, and fixes arguments in the manifest, so that no port can
be told to it (over TCP loopback the port would have to be the same for every worker of a machine). Inside, Gramine
shows them as two files, no socket: see docs/gramine.md for what the worker does about it.

Gramine writes the worker's standard error to the same place as its output. A traceback would come between two frames,
so the worker must close the way there before it sends its first one; a frame that was hit is refused here, and the
worker ended.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Final, Literal

from motte.enclave.image import RECORD
from motte.enclave.manifest import NAME, loads
from motte.enclave.process import WorkerProcess
from motte.errors import InputError, ResourceError, SettingError, UnsupportedError
from motte.link.local import Recorder

Kind = Literal["gramine-direct", "gramine-sgx"]
KINDS: Final[tuple[Kind, ...]] = ("gramine-direct", "gramine-sgx")
INSTALL: Final = (
    "sudo apt-get install gramine   (after adding Gramine's repository: gramine.readthedocs.io, Installation)"
)
_SUFFIX: Final = {"gramine-direct": (".manifest",), "gramine-sgx": (".manifest.sgx", ".sig")}
_DEVICE: Final = Path("/dev/sgx_enclave")


class GramineWorker(WorkerProcess):
    """A worker of the image in ``folder``, as ``motte enclave build`` made it.

    Args:
        folder: with ``worker.manifest``, and for ``gramine-sgx`` what ``motte enclave measure`` put beside it.
        kind: ``gramine-direct`` protects from nobody, and says so.
        start_timeout_s: everything in the image is hashed before its first frame.
        recorder: sees every frame, as the host could.

    Engine, precision and threads are the image's: they are fixed in what is measured.

    Raises:
        UnsupportedError: Gramine is not installed, or the machine has no SGX. InputError: no image there, or it is not
            signed. WorkerDied, WorkerStalled: it did not come up.
    """

    _shares_kernel = False

    def __init__(
        self,
        folder: Path,
        *,
        kind: Kind = "gramine-sgx",
        start_timeout_s: float = 300.0,
        recorder: Recorder | None = None,
    ) -> None:
        self._folder = folder
        self.kind = kind
        self._command = (str(program(kind)), NAME)
        check_folder(folder, kind)
        engine, precision, threads = stated(folder)
        super().__init__(
            threads=threads,
            engine=engine,
            precision=precision,
            start_timeout_s=start_timeout_s,
            recorder=recorder,
        )

    def _spawn(self, link_fd: int, options: list[str], passed: list[int], threads: int) -> subprocess.Popen[bytes]:
        # Gramine's own messages go to standard error of the host, which is shown where the worker dies.
        return subprocess.Popen(
            self._command,
            cwd=self._folder,
            stdin=link_fd,
            stdout=link_fd,
            stderr=self._stderr,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            start_new_session=True,
        )


def program(name: str) -> Path:
    """Where a program of Gramine is.

    Raises:
        UnsupportedError: not installed; how it is.
    """
    found = shutil.which(name)
    if found is None:
        raise UnsupportedError("Gramine is not installed on this machine", expected=f"{name} on the PATH", hint=INSTALL)
    return Path(found)


def check_folder(folder: Path, kind: Kind) -> None:
    """Refuse a folder in which Gramine would find nothing to start.

    Raises:
        InputError: a file is missing. UnsupportedError: SGX without SGX. SettingError: no such kind.
    """
    if kind not in KINDS:
        raise SettingError("unknown kind", expected=" or ".join(KINDS), got=repr(kind))
    missing = [NAME + suffix for suffix in _SUFFIX[kind] if not (folder / (NAME + suffix)).is_file()]
    if missing:
        signed = kind == "gramine-sgx" and (folder / f"{NAME}.manifest").is_file()
        hint = f"sign it: motte enclave measure {folder}" if signed else "make one: motte enclave build -o DIR"
        raise InputError(
            "not an image that can be started", where=str(folder), got=f"no {', '.join(missing)}", hint=hint
        )
    if kind == "gramine-sgx" and not _DEVICE.exists():
        raise UnsupportedError("this machine has no SGX, or its kernel does not show it", expected=str(_DEVICE))


def stated(folder: Path) -> tuple[str, str, int]:
    """Engine, precision and compute threads of an image, from the arguments in its manifest.

    Raises:
        InputError: another program than a worker. FormatError: not a manifest. ResourceError: it cannot be read.
    """
    path = folder / f"{NAME}.manifest"
    try:
        arguments = loads(path.read_bytes(), where=str(path)).get("loader", {}).get("argv", [])
    except OSError as problem:
        raise ResourceError("the manifest cannot be read", where=str(path), got=problem.strerror) from problem
    words = dict(itertools.pairwise(arguments))
    try:
        return words["--engine"], words["--precision"], int(words["--threads"])
    except (KeyError, ValueError) as problem:
        raise InputError(
            "not the manifest of a worker", where=str(path), got=str(arguments)[:200], hint=f"see {RECORD} beside it"
        ) from problem
