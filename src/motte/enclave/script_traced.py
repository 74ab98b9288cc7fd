"""Runs a script and says which files it needed. A program of its own, started by path, never in an image.

    python -I -S -B script_traced.py FD PATH[:PATH...] ARGUMENT...

As :mod:`motte.enclave.traced`, but the arguments are those of :mod:`motte.enclave.script_main`; and whatever the
script's end, the files that are mapped and the modules that are loaded then are noted too.
"""

from __future__ import annotations

import os
import runpy
import sys
import zlib  # noqa: F401  (the first program of every image reads its pack with it)

_WRITES = os.O_WRONLY | os.O_RDWR
_MAIN = "motte.enclave.script_main"


def main(words: list[str]) -> None:
    """Install the hook, then become the script."""
    out = int(words[0])
    sys.path[:] = words[1].split(os.pathsep)
    ended = False

    def note(path: str | bytes) -> None:
        os.write(out, os.fsencode(path) + b"\0")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or ended:
            return
        path, flags = arguments[0], arguments[2]
        if isinstance(path, str | bytes) and isinstance(flags, int) and not flags & _WRITES:
            note(path if os.path.isabs(path) else os.path.abspath(path))

    sys.addaudithook(hook)
    sys.argv = [_MAIN, *words[2:]]
    try:
        runpy.run_module(_MAIN, run_name="__main__", alter_sys=True)
    finally:
        # One image serves containers and guests too, where the process confines itself with this.
        import motte.enclave.script_sandbox  # noqa: F401

        # What the list itself needs is not the script's.
        ended, modules = True, dict(sys.modules)
        from motte.trusted.tcb import mapped_files, module_files

        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            mapped = mapped_files(file.read().splitlines())
        for path in (*mapped, *module_files(modules)):
            note(path)


if __name__ == "__main__":
    main(sys.argv[1:])
