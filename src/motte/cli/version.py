"""``motte version`` and ``motte --version``."""

from __future__ import annotations

from typing import Annotated

import typer

import motte
from motte.cli.output import Line, Output
from motte.cli.verb import verb

ABOUT = (
    "Split a PyTorch model between a small trusted process and a large untrusted machine: seal and run it, or train it."
)


@verb
def version(out: Output) -> None:
    """Print the version of motte."""
    out.result({"version": motte.__version__}, Line(f"motte {motte.__version__}"))


def _print_version(asked: bool) -> None:
    if asked:
        Output().result({}, Line(f"motte {motte.__version__}"))
        raise typer.Exit


def root(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Options before the verb."""
