"""``motte accelerator serve|cert``: the untrusted calculator as a process of its own, and keys to reach it over TLS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motte.cli.options import parse_size
from motte.cli.output import Line, Output, bytes_text
from motte.cli.verb import verb
from motte.errors import InputError

if TYPE_CHECKING:
    from motte.seal.tls import TlsIdentity

app = typer.Typer(help="The untrusted side: computes linear operators on what it is sent.")


@app.command()
@verb
def serve(
    out: Output,
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS", help="unix:PATH, tcp:HOST:PORT, or fd:N (an open socket).")
    ],
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, or cuda:N.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=4096, help="Compute threads. (default: every core)", show_default=False),
    ] = None,
    shared_memory: Annotated[
        str, typer.Option("--shared-memory", metavar="SIZE", help="For each local client; none: no shared memory.")
    ] = "1GiB",
    shared_memory_file: Annotated[
        Path | None,
        typer.Option(
            "--shared-memory-file", metavar="PATH", help="Share this file instead (/dev/shm/NAME, made before)."
        ),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="TLS with a new key; its pin is printed.")] = False,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="TLS with this certificate (PEM).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key (PEM).")] = None,
    client_cert: Annotated[
        list[Path] | None,
        typer.Option("--client-cert", metavar="FILE", help="Let in only holders of this certificate; repeatable."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Let in only who knows the token in this file."),
    ] = None,
) -> None:
    """Serve linear operators until Ctrl-C. Each client has a state of its own.

    Nothing here is protected: whoever owns this machine sees what clients send.
    """
    count = threads or len(os.sched_getaffinity(0))
    # Read by OpenMP when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = str(count)
    from motte.accelerator.listen import Listener, ListenSettings, read_token
    from motte.accelerator.server import calculator_for
    from motte.link.address import Address, parse_address
    from motte.seal.tls import read_certificate

    identity = _identity(tls=tls, certificate=tls_cert, key=tls_key)
    settings = ListenSettings(
        address=parse_address(listen),
        region_bytes=0 if shared_memory == "none" else parse_size(shared_memory),
        region_path=shared_memory_file,
        identity=identity,
        clients=tuple(read_certificate(path) for path in client_cert or ()),
        token=None if token_file is None else read_token(token_file),
        threads=count,
    )
    make = calculator_for(device)
    import torch

    torch.set_num_threads(count)

    def listening(address: Address) -> None:
        lines = [Line(f"accelerator on {device}, {count} threads, listening at {address}")]
        if settings.region_path is not None:
            lines.append(Line(f"  shared memory  {settings.region_path}"))
        elif settings.region_bytes and not str(address).startswith("tcp:"):
            lines.append(Line(f"  shared memory  {bytes_text(settings.region_bytes)} for each client"))
        if identity is not None:
            lines.append(Line(f"  pin            {identity.pin}"))
        document = {
            "address": str(address),
            "device": device,
            "threads": count,
            "pin": None if identity is None else identity.pin,
        }
        out.result(document, *lines)

    Listener(settings, make).run(on_listening=listening)


@app.command()
@verb
def cert(
    out: Output,
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME.key is secret, NAME.crt is not.")],
    folder: Annotated[
        Path,
        typer.Option("--folder", metavar="DIR", help="Folder for both. (default: the current one)", show_default=False),
    ] = Path(),
) -> None:
    """Make a key and a self-signed certificate for TLS, and print its pin. Nothing is overwritten."""
    from motte.seal.tls import TlsIdentity

    if Path(name).name != name or name.startswith("."):
        raise InputError("not a name", expected="a file name without a folder", got=name)
    identity = TlsIdentity.new(name)
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    identity.save(certificate, key)
    document = {"certificate": str(certificate), "key": str(key), "pin": identity.pin}
    out.result(
        document,
        Line(f"certificate  {certificate}"),
        Line(f"secret key   {key}"),
        Line(f"pin          {identity.pin}"),
    )


def _identity(*, tls: bool, certificate: Path | None, key: Path | None) -> TlsIdentity | None:
    from motte.seal.tls import TlsIdentity

    if (certificate is None) != (key is None):
        raise InputError("a certificate and its key go together", expected="--tls-cert and --tls-key")
    if certificate is not None and key is not None:
        if tls:
            raise InputError("a new key, or one from files", expected="--tls, or --tls-cert and --tls-key")
        return TlsIdentity.load(certificate, key)
    return TlsIdentity.new("motte accelerator") if tls else None
