"""``motte keys new|show|rotate``: key pairs of recipients and signers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motte.cli.output import Column, Line, Output, table
from motte.cli.verb import verb
from motte.errors import FormatError, InputError

if TYPE_CHECKING:
    from motte.seal.keys import PublicKey

app = typer.Typer(help="Make, show and rotate keys of recipients and signers.")

Folder = Annotated[
    Path,
    typer.Option("--folder", metavar="DIR", help="Folder of the keys. (default: the current one)", show_default=False),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key: NAME.key is secret, NAME.pub is not.")]
Kind = Annotated[
    Literal["recipient", "signer"],
    typer.Option("--kind", help="A recipient's key opens bundles, a signer's key signs them."),
]


@app.command()
@verb
def new(out: Output, name: Name, kind: Kind = "recipient", folder: Folder = Path()) -> None:
    """Make a key pair. Nothing is ever overwritten."""
    from motte.seal import keys

    key: keys.PrivateKey
    if kind == "recipient":
        key = keys.new(folder, name, keys.RecipientPrivateKey)
    else:
        key = keys.new(folder, name, keys.SignerPrivateKey)
    private, public = keys.key_paths(folder, name)
    document = {**_key_json(name, key.public), "private_file": str(private), "public_file": str(public)}
    out.result(
        document,
        Line(f"{kind} key {name}  id {key.public.key_id}"),
        Line(f"  secret   {private}   (keep it; whoever has it {_MEANING[kind]})"),
        Line(f"  public   {public}"),
        Line(str(key.public)),
    )


@app.command()
@verb
def show(
    out: Output,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this public key alone.")] = None,
    folder: Folder = Path(),
) -> None:
    """List the public keys of the folder, or print one. Never shows a secret."""
    if name is not None:
        from motte.seal.keys import key_paths

        key = _read_public(key_paths(folder, name)[1])
        out.result(_key_json(name, key), Line(str(key)))
        return
    found = [(path.stem, _read_public(path)) for path in sorted(folder.glob("*.pub"))]
    if not found:
        out.note(f"no keys in {folder}")
    rows = [(each, key.kind, key.key_id, "yes" if (folder / f"{each}.key").is_file() else "no") for each, key in found]
    columns = (Column("name"), Column("kind", keep=True), Column("id", keep=True), Column("secret here", keep=True))
    document = {"folder": str(folder), "keys": [_key_json(each, key) for each, key in found]}
    out.result(document, *([table(columns, rows)] if rows else []))


@app.command()
@verb
def rotate(out: Output, name: Name, folder: Folder = Path()) -> None:
    """Put a new pair in the folder of a key; the old one is kept beside it. Prints what is left to do."""
    from motte.seal import keys

    kind = _read_public(keys.key_paths(folder, name)[1]).kind
    if kind == "recipient":
        done = keys.rotate(folder, name, keys.RecipientPrivateKey)
    else:
        done = keys.rotate(folder, name, keys.SignerPrivateKey)
    document = {
        "name": name,
        "kind": kind,
        "old": str(done.old),
        "new": str(done.new),
        "old_kept_as": str(done.kept_as),
        "next_steps": list(done.next_steps),
    }
    out.result(
        document,
        Line(f"{kind} key {name}  id {done.new.key_id}  (was {done.old.key_id}, kept as {done.kept_as})"),
        Line(str(done.new)),
        *(Line(f"- {step}") for step in done.next_steps),
    )


_MEANING = {"recipient": "can open every bundle sealed to it", "signer": "can sign in its name"}


def _read_public(path: Path) -> PublicKey:
    """A public key of either kind."""
    from motte.seal.keys import RecipientPublicKey, SignerPublicKey, load_public

    try:
        return load_public(path, RecipientPublicKey)
    except FormatError:
        try:
            return load_public(path, SignerPublicKey)
        except FormatError as problem:
            raise InputError("not the file of a public key", where=str(path), got=problem.got) from problem


def _key_json(name: str, key: PublicKey) -> dict[str, Any]:
    return {"name": name, "kind": key.kind, "id": key.key_id, "public": str(key)}
