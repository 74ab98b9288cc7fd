"""Where this worker runs, as far as it can tell itself, and who vouches for it there. **Unverified** outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from motte.errors import ResourceError

if TYPE_CHECKING:
    from motte.attest.evidence import Evidence
    from motte.trusted.host_channel import HostChannel

Told = Literal["process", "gramine", "vm"]
TOLD: Final[tuple[Told, ...]] = ("process", "gramine", "vm")
"""What a worker is told at its start. In an image that is part of what is measured."""
KINDS: Final = ("process", "gramine-direct", "gramine-sgx", "vm")
"""What it then says: one image serves Gramine with SGX and without."""

_GRAMINE: Final = Path("/dev/attestation/attestation_type")
_TSM: Final = Path("/sys/kernel/config/tsm/report")


def examine(told: str, *, gramine: Path = _GRAMINE, tsm: Path = _TSM) -> tuple[str, bool]:
    """(enclave kind, whether it is SIMULATED: without hardware protection)."""
    if told == "gramine":
        try:
            real = gramine.read_text(encoding="ascii").strip("\0\n ") == "dcap"
        except (OSError, ValueError):
            real = False
        return ("gramine-sgx", False) if real else ("gramine-direct", True)
    if told == "vm":
        return "vm", not tsm.is_dir()
    return "process", True


def issuer(kind: str, host: HostChannel | None) -> Callable[[bytes], Evidence]:
    """What makes evidence over 64 bytes of report data in ``kind``: for a process that is the host, as the holder of
    the machine's TPM.

    Raises:
        ResourceError: nobody can; also when it is called, where the platform gives none.
    """
    if kind == "gramine-sgx":
        from motte.attest.platforms import sgx

        return sgx.issue
    if kind == "vm":
        from motte.trusted import guest_reports

        return guest_reports.issue
    if host is None:
        raise ResourceError(
            "a worker of this kind has no evidence", got=kind, hint="use gramine-sgx, vm, or a process with --evidence"
        )
    return host.issue


def load_for_image(told: str) -> None:
    """Import what a worker loads late, so that it is part of an image that is made by watching a worker start.

    Neither a broker nor TLS nor evidence is tried while that is done.
    """
    names = ["motte.trusted.broker_keys", "motte.link.attested", "motte.attest.platforms.sgx"]
    of_guests = ["motte.attest.platforms.snp", "motte.attest.platforms.tdx", "motte.trusted.guest_reports"]
    names += of_guests if told == "vm" else []
    for name in names:
        import_module(name)
    with suppress(ImportError):
        # A slim image leaves Python's OpenSSL out.
        import_module("motte.link.tls_stream")
        import_module("motte.seal.tls")
