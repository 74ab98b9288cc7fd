"""Reading a whole **unverified** file whose size is bounded before memory is taken for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from motte.errors import FormatError, InputError


def read_bounded(path: Path, max_bytes: int, *, what: str) -> bytes:
    """The bytes of ``path``; ``what`` is how errors call it.

    Raises:
        InputError: it cannot be read. FormatError: no regular file, or larger than ``max_bytes``.
    """
    try:
        # O_NONBLOCK: a pipe in its place is refused below, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise FormatError(f"{what} is not a regular file", where=str(path))
            data = file.read(min(facts.st_size, max_bytes) + 1)
    except OSError as problem:
        raise InputError(f"cannot read {what}", where=str(path), got=problem.strerror) from problem
    if len(data) > max_bytes:
        raise FormatError(f"{what} is too large", where=str(path), expected=f"at most {max_bytes} bytes")
    return data
