"""A file that appears whole or not at all: written beside its place under a passing name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from motte.errors import InputError, ResourceError


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool, mode: int = 0o666) -> Iterator[int]:
    """Yield the descriptor of a new file that becomes ``path`` when the block ends without an error.

    After an error, or Ctrl-C, nothing of it is left, and what stood at ``path`` stands there still. A process killed
    outright leaves a hidden ``.NAME.*.partial``.

    Args:
        overwrite: replace ``path`` if it exists.
        mode: permissions of the new file, reduced by the umask.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false; checked again, atomically, at the end.
        ResourceError: the folder cannot be written to.
    """
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    partial = path.parent / f".{path.name}.{os.urandom(6).hex()}.partial"
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except OSError as problem:
        raise ResourceError("cannot create a file", where=str(path), got=problem.strerror) from problem
    try:
        try:
            yield fd
            os.fsync(fd)
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ResourceError("no room for the file", where=str(path), got=problem.strerror) from problem
            raise
        finally:
            os.close(fd)
        _place(partial, path, overwrite)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    _sync_folder(path.parent)


def _place(partial: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(partial, path)
        return
    try:
        os.link(partial, path)  # unlike a rename, a link never replaces what appeared at ``path`` meanwhile
    except FileExistsError as problem:
        raise _exists(path) from problem
    except OSError as problem:
        if problem.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        if os.path.lexists(path):  # a file system without hard links: the best that is left
            raise _exists(path) from problem
        os.rename(partial, path)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exists(path: Path) -> InputError:
    return InputError("the file exists already", where=str(path), hint="choose another name, or allow overwriting")
