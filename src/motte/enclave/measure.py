"""What an enclave's evidence must say: Gramine signs the manifest, and the signature structure holds the measurement.

The numbers are read from SIGSTRUCT itself (Intel SDM volume 3D, "Enclave Signature Structure": 1808 bytes), which the
processor reads too, and not from what a program prints. What ``gramine-sgx-sign`` prints is compared with it.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from motte.attest.policy import AllOf, Fresh, Measurement, MinSvn, NotDebug, Platform, Policy, Signer, TcbStatus
from motte.attest.policy_text import dumps
from motte.enclave.gramine import program
from motte.enclave.image import write_bytes
from motte.enclave.manifest import NAME, loads
from motte.enclave.manifest_rules import check
from motte.errors import FormatError, InputError, MismatchError, ResourceError, TrustError
from motte.measure.clock import Clock

SIGN: Final = "gramine-sgx-sign"
POLICY: Final = "policy.json"
MEASUREMENT: Final = "measurement.json"
SIGSTRUCT_BYTES: Final = 1808
_HEADER: Final = bytes.fromhex("06000000e10000000000010000000000")
_HEADER2: Final = bytes.fromhex("01010000600000006000000001000000")
_DEBUG: Final = 2
_TIMEOUT_S: Final = 600
_MAX_AGE_S: Final = 60.0
_PRINTED: Final = re.compile(r"^Measurement:\s*\n?\s*([0-9a-f]{64})\s*$", re.MULTILINE)
_KEY_HINT: Final = "make one, and keep it off this machine: gramine-sgx-gen-private-key KEY"


@dataclass(frozen=True, slots=True)
class SgxIdentity:
    """What evidence of an enclave says of its code: lower-case hexadecimal digests, and the numbers of its signer."""

    mrenclave: str
    mrsigner: str
    product: int
    svn: int
    debug: bool

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def policy(self) -> Policy:
        """The policy for a broker: this enclave, this signer, no debugging, and evidence that was just made.

        Raises:
            TrustError: a debug enclave, for which there is none.
        """
        if self.debug:
            raise TrustError("a debug enclave gets no policy", got=self.mrenclave, hint="set sgx.debug = false")
        return AllOf(
            Platform(frozenset({"sgx"})),
            Measurement(frozenset({self.mrenclave})),
            Signer(frozenset({self.mrsigner}), self.product),
            MinSvn(self.svn),
            NotDebug(),
            TcbStatus(frozenset({"UpToDate"})),
            Fresh(_MAX_AGE_S),
        )


def read_sigstruct(data: bytes, *, where: str = "signature") -> SgxIdentity:
    """Read an **unverified** SIGSTRUCT; the processor checks its signature when the enclave starts.

    Raises:
        FormatError: another length, or other constants than every SIGSTRUCT has.
    """
    if len(data) != SIGSTRUCT_BYTES:
        raise FormatError("not a SIGSTRUCT", where=where, expected=f"{SIGSTRUCT_BYTES} bytes", got=str(len(data)))
    if data[:16] != _HEADER or data[24:40] != _HEADER2:
        raise FormatError("not a SIGSTRUCT: its constants differ", where=where)
    (exponent,) = struct.unpack_from("<I", data, 512)
    if exponent != 3:
        raise FormatError("not a key that SGX takes", where=where, expected="exponent 3", got=str(exponent))
    (flags,) = struct.unpack_from("<Q", data, 928)
    product, svn = struct.unpack_from("<HH", data, 1024)
    return SgxIdentity(
        mrenclave=data[960:992].hex(),
        mrsigner=hashlib.sha256(data[128:512]).hexdigest(),
        product=product,
        svn=svn,
        debug=bool(flags & _DEBUG),
    )


def measure(folder: Path, key: Path, *, clock: Clock | None = None) -> SgxIdentity:
    """Sign the image in ``folder`` with ``key`` (RSA 3072, exponent 3) and write its measurement and policy beside it.

    Writes ``worker.manifest.sgx``, ``measurement.json``, ``policy.json`` and, last, ``worker.sig``.

    Raises:
        UnsupportedError: Gramine is not installed. InputError: no image, no key, or it was measured already.
        TrustError: the manifest is unsafe. ResourceError: signing failed; its last words.
        MismatchError: what was signed is another measurement than was printed, or states other numbers.
    """
    sign = program(SIGN)
    manifest = folder / f"{NAME}.manifest"
    if not manifest.is_file():
        raise InputError("no image there", where=str(folder), hint="make one: motte enclave build -o DIR")
    if not key.is_file():
        raise InputError("no signing key there", where=str(key), hint=_KEY_HINT)
    values = loads(manifest.read_bytes(), where=str(manifest))
    unsafe = [problem for problem in check(values) if problem.grade == "unsafe"]
    if unsafe:
        got = "; ".join(f"{problem.key} = {problem.got}" for problem in unsafe)[:300]
        raise TrustError("an unsafe manifest is not signed", where=str(manifest), got=got, hint="motte enclave check")
    _refuse_measured(folder)
    clock = clock or Clock()
    with clock.segment("sign image", since="gramine-sgx-sign spawned", until="measurement compared"):
        signed, signature, printed = _sign(sign, folder, key)
        found = read_sigstruct(signature, where=f"{NAME}.sig")
        _compare(found, printed, values.get("sgx", {}))
    text = dumps(found.policy())
    facts = json.dumps(found.to_json(), indent=1, sort_keys=True) + "\n"
    # The signature last: without it nothing starts.
    for name, data in (
        (f"{NAME}.manifest.sgx", signed),
        (MEASUREMENT, facts.encode()),
        (POLICY, text.encode()),
        (f"{NAME}.sig", signature),
    ):
        write_bytes(folder / name, data)
    return found


def _sign(sign: Path, folder: Path, key: Path) -> tuple[bytes, bytes, str]:
    """The expanded manifest, SIGSTRUCT and what was printed."""
    with tempfile.TemporaryDirectory(prefix="motte-sign-") as passing:
        manifest, signature = Path(passing) / f"{NAME}.manifest.sgx", Path(passing) / f"{NAME}.sig"
        words = [str(sign), "--manifest", f"{NAME}.manifest", "--output", str(manifest), "--sigfile", str(signature)]
        try:
            done = subprocess.run(
                [*words, "--key", str(key.resolve())],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as problem:
            raise ResourceError(
                "signing took too long", where=str(sign), expected=f"within {_TIMEOUT_S} s"
            ) from problem
        if done.returncode != 0 or not manifest.is_file() or not signature.is_file():
            last = done.stderr.decode("utf-8", "replace").strip()[-500:]
            raise ResourceError(
                "the image could not be signed", where=str(sign), got=last or f"status {done.returncode}"
            )
        return manifest.read_bytes(), signature.read_bytes(), done.stdout.decode("utf-8", "replace")


def _compare(found: SgxIdentity, printed: str, sgx: dict[str, Any]) -> None:
    match = _PRINTED.search(printed)
    if match is not None and match[1] != found.mrenclave:
        raise MismatchError("what was signed is not what was printed", expected=match[1], got=found.mrenclave)
    stated = (sgx.get("isvprodid", 0), sgx.get("isvsvn", 0), sgx.get("debug", False))
    if stated != (found.product, found.svn, found.debug):
        raise MismatchError(
            "the signature states other numbers than the manifest",
            expected=f"product {stated[0]}, version {stated[1]}, debug {stated[2]}",
            got=f"product {found.product}, version {found.svn}, debug {found.debug}",
        )


def _refuse_measured(folder: Path) -> None:
    names = (f"{NAME}.manifest.sgx", f"{NAME}.sig", POLICY, MEASUREMENT)
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise InputError("measured already", where=str(folder), got=", ".join(there), hint="remove these files first")
