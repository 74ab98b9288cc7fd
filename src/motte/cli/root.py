"""The root of the command line: which verbs there are, and the one door in and out. Nothing heavy is imported here."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer

from motte.cli import version
from motte.cli.output import Output, forget_stdout
from motte.cli.verb import DONE, NO_READER, TERMINATED, WRONG_USE, Terminated
from motte.cli.verbs import GROUPS, VERBS

app = typer.Typer(name="motte", pretty_exceptions_enable=False, add_completion=True, help=version.ABOUT)
app.callback()(version.root)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
for verb in VERBS:
    app.command()(verb)

_UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""typer brings a click of its own, or uses the installed one: this is the right UsageError in both."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``motte`` and return its exit status; docs/cli.md says what each means."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        status = typer.main.get_command(app).main(given or ["--help"], "motte", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        forget_stdout()
        return NO_READER
    except _UsageError as problem:
        out, context = Output(), getattr(problem, "ctx", None)
        out.failure(problem.format_message())
        out.hint(f"{context.command_path if context else 'motte'} --help shows what it takes")
        return WRONG_USE
    except Terminated:
        return TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)
    return status if isinstance(status, int) else DONE


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
