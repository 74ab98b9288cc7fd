"""What every verb shares: ``--quiet``, ``--json``, ``--debug``, groups of options, and errors as exit codes."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from motte.cli.output import Output, forget_stdout
from motte.errors import InputError, MotteError, UnsupportedError

DONE, FAILED, WRONG_USE, INTERRUPTED, NO_READER, TERMINATED = 0, 1, 2, 130, 141, 143
"""Exit codes. The last three are what a shell reports for a program that SIGINT, SIGPIPE or SIGTERM ended."""
_EVERY_VERB = "Every verb"


class Terminated(BaseException):
    """SIGTERM came: unwind as Ctrl-C does, so that half-written files are removed and workers end.

    No SystemExit, which the import of a user's model takes for the model's own.
    """


@dataclass(frozen=True, slots=True)
class Common:
    """The options of every verb."""

    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="No progress, no notes. Results and warnings stay.", rich_help_panel=_EVERY_VERB
        ),
    ] = False
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout, nothing else there.", rich_help_panel=_EVERY_VERB),
    ] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="MOTTE_DEBUG", help="Show the traceback of an error.", rich_help_panel=_EVERY_VERB
        ),
    ] = False


def exit_code(problem: MotteError) -> int:
    """2 for what the caller gave wrong; 1 for all else, also for a good input that motte cannot handle."""
    wrong = isinstance(problem, InputError) and not isinstance(problem, UnsupportedError)
    return WRONG_USE if wrong else FAILED


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn ``function(out: Output, ...)`` into a command.

    Every parameter whose type is a dataclass becomes one option (or argument) per field. The command also takes the
    options of :class:`Common`; a :class:`MotteError` becomes lines on stderr and an exit code.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {"": Common}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if kind is Output:
            continue
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = kind
            parameters += _parameters_of(kind)
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    parameters += _parameters_of(Common)

    def command(**given: Any) -> None:
        made = {
            name: kind(**{each.name: given.pop(each.name) for each in fields(kind)}) for name, kind in groups.items()
        }
        common = made.pop("")
        out = Output(quiet=common.quiet, as_json=common.as_json)
        with _ending(out, debug=common.debug), out.logging(), contextlib.redirect_stdout(sys.stderr):
            function(out, **made, **given)

    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameters_of(kind: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[each.name],
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
        )
        for each in fields(kind)
    ]


@contextlib.contextmanager
def _ending(out: Output, *, debug: bool) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as problem:
        forget_stdout()
        raise typer.Exit(NO_READER) from problem
    except (KeyboardInterrupt, Terminated) as problem:
        _trace(problem, wanted=debug)
        interrupted = isinstance(problem, KeyboardInterrupt)
        out.failure("interrupted" if interrupted else "terminated")
        raise typer.Exit(INTERRUPTED if interrupted else TERMINATED) from problem
    except MotteError as problem:
        _trace(problem, wanted=debug)
        out.error(problem)
        raise typer.Exit(exit_code(problem)) from problem
    except MemoryError as problem:
        _trace(problem, wanted=debug)
        out.error(MotteError("out of memory", hint="a smaller batch, or --mode streamed, needs less"))
        raise typer.Exit(FAILED) from problem
    except Exception as problem:
        if isinstance(problem, typer.Exit | typer.Abort | typer.BadParameter):
            raise
        _trace(problem, wanted=True)
        bug = MotteError("unexpected, and a bug in motte", got=f"{type(problem).__name__}: {problem}"[:500])
        out.error(bug)
        raise typer.Exit(FAILED) from problem


def _trace(problem: BaseException, *, wanted: bool) -> None:
    if wanted:
        sys.stderr.write("".join(traceback.format_exception(problem)))
