"""``motte seal``: model -> bundle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.building import ModelOptions, capture_model, example_inputs
from motte.cli.cutting import CutOptions, read_plan
from motte.cli.options import private_key, public_key
from motte.cli.output import Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.scheme import SchemeOptions, offload_json, offload_lines
from motte.cli.verb import verb
from motte.errors import InputError, SettingError
from motte.limits import MAX_RELEASE

if TYPE_CHECKING:
    from motte.capture.export import Captured
    from motte.capture.graph import Graph
    from motte.offload.settings import Asymmetric
    from motte.plan.offload import OffloadPlan
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
    offload: SchemeOptions,
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
            metavar="LAYERS",
            rich_help_panel=_BUNDLE,
            help="Layers whose weights may leave: all-but-first-last, or names and patterns such as features.10 or"
            " 'layer3.*', with commas or repeated. Without a scheme: exact names of weights. They stand in clear in the"
            " header. (default: none)",
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
    scheme = offload.make()
    if scheme is not None and not public_weights:
        raise SettingError(
            "a scheme sends weights out, and none is marked public",
            where="--public-weights",
            expected="all-but-first-last, or names of layers",
        )
    # What needs no model is refused before one is built.
    people = [public_key(text, RecipientPublicKey, option="--recipient") for text in recipient]
    signer = private_key(signer_key, SignerPrivateKey, option="--signer-key")
    if not overwrite and os.path.lexists(output):
        raise InputError("the bundle exists already", where=str(output), hint="choose another name, or say --overwrite")
    built = model.build(out)
    captured = capture_model(out, built)
    made = read_plan(plan, captured.graph) if plan is not None else cuts.make(out, built, captured)
    made, public = _place(made, captured.graph, scheme, public_weights or [])
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
            public_weights=public,
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
        "public_weights": list(public),
        "offload": None if made.offload is None else offload_json(made.offload),
    }
    out.result(document, *_show(report, built, checked), *offload_lines(made.offload))
    address = "" if made.offload is None else " --accelerator ADDRESS"
    out.note(f"run it with: motte run {output} --signer {signer.public} --key KEY --input FILE{address}")


def _place(made: Plan, graph: Graph, scheme: Asymmetric | None, words: list[str]) -> tuple[Plan, tuple[str, ...]]:
    """The plan with its offload section, and the names of the weights that the header marks public.

    Raises:
        SettingError: two schemes, or layers that the model does not have or that cannot run split.
        BundleError: the section of a plan splits a layer that ``words`` leave out: no worker would run that.
    """
    from motte.offload.graph_layers import choose_layers, graph_layers, public_names, split_nodes
    from motte.offload.placement import to_plan
    from motte.plan.rules import check_plan

    if scheme is not None and made.offload is not None:
        raise SettingError("the plan holds a scheme already", got="--scheme with --plan", hint="keep one of them")
    if scheme is not None:
        made = replace(made, offload=to_plan(scheme, choose_layers(graph, words, tiles=made.tiles)))
        check_plan(made, graph)
        return made, public_names(graph, _section(made))
    if made.offload is None:
        return made, tuple(sorted(set(words)))
    chosen = set(choose_layers(graph, words, tiles=made.tiles).split) if words else set()
    public = tuple(sorted(layer.weight for layer in graph_layers(graph) if layer.name in chosen))
    split_nodes(graph, made.offload, public)
    return made, public


def _section(made: Plan) -> OffloadPlan:
    if made.offload is None:
        raise RuntimeError("the plan has no offload section")
    return made.offload


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
