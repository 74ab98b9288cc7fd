"""Enrolment of a TPM's attestation key: the owner learns that a key lives in a genuine TPM, and writes it down.

A quote proves only that **some** key signed it. Root of any machine can run a software TPM and sign whatever it likes,
so an owner believes only keys that were enrolled. The protocol (TCG part 1, section 24; the numbers are those of
docs/spec/evidence/tpm.md):

    host                                         owner
    collect() -> Request          ------------>  Challenge.for_request(): T-16, T-3, T-17, T-18
    activate(challenge.blob)      <------------  blob: a secret that only this TPM opens, and only beside this very key
    answer                        ------------>  Challenge.finish(answer): T-19, T-20 -> Enrolment

:func:`enrol` is the owner's side in one call. The host's side needs the TPM, the owner's side only tpm2-tools.
An :class:`Enrolment` is the owner's own statement: keep it as a policy is kept. It goes into
:attr:`motte.attest.anchors.Anchors.tpm_enrolled`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from motte.attest.certificates import Certificate, load_der, verify_chain
from motte.attest.platforms.tpm_structures import (
    Public,
    parse_public,
    qualified_name,
    require_attestation_key,
    require_endorsement_key,
)
from motte.attest.platforms.tpm_tools import DEFAULT_HANDLE, Algorithm, EkKind, Tpm, make_credential
from motte.errors import AttestationError, EvidenceError
from motte.limits import (
    MAX_CERTIFICATE_BYTES,
    MAX_NAME_BYTES,
    MAX_TPM_CERTIFICATES,
    MAX_TPM_ENROLMENT_BYTES,
    MAX_TPM_STRUCTURE_BYTES,
)
from motte.strict_json import Fields, canonical, parse

CHALLENGE_SECRET_BYTES: Final = 32
CHALLENGE_MAX_AGE_S: Final = 600.0
HARDWARE_MAKERS: Final = frozenset(
    "AMD ATML BRCM IFX INTC NSM NTC NTZ QCOM ROCC SMSC SMSN SNS STM TXN WEC".split()  # noqa: SIM905
)
"""TPM makers whose TPMs are chips or firmware (TCG vendor identifiers). All others are SIMULATED: IBM's and ``SW`` are
software, virtual TPMs (Google's, Microsoft's) have no hardware of their own, and the unknown is unknown."""
_REQUEST, _ENROLMENT = "motte-tpm-enrolment-request-1", "motte-tpm-enrolment-1"
_SAN, _MANUFACTURER, _MODEL = "2.5.29.17", "2.23.133.2.1", "2.23.133.2.2"
_EK_USAGE, _ANY_USAGE = "2.23.133.8.1", "2.5.29.37.0"
_IDENTIFIER: Final = re.compile(r"id:([0-9A-Fa-f]{8})")


@dataclass(frozen=True, slots=True)
class Request:
    """What a host says of its TPM, **unverified**.

    Attributes:
        ek, ak: public areas of the endorsement key and of the attestation key.
        certificates: DER; the endorsement key's first, then others up to the maker's root, which is left out.
        manufacturer, vendor: as the TPM states them.
    """

    ek: Public
    ak: Public
    certificates: tuple[bytes, ...]
    manufacturer: str
    vendor: str

    def encode(self) -> bytes:
        """Canonical JSON."""
        return canonical(
            {"format": _REQUEST, **_table(self.ek, self.ak, self.certificates, self.manufacturer, self.vendor)}
        )

    @staticmethod
    def decode(data: bytes) -> Request:
        """Read **unverified** bytes.

        Raises:
            EvidenceError: not a request as :meth:`encode` writes it (check T-16).
        """
        with _fields(data, _REQUEST, "enrolment request", "T-16") as fields:
            request = Request(*_common(fields, "T-16"))
        return request


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The owner's statement that the attestation key ``ak`` lives in the TPM whose endorsement key is ``ek``.

    It is trusted because of where the owner keeps it. Whether the TPM is hardware is proved again at each use, by the
    certificates (:func:`hardware_path`): a root that is no longer pinned takes its TPMs with it.

    Attributes:
        simulated: software, virtual, or of unknown origin.
        enrolled_at: UTC, whole seconds.
    """

    ek: Public
    ak: Public
    certificates: tuple[bytes, ...]
    manufacturer: str
    vendor: str
    simulated: bool
    enrolled_at: datetime

    @property
    def instance(self) -> str:
        """What names the machine: SHA-256 of the endorsement key (SubjectPublicKeyInfo, DER), hexadecimal."""
        return hashlib.sha256(self.ek.spki).hexdigest()

    @property
    def qualified_name(self) -> bytes:
        """The signer that this key's quotes must name."""
        return qualified_name(self.ak, self.ek)

    def encode(self) -> bytes:
        """Canonical JSON, an entry of :attr:`motte.attest.anchors.Anchors.tpm_enrolled`."""
        table = _table(self.ek, self.ak, self.certificates, self.manufacturer, self.vendor)
        stamp = int(self.enrolled_at.timestamp())
        return canonical({"format": _ENROLMENT, "simulated": self.simulated, "enrolled_at": stamp, **table})

    @staticmethod
    def decode(data: bytes) -> Enrolment:
        """Read a record; its bytes are believed as far as the place that they come from.

        Raises:
            EvidenceError: not a record as :meth:`encode` writes it (check T-5).
        """
        with _fields(data, _ENROLMENT, "enrolment", "T-5") as fields:
            simulated = fields.boolean("simulated")
            at = datetime.fromtimestamp(fields.integer("enrolled_at", low=0, high=1 << 37), UTC)
            record = Enrolment(*_common(fields, "T-5"), simulated, at)
        require_attestation_key(record.ak, check="T-5")
        require_endorsement_key(record.ek, check="T-5")
        return record


class Challenge:
    """The owner's half of one credential activation: the secret stays here, :attr:`blob` goes to the host.

    For one answer, within :data:`CHALLENGE_MAX_AGE_S`. Never stored: an owner that ends asks anew.
    """

    def __init__(self, request: Request, blob: bytes, secret: bytes, simulated: bool, issued_at: datetime) -> None:
        self.blob = blob
        self.simulated = simulated
        self._request = request
        self._secret: bytes | None = secret
        self._issued_at = issued_at

    @staticmethod
    def for_request(
        request: Request,
        *,
        roots: Sequence[bytes],
        now: datetime,
        intermediates: Sequence[bytes] = (),
        insecure_allow_simulated: bool = False,
        timeout_s: float = 60.0,
    ) -> Challenge:
        """Check an **unverified** request and make a challenge for it.

        Args:
            roots: DER certificates of TPM makers that the owner pins.
            intermediates: DER certificates between a root and the endorsement key's, where the host has none.
            insecure_allow_simulated: also enrol a TPM that is software, virtual, or not certified by one of ``roots``;
                all its evidence is then SIMULATED.

        Raises:
            AttestationError: not an attestation key (T-3), not an endorsement key (T-17), or not certified (T-18).
            ResourceError: tpm2-tools is missing, or refuses the endorsement key.
        """
        require_attestation_key(request.ak, check="T-3")
        require_endorsement_key(request.ek, check="T-17")
        certificates = (*request.certificates, *(each for each in intermediates if each not in request.certificates))
        if len(certificates) > MAX_TPM_CERTIFICATES:
            got, expected = str(len(certificates)), f"at most {MAX_TPM_CERTIFICATES}"
            raise AttestationError("too many certificates", check="T-18", expected=expected, got=got)
        request = Request(request.ek, request.ak, certificates, request.manufacturer, request.vendor)
        simulated = False
        try:
            if request.manufacturer not in HARDWARE_MAKERS:
                raise _not_hardware("T-18", f"a TPM that says it is by {request.manufacturer or 'nobody'}")
            hardware_path(request.ek, certificates, roots, now, check="T-18", expiry_check="T-18")
        except (AttestationError, EvidenceError):
            if not insecure_allow_simulated:
                raise
            simulated = True
        secret = secrets.token_bytes(CHALLENGE_SECRET_BYTES)
        blob = make_credential(request.ek, request.ak.name, secret, timeout_s=timeout_s)
        return Challenge(request, blob, secret, simulated, now)

    def finish(self, answer: bytes, now: datetime) -> Enrolment:
        """Compare the host's **unverified** answer with the secret: equal means that one TPM holds both keys.

        Raises:
            AttestationError: another answer (T-19); a second one, or one that came too late (T-20).
        """
        secret, self._secret = self._secret, None
        age = (now - self._issued_at).total_seconds()
        if secret is None or not 0 <= age <= CHALLENGE_MAX_AGE_S:
            raise AttestationError(
                "the challenge is used up or too old",
                check="T-20",
                expected=f"one answer within {CHALLENGE_MAX_AGE_S:g} s",
                got="a second answer" if secret is None else f"after {age:g} s",
                hint="enrol again",
            )
        if not hmac.compare_digest(secret, answer):
            raise AttestationError(
                "the TPM did not open the challenge: the attestation key is not in the TPM of this endorsement key",
                check="T-19",
                expected=f"the secret of {len(secret)} bytes",
                got=f"{len(answer)} other bytes",
            )
        it = self._request
        at = now.astimezone(UTC).replace(microsecond=0)
        return Enrolment(it.ek, it.ak, it.certificates, it.manufacturer, it.vendor, self.simulated, at)


def enrol(
    request: Request,
    activate: Callable[[bytes], bytes],
    *,
    roots: Sequence[bytes],
    clock: Callable[[], datetime],
    intermediates: Sequence[bytes] = (),
    insecure_allow_simulated: bool = False,
    timeout_s: float = 60.0,
) -> Enrolment:
    """The owner's side: check ``request``, challenge the host through ``activate``, and return the record.

    Args:
        activate: carries the challenge to the host and brings its answer, which is **unverified**.
        clock: the time, timezone-aware.

    Raises:
        AttestationError, ResourceError: as :meth:`Challenge.for_request` and :meth:`Challenge.finish`.
    """
    challenge = Challenge.for_request(
        request,
        roots=roots,
        now=clock(),
        intermediates=intermediates,
        insecure_allow_simulated=insecure_allow_simulated,
        timeout_s=timeout_s,
    )
    return challenge.finish(activate(challenge.blob), clock())


def collect(
    tpm: Tpm,
    *,
    handle: int = DEFAULT_HANDLE,
    ek: EkKind = "rsa",
    create: Algorithm | None = "ecdsa",
    certificates: Sequence[bytes] = (),
) -> Request:
    """The host's first half: the keys of its TPM, with a new attestation key at ``handle``.

    Args:
        create: algorithm of the new attestation key; None: use the key that is at ``handle`` already.
        certificates: DER; empty: the one that the TPM holds for its endorsement key, if it holds one.

    Raises:
        ResourceError: no TPM or no tools, or ``handle`` is taken.
    """
    ak = tpm.public(handle) if create is None else tpm.create_attestation_key(handle, ek=ek, algorithm=create)
    found = tpm.endorsement_certificate(ek) if not certificates else None
    manufacturer, vendor = tpm.maker()
    chain = tuple(certificates) if found is None else (found,)
    return Request(tpm.endorsement_key(ek), ak, chain, manufacturer, vendor)


def activate(tpm: Tpm, challenge: bytes, *, handle: int = DEFAULT_HANDLE, ek: EkKind = "rsa") -> bytes:
    """The host's second half: what the TPM finds in the owner's challenge.

    Raises:
        ResourceError: no TPM or no tools, or the challenge is for another TPM or another key.
    """
    return tpm.activate(handle, challenge, ek=ek)


# --- the endorsement key's certificate ----------------------------------------------------------------------------


def hardware_path(
    ek: Public, certificates: Sequence[bytes], roots: Sequence[bytes], now: datetime, *, check: str, expiry_check: str
) -> tuple[Certificate, ...]:
    """Return the **verified** path from the endorsement key to one of ``roots``, if a maker of hardware certified it.

    Raises:
        EvidenceError: not certificates.
        AttestationError: none, of another key, not leading to a root, not for an endorsement key, or by a maker that
            makes no hardware.
    """
    if not certificates:
        raise _not_hardware(check, "a TPM without a certificate of its endorsement key")
    where = "endorsement key certificate"
    chain = [load_der(each, where=f"{where}[{index}]", check=check) for index, each in enumerate(certificates)]
    pinned = [load_der(each, where=f"TPM root[{index}]", check=check) for index, each in enumerate(roots)]
    if chain[0].spki != ek.spki:
        raise AttestationError("the certificate is of another endorsement key", check=check, where=where)
    path = verify_chain(
        chain[0],
        chain[1:],
        pinned,
        now,
        check=check,
        expiry_check=expiry_check,
        allow_critical=frozenset({_SAN, "2.5.29.37"}),
    )
    usage = path[0].extended_key_usage()
    if usage and not usage & {_EK_USAGE, _ANY_USAGE}:
        raise AttestationError(
            "not a certificate for an endorsement key", check=check, expected=_EK_USAGE, got=", ".join(sorted(usage))
        )
    maker, model = certified_maker(path[0])
    if maker not in HARDWARE_MAKERS or "swtpm" in model.lower():
        raise _not_hardware(check, f"a certificate for a TPM by {maker or 'nobody'}, model {model or 'none'}")
    return path


def certified_maker(certificate: Certificate) -> tuple[str, str]:
    """Manufacturer and model in an endorsement key's certificate; an identifier that is no text stays hexadecimal."""
    names = certificate.directory_names()
    match = _IDENTIFIER.fullmatch(names.get(_MANUFACTURER, ""))
    if match is None:
        return "", names.get(_MODEL, "")
    text = bytes.fromhex(match[1]).rstrip(b"\x00 ")
    readable = text.isascii() and text.decode("ascii", "replace").isprintable()
    return (text.decode() if readable else match[1]), names.get(_MODEL, "")


def _not_hardware(check: str, got: str) -> AttestationError:
    return AttestationError(
        "not known to be a hardware TPM",
        check=check,
        expected="a maker of hardware, vouched for by a pinned root: " + ", ".join(sorted(HARDWARE_MAKERS)),
        got=got,
        hint="pin the maker's root; software and virtual TPMs can be enrolled with insecure_allow_simulated only",
    )


# --- texts --------------------------------------------------------------------------------------------------------


def _table(ek: Public, ak: Public, certificates: Sequence[bytes], manufacturer: str, vendor: str) -> dict[str, object]:
    return {
        "ek": base64.b64encode(ek.encoded).decode(),
        "ak": base64.b64encode(ak.encoded).decode(),
        "certificates": [base64.b64encode(each).decode() for each in certificates],
        "manufacturer": manufacturer,
        "vendor": vendor,
    }


@contextlib.contextmanager
def _fields(data: bytes, format_name: str, what: str, check: str) -> Iterator[Fields]:
    """The fields of a text; errors inside bear the number ``check``, and what nobody took is refused at the end."""
    try:
        fields = Fields(
            parse(data, max_bytes=MAX_TPM_ENROLMENT_BYTES, what=what, error=EvidenceError),
            where=what,
            error=EvidenceError,
        )
        fields.choice("format", (format_name,))
        yield fields
        fields.done()
    except EvidenceError as problem:
        problem.check = check
        raise


def _common(fields: Fields, check: str) -> tuple[Public, Public, tuple[bytes, ...], str, str]:
    def der(value: object, where: str) -> bytes:
        if not isinstance(value, str) or len(value) > 2 * MAX_CERTIFICATE_BYTES:
            raise EvidenceError("not a certificate in base64", where=where)
        return _base64(value, where)

    size = 2 * MAX_TPM_STRUCTURE_BYTES
    ek, ak = (
        parse_public(_base64(fields.text(name, max_bytes=size), f"{fields.where}.{name}"), where=name, check=check)
        for name in ("ek", "ak")
    )
    certificates = tuple(fields.items("certificates", max_items=MAX_TPM_CERTIFICATES, read=der))
    manufacturer = fields.text("manufacturer", max_bytes=MAX_NAME_BYTES)
    return ek, ak, certificates, manufacturer, fields.text("vendor", max_bytes=MAX_NAME_BYTES)


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise EvidenceError("not base64", where=where, got=str(problem)) from problem
