"""Runs a worker and says which files it opens. A program of its own, started by path, never imported by the worker.

    python -I -S -B traced.py FD PATH[:PATH...] ARGUMENT...

``PATH``s become the places where modules are looked for; for every file that Python opens for reading, its path and a
zero byte are written to descriptor FD. What native code opens and closes again is not seen here: whether that is needed
shows when the image runs alone (:mod:`motte.enclave.bare`).
"""

from __future__ import annotations

import os
import runpy
import sys
import zlib  # noqa: F401  (the first program of every image reads its pack with it: the worker lists it)

_WRITES = os.O_WRONLY | os.O_RDWR


def main(words: list[str]) -> None:
    """Install the hook, then become the worker."""
    out = int(words[0])
    sys.path[:] = words[1].split(os.pathsep)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open":
            return
        path, flags = arguments[0], arguments[2]
        if isinstance(path, str | bytes) and isinstance(flags, int) and not flags & _WRITES:
            os.write(out, os.fsencode(path) + b"\0")

    sys.addaudithook(hook)
    # One image serves Gramine, containers and guests: what only the last load is part of it too.
    from motte.trusted.surroundings import load_for_image

    load_for_image("vm")
    sys.argv = ["motte.trusted", *words[2:]]
    runpy.run_module("motte.trusted", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
