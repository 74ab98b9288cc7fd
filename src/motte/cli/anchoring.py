"""What a verifier on the command line starts from: pinned roots, enrolled keys, collateral; files in PEM or DER."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motte.errors import FormatError, InputError, SettingError
from motte.limits import MAX_CERTIFICATE_BYTES, MAX_COLLATERAL_BYTES, MAX_GPU_REFERENCE_BYTES, MAX_TPM_ENROLMENT_BYTES

if TYPE_CHECKING:
    from motte.attest.anchors import Anchors
    from motte.attest.platforms.snp_tcb import Tcb

_GIVEN = "Roots and reference data (default: the vendors' own)"
_TCB = re.compile(r"(\w+)=((?:\w+:\d{1,3})(?:,\w+:\d{1,3})*)")


@dataclass(frozen=True, slots=True)
class AnchorOptions:
    """What evidence is verified with. A root other than its vendor's makes the claims SIMULATED."""

    simulated_signer: Annotated[
        list[str] | None,
        typer.Option(
            "--simulated-signer", metavar="HEX", help="Development key that counts; repeatable.", rich_help_panel=_GIVEN
        ),
    ] = None
    tpm_enrolled: Annotated[
        list[Path] | None,
        typer.Option(
            "--tpm-enrolled", metavar="FILE", help="A record of `motte attest tpm enroll`.", rich_help_panel=_GIVEN
        ),
    ] = None
    tpm_root: Annotated[
        list[Path] | None,
        typer.Option("--tpm-root", metavar="FILE", help="A TPM maker's root certificate.", rich_help_panel=_GIVEN),
    ] = None
    collateral: Annotated[
        Path | None,
        typer.Option("--collateral", metavar="FILE", help="Of SGX and TDX (dcap-qvl's JSON).", rich_help_panel=_GIVEN),
    ] = None
    intel_cache: Annotated[
        Path | None,
        typer.Option("--intel-cache", metavar="DIR", help="Collateral that was fetched.", rich_help_panel=_GIVEN),
    ] = None
    intel_pccs: Annotated[
        str | None,
        typer.Option("--intel-pccs", metavar="URL", help="Fetch collateral from there.", rich_help_panel=_GIVEN),
    ] = None
    intel_root: Annotated[
        Path | None,
        typer.Option("--intel-root", metavar="FILE", help="In place of Intel's own.", rich_help_panel=_GIVEN),
    ] = None
    amd_ark: Annotated[
        list[Path] | None,
        typer.Option("--amd-ark", metavar="FILE", help="In place of AMD's own; repeatable.", rich_help_panel=_GIVEN),
    ] = None
    amd_min_tcb: Annotated[
        list[str] | None,
        typer.Option(
            "--amd-min-tcb",
            metavar="Milan=snp:22,microcode:213",
            help="Lowest firmware levels of a product.",
            rich_help_panel=_GIVEN,
        ),
    ] = None
    nvidia_root: Annotated[
        Path | None,
        typer.Option("--nvidia-root", metavar="FILE", help="In place of NVIDIA's own.", rich_help_panel=_GIVEN),
    ] = None
    nvidia_rim: Annotated[
        list[Path] | None,
        typer.Option(
            "--nvidia-rim", metavar="FILE", help="Good measurements of a GPU; repeatable.", rich_help_panel=_GIVEN
        ),
    ] = None
    revocation_list: Annotated[
        list[Path] | None,
        typer.Option(
            "--revocation-list", metavar="FILE", help="Of AMD or NVIDIA (DER); repeatable.", rich_help_panel=_GIVEN
        ),
    ] = None
    demand_revocation: Annotated[
        bool,
        typer.Option("--demand-revocation", help="Refuse what no such list covers.", rich_help_panel=_GIVEN),
    ] = False

    def anchors(self) -> Anchors:
        """All of it, read.

        Raises:
            InputError: a file that cannot be read, or no hexadecimal. FormatError: not a certificate.
        """
        from motte.attest.anchors import Anchors

        return Anchors(
            intel_root=None if self.intel_root is None else certificate(self.intel_root),
            intel_collateral=None if self.collateral is None else read_small(self.collateral, MAX_COLLATERAL_BYTES),
            intel_cache=self.intel_cache,
            intel_pccs=self.intel_pccs,
            amd_arks=None if not self.amd_ark else tuple(map(certificate, self.amd_ark)),
            amd_min_tcb=dict(map(_levels, self.amd_min_tcb or ())),
            nvidia_root=None if self.nvidia_root is None else certificate(self.nvidia_root),
            nvidia_rim=tuple(read_small(each, MAX_GPU_REFERENCE_BYTES) for each in self.nvidia_rim or ()),
            revocation_lists=tuple(read_small(each, MAX_COLLATERAL_BYTES) for each in self.revocation_list or ()),
            demand_revocation=self.demand_revocation,
            tpm_roots=tuple(map(certificate, self.tpm_root or ())),
            tpm_enrolled=tuple(read_small(each, MAX_TPM_ENROLMENT_BYTES) for each in self.tpm_enrolled or ()),
            simulated_signers=tuple(
                hexadecimal(each, "--simulated-signer", length_bytes=32) for each in self.simulated_signer or ()
            ),
        )


def read_small(path: Path, max_bytes: int) -> bytes:
    """A whole file of at most ``max_bytes``.

    Raises:
        InputError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as problem:
        raise InputError("cannot read a file", where=str(path), got=problem.strerror) from problem
    if len(data) > max_bytes:
        raise InputError("the file is too large", where=str(path), expected=f"at most {max_bytes} bytes")
    return data


def certificate(path: Path) -> bytes:
    """The DER of the one certificate in ``path``, which is PEM or DER.

    Raises:
        InputError: it cannot be read. FormatError: not one certificate.
    """
    from motte.attest.certificates import load_der, load_pem

    data = read_small(path, MAX_CERTIFICATE_BYTES)
    try:
        load = load_pem if data.lstrip().startswith(b"-----") else load_der
        return load(data, where=str(path), check="").der
    except FormatError as problem:
        raise InputError("not one certificate", where=str(path), got=problem.got) from problem


def hexadecimal(text: str, option: str, *, length_bytes: int | None = None) -> bytes:
    """The bytes that ``text`` spells.

    Raises:
        InputError: not hexadecimal, or another length.
    """
    try:
        found = bytes.fromhex(text)
    except ValueError as problem:
        raise InputError("not hexadecimal", where=option, got=repr(text)[:100]) from problem
    if length_bytes is not None and len(found) != length_bytes:
        got = f"{len(found)} bytes"
        raise InputError("another length is needed", where=option, expected=f"{length_bytes} bytes", got=got)
    return found


def moment(text: str | None, option: str) -> datetime:
    """A time with its zone, in UTC; None: now.

    Raises:
        InputError: not a time, or one without its zone.
    """
    if text is None:
        return datetime.now(UTC)
    try:
        found = datetime.fromisoformat(text)
    except ValueError as problem:
        raise InputError("not a time", where=option, expected="2026-03-04T05:06:07Z", got=repr(text)[:80]) from problem
    if found.tzinfo is None:
        raise InputError("a time without its zone", where=option, expected="2026-03-04T05:06:07Z", got=text[:80])
    return found.astimezone(UTC)


def _levels(text: str) -> tuple[str, Tcb]:
    from motte.attest.platforms.snp_tcb import Tcb

    found = _TCB.fullmatch(text)
    pairs = [] if found is None else [each.split(":") for each in found[2].split(",")]
    names = [name for name, _ in pairs]
    if found is None or len(set(names)) != len(names) or not set(names) <= set(Tcb.__dataclass_fields__):
        expected = "PRODUCT=LEVEL:N,..., of " + ", ".join(Tcb.__dataclass_fields__)
        raise SettingError("not lowest levels", where="--amd-min-tcb", expected=expected, got=repr(text)[:120])
    return found[1], Tcb(**{name: int(value) for name, value in pairs})
