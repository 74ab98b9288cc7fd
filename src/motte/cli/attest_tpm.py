"""``motte attest tpm ...``: how an owner learns that an attestation key lives in one TPM, and writes it down."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motte.cli.anchoring import certificate, hexadecimal, read_small
from motte.cli.output import Line, Output
from motte.cli.verb import verb
from motte.errors import InputError, ResourceError
from motte.limits import MAX_TPM_ENROLMENT_BYTES, MAX_TPM_STRUCTURE_BYTES

if TYPE_CHECKING:
    from motte.attest.platforms.tpm_tools import Tpm

app = typer.Typer(help="Enroll a TPM's attestation key by credential activation.")
_TPM = "The TPM (default: /dev/tpmrm0, the key at handle 0x81010100)"
_POLL_S = 0.1
Endorsement = Annotated[
    Literal["rsa", "ecc"], typer.Option("--ek", help="Which endorsement key; its maker certified one or both.")
]


@dataclass(frozen=True, slots=True)
class TpmOptions:
    """Which TPM, and where its attestation key is."""

    tcti: Annotated[
        str | None,
        typer.Option("--tcti", metavar="TCTI", help="How to reach it, in the TSS's words.", rich_help_panel=_TPM),
    ] = None
    handle: Annotated[
        str | None,
        typer.Option("--handle", metavar="HEX", help="Persistent handle of its key.", rich_help_panel=_TPM),
    ] = None

    def open(self) -> Tpm:
        """The TPM; nothing is asked of it yet.

        Raises:
            InputError: not a way to reach one.
        """
        from motte.attest.platforms.tpm_tools import DEFAULT_TCTI, Tpm

        return Tpm(DEFAULT_TCTI if self.tcti is None else self.tcti)

    def at(self) -> int:
        """The handle.

        Raises:
            InputError: not hexadecimal.
        """
        from motte.attest.platforms.tpm_tools import DEFAULT_HANDLE

        if self.handle is None:
            return DEFAULT_HANDLE
        return int.from_bytes(hexadecimal(self.handle.removeprefix("0x"), "--handle", length_bytes=4), "big")


@app.command()
@verb
def request(
    out: Output,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="For the owner; never overwritten.")],
    tpm: TpmOptions,
    ek: Endorsement = "rsa",
    algorithm: Annotated[
        Literal["ecdsa", "rsassa", "rsapss"], typer.Option("--algorithm", help="Of the new attestation key.")
    ] = "ecdsa",
    existing: Annotated[bool, typer.Option("--existing", help="Take the key that is at the handle already.")] = False,
    ek_certificate: Annotated[
        list[Path] | None,
        typer.Option("--ek-certificate", metavar="FILE", help="Of the endorsement key, then up to its maker's root."),
    ] = None,
) -> None:
    """On the host, first: make an attestation key and write down what the TPM says of itself."""
    from motte.attest.platforms.tpm_enrol import collect

    if os.path.lexists(output):
        raise InputError("the file exists already", where=str(output), hint="choose another name")
    chain = [certificate(each) for each in ek_certificate or ()]
    found = collect(tpm.open(), handle=tpm.at(), ek=ek, create=None if existing else algorithm, certificates=chain)
    _write(output, found.encode())
    document = {
        "file": str(output),
        "manufacturer": found.manufacturer,
        "vendor": found.vendor,
        "certificates": len(found.certificates),
        "key_name": found.ak.name.hex(),
    }
    maker = f"a TPM that says it is by {found.manufacturer or 'nobody'}, {len(found.certificates)} certificates"
    out.result(document, Line(f"{output}: {maker}; next, at the owner's: motte attest tpm enroll {output}"))


@app.command()
@verb
def enroll(
    out: Output,
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST", help="What the host wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The record; never overwritten.")],
    challenge: Annotated[Path, typer.Option("--challenge", metavar="FILE", help="Written here; carry it to the host.")],
    answer: Annotated[
        Path | None,
        typer.Option("--answer", metavar="FILE", help="Wait for this file. (default: a line of stdin, hexadecimal)"),
    ] = None,
    wait: Annotated[int, typer.Option("--wait", metavar="S", min=1, max=600, help="Seconds to wait for it.")] = 600,
    tpm_root: Annotated[
        list[Path] | None,
        typer.Option("--tpm-root", metavar="FILE", help="A maker's root that you compared and pin; repeatable."),
    ] = None,
    intermediate: Annotated[
        list[Path] | None,
        typer.Option("--intermediate", metavar="FILE", help="Certificate that the host has not; repeatable."),
    ] = None,
    insecure_allow_simulated: Annotated[
        bool,
        typer.Option(
            "--insecure-allow-simulated", help="Also software TPMs; SIMULATED.", rich_help_panel="For development"
        ),
    ] = False,
) -> None:
    """At the owner's: challenge the host, and write a record if its TPM holds both keys.

    The challenge is a secret that only the TPM of this endorsement key opens, and only beside this attestation key. It
    never leaves this process but sealed, so whoever interrupts it begins anew.
    """
    from motte.attest.platforms.tpm_enrol import Challenge, Request

    if os.path.lexists(output):
        raise InputError("the file exists already", where=str(output), hint="choose another name")
    found = Request.decode(read_small(request_file, MAX_TPM_ENROLMENT_BYTES))
    made = Challenge.for_request(
        found,
        roots=[certificate(each) for each in tpm_root or ()],
        intermediates=[certificate(each) for each in intermediate or ()],
        now=datetime.now(UTC),
        insecure_allow_simulated=insecure_allow_simulated,
    )
    _write(challenge, made.blob)
    try:
        out.note(f"on the host: motte attest tpm activate {challenge}")
        record = made.finish(_await(answer, wait), datetime.now(UTC))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(challenge)
    _write(output, record.encode())
    document = {
        "file": str(output),
        "simulated": record.simulated,
        "instance": record.instance,
        "manufacturer": record.manufacturer,
        "key_name": record.ak.name.hex(),
    }
    marked = "SIMULATED (no maker of hardware vouches for it)" if record.simulated else "hardware"
    out.result(
        document,
        Line(f"{output}: one TPM holds both keys; {marked}, by {record.manufacturer or 'nobody'}"),
        Line(f"  instance {record.instance}"),
    )
    if record.simulated:
        out.warn("all evidence by this key is SIMULATED: no hardware stands behind it")


@app.command()
@verb
def activate(
    out: Output,
    challenge: Annotated[Path, typer.Argument(metavar="CHALLENGE", help="What the owner wrote.")],
    tpm: TpmOptions,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The answer. (default: printed, hexadecimal)"),
    ] = None,
    ek: Endorsement = "rsa",
) -> None:
    """On the host, second: let the TPM open the owner's challenge. Only the TPM that holds both keys can."""
    from motte.attest.platforms.tpm_enrol import activate as answer_to

    found = answer_to(tpm.open(), read_small(challenge, MAX_TPM_STRUCTURE_BYTES), handle=tpm.at(), ek=ek)
    if output is not None:
        _write(output, found)
    line = found.hex() if output is None else f"{output}: the answer, for the owner who waits for it"
    out.result({"answer": found.hex(), "file": None if output is None else str(output)}, Line(line))


def _await(path: Path | None, wait_s: int) -> bytes:
    """What the host answers, **unverified**."""
    if path is None:
        line = sys.stdin.readline(4 * MAX_TPM_STRUCTURE_BYTES)
        return hexadecimal(line.strip(), "stdin")
    ends = time.monotonic() + wait_s
    while not path.exists():
        if time.monotonic() > ends:
            raise ResourceError("no answer of the host", where=str(path), expected=f"within {wait_s} s")
        time.sleep(_POLL_S)
    return read_small(path, MAX_TPM_STRUCTURE_BYTES)


def _write(path: Path, data: bytes) -> None:
    from motte.seal.atomic import atomic_file

    with atomic_file(path, overwrite=False) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
