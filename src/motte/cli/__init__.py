"""The command line, one file a verb. Nobody imports it but ``motte.__main__`` and the entry point ``motte``."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``motte`` with ``arguments`` (default: the process's own). Returns the exit status."""
    from motte.cli.root import main as run

    return run(arguments)
