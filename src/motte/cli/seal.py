"""``motte seal``: model -> bundle."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motte.cli.building import ModelOptions, capture_model, example_inputs
from motte.cli.cutting import CutOptions, read_plan
from motte.cli.gpu_placing import GpuOptions
from motte.cli.options import private_key, public_key
from motte.cli.output import Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.releasing import BrokerOptions
from motte.cli.scheme import SchemeOptions, offload_json, offload_lines
from motte.cli.verb import verb
from motte.errors import InputError, SettingError, UnsupportedError
from motte.limits import MAX_RELEASE

if TYPE_CHECKING:
    from motte.capture.export import Captured
    from motte.capture.graph import Graph
    from motte.lower.lowered import Lowered, NotLowered
    from motte.offload.settings import Asymmetric
    from motte.plan.plan import Plan
    from motte.provision.address import BrokerAddress
    from motte.provision.registration import Registration
    from motte.seal.writer import SealReport
    from motte.zoo.models import BuiltModel

_BUNDLE = "Bundle"
_ENGINES = "Engines"


@verb
def seal(
    out: Output,
    model: ModelOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle, NAME.motte.", rich_help_panel=_BUNDLE)
    ],
    signer_key: Annotated[
        Path,
        typer.Option(
            "--signer-key", metavar="FILE", rich_help_panel=_BUNDLE, help="File of the private key that signs it."
        ),
    ],
    cuts: CutOptions,
    offload: SchemeOptions,
    gpu: GpuOptions,
    holder: BrokerOptions,
    recipient: Annotated[
        list[str] | None,
        typer.Option(
            "--recipient",
            metavar="KEY",
            rich_help_panel=_BUNDLE,
            help="Who can open it: motte-recipient-1-..., or a .pub file. Repeat it for several. Needed where no"
            " --broker is given.",
        ),
    ] = None,
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
    lower: Annotated[
        Literal["auto", "off", "required"],
        typer.Option(
            "--lower",
            rich_help_panel=_ENGINES,
            help="Also store the parts as ONNX, for workers without torch: where it can be done, never, or refuse if"
            " it cannot.",
        ),
    ] = "auto",
    precision: Annotated[
        Literal["f32", "bf16"],
        typer.Option(
            "--precision",
            rich_help_panel=_ENGINES,
            help="bf16: measure what openvino's bf16 changes in the answers, so that the bundle may run in it.",
        ),
    ] = "f32",
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
    from motte.seal.run_terms import terms_of

    cuts.check(plan)
    scheme = offload.make()
    gpu.references()
    if scheme is not None and not public_weights:
        raise SettingError(
            "a scheme sends weights out, and none is marked public",
            where="--public-weights",
            expected="all-but-first-last, or names of layers",
        )
    # What needs no model is refused before one is built.
    if precision != "f32" and (lower == "off" or find_spec("openvino") is None):
        raise SettingError(
            f"{precision} is measured with openvino on lowered parts",
            got="--lower off" if lower == "off" else "openvino is not installed",
            hint="drop --precision, or " + ("--lower off" if lower == "off" else "pip install 'motte[openvino]'"),
        )
    people = [public_key(text, RecipientPublicKey, option="--recipient") for text in recipient or []]
    address = holder.address()
    if not people and address is None:
        raise SettingError("nobody could open it", expected="--recipient KEY, or --broker ADDRESS")
    signer = private_key(signer_key, SignerPrivateKey, option="--signer-key")
    if not overwrite and os.path.lexists(output):
        raise InputError("the bundle exists already", where=str(output), hint="choose another name, or say --overwrite")
    if address is not None:
        with out.progress("asking the broker"):
            people.append(holder.identity(address).recipient)
    built = model.build(out)
    captured = capture_model(out, built)
    made = read_plan(plan, captured.graph) if plan is not None else cuts.make(out, built, captured)
    made, public = _place(made, captured.graph, scheme, public_weights or [], gpu)
    checked = "not compared with the whole (--skip-check)" if skip_check else _check(out, built, captured, made)
    lowered = None if lower == "off" else _lower(out, built, captured, made, precision, required=lower == "required")
    manifest = Manifest(captured.graph, made, built.signature, lowered)
    total = sum(part.layout.bytes for part in lay_out_parts(manifest))
    with out.progress(f"sealing {output.name}", total=total, in_bytes=True) as bar:
        # A bundle that its broker does not know can be opened by nobody: it gets its name when it is registered.
        report = seal_model(
            output if address is None else output.with_name(f".{output.name}.unregistered"),
            manifest,
            captured.weights,
            release=release,
            recipients=people,
            signer=signer,
            public_weights=public,
            run=terms_of(made.offload, broker="" if address is None else str(address)),
            threads=threads or len(os.sched_getaffinity(0)),
            overwrite=overwrite or address is not None,
            progress=bar.advance,
        )
    registered: Registration | None = None
    if address is not None:
        registered = holder.register(report.path, signer, address, built.name, output)
        report = replace(report, path=output)
    origin = built.signature.weights_origin
    document = {
        **_report_json(report),
        "model": built.name,
        "weights_origin": origin,
        "check": checked,
        "lowered": None if lowered is None else _lowered_json(lowered),
        "objective": made.objective,
        "signer": str(signer.public),
        "recipients": [str(each) for each in people],
        "public_weights": list(public),
        "offload": None if made.offload is None else offload_json(made.offload),
        "broker": None if registered is None else _broker_json(registered, str(address)),
    }
    out.result(document, *_show(report, built, checked), Line(_lowered_line(lowered)), *offload_lines(made.offload))
    keys = "--key KEY" if address is None else f"--broker '{address}'"
    out.note(f"run it with: motte run {output} --signer {signer.public} {keys} --input FILE{_where(made, address)}")


def _where(made: Plan, broker: BrokerAddress | None) -> str:
    """The options of ``motte run`` that the bundle needs beside keys and inputs."""
    section = made.offload
    if section is not None and section.confidential_gpu:
        return " --enclave vm --vm ADDRESS"
    evidence = "" if broker is None else " --evidence KIND"
    return evidence + (" --accelerator ADDRESS" if section is not None and section.split else "")


def _broker_json(made: Registration, address: str) -> dict[str, Any]:
    configuration = made.configurations[0].hex()
    return {"address": address, "model": made.model, "policy": made.policy, "configuration": configuration}


def _place(
    made: Plan, graph: Graph, scheme: Asymmetric | None, words: list[str], gpu: GpuOptions
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with its offload section, and the names of the weights that the header marks public.

    Raises:
        SettingError: two schemes, or layers that the model does not have or that cannot run there.
        BundleError: the section of a plan splits a layer that ``words`` leave out: no worker would run that.
    """
    from motte.offload.graph_layers import check_layers, choose_layers, graph_layers, public_names
    from motte.offload.placement import to_plan
    from motte.plan.rules import check_plan

    if made.offload is not None and (scheme is not None or gpu.given):
        got = f"{'--gpu-layers' if scheme is None else '--scheme'} with --plan"
        raise SettingError("the plan holds a scheme already", got=got, hint="keep one of them")
    if scheme is not None or gpu.given:
        placement = None if scheme is None else choose_layers(graph, words, tiles=made.tiles)
        if placement is None or gpu.given:
            placement = gpu.place(graph, placement, made.tiles)
        if scheme is not None and not placement.split:
            raise SettingError("no layer is left to run on the accelerator", got="--gpu-layers takes all of them")
        section = to_plan(scheme, placement, gpu_references=gpu.references())
        made = replace(made, offload=section)
        check_plan(made, graph)
        return made, public_names(graph, section) if scheme is not None else tuple(sorted(set(words)))
    if made.offload is None:
        return made, tuple(sorted(set(words)))
    chosen = set(choose_layers(graph, words, tiles=made.tiles).split) if words else set()
    public = tuple(sorted(layer.weight for layer in graph_layers(graph) if layer.name in chosen))
    check_layers(graph, made.offload, public)
    return made, public


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


def _lower(
    out: Output, built: BuiltModel, captured: Captured, made: Plan, precision: str, *, required: bool
) -> Lowered | NotLowered:
    """The parts as ONNX, compared with the reference on every engine that is installed here.

    Raises:
        MismatchError: an engine answers otherwise. UnsupportedError: ``required``, and it cannot be done.
    """
    from motte.lower.check import check_lowered
    from motte.lower.lower import lower
    from motte.lower.lowered import NotLowered

    with out.progress("lowering the parts to ONNX"):
        lowered = lower(captured.graph, made)
    if isinstance(lowered, NotLowered):
        if required:
            raise UnsupportedError("the model does not lower", where=built.name, got=str(lowered), hint="--lower auto")
        return lowered
    engines = tuple(name for name in ("onnxruntime", "openvino") if find_spec(name) is not None)
    inputs = example_inputs(built, captured)
    with out.progress("comparing the lowered parts with the reference"):
        checks = check_lowered(lowered, captured.graph, made, captured.weights, inputs, engines=engines)
        if precision != "f32":
            checks += check_lowered(
                lowered, captured.graph, made, captured.weights, inputs, engines=("openvino",), precision=precision
            )
    return replace(lowered, checks=checks)


def _lowered_json(lowered: Lowered | NotLowered) -> dict[str, Any]:
    from motte.lower.lowered import NotLowered, check_json

    if isinstance(lowered, NotLowered):
        return {"reasons": {str(index): reason for index, reason in lowered.reasons.items()}}
    return {"checks": [check_json(check) for check in lowered.checks], "bytes": lowered.bytes}


def _lowered_line(lowered: Lowered | NotLowered | None) -> str:
    from motte.lower.lowered import NotLowered

    if lowered is None:
        return "lowered: no (--lower off); only the torch engine runs it"
    if isinstance(lowered, NotLowered):
        return f"NOT LOWERED, only the torch engine runs it: {lowered}"
    found: dict[str, float] = {}
    for check in lowered.checks:
        name = f"{check.engine} {check.engine_version}" + ("" if check.precision == "f32" else f" in {check.precision}")
        found[name] = max(found.get(name, 0.0), check.difference)
    figures = "; ".join(f"{name} within {difference:.2g}" for name, difference in found.items())
    return f"lowered: {bytes_text(lowered.bytes)} of ONNX; largest difference from the reference: {figures}"


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
