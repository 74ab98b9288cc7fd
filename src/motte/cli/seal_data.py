"""``motte seal-data``: a data set -> one sealed file, for training inside."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.anchoring import AnchorOptions
from motte.cli.options import private_key, public_key
from motte.cli.output import Column, Line, Output, bytes_text, table
from motte.cli.releasing import BrokerOptions
from motte.cli.train_options import ProtectionOptions
from motte.cli.training_terms import TermsOptions
from motte.cli.verb import verb
from motte.errors import InputError, SettingError
from motte.limits import MAX_RELEASE

if TYPE_CHECKING:
    from motte.provision.registration import Registration
    from motte.seal.writer import SealReport
    from motte.train.data import DataSet


@verb
def seal_data(
    out: Output,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="folder:PATH (or PATH alone), imagenet:PATH, fashion-mnist, mnist, cifar10 or cifar100.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="The sealed file.")],
    signer_key: Annotated[
        Path,
        typer.Option("--signer-key", "--signer", metavar="FILE", help="File of the private key that signs it."),
    ],
    terms: TermsOptions,
    protection: ProtectionOptions,
    holder: BrokerOptions,
    given_roots: AnchorOptions,
    recipient: Annotated[
        list[str] | None,
        typer.Option(
            "--recipient",
            metavar="KEY",
            help="Who can open it: motte-recipient-1-..., or a .pub file. Repeat it for several. Needed where no"
            " --broker is given.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Where the files of a public set lie. (default: download them)"),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the split of a folder that has no train/ and val/.")
    ] = 0,
    release: Annotated[
        int,
        typer.Option(
            "--release",
            metavar="N",
            min=0,
            max=MAX_RELEASE,
            help="Higher than that of every file of this data handed out before.",
        ),
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, max=256, help="Threads that encrypt. (default: all cores)"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Seal a folder of photos, or a public data set, for training on it inside.

    Plain folders are for public data: a host that trains from one reads every photo. Seal private data on a machine
    of your own, and hand the sealed file to the host.
    """
    from motte.seal.keys import RecipientPublicKey, SignerPrivateKey
    from motte.train.data import open_data
    from motte.train.datasets.sealing import seal_data as write

    people = [public_key(text, RecipientPublicKey, option="--recipient") for text in recipient or []]
    address = holder.address()
    if not people and address is None:
        raise SettingError("nobody could open it", expected="--recipient KEY, or --broker ADDRESS")
    run = terms.make(protection, given_roots, broker="" if address is None else str(address))
    signer = private_key(signer_key, SignerPrivateKey, option="--signer-key")
    if not overwrite and os.path.lexists(output):
        raise InputError("the file exists already", where=str(output), hint="choose another name, or say --overwrite")
    if address is not None:
        with out.progress("asking the broker"):
            people.append(holder.identity(address).recipient)
    name = f"folder:{source}" if ":" not in source and Path(source).is_dir() else source
    with out.progress(f"reading {source}", in_bytes=True) as bar:
        data = open_data(name, data_dir=data_dir, seed=seed, progress=bar.set)
    with out.progress(f"sealing {output.name}", in_bytes=True) as bar:
        # Data that its broker does not know can be opened by nobody: it gets its name when it is registered.
        report = write(
            output if address is None else output.with_name(f".{output.name}.unregistered"),
            data,
            release=release,
            recipients=people,
            signer=signer,
            threads=threads or len(os.sched_getaffinity(0)),
            overwrite=overwrite or address is not None,
            progress=bar.advance,
            run=run,
        )
    registered: Registration | None = None
    if address is not None:
        registered = holder.register(report.path, signer, address, data.name.partition(":")[0], output)
        report = replace(report, path=output)
    document = {
        "path": str(report.path),
        "bundle_id": report.bundle_id,
        "release": report.release,
        "file_bytes": report.file_bytes,
        "plaintext_bytes": report.plaintext_bytes,
        "seconds": report.seconds,
        "data": name,
        "provenance": data.provenance,
        "classes": len(data.classes),
        "records": {"train": len(data.train), "test": len(data.test)},
        "signer": str(signer.public),
        "recipients": [str(each) for each in people],
        "terms": None if run is None else run.to_json(),
        "broker": None if registered is None else _registered_json(registered, str(address)),
    }
    out.result(document, *_show(report, data))
    keys = "--data-key KEY" if address is None else f"--broker '{address}' --broker-run RUN --evidence KIND"
    out.note(
        f"train on it with: motte train --data sealed:{output} {keys} --data-signer {signer.public}"
        " (the unsealed files stay where they are)"
    )
    if registered is not None:
        out.note(f"a run of it, where the broker is: motte broker run enroll DIR {registered.model} --budget N")


def _registered_json(made: Registration, address: str) -> dict[str, Any]:
    configuration = made.configurations[0].hex()
    return {"address": address, "model": made.model, "policy": made.policy, "configuration": configuration}


def _show(report: SealReport, data: DataSet) -> list[Any]:
    columns = (Column("split", keep=True), Column("records", number=True))
    rows = [("train", f"{len(data.train):,}"), ("test", f"{len(data.test):,}")]
    return [
        table(columns, rows, title=f"{report.path}: {len(data.classes)} classes, release {report.release}"),
        Line(data.provenance),
        Line(f"bundle {report.bundle_id}, {bytes_text(report.file_bytes)}"),
    ]
