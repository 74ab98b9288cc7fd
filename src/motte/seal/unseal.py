"""Writing a bundle's plaintext to disk: for its owner, on a machine of their own."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from motte.errors import InputError, ResourceError, SettingError
from motte.seal.pool import Progress
from motte.seal.reader import UnlockedBundle


def unseal(
    bundle: UnlockedBundle,
    folder: Path,
    *,
    insecure_plaintext: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write ``manifest.bin`` and ``part-0001.bin``, ... into a new ``folder``: all of them, or after an error none.

    The digests of the whole file are verified first: what is written is what the signer sealed. Files and folder can be
    read by their owner only.

    Args:
        insecure_plaintext: must be true: the weights are on disk afterwards, for everyone who reads that disk.
        progress: given plaintext bytes of parts.

    Returns:
        The files, the manifest first.

    Raises:
        SettingError: ``insecure_plaintext`` is not true.
        InputError: ``folder`` exists.
        TrustError, BundleError: as :meth:`UnlockedBundle.open_part` and :meth:`SignedBundle.verify_digests`.
    """
    if insecure_plaintext is not True:
        raise SettingError(
            "unsealing writes weights to disk in the clear", hint="say --insecure-plaintext if that is what you want"
        )
    if os.path.lexists(folder):
        raise InputError("the folder exists already", where=str(folder))
    bundle.signed.verify_digests(threads=threads)
    partial = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.partial"
    try:
        partial.mkdir(mode=0o700)
        names = ["manifest.bin"]
        _write(partial / names[0], memoryview(bundle.manifest(threads=threads)))
        for index in range(bundle.parts):
            names.append(f"part-{index + 1:04d}.bin")
            plaintext = memoryview(bytearray(bundle.part_bytes(index)))
            bundle.open_part(index, plaintext, threads=threads, progress=progress)
            _write(partial / names[-1], plaintext)
        os.rename(partial, folder)
    except OSError as problem:
        raise ResourceError("cannot write the plaintext", where=str(folder), got=problem.strerror) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return tuple(folder / name for name in names)


def _write(path: Path, data: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
