"""What the command line prints: results on stdout; notes, warnings, progress and errors on stderr.

Names in what we print come from files that nobody has checked yet (``motte inspect``), so nothing reaches the terminal
before :func:`printable` has taken the control characters out of it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from motte.errors import MotteError

if TYPE_CHECKING:
    from rich.console import RenderableType

_LOG = logging.getLogger("motte")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_PRINTED_FACTS = ("where", "expected", "got")


def printable(text: str) -> str:
    """``text`` with every control, format and unpaired surrogate character written as an escape; newlines stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char == "\n" or not _unsafe(char) else _escape(char) for char in text)


def _unsafe(char: str) -> bool:
    # Cf holds the marks that reorder or hide text, Zl and Zp the line ends that str.isprintable knows.
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def bytes_text(count: int) -> str:
    """``575.0 MiB``; whole numbers below 1 KiB."""
    value, unit = float(count), 0
    # 1023.95 would round to "1024.0".
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def seconds_text(seconds: float) -> str:
    """Three significant digits in s, ms or us."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale * 0.9995:
            value = seconds / scale
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{seconds * 1e6:.0f} us"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: numbers stand to the right and are never broken, words are folded."""

    title: str
    number: bool = False
    keep: bool = False
    """Never broken although not a number."""
    width: int = 0
    """Not narrower than this."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, title: str = "", totals: bool = False) -> Table:
    """A table whose cells are safe to show; with ``totals`` the last row stands below a line."""
    made = Table(
        box=box.SIMPLE if totals else box.SIMPLE_HEAD,
        title=Text(printable(title)) if title else None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        footer_style="",
        show_header=any(column.title for column in columns),
        show_footer=totals,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    last = rows[-1] if totals else [""] * len(columns)
    for column, footer in zip(columns, last, strict=True):
        whole = column.number or column.keep
        made.add_column(
            column.title,
            Text(printable(footer)),
            justify="right" if column.number else "left",
            no_wrap=whole,
            overflow="ellipsis" if whole else "fold",
            min_width=column.width or None,
        )
    for row in rows[:-1] if totals else rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


class Line(Text):
    """One line of a result, never broken by us: keys and commands stay fit for copying."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class _QuietPipeConsole(Console):
    """rich ends the process when its reader has gone; we unwind instead, so that files are cleaned up."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(stream: TextIO) -> Console:
    return _QuietPipeConsole(file=stream, markup=False, highlight=False, emoji=False)


class Bar:
    """A progress bar that runs, or nothing at all."""

    def __init__(
        self,
        move: Callable[[int | None, int | None, int], None] | None,
        describe: Callable[[str], None] | None = None,
    ) -> None:
        self._move = move
        self._describe = describe

    def describe(self, text: str) -> None:
        """Say another text beside the bar from now on."""
        if self._describe is not None:
            self._describe(text)

    def advance(self, count: int) -> None:
        """``count`` more are done."""
        if self._move is not None:
            self._move(None, None, count)

    def set(self, done: int, total: int | None) -> None:
        """``done`` of ``total`` are done; None: nobody knows the total."""
        if self._move is not None:
            self._move(done, total, 0)


class Output:
    """Where one verb prints.

    Args:
        quiet: no progress and no notes; results, warnings and errors stay.
        as_json: the result is one JSON document, alone on stdout.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a label in Chinese must not end a run on a terminal that has none
                stream.reconfigure(errors="backslashreplace")
        # Kept now: while a verb runs, sys.stdout stands for stderr, so that a user's own model may print what it likes.
        self._stdout = sys.stdout
        self._results = _console(sys.stdout)
        self._stderr = _console(sys.stderr)

    def result(self, document: Mapping[str, Any], *shown: RenderableType) -> None:
        """The result of the verb, in both forms: ``document`` for ``--json``, ``shown`` for people."""
        if self.as_json:
            self._write_json(document)
            return
        for index, item in enumerate(shown):
            if index and (isinstance(item, Table) or isinstance(shown[index - 1], Table)):
                self._results.print()
            self._results.print(item, soft_wrap=isinstance(item, Text))
        self._stdout.flush()

    def note(self, text: str) -> None:
        """Something worth knowing, for people; nothing with ``--quiet``."""
        if not self.quiet:
            self._stderr.print(Line(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something that must be known; ``--quiet`` does not silence it."""
        self._stderr.print(Text("warning: ", style="yellow") + Line(text), soft_wrap=True)

    def error(self, problem: MotteError) -> None:
        """``error:`` with its facts, then ``hint:``; with ``--json`` the same as the one document on stdout."""
        if self.as_json:
            self._write_json({"error": error_json(problem)})
        self.failure(problem.message + (f" [check {problem.check}]" if problem.check else ""))
        for name in _PRINTED_FACTS:
            value = getattr(problem, name)
            if value is not None:
                self._stderr.print(Line(f"  {name}: {value}"), soft_wrap=True)
        if problem.hint is not None:
            self.hint(problem.hint)

    def failure(self, text: str) -> None:
        """An ``error:`` line."""
        self._stderr.print(Text("error: ", style="bold red") + Line(text), soft_wrap=True)

    def hint(self, text: str) -> None:
        """A ``hint:`` line."""
        self._stderr.print(Text("hint: ", style="bold") + Line(text), soft_wrap=True)

    @contextmanager
    def progress(self, text: str, *, total: int | None = None, in_bytes: bool = False) -> Iterator[Bar]:
        """A bar while the block runs, on a terminal and without ``--quiet``; a spinner where ``total`` is unknown."""
        if self.quiet or not self._stderr.is_terminal:
            yield Bar(None)
            return
        from motte.cli.bars import live_bar

        with live_bar(self._stderr, text, total=total, in_bytes=in_bytes) as bar:
            yield bar

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Show what the library logs as warnings, each text once."""
        handler = _OnceHandler(self.warn)
        _LOG.addHandler(handler)
        propagate, _LOG.propagate = _LOG.propagate, False
        try:
            yield
        finally:
            _LOG.propagate = propagate
            _LOG.removeHandler(handler)

    def _write_json(self, document: Mapping[str, Any]) -> None:
        self._stdout.write(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n")
        self._stdout.flush()


class _OnceHandler(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._shown:
            self._shown.add(text)
            self._show(text)


def error_json(problem: MotteError) -> dict[str, str]:
    """The facts of an error that are there: ``kind`` is the name of its class."""
    facts = {"kind": type(problem).__name__, "message": problem.message}
    for name in (*_PRINTED_FACTS, "check", "hint"):
        value = getattr(problem, name)
        if value is not None:
            facts[name] = value
    return facts


def forget_stdout() -> None:
    """Send what is still buffered for a reader that has gone to nowhere, so that the interpreter ends in silence."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
