"""Reports of a confidential VM through Linux's configfs (``/sys/kernel/config/tsm/report``), for TDX and SEV-SNP.

Source: the kernel's Documentation/ABI/testing/configfs-tsm-report. One folder is made for each report: ``inblob``
takes the report data, ``outblob`` gives the report, ``provider`` names the platform, ``generation`` counts every write
to the folder. Whoever shares the machine may write there too, so a report counts only if the generation before and
after says that the one write was ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from motte.attest.evidence import REPORT_DATA_BYTES
from motte.errors import InputError, ResourceError
from motte.limits import MAX_EVIDENCE_BYTES

TSM_ROOT: Final = Path("/sys/kernel/config/tsm/report")
_MAX_WORD_BYTES: Final = 128
_BUSY_TRIES: Final = 5


def read_report(report_data: bytes, *, root: Path = TSM_ROOT, expected_provider: str) -> bytes:
    """One report for ``report_data`` (64 bytes) from the platform ``expected_provider`` (``tdx_guest``, ``sev_guest``).

    Raises:
        InputError: ``report_data`` is not 64 bytes.
        ResourceError: this machine has no such device, has another one, or somebody else kept writing to the folder.
    """
    return read_blobs(report_data, root=root, expected_provider=expected_provider)[0]


def read_blobs(report_data: bytes, *, root: Path = TSM_ROOT, expected_provider: str) -> tuple[bytes, bytes]:
    """As :func:`read_report`, with what the host adds beside it (``auxblob``: certificates); empty if nothing."""
    if len(report_data) != REPORT_DATA_BYTES:
        raise InputError("not report data", expected=f"{REPORT_DATA_BYTES} bytes", got=f"{len(report_data)} bytes")
    with _folder(root) as folder:
        provider = _read(folder / "provider", _MAX_WORD_BYTES).decode("ascii", "replace").strip()
        if provider != expected_provider:
            raise ResourceError("another kind of confidential VM", expected=expected_provider, got=provider[:80])
        for _ in range(_BUSY_TRIES):
            report = _attempt(folder, report_data)
            if report is not None:
                return report
    raise ResourceError("somebody else keeps writing to the report's folder", where=str(folder), hint="try again")


def _attempt(folder: Path, report_data: bytes) -> tuple[bytes, bytes] | None:
    before = _generation(folder)
    try:
        (folder / "inblob").write_bytes(report_data)
        report = _read(folder / "outblob", MAX_EVIDENCE_BYTES)
        added = _read(folder / "auxblob", MAX_EVIDENCE_BYTES) if (folder / "auxblob").exists() else b""
    except OSError as problem:
        if problem.errno in (errno.EWOULDBLOCK, errno.EBUSY):
            return None
        raise ResourceError("the platform gave no report", where=str(folder), got=problem.strerror) from problem
    if not report:
        raise ResourceError("the platform gave an empty report", where=str(folder))
    return (report, added) if _generation(folder) == before + 1 else None


def _generation(folder: Path) -> int:
    text = _read(folder / "generation", _MAX_WORD_BYTES).strip()
    if not text.isdigit() or len(text) > 20:
        raise ResourceError("not a generation number", where=str(folder / "generation"), got=repr(text[:40]))
    return int(text)


@contextlib.contextmanager
def _folder(root: Path) -> Iterator[Path]:
    folder = root / f"motte-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        folder.mkdir(mode=0o700)  # configfs answers by creating the files
    except OSError as problem:
        raise ResourceError(
            "no report device",
            where=str(root),
            got=problem.strerror,
            hint="it needs a confidential VM, Linux 6.7 or newer, configfs mounted, and the right to write there",
        ) from problem
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            pieces, total = [], 0
            while piece := file.read(65_536):
                total += len(piece)
                if total > max_bytes:
                    raise ResourceError(
                        "the device's answer is too long", where=str(path), expected=f"{max_bytes} bytes"
                    )
                pieces.append(piece)
    except FileNotFoundError as problem:
        raise ResourceError("the report's folder lacks a file", where=str(path), got=problem.strerror) from problem
    return b"".join(pieces)
