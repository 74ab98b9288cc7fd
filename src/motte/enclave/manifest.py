"""Gramine manifests: made from a template by a writer of our own, so that the same values give the same bytes.

Everything that a host could choose is fixed: no arguments or variables of its own, no files but those of the image, by
their digests, no debugging, no other processes. Paths of the image are relative to the folder with the manifest, so
that the measurement does not depend on where that is.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from motte.enclave.image import ROOT, ImageRecord
from motte.enclave.image_files import C_LIBRARY, INTERPRETER, LIBRARIES
from motte.enclave.sizes import STACK_BYTES, Sizes
from motte.enclave.workers import image_arguments, image_environment
from motte.errors import FormatError, SettingError
from motte.limits import MAX_GRAMINE_MANIFEST_BYTES, MIB

NAME: Final = "worker"
"""Gramine's name of the program: ``worker.manifest``, ``worker.manifest.sgx`` and ``worker.sig``."""
GRAMINE_FOLDER: Final = "/usr/lib/x86_64-linux-gnu/gramine"
"""Where Gramine's Debian package puts its libraries. It is part of what is measured."""
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_ENCLAVE_PATH: Final = re.compile(r"[A-Za-z0-9/._+-]+")
Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Choices:
    """What a manifest says besides the image and its sizes.

    Attributes:
        threads: compute threads. precision: in which the engine computes.
        edmm: memory is added when it is used (SGX2, Linux 6.0): the enclave starts sooner, and runs elsewhere not.
        product, svn: the numbers that its signer gives it (ISVPRODID, ISVSVN), 0 to 65535.
        shared_memory: name of a file in /dev/shm, made and sized by the host, through which an accelerator's tensors
            go; the one file that is allowed without a digest. None: there is none.
        gramine: folder of Gramine's libraries.
    """

    threads: int = 1
    precision: str = "f32"
    edmm: bool = False
    product: int = 0
    svn: int = 0
    shared_memory: str | None = None
    gramine: str = GRAMINE_FOLDER

    def __post_init__(self) -> None:
        for name in ("product", "svn"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 1 << 16:
                raise SettingError("not a number of a signer", where=name, expected="0 to 65535", got=str(value))
        shared = self.shared_memory
        if shared is not None and (not _BARE_KEY.fullmatch(shared) or len(shared) > 64):
            raise SettingError(
                "not the name of shared memory", expected="letters, digits, - and _", got=repr(shared)[:80]
            )
        if not self.gramine.startswith("/") or not _ENCLAVE_PATH.fullmatch(self.gramine) or ".." in self.gramine:
            raise SettingError("not an absolute path", where="gramine", got=repr(self.gramine)[:80])
        if not 1 <= self.threads <= 256:
            raise SettingError("number of threads out of bounds", expected="1 to 256", got=str(self.threads))


def manifest_of(record: ImageRecord, sizes: Sizes, choices: Choices) -> dict[str, Any]:
    """The manifest of a worker as a table of TOML values."""
    runtime = f"file:{choices.gramine}/runtime/glibc"
    environment = {**image_environment(choices.threads), "LD_LIBRARY_PATH": f"/lib:/{LIBRARIES}"}
    own = [{"uri": f"file:{ROOT}/{file.path}", "sha256": file.sha256} for file in record.hashed()]
    present = sorted(name for name in C_LIBRARY if any(file.path.endswith(f"/{name}") for file in record.files))
    mounts: list[dict[str, str]] = [{"path": f"/lib/{name}", "uri": f"{runtime}/{name}"} for name in present]
    mounts += [{"path": "/usr", "uri": f"file:{ROOT}/usr"}, {"path": "/tmp", "type": "tmpfs"}]  # noqa: S108
    sgx: dict[str, Any] = {
        "debug": False,
        "edmm_enable": choices.edmm,
        "enclave_size": f"{sizes.enclave_bytes // MIB}M",
        "isvprodid": choices.product,
        "isvsvn": choices.svn,
        "max_threads": sizes.max_threads,
        "remote_attestation": "dcap",
        "trusted_files": sorted(
            [*own, *({"uri": f"{runtime}/{name}"} for name in present)], key=lambda item: item["uri"]
        ),
        "use_exinfo": True,
    }
    if choices.shared_memory is not None:
        device = f"dev:/dev/shm/{choices.shared_memory}"
        mounts.append({"path": f"/dev/shm/{choices.shared_memory}", "type": "untrusted_shm", "uri": device})  # noqa: S108
        sgx["allowed_files"] = [device]
    arguments = image_arguments(threads=choices.threads, engine=record.engine, precision=choices.precision)
    return {
        "fs": {"mounts": mounts, "root": {"type": "tmpfs"}, "start_dir": "/"},
        "libos": {"entrypoint": f"/{INTERPRETER}"},
        "loader": {
            "argv": list(arguments),
            "entrypoint": {"uri": f"file:{choices.gramine}/libsysdb.so"},
            "env": dict(sorted(environment.items())),
            "log_level": "error",
        },
        "sgx": sgx,
        "sys": {"disallow_subprocesses": True, "stack": {"size": f"{STACK_BYTES // MIB}M"}},
    }


def dumps(table: Table) -> str:
    """The one TOML text of ``table``: dotted keys sorted, one a line, lists one item a line.

    Raises:
        SettingError: a value that TOML, or this writer, does not know.
    """
    return "".join(f"{line}\n" for line in sorted(_lines("", table)))


def _lines(prefix: str, table: Table) -> Iterator[str]:
    for key, value in table.items():
        name = prefix + (key if _BARE_KEY.fullmatch(key) else _text(key))
        if isinstance(value, Mapping):
            yield from _lines(f"{name}.", value)
        elif isinstance(value, list):
            items = "".join(f"  {_value(item)},\n" for item in value)
            yield f"{name} = [\n{items}]"
        else:
            yield f"{name} = {_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(each)}" for key, each in sorted(value.items())) + " }"
    raise SettingError("a value that a manifest cannot hold", got=repr(value)[:80])


def _text(text: str) -> str:
    """A basic string; control characters, quotes and backslashes as escapes (TOML v1.0.0, "String")."""
    out = []
    for char in text:
        if char in '"\\':
            out.append(f"\\{char}")
        elif ord(char) < 0x20 or ord(char) == 0x7F:
            out.append(f"\\u{ord(char):04X}")
        elif 0xD800 <= ord(char) < 0xE000:
            raise SettingError("a text that is no Unicode", got=repr(text)[:80])
        else:
            out.append(char)
    return '"' + "".join(out) + '"'


def loads(data: bytes, *, where: str = "manifest") -> dict[str, Any]:
    """Read any manifest.

    Raises:
        FormatError: too large, or no TOML; a template of Gramine's own is none before it is rendered.
    """
    if len(data) > MAX_GRAMINE_MANIFEST_BYTES:
        expected = f"at most {MAX_GRAMINE_MANIFEST_BYTES} bytes"
        raise FormatError("manifest too large", where=where, expected=expected, got=str(len(data)))
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as problem:
        hint = "render a template first: gramine-manifest TEMPLATE MANIFEST"
        raise FormatError("not a manifest in TOML", where=where, got=str(problem)[:200], hint=hint) from problem


def find_manifest(path: Path) -> Path:
    """``path`` itself, or the manifest in a folder that ``motte enclave build`` made."""
    return path / f"{NAME}.manifest" if path.is_dir() else path
