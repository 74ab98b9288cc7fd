"""Compiles sources into unchecked-hash ``.pyc`` files (PEP 552), the same ones every time. A program of its own.

    python -S -s -P -B compile_modules.py < JOBS

A job is three texts, each ended by a zero byte: the source, the ``.pyc`` to write, and the name that tracebacks show.
Why a process of its own with nothing else in it: what ``marshal`` writes depends on which objects are shared in the
process that compiles (python.org, bpo-34093), so the order and everything before it must be the same.
"""

from __future__ import annotations

import py_compile
import sys


def main() -> None:
    """Compile all jobs of stdin."""
    words = sys.stdin.buffer.read().decode().split("\0")[:-1]
    for source, target, shown in zip(words[::3], words[1::3], words[2::3], strict=True):
        py_compile.compile(
            source,
            cfile=target,
            dfile=shown,
            doraise=True,
            optimize=0,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


if __name__ == "__main__":
    main()
