"""How a bundle reaches a worker that shares no kernel with its client: as bytes over its link, kept in memory.

Everything that arrives is **unverified**; a chunk is copied before it is authenticated (:mod:`motte.seal.reader`).
"""

from __future__ import annotations

import os
from typing import Final

from motte.errors import FrameError, ResourceError
from motte.limits import MAX_BUNDLE_FRAME_BYTES
from motte.link.frames import Kind
from motte.link.local import Link

_PLACE: Final = "/tmp/motte-bundle"  # noqa: S108 - used only where no other kernel object is to be had, see below


def receive_bytes(link: Link, bundle_bytes: int) -> int:
    """``bundle_bytes`` of ciphertext from BUNDLE frames, in memory, as a descriptor; the caller's to close.

    Raises:
        FrameError: another frame, an empty or too large one, or more than was announced. ResourceError: no memory.
    """
    fd = _memory_file()
    try:
        done = 0
        while done < bundle_bytes:
            frame = link.receive()
            if frame.kind is not Kind.BUNDLE or len(frame.tensors) != 1 or frame.meta:
                raise FrameError("frame in the wrong state", expected="BUNDLE", got=frame.kind.name)
            data = frame.tensors[0].data
            if not 0 < len(data) <= min(MAX_BUNDLE_FRAME_BYTES, bundle_bytes - done):
                raise FrameError(
                    "not the announced bytes of a bundle",
                    expected=f"1 to {min(MAX_BUNDLE_FRAME_BYTES, bundle_bytes - done)} bytes",
                    got=f"{len(data)} bytes",
                )
            with memoryview(data) as view:
                _write(fd, view)
            done += len(data)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(fd: int, view: memoryview) -> None:
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as problem:
        raise ResourceError("no memory for the bundle", got=str(problem)) from problem


def _memory_file() -> int:
    try:
        return os.memfd_create("motte-bundle")
    except OSError:
        pass
    # Gramine has no memfd_create(2). Its root is a tmpfs inside of the enclave's memory, which is what we want.
    try:
        fd = os.open(_PLACE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(_PLACE)
    except OSError as problem:
        raise ResourceError("no memory for the bundle", where=_PLACE, got=str(problem)) from problem
    return fd
