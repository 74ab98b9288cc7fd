"""The program inside: believes a signed configuration, gives up what the script does not need, becomes the script.

    python -m motte.enclave.script_main --signer HEX --fd N --script FILE [--read PATH]... [--write DIR]...
    python motte_start.pyc -m motte.enclave.script_main --signer HEX --fd 0 --module NAME --digest HEX
        [--enclave process|vm [--read PATH]...]

The second form runs in an image, where the script is one of its modules and the digest of its source is measured with
the arguments; with ``--enclave`` in a container or a confidential VM, where it confines itself as the first does.
The signed text arrives on descriptor N. Of the environment only names that tune a library, or by which
Python finds itself, stay: nothing of it decides what leaves, and ``RANK``, ``WORLD_SIZE`` and all else are dropped.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.abc import SourceLoader
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Final

from motte.enclave.script_run import ScriptRun, make_current, source_digest
from motte.errors import MotteError, SettingError
from motte.limits import MAX_SCRIPT_BYTES, MAX_SCRIPT_RUN_BYTES
from motte.link.address import TcpAddress, parse_address
from motte.seal.keys import SignerPublicKey
from motte.trusted.surroundings import TOLD

KEPT: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ORT_DISABLE_TELEMETRY", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_",
    "PYTHONDONTWRITEBYTECODE",
)  # fmt: skip
REFUSED: Final = 78
"""Exit status when nothing of the script ran: EX_CONFIG."""


@dataclass(slots=True)
class Words:
    """The arguments of this program; where the script is: ``script`` here, or ``module`` with ``digest`` in an image.

    ``report_fd``: where the process says how it is hardened; None: on standard error. ``enclave``: in an image, what
    surrounds it; with ``gramine`` there is no kernel to ask for confinement.
    """

    signer: str = ""
    fd: int = 0
    script: Path | None = None
    module: str | None = None
    digest: str | None = None
    report_fd: int | None = None
    enclave: str = "gramine"
    read: list[Path] = field(default_factory=list)
    write: list[Path] = field(default_factory=list)

    @staticmethod
    def parse(words: Sequence[str]) -> Words:
        """Raises: SettingError: an unknown, missing or ill-typed argument."""
        found = Words()
        for name, value in zip_longest(words[::2], words[1::2]):
            where = name.removeprefix("--").replace("-", "_")
            if value is None or not name.startswith("--") or where not in Words.__slots__:
                raise SettingError("not an argument of a script's process", got=name)
            if where in ("read", "write"):
                getattr(found, where).append(Path(value))
            elif where in ("fd", "report_fd"):
                if not value.isdecimal():
                    raise SettingError("not a descriptor", where=name, got=value[:40])
                setattr(found, where, int(value))
            else:
                setattr(found, where, Path(value) if where == "script" else value)
        in_image = found.module is not None and found.digest is not None
        if not found.signer or (found.script is None) is not in_image:
            raise SettingError("not the arguments of a script's process", expected="--script, or --module and --digest")
        if found.enclave not in TOLD:
            raise SettingError("unknown enclave", expected=", ".join(TOLD), got=found.enclave[:40])
        return found

    @property
    def confines(self) -> bool:
        """Whether this process gives up files, programs and ports before the script begins."""
        return self.script is not None or self.enclave != "gramine"


class _Source(SourceLoader):
    """Runs exactly the bytes whose digest was compared: the file is not read a second time."""

    def __init__(self, path: str, source: bytes) -> None:
        self._path, self._source = path, source

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_data(self, path: str | bytes) -> bytes:
        if os.fspath(path) != self._path:
            raise OSError("no bytecode beside a script")
        return self._source


class Refused(Exception):
    """Nothing of the script ran; the cause says why."""


def main(arguments: Sequence[str]) -> None:
    """Check, confine, run. What the script raises, or exits with, is the process's end.

    Raises:
        Refused: before the script began.
    """
    try:
        words, source = _prepare(arguments)
    except MotteError as problem:
        raise Refused from problem
    if words.script is not None and source is not None:
        _become(str(words.script), source)
    else:
        import runpy

        runpy.run_module(words.module or "", run_name="__main__", alter_sys=True)


def _prepare(arguments: Sequence[str]) -> tuple[Words, bytes | None]:
    words = Words.parse(arguments)
    run = ScriptRun.decode(_all_of(words.fd), SignerPublicKey(_hexadecimal(words.signer)))
    source = None
    if words.script is None:
        # In an image: the digest of the source is in the measured arguments.
        run.require_command(_hexadecimal(words.digest or ""), run.arguments)
    else:
        source = _read(words.script)
        run.require_command(source_digest(source), run.arguments)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    os.environ.clear()
    os.environ.update(kept | run.environment())
    make_current(run)
    if words.confines:
        _confine(words, run)
    sys.argv = [str(words.script or words.module), *run.arguments]
    if words.script is not None:
        sys.path.insert(0, str(words.script.parent))
    return words, source


def _confine(words: Words, run: ScriptRun) -> None:
    from motte.enclave.script_sandbox import IN_IMAGE, confine

    if words.script is not None:
        readable, writable = [words.script.parent, *words.read], words.write
    else:
        readable, writable = words.read, [place for place in IN_IMAGE[words.enclave] if place.is_dir()]
    found = confine(readable, writable, ports=_ports(run))
    if words.report_fd is not None:
        with os.fdopen(words.report_fd, "w", encoding="utf-8") as file:
            file.write(json.dumps(found.to_json()))
    elif words.script is None:
        sys.stderr.write("".join(f"{line}\n" for line in found.lines()))


def _ports(run: ScriptRun) -> tuple[int, ...] | None:
    """TCP ports that the signed run names; None: ranks meet each other, on ports that they choose when they do."""
    if run.ranks > 1:
        return None
    address = parse_address(run.accelerator) if run.accelerator else None
    return (address.port,) if isinstance(address, TcpAddress) else ()


def _become(path: str, source: bytes) -> None:
    loader = _Source(path, source)
    module = ModuleType("__main__")
    module.__file__ = path
    module.__loader__ = loader
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    loader.exec_module(module)


def _all_of(fd: int) -> bytes:
    with open(fd, "rb", closefd=fd != 0) as file:
        data = file.read(MAX_SCRIPT_RUN_BYTES + 1)
    if fd == 0:
        # A script that reads its standard input finds its end.
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)
    return data


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            source = file.read(MAX_SCRIPT_BYTES + 1)
    except OSError as problem:
        raise SettingError("the script cannot be read", where=str(path), got=problem.strerror) from problem
    if len(source) > MAX_SCRIPT_BYTES:
        raise SettingError("the script is too large", where=str(path), expected=f"at most {MAX_SCRIPT_BYTES} bytes")
    return source


def _hexadecimal(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as problem:
        raise SettingError("not hexadecimal", got=repr(text)[:80]) from problem


def _tell(problem: MotteError) -> None:
    lines = [f"error: {problem.message}"]
    lines += [f"  {name}: {getattr(problem, name)}" for name in ("where", "expected", "got") if getattr(problem, name)]
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as refused:
        if isinstance(refused.__cause__, MotteError):
            _tell(refused.__cause__)
        sys.exit(REFUSED)
