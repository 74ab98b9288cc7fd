"""A closed image of one script: exactly the interpreter, packages and libraries that it loads, and the script itself.

Found by running the script once with arguments for a trial, and checked by running the image alone with the same. The
format is that of a worker's image (docs/spec/image.md); the script and what it imports from its own folder are modules
in the pack, and the digest of its source stands in the measured arguments. Data that the trial read is left out, unless
it is named: what a script reads from the host is not measured, and Gramine shows none of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from motte.enclave import container, vm
from motte.enclave.image import ROOT, ImageRecord, without_openblas, write_bytes, write_image
from motte.enclave.image_files import INTERPRETER, MODULES, Member, members_of, module_folders
from motte.enclave.manifest import NAME, Choices, dumps, manifest_of
from motte.enclave.manifest_rules import check
from motte.enclave.script_run import ScriptRun, source_digest
from motte.enclave.sizes import (
    GRAMINE_BYTES,
    HELPER_THREADS,
    LARGEST_BYTES,
    MARGIN,
    STACK_BYTES,
    Line,
    Sizes,
    estimated_start_s,
)
from motte.enclave.start import START_NAME
from motte.enclave.workers import PYTHON_FLAGS, image_environment
from motte.errors import InputError, MismatchError, SettingError, WorkerDied
from motte.limits import GIB, MAX_SCRIPT_BYTES, MIB
from motte.measure.clock import Clock
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.trusted.surroundings import Told

BUILD: Final = "build.json"
NO_NAMESPACE: Final = "no namespace of its own"
TORCH, PLAIN = "torch", "python"
DEFAULT_MEMORY_BYTES: Final = 2 * GIB
_MAIN: Final = "motte.enclave.script_main"
_INTERPRETER_BYTES: Final = {TORCH: 256 * MIB, PLAIN: 64 * MIB}
_OWN_THREADS: Final = 16
_TRIAL_S: Final = 900
_LAST_WORDS_BYTES: Final = 600
_LIBRARIES: Final = ("/lib/", "/lib64/", "/usr/lib/", "/usr/local/lib/")
_HERE: Final = Path(__file__).parent
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to build.

    Attributes:
        script: its file; its name becomes that of a module. arguments: of the trial.
        signer: whose configurations the enclave will believe; measured.
        include: files that go into the image at their own paths, beside what was loaded.
        memory_bytes: for what the script allocates; nobody can compute it, so its owner says it.
        accelerator: let the trials have one, on the CPU of this machine, so that what a script loads to reach it is
            seen. Such a script asks :func:`motte.enclave.script_run.current` for its address.
        slim: without numpy's OpenBLAS, 28 MB: a script that has numpy multiply matrices or solve then ends with an
            illegal instruction. torch has a library of its own.
    """

    script: Path
    arguments: tuple[str, ...]
    signer: SignerPublicKey
    choices: Choices
    include: tuple[Path, ...] = ()
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    accelerator: bool = False
    slim: bool = False

    def __post_init__(self) -> None:
        name = self.script.stem
        if self.script.suffix != ".py" or not name.isidentifier() or name in sys.stdlib_module_names:
            raise SettingError(
                "not a name for a script in an image",
                expected="NAME.py, NAME no module of Python",
                got=str(self.script),
            )


@dataclass(frozen=True, slots=True)
class Built:
    """A finished image in ``folder``.

    ``left_out``: files that the trial read and the image does not have. ``why_not_proved``: why the image was not run
    alone; None: it was, to its end.
    """

    folder: Path
    record: ImageRecord
    sizes: Sizes
    left_out: tuple[str, ...]
    why_not_proved: str | None
    clock: Clock

    @property
    def start_s(self) -> float:
        """**Estimated** seconds of hashing and starting under Gramine."""
        return estimated_start_s(self.record)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "engine": self.record.engine,
            "slim": self.record.slim,
            "files": len(self.record.files),
            "bytes": self.record.bytes,
            "modules": len(self.record.modules),
            "hashed_bytes": sum(file.bytes for file in self.record.hashed()),
            "estimated_start_s": round(self.start_s, 2),
            "closed": {"proved": self.why_not_proved is None, "why": self.why_not_proved},
            "left_out": list(self.left_out),
            "sizes": self.sizes.to_json(),
            "segments": self.clock.segments().to_json(),
        }


def build(folder: Path, request: Request, tell: Tell) -> Built:
    """Build ``folder``, which must not exist; after an error, or Ctrl-C, nothing of it is left.

    Raises:
        InputError: the folder exists, or a file does not. WorkerDied: the script fails in its trial, or in the image
            alone; its last words. SettingError: no such name, or an enclave beyond all bounds.
    """
    if os.path.lexists(folder):
        raise InputError("the folder exists already", where=str(folder), hint="choose another name")
    trial = _Trial(request, _source(request.script), SignerPrivateKey.new())
    clock = Clock()
    tell("running the script to see what it loads")
    with clock.segment("trace", since="script spawned", until="its files listed"):
        opened = trial.trace()
    wanted, left_out = _sorted_out(opened, request)
    engine = TORCH if any("/torch/lib/" in path for path in wanted) else PLAIN
    members = _members(wanted, request, engine)
    record: ImageRecord | None = None
    try:
        tell("making the image")
        with clock.segment("make image", since="files listed", until="record written"):
            replaced = without_openblas(members) if request.slim else None
            record = write_image(folder, members, engine=engine, slim=False, replaced=replaced)
        tell("running the image alone")
        with clock.segment("prove closed", since="record written", until="script ended"):
            why = trial.prove(folder)
        built = Built(folder, record, derive(record, request), left_out, why, clock)
        _write_rest(built, request, trial.digest)
    except BaseException:
        if record is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return built


def arguments(
    module: str,
    digest: bytes,
    signer: SignerPublicKey,
    *,
    enclave: Told = "gramine",
    read: Sequence[Path] = (),
) -> tuple[str, ...]:
    """The whole command line in an image, its interpreter first.

    Args:
        enclave: other than ``gramine``, where there is no kernel to ask: the process confines itself first.
        read: files of the image that the script may then read, beside the interpreter's own.
    """
    words = ["-m", _MAIN, "--signer", signer.raw.hex(), "--fd", "0", "--module", module, "--digest", digest.hex()]
    if enclave != "gramine":
        words += ["--enclave", enclave, *(word for path in read for word in ("--read", str(path.resolve())))]
    return (f"/{INTERPRETER}", *PYTHON_FLAGS, f"/{MODULES}/{START_NAME}", *words)


def _confined(request: Request, digest: bytes, enclave: Told) -> tuple[str, ...]:
    return arguments(request.script.stem, digest, request.signer, enclave=enclave, read=sorted(request.include))


def derive(record: ImageRecord, request: Request) -> Sizes:
    """Sizes of the enclave, each line with its reason. Nothing is measured for it.

    Raises:
        SettingError: more than an enclave can be.
    """
    count = request.choices.threads
    threads = (
        Line(1, "main thread", "the script"),
        Line(count - 1, "compute threads", f"torch with {count}, the main thread among them"),
        Line(_OWN_THREADS, "the script's own threads", "autograd, collectives, and what it starts itself"),
        Line(HELPER_THREADS, "Gramine's helpers", "processes, timers, handshakes"),
    )
    total = sum(line.amount for line in threads)
    memory = (
        Line(record.bytes, "files of the image", "every one may be mapped, and is copied in"),
        Line(_INTERPRETER_BYTES[record.engine], "interpreter and libraries", "no file behind it; rounded up"),
        Line(request.memory_bytes, "the script", "as its owner says: --memory"),
        Line(total * STACK_BYTES, "stacks", f"{total} threads of {STACK_BYTES // MIB} MiB"),
        Line(GRAMINE_BYTES, "Gramine", "its own libraries and tables"),
    )
    wanted = int(sum(line.amount for line in memory) * (1 + MARGIN))
    size = 1 << (wanted - 1).bit_length()
    if size > LARGEST_BYTES:
        raise SettingError("no enclave is that large", expected=f"at most {LARGEST_BYTES} bytes", got=str(wanted))
    return Sizes(memory, threads, size)


def manifest(record: ImageRecord, sizes: Sizes, request: Request, digest: bytes) -> dict[str, Any]:
    """The manifest of a script as a table of TOML values: a worker's, with another command and the included files."""
    table = manifest_of(record, sizes, request.choices)
    table["loader"]["argv"] = list(arguments(request.script.stem, digest, request.signer))
    mounted = (f"/{file.path}" for file in record.files)
    own = sorted({path for path in mounted if not path.startswith(("/usr/", "/lib/", "/lib64/"))})
    table["fs"]["mounts"] += [{"path": path, "uri": f"file:{ROOT}{path}"} for path in own]
    return table


def service_unit(request: Request, digest: bytes) -> str:
    """A unit of systemd for a confidential VM: what was signed arrives on the connection, what is printed leaves."""
    command = " ".join(_escaped(word) for word in _confined(request, digest, "vm"))
    variables = "".join(
        f'Environment="{name}={value}"\n' for name, value in sorted(image_environment(request.choices.threads).items())
    )
    return (
        "[Unit]\n"
        f"Description=Trusted script ({request.script.stem})\n"
        "CollectMode=inactive-or-failed\n\n"
        "[Service]\n"
        f"ExecStart={command}\n"
        "RootDirectory=/opt/motte/root\n"
        "MountAPIVFS=yes\n"
        "BindPaths=-/sys/kernel/config/tsm/report\n"
        f"{variables}"
        "StandardInput=socket\n"
        "StandardOutput=socket\n"
        "StandardError=null\n"
        "LimitCORE=0\n"
        "NoNewPrivileges=yes\n"
        "PrivateTmp=yes\n"
        "ProtectSystem=strict\n"
        "ProtectHome=yes\n"
        "ProtectKernelModules=yes\n"
        "RestrictNamespaces=yes\n"
        "RestrictSUIDSGID=yes\n"
        "SystemCallArchitectures=native\n"
    )


def _escaped(word: str) -> str:
    """A word of a command line in a unit (systemd.service(5), "Command lines")."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$") + '"'


# --- trials -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trial:
    """Runs of the script that end by themselves. ``key`` is the trial's own: no owner's is needed to build an image."""

    request: Request
    source: bytes
    key: SignerPrivateKey

    @property
    def digest(self) -> bytes:
        return source_digest(self.source)

    def trace(self) -> tuple[str, ...]:
        """Run it with the files of this machine; real paths of all that it opened or mapped, sorted."""
        noted = os.memfd_create("motte-opened-files")
        try:
            words = [sys.executable, *PYTHON_FLAGS, str(_HERE / "script_traced.py"), str(noted)]
            command = arguments(self.request.script.stem, self.digest, self.key.public)
            words += [os.pathsep.join(_folders(self.request)), *command[command.index(_MAIN) + 1 :]]
            self._run(words, "in its trial", (noted,))
            with open(noted, "rb", closefd=False) as file:
                file.seek(0)
                found = {os.path.realpath(os.fsdecode(each)) for each in file.read().split(b"\0") if each}
        finally:
            os.close(noted)
        return tuple(sorted(found))

    def prove(self, folder: Path) -> str | None:
        """Run the image with nothing else in sight; why it could not be run."""
        with tempfile.TemporaryDirectory(prefix="motte-bare-") as place:
            words = [sys.executable, "-I", "-S", "-B", str(_HERE / "bare.py"), place, str(folder / ROOT), "--"]
            try:
                self._run([*words, *arguments(self.request.script.stem, self.digest, self.key.public)], "alone", ())
            except WorkerDied as problem:
                got = problem.got or ""
                if NO_NAMESPACE in got:
                    return got[got.index(NO_NAMESPACE) :][:300]
                raise
        return None

    def _run(self, words: Sequence[str], how: str, passed: tuple[int, ...]) -> None:
        with tempfile.TemporaryFile() as heard, _accelerator(self.request.accelerator) as fd:
            run = ScriptRun(
                script=self.digest,
                arguments=self.request.arguments,
                accelerator="" if fd is None else f"fd:{fd}",
                signer=self.key.public,
            )
            try:
                done = subprocess.run(
                    words,
                    input=run.encode(self.key),
                    stdout=heard,
                    stderr=subprocess.STDOUT,
                    pass_fds=passed if fd is None else (*passed, fd),
                    env=image_environment(self.request.choices.threads),
                    timeout=_TRIAL_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as problem:
                where, hint = str(self.request.script), "give arguments for a short trial: --trial"
                raise WorkerDied(
                    f"the script did not end {how}", where=where, expected=f"within {_TRIAL_S} s", hint=hint
                ) from problem
            if done.returncode == 0:
                return
            size = heard.seek(0, os.SEEK_END)
            heard.seek(max(0, size - _LAST_WORDS_BYTES))
            last = heard.read().decode("utf-8", "replace").strip()
        raise WorkerDied(
            f"the script failed {how}",
            where=str(self.request.script),
            expected="exit status 0",
            got=f"exit status {done.returncode}; {last}",
            hint="an image is made of what a trial loads that ends well; its arguments: --trial",
        )


@contextlib.contextmanager
def _accelerator(wanted: bool) -> Iterator[int | None]:
    """A descriptor that leads to an accelerator on this machine's CPU; None: none is wanted."""
    if not wanted:
        yield None
        return
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "motte.accelerator", f"--fd={theirs.fileno()}", "--device=cpu",
                 "--threads=1", f"--shared-memory={64 * MIB}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )  # fmt: skip
        try:
            yield ours.fileno()
        finally:
            process.kill()
            process.wait()


def _folders(request: Request) -> tuple[str, ...]:
    # As in an image, the script's own modules stand behind all others.
    return tuple(dict.fromkeys((*module_folders(), str(request.script.resolve().parent))))


# --- files --------------------------------------------------------------------------------------------------------


def _sorted_out(opened: Iterable[str], request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the files that the trial opened, those of the image, and those that are data or this machine's own."""
    folders = tuple(f"{each}{os.sep}" for each in module_folders())
    own = f"{request.script.resolve().parent}{os.sep}"
    wanted: list[str] = []
    left: list[str] = []
    included = {str(path.resolve()) for path in request.include}
    for path in opened:
        if not os.path.isfile(path) or path.startswith(("/proc/", "/sys/", "/dev/")) or path in included:
            continue
        library = path.endswith(".so") or ".so." in os.path.basename(path)
        known = library or path.startswith((*folders, *_LIBRARIES)) or path == os.path.realpath(sys.executable)
        (wanted if known or (path.endswith((".py", ".pyc")) and path.startswith(own)) else left).append(path)
    ours = {str(_HERE / name) for name in ("script_traced.py", "traced.py")}
    return tuple(path for path in wanted if path not in ours), tuple(left)


def _members(wanted: Sequence[str], request: Request, engine: str) -> tuple[Member, ...]:
    members = members_of((), wanted, engine=engine, folders=_folders(request))
    included = []
    for path in request.include:
        real = path.resolve()
        if not real.is_file():
            raise InputError("no such file to include", where=str(path))
        included.append(Member(str(real).lstrip("/"), str(real)))
    places = {member.place for member in members}
    twice = sorted(member.place for member in included if member.place in places)
    if twice:
        raise InputError("a file is in the image already", where=twice[0])
    return (*members, *included)


def _write_rest(built: Built, request: Request, digest: bytes) -> None:
    table = manifest(built.record, built.sizes, request, digest)
    problems = check(table)
    if problems:
        raise MismatchError("our own manifest breaks a rule", where=problems[0].key, got=problems[0].reason)
    (built.folder / vm.FOLDER).mkdir()
    for name, text in {
        f"{NAME}.manifest": dumps(table),
        container.CONTAINERFILE: container.script_containerfile(
            built.record,
            _confined(request, digest, "process"),
            name=request.script.name,
            threads=request.choices.threads,
        ),
        container.IGNORE: container.ignore_file(),
        f"{vm.FOLDER}/motte-script.socket": vm.socket_unit().replace("trusted worker", "trusted script"),
        f"{vm.FOLDER}/motte-script@.service": service_unit(request, digest),
        f"{vm.FOLDER}/mkosi.conf": vm.disk_recipe().replace("motte-worker", "motte-script"),
        f"{vm.FOLDER}/expected-snp.sh": vm.snp_recipe(),
        BUILD: json.dumps(built.to_json(), indent=1, sort_keys=True) + "\n",
    }.items():
        write_bytes(built.folder / name, text.encode())


def _source(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise InputError("the script cannot be read", where=str(path), got=problem.strerror) from problem
    if len(data) > MAX_SCRIPT_BYTES:
        raise InputError("the script is too large", where=str(path), expected=f"at most {MAX_SCRIPT_BYTES} bytes")
    return data
