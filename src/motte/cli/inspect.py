"""``motte inspect``: all that can be known of a bundle without keys, and with one what may leave a worker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motte.cli.options import private_key, public_key
from motte.cli.output import Column, Line, Output, bytes_text, table
from motte.cli.scheme import offload_json, offload_lines
from motte.cli.verb import FAILED, verb

if TYPE_CHECKING:
    from motte.plan.offload import OffloadPlan
    from motte.seal.inspection import Inspection
    from motte.seal.keys import SignerPublicKey

_SAID = {
    "by the demanded signer": "valid, by the demanded signer",
    "by the signer that it names": "valid, by the signer named here (anyone can sign under a name of their own)",
    "by another signer": "valid, but NOT BY THE DEMANDED SIGNER",
    "invalid": "INVALID",
}
_SHOWN_NAMES = 20


@verb
def inspect(
    out: Output,
    bundle: Annotated[Path, typer.Argument(metavar="FILE", help="The bundle.")],
    signer: Annotated[
        str | None, typer.Option("--signer", metavar="KEY", help="Demanded signer: motte-signer-1-..., or a .pub file.")
    ] = None,
    verify_digests: Annotated[
        bool, typer.Option("--verify-digests", help="Compare all ciphertext with the digests in the header.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="FILE", help="A recipient's private key: show also which layers may run outside, and why."
        ),
    ] = None,
) -> None:
    """Show what a bundle says without any key: release, signer, recipients, parts, sizes, weights marked public.

    Nothing shown is verified beyond what the line "signature" says. Exit code 1 if the signature is not valid, is not
    the demanded signer's, or if a section is damaged. With --key such a bundle is refused.
    """
    from motte.seal.inspection import inspect as look
    from motte.seal.keys import SignerPublicKey

    demanded = public_key(signer, SignerPublicKey, option="--signer") if signer is not None else None
    total = bundle.stat().st_size if bundle.is_file() else None
    with out.progress("reading", total=total, in_bytes=True) as bar:
        found = look(bundle, signer=demanded, digests=verify_digests, progress=bar.advance)
    header = found.header
    section = None if key is None else _offload(bundle, key, demanded or header.signer)
    facts = [
        ("file", f"{found.path} ({bytes_text(found.file_bytes)})"),
        ("bundle", header.bundle_id.hex()),
        ("release", str(header.release)),
        ("signature", _SAID[found.signature]),
        ("signer id", header.signer.key_id),
        ("parts", f"{header.parts}, {bytes_text(found.plaintext_bytes)} when opened (the manifest included)"),
        ("digests", _digests(found)),
        ("public weights", _names(header.public_weights)),
        ("recipients", f"{len(header.recipients)}: " + ", ".join(each.key.key_id for each in header.recipients)),
    ]
    rows = [
        (
            f"part {each.index}" if each.index else "manifest",
            bytes_text(each.plaintext_bytes),
            bytes_text(each.ciphertext_bytes),
            each.digest.hex()[:16],
            "DAMAGED" if each.index in (found.damaged_sections or ()) else "",
        )
        for each in header.sections
    ]
    columns = (
        Column("section", keep=True),
        Column("opened", number=True),
        Column("in the file", number=True),
        Column("digest (begins)", keep=True),
        Column("", keep=True),
    )
    opened = {} if key is None else {"offload": None if section is None else offload_json(section)}
    none = [] if key is None or section is not None else [Line("scheme: none, everything runs inside")]
    out.result(
        {**found.to_json(), **opened},
        table((Column("", keep=True), Column("")), facts),
        table(columns, rows),
        Line(f"signer      {header.signer}"),
        *(Line(f"recipient   {each.key}") for each in header.recipients),
        *offload_lines(section),
        *none,
    )
    if found.signature in ("invalid", "by another signer") or found.damaged_sections:
        raise typer.Exit(FAILED)


def _offload(path: Path, key: Path, signer: SignerPublicKey) -> OffloadPlan | None:
    """The offload section of the plan in the encrypted manifest.

    Raises:
        TrustError, BundleError: the bundle is not ``signer``'s, or does not open with the key.
    """
    from motte.seal.keys import RecipientPrivateKey
    from motte.seal.manifest import loads
    from motte.seal.reader import open_bundle

    private = private_key(key, RecipientPrivateKey, option="--key")
    with open_bundle(path, signer=signer) as signed:
        return loads(signed.unlock(signed.unwrap(private)).manifest()).plan.offload


def _digests(found: Inspection) -> str:
    if found.damaged_sections is None:
        return "not compared (--verify-digests does)"
    if found.damaged_sections:
        return "DAMAGED: section " + ", ".join(str(index) for index in found.damaged_sections)
    return "all ciphertext is as the header says"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more if names else "none: everything is sealed"
