"""Strict readers of the TPM 2.0 structures that evidence carries, and the names that follow from them.

Source: TCG "Trusted Platform Module Library", part 2 (structures), numbers in brackets below are its sections. All
integers are big-endian. A reader takes every byte or refuses: nothing is skipped, and nothing may follow. What is
accepted is narrower than the standard: the kinds of keys, hashes and signatures that evidence uses, see the tables.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from motte.attest.certificates import HashName, ec_spki, rsa_spki, verify_ecdsa, verify_rsa
from motte.errors import AttestationError, EvidenceError
from motte.limits import MAX_TPM_STRUCTURE_BYTES

GENERATED: Final = 0xFF544347
"""TPM_GENERATED_VALUE [6.2]: a restricted key signs bytes that begin with it only if the TPM itself made them."""
ATTEST_QUOTE: Final = 0x8018
HANDLE_ENDORSEMENT: Final = 0x4000000B
RESETTABLE_PCRS: Final = frozenset({16, 23})
"""Registers that any software may set back to zero (TCG PC Client profile): a quote over them says nothing."""
_RSA, _ECC, _NULL, _AES, _CFB = 0x0001, 0x0023, 0x0010, 0x0006, 0x0043
_HASHES: Final[dict[int, HashName]] = {0x000B: "sha256", 0x000C: "sha384"}
_SCHEMES: Final = {0x0014: "rsassa", 0x0016: "rsapss", 0x0018: "ecdsa"}
_CURVES: Final = {0x0003: ("secp256r1", 32), 0x0004: ("secp384r1", 48)}
_DEFAULT_EXPONENT: Final = 65537

FIXED_TPM, FIXED_PARENT, SENSITIVE_DATA_ORIGIN = 1 << 1, 1 << 4, 1 << 5
RESTRICTED, DECRYPT, SIGN = 1 << 16, 1 << 17, 1 << 18
_ATTRIBUTES: Final = {
    1: "fixedTPM",
    2: "stClear",
    4: "fixedParent",
    5: "sensitiveDataOrigin",
    6: "userWithAuth",
    7: "adminWithPolicy",
    10: "noDA",
    11: "encryptedDuplication",
    16: "restricted",
    17: "decrypt",
    18: "sign",
    19: "x509sign",
}


class Reader:
    """A cursor over **unverified** bytes; whatever is missing or left over is refused under one numbered check."""

    def __init__(self, data: bytes, *, where: str, check: str) -> None:
        if len(data) > MAX_TPM_STRUCTURE_BYTES:
            raise EvidenceError(
                "a TPM structure is too large",
                check=check,
                where=where,
                expected=f"at most {MAX_TPM_STRUCTURE_BYTES} bytes",
                got=f"{len(data)} bytes",
            )
        self._data, self._at = data, 0
        self.where, self.check = where, check

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        if size > len(self._data) - self._at:
            raise self.bad(f"{what} is cut off", expected=f"{size} bytes", got=f"{len(self._data) - self._at} bytes")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int, what: str) -> int:
        """An unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size, what), "big")

    def sized(self, what: str, *, most: int, least: int = 0) -> bytes:
        """A TPM2B [10.4]: two bytes of length, then that many."""
        size = self.number(2, f"the length of {what}")
        if not least <= size <= most:
            raise self.bad(f"{what} has a wrong length", expected=f"{least} to {most} bytes", got=f"{size} bytes")
        return self.take(size, what)

    def exactly(self, size: int, value: int, what: str) -> None:
        """An integer that must be ``value``."""
        got = self.number(size, what)
        if got != value:
            raise self.bad(f"{what} is not what it has to be", expected=f"{value:#x}", got=f"{got:#x}")

    def done(self) -> None:
        """Refuse what is left."""
        if self._at != len(self._data):
            raise self.bad("bytes follow a TPM structure", got=f"{len(self._data) - self._at} bytes too many")

    def bad(self, message: str, *, expected: str | None = None, got: str | None = None) -> EvidenceError:
        """The error to raise at the cursor."""
        where = f"{self.where}, byte {self._at}"
        return EvidenceError(message, check=self.check, where=where, expected=expected, got=got)


# --- public areas of keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Public:
    """The public area of a TPM key (TPMT_PUBLIC [12.2.4]), **unverified**: any software can write one.

    What it says of the key is true only where a TPM vouched for its :attr:`name` (credential activation).

    Attributes:
        area: the bytes of the public area, without the length before it.
        name_hash: the hash of its name. attributes: bits of TPMA_OBJECT [8.3].
        scheme, scheme_hash: what a signing key signs with; None: left open, as for a key that decrypts.
        spki: the key as SubjectPublicKeyInfo (DER).
    """

    area: bytes
    name_hash: HashName
    attributes: int
    scheme: str | None
    scheme_hash: HashName | None
    spki: bytes

    @property
    def encoded(self) -> bytes:
        """TPM2B_PUBLIC [12.2.5]."""
        return struct.pack(">H", len(self.area)) + self.area

    @property
    def name(self) -> bytes:
        """The hash's identifier and the area's hash (part 1, section 16): what names this key, attributes included."""
        return _named(self.name_hash, self.area)

    def has(self, bits: int) -> bool:
        """Whether all of ``bits`` are set."""
        return self.attributes & bits == bits

    def attribute_names(self) -> str:
        """The attributes that are set, for people."""
        return ", ".join(word for bit, word in _ATTRIBUTES.items() if self.attributes >> bit & 1) or "none"


def _named(name_hash: HashName, data: bytes) -> bytes:
    identifier = next(number for number, name in _HASHES.items() if name == name_hash)
    return struct.pack(">H", identifier) + hashlib.new(name_hash, data).digest()


def qualified_name(key: Public, parent: Public) -> bytes:
    """The qualified name of ``key`` below the primary key ``parent`` of the endorsement hierarchy (part 1, section 16).

    A TPM writes it into every quote, so that a quote also names the endorsement key above the key that signed.
    """
    above = _named(parent.name_hash, struct.pack(">I", HANDLE_ENDORSEMENT) + parent.name)
    return _named(key.name_hash, above + key.name)


def parse_public(data: bytes, *, where: str, check: str) -> Public:
    """Read an **unverified** TPM2B_PUBLIC of an RSA key or of one on P-256 or P-384.

    Raises:
        EvidenceError: malformed, or of a kind that is not accepted.
    """
    outer = Reader(data, where=where, check=check)
    area = outer.sized("the public area", most=MAX_TPM_STRUCTURE_BYTES)
    outer.done()
    reader = Reader(area, where=where, check=check)
    kind = reader.number(2, "the kind of key")
    if kind not in (_RSA, _ECC):
        raise reader.bad("a kind of key that is not accepted", expected="RSA or ECC", got=f"{kind:#06x}")
    name_hash = _hash(reader, "the hash of the name")
    attributes = reader.number(4, "the attributes")
    unknown = attributes & ~sum(1 << bit for bit in _ATTRIBUTES)
    if unknown:
        raise reader.bad("reserved attributes are set", got=f"{unknown:#010x}")
    reader.sized("the policy", most=64)
    _skip_symmetric(reader)
    scheme, scheme_hash = _scheme(reader)
    spki = _rsa_key(reader) if kind == _RSA else _ecc_key(reader)
    reader.done()
    if scheme is not None and (scheme == "ecdsa") is not (kind == _ECC):
        raise reader.bad("the signature scheme does not fit the key", got=scheme)
    return Public(area, name_hash, attributes, scheme, scheme_hash, spki)


def _hash(reader: Reader, what: str) -> HashName:
    number = reader.number(2, what)
    if number not in _HASHES:
        raise reader.bad(f"{what} is not accepted", expected="sha256 or sha384", got=f"{number:#06x}")
    return _HASHES[number]


def _skip_symmetric(reader: Reader) -> None:
    # A restricted decryption key (the EK) names the cipher that protects its children; a signing key names none.
    kind = reader.number(2, "the symmetric algorithm")
    if kind == _NULL:
        return
    if kind != _AES:
        raise reader.bad("a symmetric algorithm that is not accepted", expected="AES", got=f"{kind:#06x}")
    if reader.number(2, "the bits of the symmetric key") not in (128, 192, 256):
        raise reader.bad("not the size of an AES key")
    reader.exactly(2, _CFB, "the symmetric mode")


def _scheme(reader: Reader) -> tuple[str | None, HashName | None]:
    number = reader.number(2, "the signature scheme")
    if number == _NULL:
        return None, None
    if number not in _SCHEMES:
        raise reader.bad("a scheme that is not accepted", expected=", ".join(_SCHEMES.values()), got=f"{number:#06x}")
    return _SCHEMES[number], _hash(reader, "the hash of the scheme")


def _rsa_key(reader: Reader) -> bytes:
    bits = reader.number(2, "the bits of the RSA key")
    if bits not in (2048, 3072, 4096):
        raise reader.bad("an RSA key of a size that is not accepted", expected="2048, 3072 or 4096", got=str(bits))
    exponent = reader.number(4, "the exponent") or _DEFAULT_EXPONENT
    if exponent != _DEFAULT_EXPONENT:
        raise reader.bad("an exponent that is not accepted", expected=str(_DEFAULT_EXPONENT), got=str(exponent))
    modulus = int.from_bytes(reader.sized("the modulus", most=bits // 8, least=bits // 8), "big")
    if modulus.bit_length() != bits:
        raise reader.bad("the modulus does not have its size", expected=str(bits), got=str(modulus.bit_length()))
    return rsa_spki(modulus, exponent, where=reader.where, check=reader.check)


def _ecc_key(reader: Reader) -> bytes:
    number = reader.number(2, "the curve")
    if number not in _CURVES:
        raise reader.bad("a curve that is not accepted", expected="P-256 or P-384", got=f"{number:#06x}")
    curve, size = _CURVES[number]
    reader.exactly(2, _NULL, "the key derivation")
    x = int.from_bytes(reader.sized("x", most=size, least=size), "big")
    y = int.from_bytes(reader.sized("y", most=size, least=size), "big")
    return ec_spki(curve, x, y, where=reader.where, check=reader.check)


def require_attestation_key(key: Public, *, check: str) -> None:
    """Refuse a key whose signatures would not mean that a TPM made what was signed.

    Restricted: it signs only what the TPM itself generated, or bytes that cannot be mistaken for it. fixedTPM,
    fixedParent and sensitiveDataOrigin: the TPM made its private half and never lets it out.

    Raises:
        AttestationError: it can sign anything, can leave the TPM, came from outside, or can also decrypt.
    """
    needed = RESTRICTED | SIGN | FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN
    if not key.has(needed) or key.attributes & DECRYPT or key.scheme is None:
        raise AttestationError(
            "not an attestation key",
            check=check,
            where="attestation key",
            expected="fixedTPM, fixedParent, sensitiveDataOrigin, restricted, sign, not decrypt, and a scheme",
            got=f"{key.attribute_names()}; {key.scheme or 'no scheme'}",
            hint="make it with `tpm2_createak`, or by an enrolment",
        )


def require_endorsement_key(key: Public, *, check: str) -> None:
    """Refuse a key that cannot be the endorsement key of credential activation.

    Raises:
        AttestationError: not a restricted decryption key that is bound to its TPM.
    """
    needed = RESTRICTED | DECRYPT | FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN
    if not key.has(needed) or key.attributes & SIGN:
        raise AttestationError(
            "not an endorsement key",
            check=check,
            where="endorsement key",
            expected="fixedTPM, fixedParent, sensitiveDataOrigin, restricted, decrypt, not sign",
            got=key.attribute_names(),
        )


# --- quotes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quote:
    """TPMS_ATTEST [10.12.12] of a quote, **unverified** until its signature was checked.

    Attributes:
        signed: the bytes that are signed.
        qualified_signer: qualified name of the key that signed. extra_data: what the caller bound into it.
        clock_ms: milliseconds that the TPM was powered since its owner was last cleared. resets, restarts: counters.
        safe: the clock was never set back. firmware: the vendor's number, 64 bits.
        bank: hash of the registers. pcrs: their numbers, ascending.
        pcr_digest: hash, by the signature's algorithm, over the registers' values in order.
    """

    signed: bytes
    qualified_signer: bytes
    extra_data: bytes
    clock_ms: int
    resets: int
    restarts: int
    safe: bool
    firmware: int
    bank: HashName
    pcrs: tuple[int, ...]
    pcr_digest: bytes


def parse_quote(data: bytes, *, where: str, check: str, magic_check: str) -> Quote:
    """Read **unverified** TPMS_ATTEST, as ``tpm2_quote -m`` writes it (no length before it).

    Raises:
        EvidenceError: malformed. AttestationError: not made by a TPM, or no quote (``magic_check``).
    """
    reader = Reader(data, where=where, check=check)
    magic = reader.number(4, "the magic")
    if magic != GENERATED:
        raise AttestationError(
            "not generated by a TPM",
            check=magic_check,
            where=where,
            expected=f"{GENERATED:#010x}",
            got=f"{magic:#010x}",
        )
    kind = reader.number(2, "the kind of attestation")
    if kind != ATTEST_QUOTE:
        raise AttestationError(
            "not a quote", check=magic_check, where=where, expected=f"{ATTEST_QUOTE:#06x}", got=f"{kind:#06x}"
        )
    signer = reader.sized("the qualified signer", most=66)
    extra = reader.sized("the extra data", most=66)
    clock, resets, restarts = (reader.number(size, "the clock") for size in (8, 4, 4))
    safe = reader.number(1, "the clock's safety")
    if safe > 1:
        raise reader.bad("not a yes or no", got=str(safe))
    firmware = reader.number(8, "the firmware version")
    bank, pcrs = _selection(reader)
    digest = reader.sized("the digest of the registers", most=64, least=32)
    reader.done()
    return Quote(data, signer, extra, clock, resets, restarts, bool(safe), firmware, bank, pcrs, digest)


def _selection(reader: Reader) -> tuple[HashName, tuple[int, ...]]:
    """TPML_PCR_SELECTION [10.9.7] of exactly one bank and at least one register."""
    reader.exactly(4, 1, "the number of banks")
    bank = _hash(reader, "the bank")
    size = reader.number(1, "the bytes of the selection")
    if size not in (3, 4):
        raise reader.bad("a selection of a size that is not accepted", expected="3 or 4 bytes", got=str(size))
    bits = reader.take(size, "the selection")
    pcrs = tuple(index for index in range(8 * size) if bits[index // 8] >> index % 8 & 1)
    if not pcrs:
        raise reader.bad("no register is selected")
    return bank, pcrs


# --- signatures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signature:
    """TPMT_SIGNATURE [11.3.4], **unverified**: its algorithm and, by it, RSA bytes or the numbers (r, s)."""

    scheme: str
    hash_name: HashName
    value: bytes | tuple[int, int]


def parse_signature(data: bytes, *, where: str, check: str) -> Signature:
    """Read an **unverified** TPMT_SIGNATURE: RSASSA, RSAPSS or ECDSA, with SHA-256 or SHA-384.

    Raises:
        EvidenceError: malformed, or another algorithm.
    """
    reader = Reader(data, where=where, check=check)
    scheme, hash_name = _scheme(reader)
    if scheme is None or hash_name is None:
        raise reader.bad("an empty signature")
    value: bytes | tuple[int, int]
    if scheme == "ecdsa":
        r = int.from_bytes(reader.sized("r", most=48, least=1), "big")
        value = (r, int.from_bytes(reader.sized("s", most=48, least=1), "big"))
    else:
        value = reader.sized("the signature", most=512, least=256)
    reader.done()
    return Signature(scheme, hash_name, value)


def verify_signature(signature: Signature, key: Public, data: bytes, *, where: str, check: str) -> None:
    """Verify that ``key`` signed ``data`` with the one scheme that its public area names.

    Raises:
        AttestationError: another scheme or hash, or the signature does not hold.
    """
    if (signature.scheme, signature.hash_name) != (key.scheme, key.scheme_hash):
        raise AttestationError(
            "signed with another scheme than the key's",
            check=check,
            where=where,
            expected=f"{key.scheme}-{key.scheme_hash}",
            got=f"{signature.scheme}-{signature.hash_name}",
        )
    if isinstance(signature.value, tuple):
        verify_ecdsa(key.spki, signature.value, data, hash_name=signature.hash_name, where=where, check=check)
        return
    verify_rsa(
        key.spki,
        signature.value,
        data,
        hash_name=signature.hash_name,
        scheme="pss" if signature.scheme == "rsapss" else "pkcs1",
        where=where,
        check=check,
    )
