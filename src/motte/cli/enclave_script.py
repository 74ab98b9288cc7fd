"""``motte enclave build --script``, ``configure`` and ``run``: any script in an enclave, as its owner signed it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motte.cli.options import parse_size, private_key, public_key
from motte.cli.output import Line, Output
from motte.errors import SettingError

if TYPE_CHECKING:
    from motte.enclave.manifest import Choices
    from motte.enclave.script_image import Built
    from motte.enclave.script_run import ScriptRun
    from motte.seal.keys import SignerPublicKey
    from motte.trusted.harden import Hardening

_SCRIPT = "An image of a script, in place of the worker's"
_MB = 1e6
_MIB = 1 << 20
KindName = Literal["process", "gramine-direct", "gramine-sgx", "vm"]
Words = Annotated[
    list[str], typer.Argument(metavar="-- python SCRIPT ARGUMENTS", help="The script, and all of its arguments.")
]


@dataclass(frozen=True, slots=True)
class ScriptOptions:
    """What ``motte enclave build --script`` takes besides."""

    script: Annotated[
        Path | None,
        typer.Option("--script", metavar="FILE", help="Of this script; needs --signer.", rich_help_panel=_SCRIPT),
    ] = None
    trial: Annotated[
        str | None,
        typer.Option("--trial", metavar="ARGS", help="Arguments of a short run of it.", rich_help_panel=_SCRIPT),
    ] = None
    trial_accelerator: Annotated[
        bool,
        typer.Option("--trial-accelerator", help="Let that run have an accelerator.", rich_help_panel=_SCRIPT),
    ] = False
    include: Annotated[
        list[Path] | None,
        typer.Option("--include", metavar="FILE", help="Data for the image; repeatable.", rich_help_panel=_SCRIPT),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="For what it allocates; 2GiB.", rich_help_panel=_SCRIPT),
    ] = None

    def refuse_without_script(self) -> None:
        """Raises: SettingError: something is given that only the image of a script reads."""
        if self != ScriptOptions():
            raise SettingError(
                "this is read with --script only", got="--trial, --trial-accelerator, --include, --memory"
            )


def build(
    out: Output,
    output: Path,
    given: ScriptOptions,
    signer: str | None,
    choices: Choices,
    *,
    slim: bool,
    refused: Mapping[str, object],
) -> None:
    """The image of a script, with what is printed about it.

    Raises:
        SettingError: no signer, or an option of the worker's image.
    """
    from motte.enclave.script_image import DEFAULT_MEMORY_BYTES, Request
    from motte.enclave.script_image import build as build_image
    from motte.seal.keys import SignerPublicKey

    named = [name for name, value in refused.items() if value]
    if named:
        raise SettingError("not read with --script", got=", ".join(named))
    if given.script is None or signer is None:
        hint = "it is measured: the enclave believes configurations of this signer only"
        raise SettingError("whose configurations shall the script believe?", expected="--signer", hint=hint)
    try:
        arguments = tuple(shlex.split(given.trial or ""))
    except ValueError as problem:
        raise SettingError("not arguments", where="--trial", got=str(problem)) from problem
    request = Request(
        script=given.script,
        arguments=arguments,
        signer=public_key(signer, SignerPublicKey, option="--signer"),
        choices=choices,
        include=tuple(given.include or ()),
        memory_bytes=DEFAULT_MEMORY_BYTES if given.memory is None else parse_size(given.memory),
        accelerator=given.trial_accelerator,
        slim=slim,
    )
    with out.progress("", total=None) as bar:
        built = build_image(output, request, bar.describe)
    out.result({"folder": str(output), **built.to_json()}, *_lines(built))
    if built.why_not_proved is not None:
        out.warn(f"not proved closed: this machine makes no namespaces ({built.why_not_proved})")
    if built.left_out:
        shown = ", ".join(built.left_out[:5]) + (f" and {len(built.left_out) - 5} more" if built.left_out[5:] else "")
        out.warn(f"read in the trial, and not in the image (--include adds a file): {shown}")


def _lines(built: Built) -> list[Line]:
    from motte.enclave.sizes import aim_of

    record, sizes = built.record, built.sizes
    aim = aim_of(record.engine, slim=record.slim)
    met = "" if aim is None else f"; aim: {aim.megabytes:g} MB, {aim.files} files: " + (
        "met" if aim.met_by(record) else "NOT met"
    )  # fmt: skip
    size = f"{len(record.files)} files, {record.bytes / _MB:.1f} MB ({len(record.modules)} modules packed into one)"
    closed = "it ran alone to its end" if built.why_not_proved is None else "NOT proved"
    terms = [f"  {line.amount / _MIB:>8.1f} MiB  {line.what}: {line.why}" for line in sizes.memory]
    seconds = ", ".join(f"{item.name} {item.seconds:.1f} s" for item in built.clock.segments().items)
    return [
        Line(f"{record.engine}{', slim' if record.slim else ''}: {size}{met}"),
        Line(f"closed: {closed}"),
        Line(f"start under Gramine: about {built.start_s:.1f} s (ESTIMATE: 0.75 s + MB / 30, not measured here)"),
        *map(Line, terms),
        Line(f"with a margin of 25 %, the next power of two: enclave_size {sizes.enclave_bytes // _MIB} MiB"),
        Line(f"max_threads {sizes.max_threads}"),
        Line(seconds),
        Line(f"in {built.folder}; next: motte enclave measure {built.folder} --key KEY"),
    ]


def configure(
    out: Output,
    command: Words,
    signer_key: Annotated[Path, typer.Option("--signer-key", metavar="FILE", help="Signs it.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Signed; never overwritten.")],
    rank: Annotated[int, typer.Option("--rank", metavar="N", min=0, help="Of this process.")] = 0,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="ADDRESS", help="tcp:HOST:PORT of each rank, in order; repeat it."),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option("--accelerator", metavar="ADDRESS", help="Where layers may run that the script lets out."),
    ] = None,
    noise: Annotated[
        str | None, typer.Option("--noise", metavar="NOISE", help="none, or gaussian:...; with --accelerator.")
    ] = None,
    integrity: Annotated[
        Literal["freivalds", "off"], typer.Option("--integrity", help="How its answers are checked.")
    ] = "freivalds",
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="FILE", help="Sealed data or model that it opens: its id and release."),
    ] = None,
    broker: Annotated[str, typer.Option("--broker", metavar="ADDRESS", help="Where it gets keys.")] = "",
) -> None:
    """At the owner's: sign what one process of a script may be, one file for each rank.

    Script, arguments, rank, peers, accelerator, noise and checks are fixed by it, and their digest stands in evidence.
    """
    from motte.enclave.script_run import ScriptRun
    from motte.enclave.script_start import Command, digest_of
    from motte.seal.atomic import atomic_file
    from motte.seal.keys import SignerPrivateKey

    if (accelerator is None) is not (noise is None):
        raise SettingError(
            "say what is done to what leaves", expected="--noise with --accelerator, and neither alone",
            got="--noise" if accelerator is None else "--accelerator",
        )  # fmt: skip
    key = private_key(signer_key, SignerPrivateKey, option="--signer-key")
    parsed = Command.parse(command)
    bundle_id, release = (b"", 1) if bundle is None else _bundle(bundle, key.public)
    peers = tuple(peer or ())
    run = ScriptRun(
        script=digest_of(parsed),
        arguments=parsed.arguments,
        rank=rank,
        ranks=len(peers) or 1,
        peers=peers,
        accelerator=accelerator or "",
        noise=None if noise == "none" else noise,
        integrity=integrity,
        broker=broker,
        bundle_id=bundle_id,
        release=release,
        signer=key.public,
    )
    data = run.encode(key)
    with atomic_file(output, overwrite=False) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    digest = run.configuration().digest().hex()
    out.result(
        {"file": str(output), "script": run.script.hex(), "rank": run.rank, "ranks": run.ranks, "digest": digest},
        Line(f"{output}: {parsed.script}, rank {run.rank} of {run.ranks}, signed by {key.public}"),
        Line(f"  configuration {digest}   (motte broker add --configuration)"),
    )


def run(
    out: Output,
    command: Words,
    enclave: Annotated[KindName, typer.Option("--enclave", help="The kind of enclave.")],
    configuration: Annotated[
        Path, typer.Option("--configuration", metavar="FILE", help="What the owner signed: motte enclave configure.")
    ],
    signer: Annotated[str, typer.Option("--signer", metavar="SIGNER", help="Whose signature is demanded.")],
    image: Annotated[
        Path | None, typer.Option("--image", metavar="DIR", help="Of the script: motte enclave build --script.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, max=256, help="process: of torch.")] = 1,
    read: Annotated[
        list[Path] | None, typer.Option("--read", metavar="PATH", help="process: what it may read; repeatable.")
    ] = None,
    write: Annotated[
        list[Path] | None, typer.Option("--write", metavar="DIR", help="process: where it may write; repeatable.")
    ] = None,
    vm_address: Annotated[
        str | None, typer.Option("--vm-address", metavar="ADDRESS", help="vm: vsock:CID:PORT, or unix:PATH.")
    ] = None,
) -> None:
    """Run a script in an enclave; ends with the script's exit status. What it prints reaches this machine.

    Rank, world size and peers come from the signed configuration: RANK and WORLD_SIZE of the environment are dropped.
    """
    from motte.enclave import script_start
    from motte.enclave.gramine import program
    from motte.seal.keys import SignerPublicKey

    _refuse_unread(enclave, {"--read": read, "--write": write}, ("process",))
    _refuse_unread(enclave, {"--image": image}, ("gramine-direct", "gramine-sgx"))
    _refuse_unread(enclave, {"--vm-address": vm_address}, ("vm",))
    demanded = public_key(signer, SignerPublicKey, option="--signer")
    parsed = script_start.Command.parse(command)
    signed_run, signed = script_start.read_run(configuration, demanded)
    if (warning := script_start.simulated(enclave)) is not None:
        out.warn(warning)
    _say_dropped(out)
    # With --json what the script prints goes to stderr: stdout holds the one document.
    stdout = 2 if out.as_json else None
    if enclave == "process":
        signed_run.require_command(script_start.digest_of(parsed), parsed.arguments)
        status = script_start.run_process(
            parsed, signed, demanded, threads=threads, read=read or (), write=write or (), stdout=stdout,
            tell=lambda found: _say_hardening(out, found),
        )  # fmt: skip
    elif enclave == "vm":
        signed_run.require_command(None, parsed.arguments)
        if vm_address is None:
            raise SettingError("which guest?", expected="--vm-address vsock:CID:PORT")
        script_start.run_vm(vm_address, signed, stdout=stdout)
        out.warn("a guest's socket tells no exit status")
        status = 0
    else:
        folder = script_start.require_image(image, enclave)
        # Before the image is read: without Gramine there is nothing to start, and the error says how it is had.
        program(enclave)
        signed_run.require_command(script_start.script_of_image(folder), parsed.arguments)
        status = script_start.run_gramine(folder, enclave, signed, stdout=stdout)
    if out.as_json:
        out.result(_document(signed_run, enclave, status))
    if status:
        raise typer.Exit(status)


def _document(run: ScriptRun, enclave: str, status: int) -> dict[str, object]:
    return {
        "enclave": enclave,
        "simulated": enclave in ("process", "gramine-direct"),
        "exit_status": status,
        "rank": run.rank,
        "ranks": run.ranks,
        "configuration": run.configuration().digest().hex(),
    }


def _say_hardening(out: Output, found: Hardening) -> None:
    for line in found.lines():
        out.note(line)


def _say_dropped(out: Output) -> None:
    dropped = [
        name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name in os.environ
    ]
    if dropped:
        out.warn(f"{', '.join(dropped)} of the environment: dropped, the signed configuration counts")


def _bundle(path: Path, signer: SignerPublicKey) -> tuple[bytes, int]:
    from motte.seal.reader import open_bundle

    with open_bundle(path, signer=signer) as signed:
        return signed.header.bundle_id, signed.header.release


def _refuse_unread(enclave: str, given: dict[str, object], kinds: tuple[str, ...]) -> None:
    named = [option for option, value in given.items() if value]
    if named and enclave not in kinds:
        raise SettingError(f"{named[0]} is not read by this kind", expected=" or ".join(kinds), got=enclave)
