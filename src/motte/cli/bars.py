"""Progress bars on stderr. Imported only where one is shown: rich needs some time to load them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from motte.cli.output import Bar, bytes_text, printable


class _Rate(ProgressColumn):
    """Bytes per second in the units of everything else that we print."""

    def render(self, task: Task) -> Text:
        """The rate so far; nothing before it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{bytes_text(round(speed))}/s" if speed is not None else "")


@contextmanager
def live_bar(console: Console, text: str, *, total: int | None, in_bytes: bool) -> Iterator[Bar]:
    """A bar that vanishes when the block ends; a spinner where ``total`` is not known."""
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
    columns += [BarColumn(bar_width=24), TaskProgressColumn()]
    columns += [DownloadColumn(binary_units=True), _Rate()] if in_bytes else []
    columns.append(TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as live:
        task = live.add_task(printable(text), total=total)

        def move(done: int | None, whole: int | None, more: int) -> None:
            if done is None:
                live.advance(task, more)
            else:
                live.update(task, completed=done, total=whole)

        def describe(text: str) -> None:
            live.update(task, description=printable(text))

        yield Bar(move, describe)
