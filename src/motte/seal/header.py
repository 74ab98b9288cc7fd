"""The front of a bundle: magic, length, canonical JSON header, signature (docs/spec/bundle.md, sections 2 and 3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from motte.errors import BundleError, FormatError, SignatureError
from motte.limits import (
    CHUNK_BYTES,
    MAX_GRAPH_WEIGHTS,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_NAME_BYTES,
    MAX_PARTS,
    MAX_RECIPIENTS,
    MAX_RELEASE,
    MAX_SECTION_BYTES,
)
from motte.seal.checks import numbered
from motte.seal.keys import RecipientPublicKey, SignerPublicKey
from motte.seal.primitives import (
    BUNDLE_ID_BYTES,
    DIGEST_BYTES,
    HPKE_EXTRA_BYTES,
    KEY_BYTES,
    SIGNATURE_BYTES,
    TAG_BYTES,
    WRAPPED_KEY_BYTES,
)
from motte.seal.run_terms import RunTerms
from motte.strict_json import Fields, canonical, parse

# As in PNG: a byte above 127, then a line end that a text-mode copy would change.
MAGIC: Final = b"\x89MOTTE\r\n"
FORMAT: Final = "motte-bundle-1"
PREFIX_BYTES: Final = len(MAGIC) + 4
"""Magic and length, before the header."""
SEALED_KEK_BYTES: Final = KEY_BYTES + HPKE_EXTRA_BYTES
_MAX_CIPHERTEXT_BYTES: Final = MAX_SECTION_BYTES + TAG_BYTES * (MAX_SECTION_BYTES // CHUNK_BYTES)


def chunk_count(plaintext_bytes: int) -> int:
    """Chunks of a section: full ones and one shorter, or full ones only; an empty section is one empty chunk."""
    return max(1, -(-plaintext_bytes // CHUNK_BYTES))


def ciphertext_bytes(plaintext_bytes: int) -> int:
    """Bytes in the file of a section of ``plaintext_bytes``."""
    return plaintext_bytes + TAG_BYTES * chunk_count(plaintext_bytes)


@dataclass(frozen=True, slots=True)
class SectionEntry:
    """One section as the header describes it; index 0 is the manifest, index ``i + 1`` is part ``i``."""

    index: int
    plaintext_bytes: int
    ciphertext_bytes: int
    digest: bytes  # of the ciphertext: primitives.section_digest
    wrapped_key: bytes  # the data key under the key-encryption key

    @property
    def chunks(self) -> int:
        """Number of chunks, at least one."""
        return chunk_count(self.plaintext_bytes)

    def chunk_plaintext_bytes(self, chunk: int) -> int:
        """Plaintext bytes of one chunk: 1 MiB but for the last."""
        return min(CHUNK_BYTES, self.plaintext_bytes - chunk * CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class RecipientEntry:
    """One recipient: to whom, and the key-encryption key sealed to them with HPKE."""

    key: RecipientPublicKey
    sealed_kek: bytes


@dataclass(frozen=True, slots=True)
class BundleHeader:
    """Everything that a bundle says in the clear. Whether it is **verified** depends on who holds it.

    From :class:`~motte.seal.reader.SignedBundle` it is; from :func:`~motte.seal.inspection.inspect` it may not be.
    """

    bundle_id: bytes
    release: int
    signer: SignerPublicKey
    sections: tuple[SectionEntry, ...]
    recipients: tuple[RecipientEntry, ...]
    public_weights: tuple[str, ...]
    run: RunTerms | None = None

    @property
    def parts(self) -> int:
        """Number of parts: sections but the manifest."""
        return len(self.sections) - 1

    def encode(self) -> bytes:
        """The canonical JSON that is signed."""
        fields = {
            "bundle_id": self.bundle_id.hex(),
            "format": FORMAT,
            "parts": self.parts,
            "public_weights": list(self.public_weights),
            "recipients": [{"key": r.key.raw.hex(), "sealed_kek": r.sealed_kek.hex()} for r in self.recipients],
            "release": self.release,
            "sections": [
                {
                    "ciphertext_bytes": s.ciphertext_bytes,
                    "digest": s.digest.hex(),
                    "index": s.index,
                    "plaintext_bytes": s.plaintext_bytes,
                    "wrapped_key": s.wrapped_key.hex(),
                }
                for s in self.sections
            ],
            "signer": self.signer.raw.hex(),
        }
        return canonical(fields if self.run is None else fields | {"run": self.run.to_json()})


def front(encoded_header: bytes) -> bytes:
    """Magic, length and header: the bytes that are signed, and after which the signature stands."""
    return MAGIC + len(encoded_header).to_bytes(4, "big") + encoded_header


def section_offsets(header: BundleHeader, header_bytes: int) -> tuple[int, ...]:
    """Where each section begins in the file, and at the end where the file ends."""
    offsets = [PREFIX_BYTES + header_bytes + SIGNATURE_BYTES]
    for section in header.sections:
        offsets.append(offsets[-1] + section.ciphertext_bytes)
    return tuple(offsets)


def read_prefix(prefix: bytes, file_bytes: int) -> int:
    """Checks B-1 (the length), B-2 and B-3 on the **unverified** first 12 bytes.

    Returns:
        The length of the header in bytes.

    Raises:
        BundleError: not the beginning of a bundle.
    """
    if len(prefix) < PREFIX_BYTES or file_bytes < PREFIX_BYTES + 2 + SIGNATURE_BYTES:
        raise BundleError("too short for a bundle", check="B-1", got=f"{file_bytes} bytes")
    if prefix[: len(MAGIC)] != MAGIC:
        raise BundleError(
            "not a motte bundle", check="B-2", expected=MAGIC.hex(), got=prefix[: len(MAGIC)].hex(), where="magic"
        )
    length = int.from_bytes(prefix[len(MAGIC) :], "big")
    most = min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES - SIGNATURE_BYTES)
    if not 2 <= length <= most:
        raise BundleError(
            "the header's length is out of bounds",
            check="B-3",
            expected=f"2 to {most} bytes",
            got=f"{length} bytes",
            hint="the file may be cut off: compare its size with the original's",
        )
    return length


def parse_header(data: bytes) -> BundleHeader:
    """Checks B-5 to B-13 on a header; the order is the specification's.

    Args:
        data: **unverified** bytes, or bytes whose signature holds; the checks are the same.

    Raises:
        BundleError: it does not follow the specification; ``check`` says where.
        SignatureError: the key that it names cannot be a signer's (B-9).
    """
    with numbered("B-5"):
        value = parse(data, max_bytes=MAX_HEADER_BYTES, what="header", error=BundleError)
        fields = Fields(value, where="header", error=BundleError)
    _check_format(value.get("format"))
    _check_canonical(data, value)
    with numbered("B-8"):
        fields.any("format")
        header = _read_fields(fields)
    _check_sections(header)
    _check_order(header)
    return header


def _check_format(name: object) -> None:
    if name != FORMAT:
        newer = isinstance(name, str) and name.startswith("motte-bundle-")
        raise BundleError(
            "a format that this version does not know",
            check="B-6",
            where="header.format",
            expected=FORMAT,
            got=repr(name)[:80],
            hint="a newer motte may read it" if newer else None,
        )


def _check_canonical(data: bytes, value: object) -> None:
    try:
        again = canonical(value)
    except ValueError as problem:  # a number such as 1e999, which the parser reads as infinity
        raise BundleError("the header is not encoded canonically", check="B-7", got=str(problem)) from problem
    if again != data:
        shorter = min(len(again), len(data))
        place = next((i for i in range(shorter) if again[i] != data[i]), shorter)
        raise BundleError("the header is not encoded canonically", check="B-7", where=f"header, byte {place}")


def _read_fields(fields: Fields) -> BundleHeader:
    """Check B-8, and what needs one field alone: the parts' number, the keys."""
    parts = fields.integer("parts", low=1, high=MAX_PARTS)
    signer = fields.hexadecimal("signer", length_bytes=KEY_BYTES)
    header = BundleHeader(
        bundle_id=fields.hexadecimal("bundle_id", length_bytes=BUNDLE_ID_BYTES),
        release=fields.integer("release", low=0, high=MAX_RELEASE),
        signer=_signer(signer),
        sections=tuple(fields.items("sections", max_items=MAX_PARTS + 1, read=_read_section)),
        recipients=tuple(fields.items("recipients", max_items=MAX_RECIPIENTS, read=_read_recipient)),
        public_weights=tuple(fields.items("public_weights", max_items=MAX_GRAPH_WEIGHTS, read=_read_name)),
        run=RunTerms.from_json(fields.any("run"), where="header.run") if fields.has("run") else None,
    )
    fields.done()
    if header.parts != parts:
        raise BundleError(
            "the number of sections does not match the number of parts",
            check="B-10",
            where="header.sections",
            expected=f"{parts + 1}",
            got=f"{len(header.sections)}",
        )
    return header


def _signer(raw: bytes) -> SignerPublicKey:
    try:
        return SignerPublicKey(raw)
    except FormatError as problem:
        raise SignatureError(problem.message, check="B-9", where="header.signer", got=raw.hex()) from problem


def _read_section(value: Any, where: str) -> SectionEntry:
    fields = Fields(value, where=where, error=BundleError)
    entry = SectionEntry(
        index=fields.integer("index", low=0, high=MAX_PARTS),
        plaintext_bytes=fields.integer("plaintext_bytes", low=0, high=MAX_SECTION_BYTES),
        ciphertext_bytes=fields.integer("ciphertext_bytes", low=TAG_BYTES, high=_MAX_CIPHERTEXT_BYTES),
        digest=fields.hexadecimal("digest", length_bytes=DIGEST_BYTES),
        wrapped_key=fields.hexadecimal("wrapped_key", length_bytes=WRAPPED_KEY_BYTES),
    )
    fields.done()
    return entry


def _read_recipient(value: Any, where: str) -> RecipientEntry:
    fields = Fields(value, where=where, error=BundleError)
    raw = fields.hexadecimal("key", length_bytes=KEY_BYTES)
    sealed = fields.hexadecimal("sealed_kek", length_bytes=SEALED_KEK_BYTES)
    fields.done()
    try:
        return RecipientEntry(RecipientPublicKey(raw), sealed)
    except FormatError as problem:
        raise BundleError(problem.message, check="B-12", where=f"{where}.key", got=raw.hex()) from problem


def _read_name(value: Any, where: str) -> str:
    return Fields({"name": value}, where=where, error=BundleError).text("name", max_bytes=MAX_NAME_BYTES)


def _check_sections(header: BundleHeader) -> None:
    for place, section in enumerate(header.sections):
        where = f"header.sections[{place}]"
        if section.index != place:
            raise BundleError(
                "sections out of order",
                check="B-10",
                where=f"{where}.index",
                expected=str(place),
                got=str(section.index),
            )
        if ciphertext_bytes(section.plaintext_bytes) != section.ciphertext_bytes:
            raise BundleError(
                "sizes that do not belong together",
                check="B-11",
                where=where,
                expected=f"{ciphertext_bytes(section.plaintext_bytes)} bytes of ciphertext",
                got=f"{section.ciphertext_bytes} bytes",
            )
    if header.sections[0].plaintext_bytes > MAX_MANIFEST_BYTES:
        raise BundleError(
            "the manifest is too large",
            check="B-11",
            where="header.sections[0].plaintext_bytes",
            expected=f"at most {MAX_MANIFEST_BYTES}",
            got=str(header.sections[0].plaintext_bytes),
        )


def _check_order(header: BundleHeader) -> None:
    keys = [entry.key.raw for entry in header.recipients]
    if not keys or any(a >= b for a, b in pairwise(keys)):
        raise BundleError(
            "recipients missing, repeated or not sorted by key",
            check="B-12",
            where="header.recipients",
            got=f"{len(keys)} recipients",
        )
    names = header.public_weights
    if any(a >= b for a, b in pairwise(names)):
        raise BundleError("names of public weights repeated or not sorted", check="B-13", where="header.public_weights")
