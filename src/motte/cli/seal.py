"""``motte seal``: model -> bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.building import ModelOptions, capture_model, example_inputs
from motte.cli.cutting import CutOptions, read_plan
from motte.cli.options import private_key, public_key
from motte.cli.output import Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.verb import verb
from motte.errors import InputError
from motte.limits import MAX_RELEASE

if TYPE_CHECKING:
    from motte.capture.export import Captured
    from motte.plan.plan import Plan
    from motte.seal.writer import SealReport
    from motte.zoo.models import BuiltModel

_BUNDLE = "Bundle"


@verb
def seal(
    out: Output,
    model: ModelOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle, NAME.motte.", rich_help_panel=_BUNDLE)
    ],
    recipient: Annotated[
        list[str],
        typer.Option(
            "--recipient",
            metavar="KEY",
            rich_help_panel=_BUNDLE,
            help="Who can open it: motte-recipient-1-..., or a .pub file. Repeat it for several.",
        ),
    ],
    signer_key: Annotated[
        Path,
        typer.Option(
            "--signer-key", metavar="FILE", rich_help_panel=_BUNDLE, help="File of the private key that signs it."
        ),
    ],
    cuts: CutOptions,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="FILE", rich_help_panel="Cuts: choose one way", help="A plan of `motte plan -o`."
        ),
    ] = None,
    release: Annotated[
        int,
        typer.Option(
            "--release",
            metavar="N",
            min=0,
            max=MAX_RELEASE,
            rich_help_panel=_BUNDLE,
            help="Higher than that of every bundle of this model handed out before.",
        ),
    ] = 1,
    public_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--public-weights",
            metavar="NAME",
            rich_help_panel=_BUNDLE,
            help="Mark a weight as allowed to leave the trusted side. Repeat it for several. (default: none)",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            max=256,
            rich_help_panel=_BUNDLE,
            help="Threads that encrypt. (default: all cores)",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_BUNDLE, help="Replace the bundle.")
    ] = False,
    skip_check: Annotated[
        bool,
        typer.Option(
            "--skip-check", rich_help_panel=_BUNDLE, help="Do not compare the parts' answer with the whole model's."
        ),
    ] = False,
) -> None:
    """Cut a model, check that its parts answer as the whole does, and write them sealed into one file."""
    from motte.seal.keys import RecipientPublicKey, SignerPrivateKey
    from motte.seal.manifest import Manifest, lay_out_parts
    from motte.seal.package import seal_model

    cuts.check(plan)
    # What needs no model is refused before one is built.
    people = [public_key(text, RecipientPublicKey, option="--recipient") for text in recipient]
    signer = private_key(signer_key, SignerPrivateKey, option="--signer-key")
    if not overwrite and os.path.lexists(output):
        raise InputError("the bundle exists already", where=str(output), hint="choose another name, or say --overwrite")
    built = model.build(out)
    captured = capture_model(out, built)
    made = read_plan(plan, captured.graph) if plan is not None else cuts.make(out, built, captured)
    checked = "not compared with the whole (--skip-check)" if skip_check else _check(out, built, captured, made)
    manifest = Manifest(captured.graph, made, built.signature)
    total = sum(part.layout.bytes for part in lay_out_parts(manifest))
    with out.progress(f"sealing {output.name}", total=total, in_bytes=True) as bar:
        report = seal_model(
            output,
            manifest,
            captured.weights,
            release=release,
            recipients=people,
            signer=signer,
            public_weights=public_weights or (),
            threads=threads or len(os.sched_getaffinity(0)),
            overwrite=overwrite,
            progress=bar.advance,
        )
    origin = built.signature.weights_origin
    document = {
        **_report_json(report),
        "model": built.name,
        "weights_origin": origin,
        "check": checked,
        "objective": made.objective,
        "signer": str(signer.public),
        "recipients": [str(each) for each in people],
        "public_weights": sorted(public_weights or ()),
    }
    out.result(document, *_show(report, built, checked))
    out.note(f"run it with: motte run {output} --signer {signer.public} --key KEY --input FILE")


def _check(out: Output, built: BuiltModel, captured: Captured, made: Plan) -> str:
    """Compare the parts with the whole on the example inputs; says how equal they are.

    Raises:
        MismatchError: they are not.
    """
    from motte.engines.torch_engine import TorchEngine
    from motte.split.oracle import check_parts

    with out.progress("checking that the parts answer as the whole"):
        inputs = example_inputs(built, captured)
        found = check_parts(captured.graph, made, TorchEngine(), captured.weights, inputs)
    if made.tiles:
        return f"tiled: within {found.tiled_difference:.2g} of the whole (limit 1e-6), {found.values} tensors compared"
    return f"bit for bit equal to the whole, {found.values} tensors compared"


def _report_json(report: SealReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "bundle_id": report.bundle_id,
        "release": report.release,
        "file_bytes": report.file_bytes,
        "seconds": report.seconds,
        "bytes_per_second": report.bytes_per_second,
        "sections": [
            {
                "index": each.index,
                "kind": "part" if each.index else "manifest",
                "plaintext_bytes": each.plaintext_bytes,
                "ciphertext_bytes": each.ciphertext_bytes,
                "seconds": each.seconds,
                "bytes_per_second": each.bytes_per_second,
            }
            for each in report.sections
        ],
    }


def _show(report: SealReport, built: BuiltModel, checked: str) -> list[Any]:
    rows = [
        (
            f"part {each.index}" if each.index else "manifest",
            bytes_text(each.plaintext_bytes),
            bytes_text(each.ciphertext_bytes),
            seconds_text(each.seconds),
            f"{bytes_text(round(each.bytes_per_second))}/s",
        )
        for each in report.sections
    ]
    whole = (
        "all",
        bytes_text(report.plaintext_bytes),
        bytes_text(report.file_bytes),
        seconds_text(report.seconds),
        f"{bytes_text(round(report.bytes_per_second))}/s",
    )
    columns = (
        Column("section", keep=True),
        Column("opened", number=True),
        Column("in the file", number=True),
        Column("time", number=True),
        Column("rate", number=True),
    )
    shown = [
        table(columns, [*rows, whole], title=f"{report.path}: {built.name}, release {report.release}", totals=True),
        Line(f"bundle {report.bundle_id}"),
        Line(f"check: {checked}"),
    ]
    if built.signature.weights_origin == "random":
        shown.append(Line("RANDOM WEIGHTS: every answer of this model means nothing"))
    return shown
