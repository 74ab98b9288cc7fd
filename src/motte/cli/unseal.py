"""``motte unseal``: the owner's way back from a bundle to plaintext."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from motte.cli.options import private_key, public_key
from motte.cli.output import Line, Output, bytes_text
from motte.cli.verb import verb


@verb
def unseal(
    out: Output,
    bundle: Annotated[Path, typer.Argument(metavar="FILE", help="The bundle.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New folder for the plaintext.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="File of a recipient's private key.")],
    signer: Annotated[
        str, typer.Option("--signer", metavar="KEY", help="Demanded signer: motte-signer-1-..., or a .pub file.")
    ],
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", help="Say that weights may lie on this disk in the clear.")
    ] = False,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, max=256, help="Threads.")] = 1,
) -> None:
    """Write the graph and the weights of a bundle to disk in the clear: for its owner, on a machine of their own."""
    from motte.errors import SettingError
    from motte.seal.keys import RecipientPrivateKey, SignerPublicKey
    from motte.seal.reader import open_bundle
    from motte.seal.unseal import unseal as write_plaintext

    if not insecure_plaintext:
        raise SettingError(
            "unsealing writes weights to disk in the clear", hint="say --insecure-plaintext if that is what you want"
        )
    private = private_key(key, RecipientPrivateKey, option="--key")
    demanded = public_key(signer, SignerPublicKey, option="--signer")
    with open_bundle(bundle, signer=demanded) as signed, signed.unlock(signed.unwrap(private)) as unlocked:
        total = sum(unlocked.part_bytes(index) for index in range(unlocked.parts))
        with out.progress("opening", total=total, in_bytes=True) as bar:
            files = write_plaintext(unlocked, output, insecure_plaintext=True, threads=threads, progress=bar.advance)
    out.warn(f"the weights lie in the clear in {output}")
    sizes = [path.stat().st_size for path in files]
    out.result(
        {"folder": str(output), "files": [{"path": str(p), "bytes": n} for p, n in zip(files, sizes, strict=True)]},
        *(Line(f"{path}  {bytes_text(size)}") for path, size in zip(files, sizes, strict=True)),
    )
