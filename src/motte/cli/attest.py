"""``motte attest ...``: evidence of this machine, and the decision of a policy on evidence of another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motte.cli import attest_tpm
from motte.cli.anchoring import AnchorOptions, hexadecimal, moment, read_small
from motte.cli.attest_tpm import TpmOptions
from motte.cli.output import Line, Output, printable
from motte.cli.verb import verb
from motte.errors import InputError, SettingError
from motte.limits import MAX_COLLATERAL_BYTES, MAX_EVIDENCE_BYTES, MAX_POLICY_TEXT_BYTES

if TYPE_CHECKING:
    from motte.attest.evidence import Evidence
    from motte.attest.report_data import Binding
    from motte.attest.verify import Verdict

app = typer.Typer(help="Make evidence of this machine; verify evidence of another one.")
simulated_app = typer.Typer(help="Evidence without hardware, for development.")
app.add_typer(attest_tpm.app, name="tpm")
app.add_typer(simulated_app, name="simulated")

PlatformName = Literal["sgx", "tdx", "snp", "tpm", "nvidia", "simulated"]
_BOUND = "What it speaks for (default: no key, no TLS, no run)"
_OF = "Of one platform"
_NO_KEY = bytes(32)
"""Whoever only wants to see the evidence of a machine binds it to zeros: such evidence gets nobody a key."""


@dataclass(frozen=True, slots=True)
class BoundOptions:
    """What report data binds besides the nonce."""

    public_key: Annotated[
        str | None,
        typer.Option("--public-key", metavar="HEX", help="X25519 key for released keys.", rich_help_panel=_BOUND),
    ] = None
    tls_spki: Annotated[
        str | None,
        typer.Option("--tls-spki", metavar="HEX", help="SHA-256 of the TLS key's SPKI.", rich_help_panel=_BOUND),
    ] = None
    configuration: Annotated[
        str | None,
        typer.Option("--configuration", metavar="HEX", help="Digest of the run.", rich_help_panel=_BOUND),
    ] = None

    def binding(self, nonce: str) -> Binding:
        """With ``nonce``.

        Raises:
            InputError: not hexadecimal, or of another length.
        """
        from motte.attest.report_data import Binding

        given = {"--public-key": self.public_key, "--tls-spki": self.tls_spki, "--configuration": self.configuration}
        key, tls, configuration = (
            None if text is None else hexadecimal(text, option, length_bytes=32) for option, text in given.items()
        )
        return Binding(
            nonce=hexadecimal(nonce, "--nonce", length_bytes=32),
            public_key=key or _NO_KEY,
            tls_spki_digest=tls or b"",
            configuration_digest=configuration or _NO_KEY,
        )


@dataclass(frozen=True, slots=True)
class IssueOptions:
    """What single platforms want to know."""

    simulated_key: Annotated[
        Path | None,
        typer.Option("--simulated-key", metavar="FILE", help="simulated: who signs.", rich_help_panel=_OF),
    ] = None
    measurement: Annotated[
        str | None,
        typer.Option("--measurement", metavar="HEX", help="simulated: what it is to say.", rich_help_panel=_OF),
    ] = None
    pcrs: Annotated[
        str | None,
        typer.Option("--pcrs", metavar="0,4,7", help="tpm: registers. (default: the boot's code)", rich_help_panel=_OF),
    ] = None
    bank: Annotated[
        Literal["sha256", "sha384"] | None,
        typer.Option("--bank", help="tpm: bank of registers; sha256 if not given.", rich_help_panel=_OF),
    ] = None
    bring_collateral: Annotated[
        Path | None,
        typer.Option("--bring-collateral", metavar="FILE", help="sgx, tdx: goes along.", rich_help_panel=_OF),
    ] = None
    certificates: Annotated[
        Path | None,
        typer.Option(
            "--certificates", metavar="DIR", help="snp: vcek, ask and ark, if the host has none.", rich_help_panel=_OF
        ),
    ] = None
    cpu: Annotated[
        Literal["snp", "tdx"] | None,
        typer.Option("--cpu", help="nvidia: the guest's own platform; snp if not given.", rich_help_panel=_OF),
    ] = None


_READ_BY = {
    "simulated_key": ("simulated",),
    "measurement": ("simulated",),
    "pcrs": ("tpm",),
    "bank": ("tpm",),
    "tcti": ("tpm",),
    "handle": ("tpm",),
    "bring_collateral": ("sgx", "tdx"),
    "certificates": ("snp",),
    "cpu": ("nvidia",),
}


@app.command()
@verb
def evidence(
    out: Output,
    platform: Annotated[PlatformName, typer.Option("--platform", help="What of this machine signs.")],
    nonce: Annotated[str, typer.Option("--nonce", metavar="HEX", help="32 bytes of whoever will verify; used once.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The evidence; never overwritten.")],
    bound: BoundOptions,
    issue: IssueOptions,
    tpm: TpmOptions,
) -> None:
    """Make evidence on this machine, for one nonce. What it proves is decided by who verifies it."""
    _refuse_unread(platform, issue, tpm)
    report_data = bound.binding(nonce).report_data()
    made = _issue(platform, report_data, issue, tpm)
    from motte.seal.atomic import atomic_file

    encoded = made.encode()
    with atomic_file(output, overwrite=False) as fd:
        view = memoryview(encoded)
        while view:
            view = view[os.write(fd, view) :]
    document = {"file": str(output), "platform": platform, "bytes": len(encoded), "report_data": report_data.hex()}
    out.result(document, Line(f"{output}: evidence of platform {platform}, {len(encoded)} bytes"))
    if platform == "simulated":
        out.warn("SIMULATED evidence: no hardware stands behind it")


@app.command()
@verb
def verify(
    out: Output,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Evidence.")],
    policy: Annotated[Path, typer.Option("--policy", metavar="FILE", help="The policy: strict JSON.")],
    bound: BoundOptions,
    given: AnchorOptions,
    nonce: Annotated[
        str | None, typer.Option("--nonce", metavar="HEX", help="The nonce that you issued. Without it fresh refuses.")
    ] = None,
    issued: Annotated[
        str | None, typer.Option("--issued", metavar="TIME", help="When you issued it; demanded where fresh is asked.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="As of when; for archives and tests. (default: now)")
    ] = None,
) -> None:
    """Decide on evidence: prints the verified claims that the policy accepted, or the numbered check that failed."""
    from motte.attest.evidence import Evidence
    from motte.attest.policy import demands_freshness, with_nonce
    from motte.attest.policy_text import loads
    from motte.attest.verify import verify as decide

    if nonce is None and (issued is not None or bound != BoundOptions()):
        raise SettingError("evidence is bound to a nonce first", expected="--nonce", got="what else it is bound to")
    now = moment(at, "--at")
    asked = loads(read_small(policy, MAX_POLICY_TEXT_BYTES))
    if not demands_freshness(asked):
        out.warn("this policy does not demand fresh evidence: what was recorded once would pass again")
    binding = None if nonce is None else bound.binding(nonce)
    if binding is not None and issued is not None:
        asked = with_nonce(asked, binding.nonce, moment(issued, "--issued"))
    found = Evidence.decode(read_small(file, MAX_EVIDENCE_BYTES))
    verdict = decide(found, asked, now, anchors=given.anchors(), binding=binding)
    out.result(_verdict_json(verdict), *_verdict_lines(verdict))
    if verdict.claims.simulated:
        out.warn("SIMULATED: no hardware stands behind this evidence; the policy permits that by name")
    if binding is None:
        out.warn("compared with no nonce: nothing says for whom, or when, this evidence was made")


@simulated_app.command("new-key")
@verb
def new_key(
    out: Output, file: Annotated[Path, typer.Argument(metavar="FILE", help="The new key; never overwritten.")]
) -> None:
    """Make a development key. Its evidence is SIMULATED, and counts only where a verifier names the key."""
    from motte.attest.platforms.simulated_key import SimulatedKey, write_key

    key = SimulatedKey.new()
    write_key(file, key)
    out.result(
        {"file": str(file), "public": key.public.hex()},
        Line(f"{file}: a development key; whoever has it makes SIMULATED evidence"),
        Line(key.public.hex()),
    )


@simulated_app.command("measure")
@verb
def measure(out: Output) -> None:
    """Print what SIMULATED evidence of a worker in a process says of its code: for the policy that allows it.

    The same code and versions give the same digest on any machine. Nothing keeps a host from saying it of other code.
    """
    from motte.enclave.process_measurement import measure_process, package_versions

    found = measure_process().hex()
    out.result({"measurement": found, "packages": package_versions()}, Line(found))


def _refuse_unread(platform: str, issue: IssueOptions, tpm: TpmOptions) -> None:
    values: dict[str, Any] = {name: getattr(issue, name, None) or getattr(tpm, name, None) for name in _READ_BY}
    unread = [name for name, value in values.items() if value is not None and platform not in _READ_BY[name]]
    if unread:
        option = "--" + unread[0].replace("_", "-")
        raise SettingError(f"{option} is not read by this platform", expected=" or ".join(_READ_BY[unread[0]]),
                           got=platform)  # fmt: skip


def _issue(platform: str, report_data: bytes, given: IssueOptions, tpm: TpmOptions) -> Evidence:
    # Each issuer is imported when asked for: one platform needs nothing of the others.
    if platform == "simulated":
        return _simulated(report_data, given)
    if platform == "tpm":
        from motte.attest.platforms import tpm as tpm_platform

        pcrs = tpm_platform.DEFAULT_PCRS if given.pcrs is None else _registers(given.pcrs)
        bank = given.bank or "sha256"
        return tpm_platform.issue(report_data, tpm=tpm.open(), handle=tpm.at(), pcrs=pcrs, bank=bank)
    if platform == "snp":
        from motte.attest.platforms import snp

        return snp.issue(report_data, certificates=given.certificates)
    if platform == "nvidia":
        from motte.attest.platforms import nvidia

        return nvidia.issue(report_data, cpu=given.cpu or "snp")
    from motte.attest.platforms import sgx, tdx

    brought = None if given.bring_collateral is None else read_small(given.bring_collateral, MAX_COLLATERAL_BYTES)
    if platform == "sgx":
        return sgx.issue(report_data, collateral=brought)
    return tdx.issue(report_data, collateral=brought)


def _simulated(report_data: bytes, given: IssueOptions) -> Evidence:
    from motte.attest.platforms import simulated
    from motte.attest.platforms.simulated_key import read_key

    if given.simulated_key is None:
        raise SettingError(
            "simulated evidence is signed by a development key",
            expected="--simulated-key FILE",
            hint="make one: motte attest simulated new-key FILE",
        )
    text = given.measurement
    measurement = bytes(32) if text is None else hexadecimal(text, "--measurement", length_bytes=32)
    return simulated.issue(report_data, private=read_key(given.simulated_key).secret, measurement=measurement)


def _registers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError as problem:
        raise InputError("not registers", where="--pcrs", expected="0,4,7", got=repr(text)[:80]) from problem


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    claims = verdict.claims
    until = claims.collateral_until
    return {
        "accepted": True,
        "at": verdict.at.isoformat(),
        "platform": claims.platform,
        "simulated": claims.simulated,
        "debug": claims.debug,
        "tcb_status": claims.tcb_status,
        "advisories": list(claims.advisories),
        "signer": claims.signer,
        "svn": claims.svn,
        "instance": claims.instance,
        "report_data": claims.report_data.hex(),
        "bound": claims.binding is not None,
        "collateral_until": None if until is None else until.isoformat(),
        "measurements": dict(claims.measurements),
        "details": dict(claims.details),
        "policy": verdict.policy_text,
    }


def _verdict_lines(verdict: Verdict) -> list[Line]:
    claims = verdict.claims
    facts = {
        "signer": claims.signer,
        "svn": claims.svn,
        "debug": "yes" if claims.debug else "no",
        "tcb status": claims.tcb_status,
        "advisories": ", ".join(claims.advisories) or None,
        "instance": claims.instance,
        "collateral until": claims.collateral_until,
        **{f"measurement {name}": value for name, value in claims.measurements.items()},
        **claims.details,
    }
    marked = "SIMULATED " if claims.simulated else ""
    head = Line(f"accepted: {marked}evidence of platform {claims.platform}, as of {verdict.at:%Y-%m-%d %H:%M:%S} UTC")
    return [head, *(Line(f"  {name}: {printable(str(value))}") for name, value in facts.items() if value is not None)]
