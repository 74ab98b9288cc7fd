"""``motte enclave ...``: closed images of the trusted worker, for Gramine, containers and confidential VMs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motte.cli import enclave_script
from motte.cli.options import private_key, public_key
from motte.cli.output import Column, Line, Output, table
from motte.cli.verb import FAILED, verb
from motte.errors import SettingError

if TYPE_CHECKING:
    from rich.table import Table

    from motte.doctor.image_build import Built
    from motte.enclave.sizes import Line as SizeLine
    from motte.enclave.sizes import ModelNeed

app = typer.Typer(help="Make, check and measure closed images of the trusted worker; run scripts in enclaves.")
app.command("configure")(verb(enclave_script.configure))
app.command("run")(verb(enclave_script.run))
_MB = 1e6
_MIB = 1 << 20


@app.command()
@verb
def build(
    out: Output,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New folder for the image.")],
    of_script: enclave_script.ScriptOptions,
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="The enclave is made large enough for this model.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="NAME", help="onnxruntime (the default), openvino or torch.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="A recipient's key that opens BUNDLE.")
    ] = None,
    signer: Annotated[
        str | None, typer.Option("--signer", metavar="SIGNER", help="Who must have signed BUNDLE, or a script's run.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", min=1, help="Largest batch that fits. (default: as planned)")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, max=256, help="Compute threads.")] = 1,
    precision: Annotated[str, typer.Option("--precision", metavar="NAME", help="In which openvino computes.")] = "f32",
    slim: Annotated[
        bool, typer.Option("--slim", help="Without numpy's OpenBLAS and Python's own OpenSSL, which no run needs.")
    ] = False,
    edmm: Annotated[bool, typer.Option("--edmm", help="For SGX2 and Linux 6.0: add memory when it is used.")] = False,
    enclave_mib: Annotated[
        int, typer.Option("--enclave-mib", metavar="N", min=0, help="At least so large, for other models as well.")
    ] = 0,
    product: Annotated[int, typer.Option("--isv-product", metavar="N", min=0, max=65535, help="ISVPRODID.")] = 0,
    svn: Annotated[int, typer.Option("--isv-svn", metavar="N", min=0, max=65535, help="ISVSVN.")] = 0,
    shared_memory: Annotated[
        str | None, typer.Option("--shared-memory", metavar="NAME", help="A file of /dev/shm to an accelerator.")
    ] = None,
) -> None:
    """Make a closed image: exactly the interpreter, packages and files that the worker, or a script, loads.

    A worker is run to see what it loads, and the image is run alone to see that nothing is missing. The enclave's size
    is computed for BUNDLE, or else for the shipped model. The same inputs give the same image, byte for byte.
    """
    from motte.doctor.image_build import Request, report
    from motte.doctor.image_build import build as build_image
    from motte.enclave.manifest import Choices

    if of_script.script is not None:
        refused = {"BUNDLE": bundle, "--engine": engine, "--key": key, "--batch": batch, "--enclave-mib": enclave_mib}
        choices = Choices(threads=threads, edmm=edmm, product=product, svn=svn, shared_memory=shared_memory)
        enclave_script.build(out, output, of_script, signer, choices, slim=slim, refused=refused)
        return
    of_script.refuse_without_script()
    chosen = engine or "onnxruntime"
    need = _need(bundle, key, signer, chosen, batch)
    choices = Choices(
        threads=threads, precision=precision, edmm=edmm, product=product, svn=svn, shared_memory=shared_memory
    )
    request = Request(chosen, slim, choices, need, enclave_mib * _MIB)
    with out.progress("", total=None) as bar:
        built = build_image(output, request, bar.describe)
    out.result({"folder": str(output), **report(built)}, *_lines(built, bundle))
    if not built.closed.proved:
        out.warn(f"not proved closed: this machine makes no namespaces ({built.closed.why})")


@app.command()
@verb
def check(
    out: Output,
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A manifest of Gramine, or the folder of an image.")],
) -> None:
    """Say what is unsafe, obsolete or missing in a manifest of Gramine v1.9, and why. Exit 1 if anything."""
    from motte.enclave.manifest import find_manifest, loads
    from motte.enclave.manifest_rules import check as check_manifest

    manifest = find_manifest(path)
    try:
        data = manifest.read_bytes()
    except OSError as problem:
        raise SettingError("the manifest cannot be read", where=str(manifest), got=problem.strerror) from problem
    problems = check_manifest(loads(data, where=str(manifest)))
    document = {"manifest": str(manifest), "problems": [problem.to_json() for problem in problems]}
    if not problems:
        out.result(document, Line(f"{manifest}: nothing unsafe, obsolete or missing"))
        return
    columns = (Column("key", keep=True), Column("grade", keep=True), Column("what stands there, and why it is wrong"))
    rows = [(problem.key, problem.grade, f"{problem.got}\n{problem.reason}") for problem in problems]
    out.result(document, table(columns, rows))
    raise typer.Exit(FAILED)


@app.command()
@verb
def measure(
    out: Output,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an image.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Signing key of enclaves: RSA 3072, exponent 3.")],
) -> None:
    """Sign an image with Gramine's own tool; write its measurement, and the policy that a broker takes.

    Needs gramine-sgx-sign, but no SGX. Whoever has KEY can sign other enclaves in your name.
    """
    from motte.enclave.measure import POLICY
    from motte.enclave.measure import measure as measure_image
    from motte.measure.clock import Clock

    clock = Clock()
    found = measure_image(folder, key, clock=clock)
    out.result(
        {**found.to_json(), "policy": str(folder / POLICY), "segments": clock.segments().to_json()},
        Line(f"MRENCLAVE  {found.mrenclave}"),
        Line(f"MRSIGNER   {found.mrsigner}"),
        Line(f"ISVPRODID  {found.product}    ISVSVN  {found.svn}"),
        Line(f"policy     {folder / POLICY}   (motte broker policy check)"),
        Line(f"signed in {clock.segments().total_s:.1f} s"),
    )


def _need(
    bundle: Path | None, key: Path | None, signer: str | None, engine: str, batch: int | None
) -> ModelNeed | None:
    if bundle is None:
        if key is not None or signer is not None or batch is not None:
            raise SettingError("--key, --signer and --batch belong to a bundle", hint="name the bundle too")
        return None
    if key is None or signer is None:
        raise SettingError("a bundle's sizes are encrypted", expected="--key and --signer", hint="or leave BUNDLE out")
    from motte.doctor.image_build import bundle_need
    from motte.seal.keys import RecipientPrivateKey, SignerPublicKey

    opener = private_key(key, RecipientPrivateKey, option="--key")
    demanded = public_key(signer, SignerPublicKey, option="--signer")
    return bundle_need(bundle, opener, demanded, engine=engine, dims=None if batch is None else {"batch": batch})


def _lines(built: Built, bundle: Path | None) -> list[Line | Table]:
    from motte.enclave.sizes import aim_of

    record, sizes = built.record, built.sizes
    aim = aim_of(record.engine, slim=record.slim)
    size = f"{len(record.files)} files, {record.bytes / _MB:.1f} MB ({len(record.modules)} modules packed into one)"
    meant = "" if aim is None else f"; aim: {aim.megabytes:g} MB, {aim.files} files: {_yes(aim.met_by(record))}"
    proof = "it ran alone, and answered bit for bit as outside" if built.closed.proved else "NOT proved closed"
    shown: list[Line | Table] = [
        Line(f"{record.engine}{', slim' if record.slim else ''}: {size}{meant}"),
        Line(f"closed: {proof}"),
        Line(
            f"first answer under Gramine: about {built.start_s:.1f} s (ESTIMATE: 0.75 s + MB / 30, not measured here)"
        ),
        _sum(sizes.memory, f"enclave memory for {bundle or 'the shipped model'}", _MIB, "MiB"),
        Line(f"with a margin of 25 %, the next power of two: enclave_size {sizes.enclave_bytes // _MIB} MiB"),
        _sum(sizes.threads, f"max_threads {sizes.max_threads}", 1, "threads"),
    ]
    seconds = ", ".join(f"{item.name} {item.seconds:.1f} s" for item in built.clock.segments().items)
    return [*shown, Line(seconds), Line(f"in {built.folder}; next: motte enclave measure {built.folder} --key KEY")]


def _sum(lines: tuple[SizeLine, ...], title: str, unit: int, name: str) -> Table:
    rows = [(line.what, f"{line.amount / unit:.1f}" if unit > 1 else str(line.amount), line.why) for line in lines]
    return table((Column("what", keep=True), Column(name, number=True), Column("why")), rows, title=title)


def _yes(met: bool) -> str:
    return "met" if met else "NOT met"
