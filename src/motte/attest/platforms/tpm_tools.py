"""A TPM 2.0 through the programs of tpm2-tools: quotes, attestation keys and credential activation.

Why programs and not a library: they are in every distribution, need no compiler (``tpm2-pytss`` builds against the TSS
headers), and ``tpm2_makecredential`` also does the owner's half of credential activation without a TPM, so that none of
its key derivation is written here. Each call is a fixed list of arguments without a shell, with a time limit, in a
folder of its own that nobody else may read and that is removed afterwards. What the programs print is not believed
more than a file from outside: what comes back is parsed by :mod:`motte.attest.platforms.tpm_structures`.

Hierarchies with a password are not supported: the endorsement and owner passwords must be empty, as they are on a
machine on which nobody set them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from motte.attest.platforms.tpm_structures import Public, parse_public
from motte.errors import InputError, ResourceError
from motte.limits import MAX_CERTIFICATE_BYTES, MAX_TPM_STRUCTURE_BYTES

EkKind = Literal["rsa", "ecc"]
Algorithm = Literal["ecdsa", "rsassa", "rsapss"]
Bank = Literal["sha256", "sha384"]
DEFAULT_TCTI: Final = "device:/dev/tpmrm0"
DEFAULT_HANDLE: Final = 0x81010100
"""Persistent handle of the attestation key."""
_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_TCTIS: Final = ("device:", "swtpm:", "mssim:", "tabrmd:")
_EK_CERTIFICATES: Final = {"rsa": 0x01C00002, "ecc": 0x01C0000A}
"""Where a maker leaves the endorsement key's certificate (TCG EK Credential Profile, low-range templates)."""
_PROPERTY: Final = re.compile(
    r"^TPM2_PT_(MANUFACTURER|VENDOR_STRING_[1-4]):\n  raw: 0x([0-9A-Fa-f]{1,8})$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a TPM quoted, as the tools write it: TPMS_ATTEST, TPMT_SIGNATURE, and the registers' values in order."""

    attest: bytes
    signature: bytes
    pcrs: bytes


@dataclass(frozen=True, slots=True)
class Tpm:
    """One TPM that this process may open.

    Attributes:
        tcti: how to reach it, in the TSS's words: ``device:/dev/tpmrm0``, ``swtpm:path=SOCKET``, ``mssim:...``,
            ``tabrmd:...``.
        timeout_s: limit of each single call. Making an RSA key takes real TPMs up to half a minute.
    """

    tcti: str = DEFAULT_TCTI
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        # "cmd:" would start any program, and the TSS takes "none" and bare library paths as well.
        if not self.tcti.startswith(_TCTIS) or not self.tcti.isprintable():
            raise InputError(
                "not a way to reach a TPM", where="tcti", expected=" or ".join(_TCTIS), got=repr(self.tcti)[:80]
            )
        if not self.timeout_s > 0:
            raise InputError("not a time limit", where="timeout_s", expected="above 0 s", got=f"{self.timeout_s:g}")

    def public(self, handle: int) -> Public:
        """The public area of the persistent key at ``handle``."""
        with _Bench(self.tcti, self.timeout_s) as bench:
            bench.run("tpm2_readpublic", "-c", _handle(handle), "-o", "key.pub")
            return bench.public("key.pub")

    def create_attestation_key(self, handle: int, *, ek: EkKind = "rsa", algorithm: Algorithm = "ecdsa") -> Public:
        """Make a restricted signing key below the endorsement key ``ek`` and keep it at the persistent ``handle``.

        ``algorithm``: ``ecdsa`` is P-256, the others RSA-2048; all with SHA-256.

        Raises:
            ResourceError: no TPM or no tools, or something already is at ``handle``.
        """
        kind = "ecc" if algorithm == "ecdsa" else "rsa"
        with _Bench(self.tcti, self.timeout_s) as bench:
            bench.run("tpm2_createek", "-G", ek, "-c", "ek.ctx", "-u", "ek.pub")
            bench.flush()
            bench.run(
                *("tpm2_createak", "-C", "ek.ctx", "-c", "ak.ctx", "-G", kind, "-g", "sha256"),
                *("-s", algorithm, "-u", "ak.pub", "-r", "ak.priv"),
            )
            bench.flush()
            bench.run("tpm2_evictcontrol", "-C", "o", "-c", "ak.ctx", _handle(handle))
            bench.flush()
            return bench.public("ak.pub")

    def remove_key(self, handle: int) -> None:
        """Remove the persistent key at ``handle``; evidence by it can never be made again."""
        with _Bench(self.tcti, self.timeout_s) as bench:
            bench.run("tpm2_evictcontrol", "-C", "o", "-c", _handle(handle))

    def endorsement_key(self, ek: EkKind) -> Public:
        """The public area of the endorsement key, from the TCG's default template (the same each time)."""
        with _Bench(self.tcti, self.timeout_s) as bench:
            bench.run("tpm2_createek", "-G", ek, "-c", "ek.ctx", "-u", "ek.pub")
            bench.flush()
            return bench.public("ek.pub")

    def endorsement_certificate(self, ek: EkKind) -> bytes | None:
        """The maker's certificate of the endorsement key (DER, **unverified**); None: the TPM holds none."""
        index = _EK_CERTIFICATES[ek]
        with _Bench(self.tcti, self.timeout_s) as bench:
            if f"0x{index:X}".encode() not in bench.run("tpm2_getcap", "handles-nv-index").split():
                return None
            bench.run("tpm2_nvread", "-C", "o", f"{index:#x}", "-o", "ek.der")
            return _first_der(bench.read("ek.der", MAX_CERTIFICATE_BYTES))

    def maker(self) -> tuple[str, str]:
        """Manufacturer and vendor string as the TPM states them (**unverified**), such as ``IBM`` and ``SW   TPM``."""
        with _Bench(self.tcti, self.timeout_s) as bench:
            text = bench.run("tpm2_getcap", "properties-fixed").decode("ascii", "replace")
        found = {name: _four(int(value, 16)) for name, value in _PROPERTY.findall(text)}
        vendor = "".join(found.get(f"VENDOR_STRING_{index}", "") for index in range(1, 5))
        return found.get("MANUFACTURER", "").strip(), vendor.strip()

    def quote(self, handle: int, qualifying: bytes, pcrs: tuple[int, ...], bank: Bank, key: Public) -> Quoted:
        """A quote over ``pcrs`` of ``bank`` by the key at ``handle``, whose public area is ``key``."""
        if key.scheme is None or key.scheme_hash is None:
            raise ResourceError("the key at this handle is no attestation key", where=_handle(handle), got="no scheme")
        with _Bench(self.tcti, self.timeout_s) as bench:
            bench.run(
                *("tpm2_quote", "-c", _handle(handle), "-l", f"{bank}:{','.join(map(str, pcrs))}"),
                *("-q", qualifying.hex(), "-m", "quote", "-s", "signature", "-o", "pcrs", "-F", "values"),
                *("-g", key.scheme_hash, "--scheme", key.scheme),
            )
            limit = MAX_TPM_STRUCTURE_BYTES
            return Quoted(bench.read("quote", limit), bench.read("signature", limit), bench.read("pcrs", limit))

    def activate(self, handle: int, challenge: bytes, *, ek: EkKind) -> bytes:
        """Open ``challenge`` (from :func:`make_credential`): possible only in the TPM that holds both keys.

        Raises:
            ResourceError: no TPM or no tools, or the challenge is for another TPM or another key.
        """
        with _Bench(self.tcti, self.timeout_s) as bench:
            bench.write("challenge", challenge)
            bench.run("tpm2_createek", "-G", ek, "-c", "ek.ctx", "-u", "ek.pub")
            bench.flush()
            bench.run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
            try:
                # The endorsement key's policy (TCG default template): whoever knows the endorsement password.
                bench.run("tpm2_policysecret", "-S", "session.ctx", "-c", "e")
                bench.run(
                    *("tpm2_activatecredential", "-c", _handle(handle), "-C", "ek.ctx", "-i", "challenge"),
                    *("-o", "answer", "-P", "session:session.ctx"),
                )
            finally:
                with contextlib.suppress(ResourceError):
                    bench.run("tpm2_flushcontext", "session.ctx")
                bench.flush()
            return bench.read("answer", MAX_TPM_STRUCTURE_BYTES)


def make_credential(ek: Public, name: bytes, secret: bytes, *, timeout_s: float = 60.0) -> bytes:
    """The owner's half of credential activation, without a TPM: ``secret`` sealed for a key ``name`` beside ``ek``.

    Only the TPM that holds ``ek`` opens it, and only if it holds a key of exactly this ``name`` (part 1, section 24).

    Raises:
        ResourceError: no tools, or they refuse the endorsement key.
    """
    with _Bench("none", timeout_s) as bench:
        bench.write("ek.pub", ek.encoded)
        bench.write("secret", secret)
        bench.run("tpm2_makecredential", "-u", "ek.pub", "-n", name.hex(), "-s", "secret", "-o", "challenge")
        return bench.read("challenge", MAX_TPM_STRUCTURE_BYTES)


class _Bench:
    """A folder for the files of a few calls, and the calls."""

    def __init__(self, tcti: str, timeout_s: float) -> None:
        self._tcti, self._timeout_s = tcti, timeout_s
        self._stack = contextlib.ExitStack()
        self._folder = Path()

    def __enter__(self) -> _Bench:
        # mkdtemp's folders are 0700.
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="motte-tpm-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, tool: str, *arguments: str) -> bytes:
        program = shutil.which(tool, path=_PATH)
        if program is None:
            raise ResourceError(f"{tool} is not installed", where=_PATH, hint="apt install tpm2-tools (5.4 or newer)")
        command = [program, *arguments, f"--tcti={self._tcti}"]
        environment = {"PATH": _PATH, "LC_ALL": "C", "TSS2_LOG": "all+ERROR"}
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd=self._folder,
                env=environment,
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as problem:
            raise ResourceError(
                f"{tool} did not end in time", where=self._tcti, expected=f"within {self._timeout_s:g} s"
            ) from problem
        if done.returncode != 0:
            lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.startswith("ERROR")]
            raise ResourceError(
                f"{tool} failed",
                where=self._tcti,
                got=" | ".join(lines[-3:])[:400] or f"exit status {done.returncode}",
                hint="is there a TPM, may this user open it (group tss), and is the key at its handle?",
            )
        return done.stdout

    def flush(self) -> None:
        """Unload what the last call left in the TPM; behind a resource manager nothing is left."""
        if not self._tcti.startswith(("device:/dev/tpmrm", "tabrmd:")):
            self.run("tpm2_flushcontext", "-t")

    def write(self, name: str, data: bytes) -> None:
        (self._folder / name).write_bytes(data)

    def read(self, name: str, most: int) -> bytes:
        try:
            with (self._folder / name).open("rb") as file:
                data = file.read(most + 1)
        except OSError as problem:
            raise ResourceError("a tool wrote no answer", where=name, got=problem.strerror) from problem
        if len(data) > most:
            raise ResourceError("a tool's answer is too long", where=name, expected=f"at most {most} bytes")
        return data

    def public(self, name: str) -> Public:
        return parse_public(self.read(name, MAX_TPM_STRUCTURE_BYTES), where=name, check="T-2")


def _handle(handle: int) -> str:
    if not 0x81000000 <= handle <= 0x817FFFFF:
        raise InputError(
            "not a persistent handle of the owner", expected="0x81000000 to 0x817fffff", got=f"{handle:#x}"
        )
    return f"{handle:#010x}"


def _four(value: int) -> str:
    return value.to_bytes(4, "big").rstrip(b"\x00").decode("ascii", "replace")


def _first_der(data: bytes) -> bytes:
    # Some makers fill the index up with zeros or ones behind the certificate: its own length says where it ends.
    if len(data) > 4 and data[:2] == b"\x30\x82":
        return data[: 4 + int.from_bytes(data[2:4], "big")]
    return data
