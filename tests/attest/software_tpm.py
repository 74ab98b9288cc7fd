"""TPMs for tests: ``swtpm`` on a private socket, and ``FakeTpm``, which forges whatever a test asks for.

Neither needs root. ``FakeTpm`` is also the adversary: a host that writes every structure as it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from motte.attest.evidence import Evidence
from motte.attest.platforms.tpm import extra_data
from motte.attest.platforms.tpm_enrol import Enrolment, Request
from motte.attest.platforms.tpm_structures import (
    Public,
    parse_public,
    qualified_name,
)

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
AK_ATTRIBUTES = 0x00050072
EK_ATTRIBUTES = 0x000300B2
HARDWARE_ID = "id:49465800"
HASHES = {"sha256": (0x000B, hashes.SHA256()), "sha384": (0x000C, hashes.SHA384())}
CURVES = {"p256": (0x0003, ec.SECP256R1(), 32), "p384": (0x0004, ec.SECP384R1(), 48)}
ALGORITHMS = ("ecdsa-p256-sha256", "ecdsa-p384-sha384", "rsassa-2048-sha256", "rsapss-2048-sha384")


def absent() -> str | None:
    """Why no software TPM can be started here; None: it can."""
    missing = [name for name in ("swtpm", "swtpm_setup", "tpm2_quote") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (apt install swtpm swtpm-tools tpm2-tools)" if missing else None


@contextlib.contextmanager
def swtpm(state: Path | None = None) -> Iterator[str]:
    """Start a software TPM and yield its TCTI; ``state``: a folder that :func:`manufacture` filled."""
    # Not pytest's folder: a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="swtpm-") as name:
        folder = Path(name)
        if state is None:
            state = folder / "state"
            state.mkdir()
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--seccomp", "action=none"]
        command += ["--server", f"type=unixio,path={folder}/s", "--ctrl", f"type=unixio,path={folder}/s.ctrl"]
        command += ["--flags", "not-need-init,startup-clear", "--log", f"file={folder}/log"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            _wait(process, folder)
            yield f"swtpm:path={folder}/s"
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"{folder}/s")
            return
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    raise AssertionError("swtpm does not listen")


def manufacture(folder: Path) -> tuple[Path, bytes, bytes]:
    """Make a software TPM's state with endorsement certificates, as a cloud would; the state, its root, its issuer."""
    state, authority = folder / "state", folder / "authority"
    state.mkdir()
    authority.mkdir()
    (folder / "ca.conf").write_text(
        f"statedir = {authority}\nsigningkey = {authority}/key.pem\nissuercert = {authority}/issuer.pem\n"
        f"certserial = {authority}/serial\n"
    )
    (folder / "ca.options").write_text("--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n")
    (folder / "setup.conf").write_text(
        f"create_certs_tool = {shutil.which('swtpm_localca')}\ncreate_certs_tool_config = {folder}/ca.conf\n"
        f"create_certs_tool_options = {folder}/ca.options\nactive_pcr_banks = sha256\n"
    )
    command = [
        "swtpm_setup",
        "--tpm2",
        "--tpmstate",
        str(state),
        "--create-ek-cert",
        "--config",
        f"{folder}/setup.conf",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    root, issuer = (
        x509.load_pem_x509_certificate((authority / name).read_bytes()).public_bytes(serialization.Encoding.DER)
        for name in ("swtpm-localca-rootca-cert.pem", "issuer.pem")
    )
    return state, root, issuer


# --- forged structures --------------------------------------------------------------------------------------------


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def selection(pcrs: tuple[int, ...], *, bank: str = "sha256", size: int = 3) -> bytes:
    """TPML_PCR_SELECTION of one bank; ``size``: bytes of its bit map."""
    bits = sum(1 << 8 * (index // 8) + index % 8 for index in pcrs)
    return struct.pack(">IHB", 1, HASHES[bank][0], size) + bits.to_bytes(size, "little")


def make_key(kind: str) -> Any:
    """``p256``, ``p384`` or the bits of an RSA key."""
    if kind in CURVES:
        return ec.generate_private_key(CURVES[kind][1])
    return rsa.generate_private_key(public_exponent=65537, key_size=int(kind))


def public_area(
    key: Any, attributes: int, *, scheme: bytes = b"\x00\x10", symmetric: bytes = b"\x00\x10", name: str = "sha256"
) -> bytes:
    """TPM2B_PUBLIC of a key, with whatever attributes."""
    numbers = key.public_key().public_numbers()
    if isinstance(numbers, rsa.RSAPublicNumbers):
        bits = key.key_size
        kind, rest = 0x0001, struct.pack(">HI", bits, 0) + sized(numbers.n.to_bytes(bits // 8, "big"))
    else:
        number, _, size = next(each for each in CURVES.values() if each[1].name == numbers.curve.name)
        point = sized(numbers.x.to_bytes(size, "big")) + sized(numbers.y.to_bytes(size, "big"))
        kind, rest = 0x0023, struct.pack(">HH", number, 0x0010) + point
    area = struct.pack(">HHI", kind, HASHES[name][0], attributes) + sized(b"") + symmetric + scheme + rest
    return sized(area)


@dataclass
class FakeTpm:
    """Plain keys that write quotes like a TPM's. ``algorithm``: one of :data:`ALGORITHMS`."""

    algorithm: str = ALGORITHMS[0]
    attributes: int = AK_ATTRIBUTES
    key: Any = None
    ek_key: Any = None
    registers: dict[int, bytes] = field(default_factory=lambda: {n: bytes([n]) * 32 for n in (0, 4, 7, 11)})
    firmware: int = 0x0007_0055_0000_11C8

    def __post_init__(self) -> None:
        self.scheme, kind, self.hash_name = self.algorithm.split("-")
        self.key = self.key or make_key(kind)
        self.ek_key = self.ek_key or make_key("p256")
        number = {"rsassa": 0x0014, "rsapss": 0x0016, "ecdsa": 0x0018}[self.scheme]
        self.scheme_bytes = struct.pack(">HH", number, HASHES[self.hash_name][0])

    @property
    def ak(self) -> Public:
        data = public_area(self.key, self.attributes, scheme=self.scheme_bytes)
        return parse_public(data, where="test", check="T-2")

    @property
    def ek(self) -> Public:
        data = public_area(self.ek_key, EK_ATTRIBUTES, symmetric=struct.pack(">HHH", 0x0006, 128, 0x0043))
        return parse_public(data, where="test", check="T-2")

    def attest(self, report_data: bytes, **changes: Any) -> bytes:
        """TPMS_ATTEST; ``changes`` replace its parts by name."""
        values = b"".join(value for _, value in sorted(self.registers.items()))
        parts: dict[str, bytes] = {
            "magic": struct.pack(">I", 0xFF544347),
            "kind": struct.pack(">H", 0x8018),
            "signer": sized(qualified_name(self.ak, self.ek)),
            "extra": sized(extra_data(report_data)),
            "clock": struct.pack(">QIIB", 123456, 3, 1, 1),
            "firmware": struct.pack(">Q", self.firmware),
            "selection": selection(tuple(sorted(self.registers))),
            "digest": sized(hashlib.new(self.hash_name, values).digest()),
        }
        assert not set(changes) - set(parts)
        return b"".join({**parts, **changes}.values())

    def sign(self, data: bytes) -> bytes:
        """TPMT_SIGNATURE."""
        digest = HASHES[self.hash_name][1]
        if self.scheme == "ecdsa":
            r, s = decode_dss_signature(self.key.sign(data, ec.ECDSA(digest)))
            size = (self.key.key_size + 7) // 8
            return self.scheme_bytes + sized(r.to_bytes(size, "big")) + sized(s.to_bytes(size, "big"))
        pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
        return self.scheme_bytes + sized(
            self.key.sign(data, pss if self.scheme == "rsapss" else padding.PKCS1v15(), digest)
        )

    def evidence(self, report_data: bytes, *, pcrs: bytes | None = None, **changes: Any) -> Evidence:
        """Signed evidence; ``changes`` as for :meth:`attest`."""
        attest = self.attest(report_data, **changes)
        values = b"".join(value for _, value in sorted(self.registers.items()))
        documents = {
            "ak_public": self.ak.encoded,
            "attest": attest,
            "pcrs": values if pcrs is None else pcrs,
            "report_data": report_data,
            "signature": self.sign(attest),
        }
        return Evidence("tpm", documents)

    def record(self, certificates: tuple[bytes, ...] = (), *, simulated: bool = False) -> Enrolment:
        return Enrolment(self.ek, self.ak, certificates, "IFX", "SLB9670", simulated, NOW)

    def request(self, certificates: tuple[bytes, ...] = (), manufacturer: str = "IFX") -> Request:
        return Request(self.ek, self.ak, certificates, manufacturer, "SLB9670")


class Maker:
    """A test maker of TPMs: a root that certifies endorsement keys."""

    def __init__(self, name: str = "Test TPM root") -> None:
        self._key = make_key("p384")
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.root = self._sign(self._name, self._key.public_key(), ca=True)

    def certify(
        self,
        key: Any,
        *,
        maker: str = HARDWARE_ID,
        model: str = "SLB9670",
        usage: str | None = "2.23.133.8.1",
        until: datetime = NOW + timedelta(days=365),
    ) -> bytes:
        """A certificate (DER) of an endorsement public key, as TPM makers write it: no subject, a critical SAN."""
        oids = {"2.23.133.2.1": maker, "2.23.133.2.2": model, "2.23.133.2.3": "id:00070055"}
        names = x509.Name([x509.NameAttribute(x509.ObjectIdentifier(oid), text) for oid, text in oids.items()])
        return self._sign(x509.Name([]), key, ca=False, names=names, usage=usage, until=until)

    def _sign(
        self,
        subject: x509.Name,
        key: Any,
        *,
        ca: bool,
        names: x509.Name | None = None,
        usage: str | None = None,
        until: datetime = NOW + timedelta(days=3650),
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=10))
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DirectoryName(names)]), critical=True)
        if usage is not None:
            usages = x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage)])
            builder = builder.add_extension(usages, critical=False)
        return builder.sign(self._key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)
