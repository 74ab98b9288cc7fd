"""``motte zoo list|show|pull``: the models that motte knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.output import Column, Line, Output, bytes_text, table
from motte.cli.verb import verb

if TYPE_CHECKING:
    from motte.zoo.registry import Entry

app = typer.Typer(help="The models that motte knows by name, and their published weights.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name of `motte zoo list --all`.")]


@app.command("list")
@verb
def list_(
    out: Output,
    every: Annotated[
        bool, typer.Option("--all", help="All classification models of torchvision too (slower).")
    ] = False,
) -> None:
    """List the models."""
    from motte.zoo import list_models

    found = list_models(every=every)
    rows = [
        (
            each.name,
            each.family,
            f"{each.parameters / 1e6:.2f} M" if each.parameters is not None else "",
            each.input or "",
            each.weights,
            str(len(each.published_cuts) + 1) if each.published_cuts else "",
        )
        for each in found
    ]
    columns = (
        Column("name", keep=True),
        Column("family", keep=True),
        Column("parameters", number=True),
        Column("input"),
        Column("weights"),
        Column("cuts", number=True),
    )
    out.result({"models": [_entry_json(each) for each in found]}, table(columns, rows))
    out.note("`cuts` is the number of parts of --cuts published. Your own model: path/to/file.py:factory.")


@app.command()
@verb
def show(out: Output, name: Name) -> None:
    """Show one model: size, input, weights, published cuts."""
    from motte.zoo import find

    entry = find(name)
    facts = [("name", entry.name), ("family", entry.family)]
    if entry.parameters is not None:
        facts.append(("parameters", f"{entry.parameters:,} ({bytes_text(4 * entry.parameters)} as float32)"))
    if entry.input is not None:
        facts.append(("input", entry.input))
    facts.append(("weights", entry.weights))
    cuts = entry.published_cuts
    facts.append(("published cuts", f"{len(cuts) + 1} parts, after {', '.join(cuts)}" if cuts else "none"))
    out.result(_entry_json(entry), table((Column("", keep=True), Column("")), facts))


@app.command()
@verb
def pull(
    out: Output,
    name: Name,
    published: Annotated[
        str | None,
        typer.Option(
            "--published", metavar="SET", help="One published set, such as IMAGENET1K_V1. (default: the newest)"
        ),
    ] = None,
) -> None:
    """Download the published weights into the cache and check their hash."""
    from motte.zoo import pull as fetch

    with out.progress(f"pulling {name}", in_bytes=True) as bar:
        path = fetch(name, which=published, progress=bar.set)
    size = path.stat().st_size
    out.result({"name": name, "path": str(path), "bytes": size}, Line(f"{path}  {bytes_text(size)}"))


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "family": entry.family,
        "parameters": entry.parameters,
        "input": entry.input,
        "weights": entry.weights,
        "published_cuts": list(entry.published_cuts),
    }
