"""``motte recipients add|remove``: who can open a bundle that exists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from motte.cli.options import private_key, public_key
from motte.cli.output import Line, Output
from motte.cli.verb import verb

if TYPE_CHECKING:
    from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey
    from motte.seal.recipients import RecipientsReport

app = typer.Typer(help="Let more people open a bundle, or fewer.")

Bundle = Annotated[Path, typer.Argument(metavar="FILE", help="The bundle; replaced whole or not at all.")]
People = Annotated[
    list[str], typer.Argument(metavar="RECIPIENT...", help="Public keys: motte-recipient-1-..., or .pub files.")
]
Opener = Annotated[Path, typer.Option("--key", metavar="FILE", help="File of a present recipient's private key.")]
SignerKey = Annotated[
    Path, typer.Option("--signer-key", metavar="FILE", help="File of the private key that signed the bundle.")
]
Release = Annotated[
    int | None, typer.Option("--release", metavar="N", min=1, help="New release number. (default: one more than now)")
]


@app.command()
@verb
def add(
    out: Output, bundle: Bundle, recipients: People, key: Opener, signer_key: SignerKey, release: Release = None
) -> None:
    """Let more recipients open the bundle. The release number rises."""
    from motte.seal.recipients import add_recipients

    _change(out, add_recipients, bundle, recipients, key, signer_key, release)


@app.command()
@verb
def remove(
    out: Output, bundle: Bundle, recipients: People, key: Opener, signer_key: SignerKey, release: Release = None
) -> None:
    """Seal the bundle to some recipients no more. The release number rises."""
    from motte.seal.recipients import remove_recipients

    _change(out, remove_recipients, bundle, recipients, key, signer_key, release)
    out.warn("who was removed may have kept an old copy or its keys; only sealing anew protects new weights from them")


class _Change(Protocol):
    def __call__(
        self,
        path: Path,
        people: Any,
        /,
        *,
        opener: RecipientPrivateKey,
        signer: SignerPrivateKey,
        release: int | None,
        progress: Any,
    ) -> RecipientsReport: ...


def _change(
    out: Output, change: _Change, bundle: Path, recipients: list[str], key: Path, signer_key: Path, release: int | None
) -> None:
    from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey

    people: list[RecipientPublicKey] = [public_key(text, RecipientPublicKey, option="RECIPIENT") for text in recipients]
    opener = private_key(key, RecipientPrivateKey, option="--key")
    signer = private_key(signer_key, SignerPrivateKey, option="--signer-key")
    total = bundle.stat().st_size if bundle.is_file() else None
    with out.progress("copying", total=total, in_bytes=True) as bar:
        report = change(bundle, people, opener=opener, signer=signer, release=release, progress=bar.advance)
    document = {
        "path": str(report.path),
        "old_release": report.old_release,
        "release": report.release,
        "recipients": [{"key": str(each), "id": each.key_id} for each in report.recipients],
    }
    out.result(
        document,
        Line(f"{report.path}: release {report.old_release} -> {report.release}, {len(report.recipients)} can open it:"),
        *(Line(str(each)) for each in report.recipients),
        Line(f"To refuse the file from before, run it with --min-release {report.release}."),
    )
