"""Evidence of a confidential VM, made by a second process, so that the worker itself can give up every file.

A report of configfs wants a folder made, a file written and the folder removed (:mod:`motte.attest.platforms.tsm`). No
descriptor that was opened beforehand serves for that: what is written to such a file counts when it is closed, and each
report has a folder of its own. So before the worker confines itself it forks once. The helper keeps the right to write
below configfs' folder of reports and nothing else: it has no link, no network, no key and none of the bundle, and knows
two messages. From the worker: 64 bytes of report data. From the helper: the length of the evidence (four bytes,
big-endian) and the evidence; or length 0, a length of at most 1 KiB, and why there is none.

Both are trusted alike and on the same kernel: what that lacks (Landlock, filters) the worker says of itself.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, NoReturn

from motte.attest.platforms.tsm import TSM_ROOT
from motte.errors import MotteError, ResourceError, UnsupportedError
from motte.limits import MAX_EVIDENCE_BYTES

if TYPE_CHECKING:
    from motte.attest.evidence import Evidence

Make = Callable[[bytes, Path], "Evidence"]
"""Makes evidence over 64 bytes of report data, with configfs' folder of reports."""
REPORT_TIMEOUT_S: Final = 120.0
_REPORT_DATA_BYTES: Final = 64
_LENGTH_BYTES: Final = 4
_MOST_WORDS: Final = 1024
_HINT: Final = "it needs a confidential VM, Linux 6.7 or newer, configfs mounted, and the right to write there"
_HELPER: list[socket.socket] = []
_ONE_AT_A_TIME: Final = Lock()


def of_guest(report_data: bytes, root: Path) -> Evidence:
    """Evidence of this guest, whichever kind it is.

    Raises:
        ResourceError: this machine has no such device.
    """
    from motte.attest.platforms import snp, tdx

    try:
        return tdx.issue(report_data, root=root)
    except (ResourceError, UnsupportedError):
        return snp.issue(report_data, root=root)


def start(*, root: Path = TSM_ROOT, make: Make = of_guest) -> None:
    """Fork the helper of this process, once, while it has one thread; without ``root`` there is nothing to start.

    Raises:
        ResourceError: the kernel gives no process.
    """
    if _HELPER or not root.is_dir():
        return
    ours, theirs = socket.socketpair()
    try:
        child = os.fork()
    except OSError as problem:
        ours.close()
        theirs.close()
        raise ResourceError("no process to make evidence in", got=str(problem)) from problem
    if child == 0:
        _become_helper(theirs, root, make)
    theirs.close()
    ours.settimeout(REPORT_TIMEOUT_S)
    _HELPER.append(ours)


def issue(report_data: bytes) -> Evidence:
    """Evidence over 64 bytes of report data; **unverified**, as all evidence is.

    Raises:
        ResourceError: there is no device, or it gave none; the helper's words. EvidenceError: what it gave is none.
    """
    from motte.attest.evidence import Evidence

    if not _HELPER:
        raise ResourceError("no report device", where=str(TSM_ROOT), hint=_HINT)
    sock = _HELPER[0]
    with _ONE_AT_A_TIME:
        try:
            sock.sendall(report_data)
            size = int.from_bytes(_exactly(sock, _LENGTH_BYTES), "big")
            encoded = _exactly(sock, min(size, MAX_EVIDENCE_BYTES))
            words = "" if size else _exactly(sock, _size_of(sock)).decode("utf-8", "replace")
        except OSError as problem:
            got = str(problem) or f"nothing in {REPORT_TIMEOUT_S:g} s"
            raise ResourceError("the process that makes evidence of this guest is gone", got=got) from problem
    if not size:
        raise ResourceError("this guest makes no evidence", got=words)
    return Evidence.decode(encoded)


def _size_of(sock: socket.socket) -> int:
    return min(int.from_bytes(_exactly(sock, _LENGTH_BYTES), "big"), _MOST_WORDS)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("it closed its end")
        data += piece
    return bytes(data)


# --- in the helper ------------------------------------------------------------------------------------------------


def _become_helper(sock: socket.socket, root: Path, make: Make) -> NoReturn:
    """The process ends when the worker's end is closed, whatever happens."""
    status = 1
    try:
        sock = _alone_with(sock)
        _confine(root)
        _serve(sock, root, make)
        status = 0
    finally:
        os._exit(status)


def _alone_with(sock: socket.socket) -> socket.socket:
    """Nothing else stays open: the worker's link must end when the worker does."""
    fd = sock.detach()
    while fd < 3:
        fd = os.dup(fd)
    os.closerange(3, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    return socket.socket(fileno=fd)


def _confine(root: Path) -> None:
    from motte.trusted import harden, landlock, seccomp

    harden.harden()
    with suppress(OSError):
        landlock.restrict(landlock.interpreter_paths(), writable=(root,))
    if seccomp.unsupported() is None:
        with suppress(OSError):
            seccomp.load(folders=True)


def _serve(sock: socket.socket, root: Path, make: Make) -> None:
    while report_data := sock.recv(_REPORT_DATA_BYTES, socket.MSG_WAITALL):
        try:
            encoded, words = make(report_data, root).encode(), b""
        except (MotteError, OSError) as problem:
            hint = getattr(problem, "hint", None)
            encoded, words = b"", (f"{problem}; {hint}" if hint else str(problem)).encode()[:_MOST_WORDS]
        answer = len(encoded).to_bytes(_LENGTH_BYTES, "big") + encoded
        if not encoded:
            answer += len(words).to_bytes(_LENGTH_BYTES, "big") + words
        sock.sendall(answer)
