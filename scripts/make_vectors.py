"""Make tests/vectors: good and broken bundles, each named for its flaw, with the failure expected of a reader.

    python scripts/make_vectors.py tests/vectors

Everything follows from one seed but HPKE's ephemeral keys, which ``cryptography`` draws itself: a second run makes
other bytes of the same kinds. The committed files are what counts; run this only when the format changes, and read
the differences in index.json.

A vector is a file, or, where a chunk boundary needs megabytes, ``pieces`` of such a file and literal bytes between.
Most flaws are signed again by the right signer: a reader must refuse them although the signature holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vector_drafts import Collection, Draft, Pieces, flip, literal, plaintext, seeded

from motte.limits import CHUNK_BYTES, MAX_HEADER_BYTES, MAX_MANIFEST_BYTES, MAX_RELEASE
from motte.seal import add_recipients, primitives, remove_recipients
from motte.seal.header import MAGIC, ciphertext_bytes, front
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.strict_json import canonical

# --- the vectors --------------------------------------------------------------------------------------------------


def prefix_vectors(out: Collection, good: Draft) -> None:
    """The first twelve bytes (B-1 to B-3)."""
    data = good.file()
    header_bytes = len(canonical(good.header))

    def refuse(name: str, broken: bytes, flaw: str, check: str) -> None:
        out.add(name, broken, flaw, stage="open", error="BundleError", check=check, inspect=check)

    refuse("empty-file", b"", "nothing at all", "B-1")
    refuse("prefix-only", data[:12], "ends after the prefix", "B-1")
    refuse("magic-bit-flipped", flip(data, 0, 7), "first bit of the file flipped", "B-2")
    refuse("magic-last-bit-flipped", flip(data, 7), "last bit of the magic flipped", "B-2")
    refuse("magic-line-end-converted", data.replace(b"\r\n", b"\n", 1), "copied in text mode", "B-2")
    refuse("magic-missing", data[8:], "begins with the length", "B-2")
    refuse("zip-file", b"PK\x03\x04" + bytes(200), "another kind of file", "B-2")
    length = lambda n: MAGIC + n.to_bytes(4, "big") + data[12:]  # noqa: E731
    refuse("length-zero", length(0), "a header of no bytes", "B-3")
    refuse("length-one", length(1), "a header of one byte", "B-3")
    refuse("length-over-limit", length(MAX_HEADER_BYTES + 1), "a header of more than 4 MiB", "B-3")
    refuse("length-all-ones", length(0xFFFFFFFF), "a header of 4 GiB", "B-3")
    refuse("length-beyond-file", length(len(data)), "a header longer than the file", "B-3")
    out.add(
        "length-bit-flipped",
        flip(data, 11),
        "the header is said to be one byte shorter or longer",
        stage="open",
        error="SignatureError",
        check="B-4",
        inspect="B-5",
    )
    for cut, where in ((5, "magic"), (10, "length")):
        refuse(f"truncated-in-{where}", data[:cut], f"ends within the {where}", "B-1")
    for cut, where in (
        (12 + header_bytes // 2, "in-header"),
        (12 + header_bytes, "after-header"),
        (12 + header_bytes + 63, "in-signature"),
    ):
        refuse(f"truncated-{where}", data[:cut], f"ends {where.replace('-', ' ')}", "B-3")


def length_vectors(out: Collection, good: Draft) -> None:
    """A file longer or shorter than its sections (B-14)."""
    data = good.file()

    def refuse(name: str, broken: bytes, flaw: str) -> None:
        out.add(name, broken, flaw, stage="open", error="BundleError", check="B-14", inspect="B-14")

    end = len(good.signed_front())
    refuse("truncated-after-signature", data[:end], "no section at all")
    for index, size in enumerate(good.sizes):
        refuse(f"truncated-in-section-{index}", data[: end + 1], f"ends within section {index}")
        end += ciphertext_bytes(size)
        if index < len(good.sizes) - 1:
            refuse(f"truncated-after-section-{index}", data[:end], f"ends after section {index}")
    refuse("truncated-by-one-byte", data[:-1], "the last byte of the last tag is missing")
    refuse("truncated-by-one-tag", data[:-16], "the last tag is missing")
    refuse("trailing-byte", data + b"\x00", "one byte after the last section")
    refuse("trailing-newline", data + b"\n", "a newline after the last section")
    refuse("trailing-chunk", data + bytes(CHUNK_BYTES // 1024 + 16), "something like a chunk after the last section")
    refuse("trailing-bundle", data + data, "a second bundle after the first")
    refuse("signature-doubled", data[: len(good.signed_front())] + data[-len(good.body()) - 64 :], "two signatures")


def signature_vectors(out: Collection, good: Draft, other: SignerPrivateKey) -> None:
    """Altered after signing, or signed by somebody else (B-4, B-9)."""
    data = good.file()
    start = front(canonical(good.header))

    def refuse(name: str, broken: bytes, flaw: str, inspect: str = "invalid", check: str = "B-4", **more: Any) -> None:
        out.add(name, broken, flaw, stage="open", error="SignatureError", check=check, inspect=inspect, **more)

    def flipped(field: str, value: str, replacement: str, inspect: str = "invalid", **more: Any) -> None:
        old, new = value.encode(), replacement.encode()
        if data.count(old) < 1 or old == new or len(old) != len(new):
            raise SystemExit(f"cannot break {field}")
        refuse(f"header-flipped-{field}", data.replace(old, new, 1), f"one digit of {field} changed", inspect, **more)

    def digit(text: str) -> str:
        return text[:-1] + ("1" if text[-1] == "0" else "0")

    header = good.header
    flipped("bundle-id", header["bundle_id"], digit(header["bundle_id"]))
    flipped("release", '"release":7', '"release":6')
    flipped("release-raised", '"release":7', '"release":9')
    flipped("digest", header["sections"][1]["digest"], digit(header["sections"][1]["digest"]), digests="B-23")
    for section in (0, 1, 3):
        wrapped = header["sections"][section]["wrapped_key"]
        flipped(f"wrapped-key-{section}", wrapped, digit(wrapped))
    flipped("sealed-kek", header["recipients"][0]["sealed_kek"], digit(header["recipients"][0]["sealed_kek"]))
    flipped("recipient", header["recipients"][0]["key"], digit(header["recipients"][0]["key"]))
    flipped("signer", header["signer"], digit(header["signer"]))
    flipped("public-weight", '"head.bias"', '"head.bibs"')
    flipped("size", '"plaintext_bytes":300', '"plaintext_bytes":301', inspect="B-11")
    flipped("index", '"index":1', '"index":0', inspect="B-10")
    flipped("parts", '"parts":3', '"parts":2', inspect="B-10")
    flipped("format", "motte-bundle-1", "motte-bundle-0", inspect="B-6")
    flipped("field-name", '"release"', '"selease"', inspect="B-7")
    flipped("syntax", '{"bundle_id"', '["bundle_id"', inspect="B-5")
    for name, offset in (("first", 0), ("middle", 31), ("last", 63)):
        refuse(f"signature-{name}-byte-flipped", flip(data, len(start) + offset), f"{name} byte of the signature")
    refuse("signature-zeros", start + bytes(64) + good.body(), "not signed: zeros for a signature")
    refuse("signature-missing", start + good.body(), "not signed: the sections follow the header", inspect="B-14")
    twin = good.clone()
    twin.signer = other
    refuse("signature-by-another", twin.file(), "signed by another, naming the demanded signer")
    twin.header["signer"] = other.public.raw.hex()
    refuse("signer-another", twin.file(), "signed by another, who is named", inspect="valid")
    refuse(
        "signer-demanded-is-another", data, "a good bundle, another signer demanded", inspect="valid", signer="other"
    )
    bare = SignerPrivateKey(good.signer.secret)
    without_domain = _sign_raw(bare, start)
    refuse("signature-without-domain", start + without_domain + good.body(), "signed without the domain string")
    refuse("signature-of-header-only", start + _sign_raw(bare, canonical(good.header)) + good.body(), "prefix unsigned")
    sibling = good.clone()
    sibling.header["release"] = 8
    refuse("signature-of-another-release", start + sibling.signed_front()[-64:] + good.body(), "a sibling's signature")
    named = good.clone()
    named.header["signer"] = other.public.raw.hex()
    refuse("signer-named-is-another", named.file(), "signed by the demanded signer, naming another", check="B-9")
    named.header["signer"] = "01" + "00" * 31
    refuse("signer-of-small-order", named.file(), "names a key for which anyone can sign", inspect="B-9", check="B-9")


def _sign_raw(signer: SignerPrivateKey, message: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(signer.secret).sign(message)


def encoding_vectors(out: Collection, good: Draft) -> None:
    """Headers that are signed but not written as they must be (B-5 to B-7)."""
    text = canonical(good.header)

    def refuse(name: str, encoded: bytes, flaw: str, check: str) -> None:
        out.add(name, good.file(encoded), flaw, stage="open", error="BundleError", check=check, inspect=check)

    refuse("json-cut", text[:-1], "the closing brace is missing", "B-5")
    refuse("json-two-values", text + text, "two headers", "B-5")
    refuse("json-not-an-object", b"[" + text + b"]", "a list around the header", "B-5")
    refuse("json-empty-object", b"{}", "an object without fields", "B-6")
    refuse("json-not-utf8", text.replace(b"head.bias", b"head.bi\xff\xfe"), "bytes that are not UTF-8", "B-5")
    refuse("json-byte-order-mark", b"\xef\xbb\xbf" + text, "a byte order mark", "B-5")
    refuse("json-nan", text.replace(b'"release":7', b'"release":NaN'), "NaN for a number", "B-5")
    refuse("json-infinity", text.replace(b'"release":7', b'"release":Infinity'), "Infinity for a number", "B-5")
    refuse("json-nested", b"[" * 5000 + b"]" * 5000, "5,000 levels deep", "B-5")
    refuse("json-huge-integer", text.replace(b'"release":7', b'"release":' + b"9" * 5000), "5,000 digits", "B-5")
    refuse("duplicate-field", text.replace(b'"release":7', b'"release":7,"release":7'), "release given twice", "B-5")
    refuse("duplicate-field-differs", text.replace(b'"release":7', b'"release":9,"release":7'), "two releases", "B-5")
    refuse("duplicate-field-in-section", text.replace(b'"index":1', b'"index":1,"index":1'), "index given twice", "B-5")
    refuse("format-newer", text.replace(b"motte-bundle-1", b"motte-bundle-2"), "a format of the future", "B-6")
    refuse("format-unknown", text.replace(b"motte-bundle-1", b"another"), "another format", "B-6")
    refuse("format-missing", text.replace(b'"format":"motte-bundle-1",', b""), "no format", "B-6")
    refuse("format-number", text.replace(b'"motte-bundle-1"', b"1"), "the format is a number", "B-6")
    spaced = json.dumps(good.header, sort_keys=True).encode()
    refuse("canonical-spaces", spaced, "spaces after commas and colons", "B-7")
    refuse("canonical-newline", text + b"\n", "a newline after the header", "B-7")
    backwards = json.dumps(dict(sorted(good.header.items(), reverse=True)), separators=(",", ":")).encode()
    refuse("canonical-unsorted", backwards, "fields not sorted", "B-7")
    refuse("canonical-escape", text.replace(b"head.bias", b"head.b\\u0069as"), "a needless escape", "B-7")
    refuse("canonical-raw-letter", text.replace(b"head.bias", "häd.bias".encode()), "a letter not escaped", "B-7")
    refuse("canonical-exponent", text.replace(b'"release":7', b'"release":7e0'), "an exponent", "B-7")
    refuse("canonical-infinite", text.replace(b'"release":7', b'"release":1e999'), "a number beyond range", "B-7")
    refuse("canonical-minus-zero", text.replace(b'"release":7', b'"release":-0'), "minus zero", "B-7")


_GONE = object()


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one field of a header; ``path`` is its names and places, joined with dots."""

    def change(header: dict[str, Any]) -> None:
        target: Any = header
        *way, last = path.split(".")
        for step in way:
            target = target[int(step) if step.isdigit() else step]
        if value is _GONE:
            del target[last]
        else:
            target[int(last) if last.isdigit() else last] = value

    return change


def refuse_header(
    out: Collection, good: Draft, name: str, flaw: str, check: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Keep a bundle whose header was changed and signed again."""
    broken = good.clone()
    change(broken.header)
    out.add(name, broken.file(), flaw, stage="open", error="BundleError", check=check, inspect=check)


FIELDS: tuple[tuple[str, str, str, Any], ...] = (
    ("missing-sealed-kek", "a recipient without a key", "recipients.0.sealed_kek", _GONE),
    ("unknown-field", "a field that nobody knows", "comment", "hello"),
    ("unknown-section-field", "the same in a section", "sections.1.offset", 0),
    ("unknown-recipient-field", "the same in a recipient", "recipients.0.name", "alice"),
    ("plaintext-digest", "a digest of plaintext, which would confirm guesses", "sections.1.sum", "00"),
    ("release-text", "the release is a string", "release", "7"),
    ("release-true", "the release is true", "release", True),
    ("release-fraction", "the release is 7.0", "release", 7.0),
    ("release-negative", "the release is negative", "release", -1),
    ("release-absurd", "the release is 2^53", "release", MAX_RELEASE + 1),
    ("bundle-id-short", "a bundle id of 15 bytes", "bundle_id", "00" * 15),
    ("bundle-id-upper-case", "hexadecimal in capitals", "bundle_id", "AB" * 16),
    ("digest-short", "a digest of 31 bytes", "sections.1.digest", "00" * 31),
    ("wrapped-key-short", "a wrapped key without its tag", "sections.1.wrapped_key", "00" * 44),
    ("sealed-kek-long", "a sealed key with a byte more", "recipients.0.sealed_kek", "00" * 81),
    ("signer-null", "the signer is null", "signer", None),
    ("sections-object", "the sections are an object", "sections", {}),
    ("section-a-number", "a section is a number", "sections.1", 5),
    ("plaintext-absurd", "a section of 2^60 bytes", "sections.1.plaintext_bytes", 1 << 60),
    ("plaintext-negative", "a section of -1 bytes", "sections.1.plaintext_bytes", -1),
    ("ciphertext-absurd", "2^60 bytes of ciphertext", "sections.1.ciphertext_bytes", 1 << 60),
    ("ciphertext-below-tag", "15 bytes of ciphertext", "sections.1.ciphertext_bytes", 15),
    ("public-weight-number", "a name that is a number", "public_weights.0", 1),
    ("public-weight-long", "a name of 513 bytes", "public_weights.0", "a" * 513),
    ("public-weight-surrogate", "half a character", "public_weights.0", "\ud800"),
    ("parts-absurd", "2^40 parts", "parts", 1 << 40),
)
"""Check B-8: name, flaw, field, what it is set to."""


def field_vectors(out: Collection, good: Draft) -> None:
    """Headers that are signed and canonical, with a field that is wrong in itself (B-8)."""
    for path in ("bundle_id", "parts", "public_weights", "recipients", "release", "sections", "signer"):
        refuse_header(out, good, f"missing-{path.replace('_', '-')}", f"no {path}", "B-8", put(path, _GONE))
    for field in ("ciphertext_bytes", "digest", "index", "plaintext_bytes", "wrapped_key"):
        name = f"missing-section-{field.replace('_', '-')}"
        refuse_header(out, good, name, f"no {field}", "B-8", put(f"sections.1.{field}", _GONE))
    for name, flaw, path, value in FIELDS:
        refuse_header(out, good, name, flaw, "B-8", put(path, value))


def relation_vectors(out: Collection, good: Draft) -> None:
    """Headers whose fields are well-formed but do not belong together (B-8 for no parts, B-10 to B-13)."""

    def refuse(name: str, flaw: str, check: str, change: Callable[[dict[str, Any]], None]) -> None:
        refuse_header(out, good, name, flaw, check, change)

    def swap(header: dict[str, Any]) -> None:
        header["sections"][1], header["sections"][3] = header["sections"][3], header["sections"][1]

    def huge_manifest(header: dict[str, Any]) -> None:
        size = MAX_MANIFEST_BYTES + 1
        header["sections"][0].update(plaintext_bytes=size, ciphertext_bytes=ciphertext_bytes(size))

    refuse("parts-zero", "a manifest, no parts", "B-8", lambda h: h.update(parts=0, sections=h["sections"][:1]))
    refuse("sections-none", "parts, but no sections", "B-10", put("sections", []))
    refuse("sections-fewer", "one section too few", "B-10", lambda h: h["sections"].pop())
    refuse("sections-more", "one section too many", "B-10", lambda h: h["sections"].append(h["sections"][-1]))
    refuse("parts-fewer", "one part less than sections say", "B-10", put("parts", 2))
    refuse("sections-unordered", "two sections change places", "B-10", swap)
    refuse("index-repeated", "two sections of one number", "B-10", put("sections.2.index", 1))
    refuse("index-gap", "a number left out", "B-10", put("sections.3.index", 4))
    refuse("size-relation", "ciphertext without room for a tag", "B-11", put("sections.1.ciphertext_bytes", 300))
    refuse("size-two-tags", "one chunk, two tags", "B-11", put("sections.1.ciphertext_bytes", 332))
    refuse("size-of-two-chunks", "an empty section as 32 bytes", "B-11", put("sections.2.ciphertext_bytes", 32))
    refuse("manifest-absurd", "a manifest beyond its bound", "B-11", huge_manifest)
    refuse("recipients-none", "sealed to nobody", "B-12", put("recipients", []))
    refuse("recipients-repeated", "a recipient twice", "B-12", lambda h: h["recipients"].append(h["recipients"][-1]))
    refuse("recipients-unsorted", "recipients not sorted", "B-12", lambda h: h["recipients"].reverse())
    refuse("recipient-of-small-order", "a key that everybody can open", "B-12", put("recipients.0.key", "00" * 32))
    refuse("public-weights-repeated", "a name twice", "B-13", put("public_weights", ["a", "a"]))
    refuse("public-weights-unsorted", "names not sorted", "B-13", put("public_weights", ["b", "a"]))


def key_vectors(out: Collection, good: Draft, alice: RecipientPrivateKey) -> None:
    """Keys that do not open what they should (B-15 to B-19); everything is signed."""
    out.add(
        "release-below-minimum",
        good.file(),
        "release 7, at least 8 demanded",
        stage="open",
        error="RollbackError",
        check="B-15",
        min_release=8,
    )
    out.add(
        "recipient-another",
        good.file(),
        "not sealed to our key",
        stage="unwrap",
        error="KeyAccessError",
        check="B-16",
        recipient="mallory",
    )
    place = next(i for i, key in enumerate(good.recipients) if key.public == alice.public)

    def refuse(name: str, flaw: str, stage: str, check: str, change: Callable[[Draft], None]) -> None:
        broken = good.clone()
        change(broken)
        out.add(name, broken.file(), flaw, stage=stage, error="DecryptError", check=check)

    def kek(value: str) -> Callable[[Draft], None]:
        return lambda draft: draft.header["recipients"][place].update(sealed_kek=value)

    sealed = good.header["recipients"][place]["sealed_kek"]
    for name, offset in (("encapsulated", 5), ("ciphertext", 40), ("tag", 79)):
        broken = flip(bytes.fromhex(sealed), offset).hex()
        refuse(f"sealed-kek-{name}-flipped", f"one bit of the {name} part", "unwrap", "B-17", kek(broken))
    refuse("sealed-kek-zeros", "a point of small order", "unwrap", "B-17", kek("00" * 80))
    elsewhere = good.seal_kek(alice, bundle_id=bytes(16))
    refuse("sealed-kek-of-another-bundle", "the context of another bundle", "unwrap", "B-17", kek(elsewhere))
    earlier = good.seal_kek(alice, release=6)
    refuse("sealed-kek-of-another-release", "the context of another release", "unwrap", "B-17", kek(earlier))
    theirs = good.header["recipients"][1 - place]["sealed_kek"]
    refuse("sealed-kek-of-another-recipient", "the other recipient's", "unwrap", "B-17", kek(theirs))

    def wrapped(section: int, value: str) -> Callable[[Draft], None]:
        return lambda draft: draft.header["sections"][section].update(wrapped_key=value)

    for section in range(len(good.sizes)):
        value = bytes.fromhex(good.header["sections"][section]["wrapped_key"])
        name = f"wrapped-key-{section}-flipped"
        refuse(name, f"one bit of data key {section}", "unlock", "B-19", wrapped(section, flip(value, 30).hex()))
    value = bytes.fromhex(good.header["sections"][1]["wrapped_key"])
    refuse("wrapped-key-nonce-flipped", "one bit of the nonce", "unlock", "B-19", wrapped(1, flip(value, 0).hex()))
    refuse("wrapped-key-tag-flipped", "one bit of the tag", "unlock", "B-19", wrapped(1, flip(value, 59).hex()))
    other = good.header["sections"][3]["wrapped_key"]
    refuse("wrapped-key-of-another-section", "another section's data key", "unlock", "B-19", wrapped(1, other))
    key = good.data_keys[1]
    elsewhere = good.wrap(key, 1, bundle_id=bytes(16))
    refuse("wrapped-key-of-another-bundle", "wrapped for another bundle", "unlock", "B-19", wrapped(1, elsewhere))
    earlier = good.wrap(key, 1, release=6)
    refuse("wrapped-key-of-another-release", "wrapped for another release", "unlock", "B-19", wrapped(1, earlier))


def chunk_vectors(out: Collection, good: Draft, model: Draft) -> None:
    """Ciphertext that does not open (B-21), or opens and is not what was signed (B-23)."""

    def refuse(name: str, flaw: str, section: int, change: Callable[[Draft], None], *, signed: bool = False) -> None:
        broken = good.clone()
        change(broken)
        digests = None if signed else "B-23"
        out.add(
            name, broken.file(), flaw, stage=str(section), error="DecryptError", check="B-21", chunk=0, digests=digests
        )

    def chunk(section: int, value: bytes, redigest: bool = False) -> Callable[[Draft], None]:
        def change(draft: Draft) -> None:
            draft.chunks[section] = [value]
            if redigest:
                draft.redigest(section)

        return change

    for section, name in ((0, "manifest"), (1, "part-0"), (3, "part-2")):
        data = good.chunks[section][0]
        for place, offset in (("first-byte", 0), ("middle", len(data) // 2), ("tag", -1)):
            refuse(f"{name}-{place}-flipped", f"{place} of {name}", section, chunk(section, flip(data, offset)))
    refuse("empty-part-tag-flipped", "the tag of an empty part", 2, chunk(2, flip(good.chunks[2][0], 3)))

    def swap(draft: Draft) -> None:
        draft.chunks[1], draft.chunks[3] = draft.chunks[3], draft.chunks[1]

    refuse("parts-swapped", "two parts of one size change places", 1, swap)

    def swap_keys(draft: Draft) -> None:
        swap(draft)
        for here, there in ((1, 3), (3, 1)):
            draft.header["sections"][here]["wrapped_key"] = draft.wrap(draft.data_keys[there], here)
            draft.redigest(here)

    refuse("parts-swapped-with-keys", "and their data keys with them, all signed", 1, swap_keys, signed=True)
    refuse("part-repeated", "part 0 in the place of part 2", 3, chunk(3, good.chunks[1][0]))
    refuse(
        "part-of-another-model", "the same part of another model, same keys of people", 1, chunk(1, model.chunks[1][0])
    )

    def transplant(draft: Draft) -> None:
        draft.chunks[1] = model.chunks[1]
        draft.header["sections"][1]["wrapped_key"] = draft.wrap(model.data_keys[1], 1)
        draft.redigest(1)

    refuse("part-of-another-model-with-key", "and its data key wrapped here, all signed", 1, transplant, signed=True)
    data = plaintext(1, 300)
    for name, flaw, sealed in (
        ("no-end-mark", "the last chunk is not marked as the last", good.seal_chunk(1, 0, False, data)),
        ("wrong-counter", "the first chunk is counted as the second", good.seal_chunk(1, 1, True, data)),
        ("wrong-bundle", "sealed for another bundle id", good.seal_chunk(1, 0, True, data, bundle_id=bytes(16))),
        ("wrong-section", "sealed for another section", good.seal_chunk(1, 0, True, data, as_section=3)),
        (
            "wrong-data-key",
            "sealed under the data key of another part",
            good.seal_chunk(3, 0, True, data, as_section=1),
        ),
        ("nonce-zero", "the end mark in the associated data only", _raw(good, data, bytes(12), None)),
        ("nonce-little-endian", "the counter backwards", _raw(good, data, b"\x01" + bytes(11), None)),
        ("nonce-prefix", "a random prefix in the nonce", _raw(good, data, b"prefix\x00" + bytes(4) + b"\x01", None)),
        ("no-associated-data", "nothing bound in", _raw(good, data, None, b"")),
        ("associated-data-without-domain", "no domain string", _raw(good, data, None, good.bundle_id)),
        ("plaintext-for-ciphertext", "not encrypted at all", data + bytes(16)),
        ("zeros-for-ciphertext", "zeros", bytes(316)),
    ):
        refuse(f"chunk-{name}", flaw, 1, chunk(1, sealed, redigest=True), signed=True)

    forged = good.clone()
    forged.chunks[1] = [good.seal_chunk(1, 0, True, b"\x66" * 300)]
    out.add(
        "forged-by-a-recipient",
        forged.file(),
        "a chunk that opens, made by somebody who knows the data key",
        digests="B-23",
        altered=[1],
    )
    for section in (0, 2):
        wrong = good.clone()
        wrong.header["sections"][section]["digest"] = "00" * 32
        # The manifest's digest is checked whenever it is read.
        refused = {} if section else {"stage": "0", "error": "SignatureError", "check": "B-23"}
        out.add(f"digest-wrong-{section}", wrong.file(), "signed with a wrong digest", digests="B-23", **refused)
    flat = good.clone()
    flat.header["sections"][1]["digest"] = hashlib.sha256(good.chunks[1][0]).hexdigest()
    out.add("digest-of-one-level", flat.file(), "a plain SHA-256 of the ciphertext", digests="B-23")


def _raw(draft: Draft, data: bytes, nonce: bytes | None, aad: bytes | None) -> bytes:
    """A chunk of section 1 sealed with another nonce, or other associated data, than the specification's."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    right = bytes(11) + b"\x01"
    bound = b"motte-bundle-1 chunk\x00" + draft.bundle_id + (1).to_bytes(4, "big") + right
    return AESGCM(draft.data_keys[1]).encrypt(nonce or right, data, bound if aad is None else aad)


def large_vectors(out: Collection, big: Draft) -> None:
    """Sections of several chunks, as pieces of one file."""
    name = "good-three-chunks"
    out.add(name, big.file(), "none: a part of 2 MiB and 200 bytes, and one of exactly 1 MiB")
    make = Pieces(out, big, name)
    a, b, c, d, end = make.starts
    make.flipped("chunk-0-flipped", a, 0)
    make.flipped("chunk-0-tag-flipped", b - 1, 0)
    make.flipped("chunk-1-flipped", b + CHUNK_BYTES // 2, 1)
    make.flipped("chunk-1-tag-flipped", c - 16, 1)
    make.flipped("chunk-2-flipped", c, 2)
    make.flipped("chunk-2-tag-flipped", d - 1, 2)
    make.flipped("full-last-chunk-flipped", end - 17, 0, 2)
    head, tail = make.cut(0, a), make.cut(c, end)
    first, second, other = make.chunk(0), make.chunk(1), make.chunk(3)
    make.refuse("chunks-swapped", "chunks 0 and 1 change places", [head, second, first, tail], 0)
    make.refuse("chunk-duplicated", "chunk 0 in the place of chunk 1", [head, first, first, tail], 1)
    make.refuse("chunk-of-another-part", "part 1's chunk in part 0", [head, other, second, tail], 0)
    make.refuse_open("chunk-dropped", "chunk 1 left out", [head, first, tail], "B-14")
    make.refuse_open("truncated-after-chunk-0", "ends after a chunk", [make.cut(0, b)], "B-14")
    make.refuse_open("truncated-after-chunk-1", "ends after two chunks", [make.cut(0, c)], "B-14")
    make.refuse_open("truncated-in-chunk-1", "ends within a chunk", [make.cut(0, c - 100)], "B-14")
    end_mark_vectors(make)


def end_mark_vectors(make: Pieces) -> None:
    """The last chunk of a section is not the one that is marked as the last."""
    big = make.big
    _, _, c, d, end = make.starts
    sections = len(big.signed_front())
    # Signed sizes that leave the last chunk out: what is then last lacks the end mark.
    short = big.clone()
    size = 2 * CHUNK_BYTES
    short.header["sections"][1].update(plaintext_bytes=size, ciphertext_bytes=ciphertext_bytes(size))
    pieces = [literal(short.signed_front()), make.cut(sections, c), make.chunk(3)]
    make.refuse("chunk-last-dropped-signed", "the last chunk left out, sizes signed", pieces, 1)
    rest = plaintext(1, big.sizes[1])[-200:]
    pieces = [make.cut(0, c), literal(big.seal_chunk(1, 2, False, rest)), make.chunk(3)]
    make.refuse("end-mark-missing", "the last of three chunks is not marked as the last", pieces, 2)
    # The end mark before the end: sizes signed so that 200 bytes follow the marked chunk.
    longer = big.clone()
    size = CHUNK_BYTES + 200
    longer.header["sections"][2].update(plaintext_bytes=size, ciphertext_bytes=ciphertext_bytes(size))
    more = big.seal_chunk(2, 1, True, bytes(200))
    pieces = [literal(longer.signed_front()), make.cut(sections, end), literal(more)]
    make.refuse("end-mark-early", "a chunk marked as the last, and another after it", pieces, 0, section=2)
    extra = big.clone()
    extra.header["sections"][2]["ciphertext_bytes"] += 16
    empty = literal(big.seal_chunk(2, 1, True, b""))
    pieces = [literal(extra.signed_front()), make.cut(sections, end), empty]
    make.refuse_open("extra-empty-chunk", "an empty last chunk after a full one, sizes signed", pieces, "B-11")
    make.refuse_open("extra-empty-chunk-unsigned", "the same, sizes as they were", [make.cut(0, end), empty], "B-14")
    pieces = [make.cut(0, d), make.chunk(3), make.chunk(3)]
    make.refuse_open("part-appended", "a part more than the header lists", pieces, "B-14")


def good_vectors(out: Collection, folder: Path, small: Draft, keys: dict[str, Any]) -> None:
    """Bundles that open."""
    alice, bob, signer = keys["alice"], keys["bob"], keys["signer"]
    out.add("good-three-parts", small.file(), "none: parts of 300, 0 and 300 bytes, two recipients")
    out.add("good-second-recipient", small.file(), "none: opened by the other recipient", recipient="bob")
    out.add("good-release-at-minimum", small.file(), "none: release 7, at least 7 demanded", min_release=7)
    out.add("good-minimal", Draft([0, 0], [alice], signer, release=0).file(), "none: an empty manifest, an empty part")
    out.add(
        "good-highest-release", Draft([5, 5], [alice], signer, release=MAX_RELEASE).file(), "none: release 2^53 - 1"
    )
    names = ["fc.weight", "größe", "w\u2028eight", "\U0001f3f0"]
    draft = Draft([5, 5], [alice], signer, public_weights=sorted(names))
    out.add("good-names", draft.file(), "none: names of public weights beyond ASCII")
    path = folder / "good-recipient-added.motte"
    path.write_bytes(Draft([40, 200], [alice], signer).file())
    add_recipients(path, [bob.public], opener=alice, signer=signer)
    added = path.read_bytes()
    out.add("good-recipient-added", added, "none: release 8 of a bundle that got a recipient", recipient="bob")
    path = folder / "recipient-removed.motte"
    path.write_bytes(added)
    remove_recipients(path, [bob.public], opener=alice, signer=signer)
    removed = path.read_bytes()
    path.unlink()
    out.add("good-recipient-removed", removed, "none: release 9, after the removal, for who is left", min_release=9)
    out.add(
        "recipient-removed",
        removed,
        "opened by somebody who was removed",
        stage="unwrap",
        error="KeyAccessError",
        check="B-16",
        recipient="bob",
    )
    out.add(
        "rollback-to-before-the-removal",
        added,
        "the bundle from before a removal, release 9 demanded",
        stage="open",
        error="RollbackError",
        check="B-15",
        min_release=9,
    )


def main() -> None:
    """Write the folder given on the command line, which must be empty or hold vectors."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.motte"), folder / "index.json", folder / "keys.json"]:
        old.unlink(missing_ok=True)
    primitives.random_bytes = seeded
    keys: dict[str, Any] = {
        "signer": SignerPrivateKey.new(),
        "other": SignerPrivateKey.new(),
        "alice": RecipientPrivateKey.new(),
        "bob": RecipientPrivateKey.new(),
        "mallory": RecipientPrivateKey.new(),
    }
    people = [keys["alice"], keys["bob"]]
    small = Draft([120, 300, 0, 300], people, keys["signer"], public_weights=["head.bias", "head.weight"])
    model = Draft([120, 300, 0, 300], people, keys["signer"], public_weights=["head.bias", "head.weight"])
    big = Draft([64, 2 * CHUNK_BYTES + 200, CHUNK_BYTES], [keys["alice"]], keys["signer"])
    out = Collection(folder)
    good_vectors(out, folder, small, keys)
    prefix_vectors(out, small)
    length_vectors(out, small)
    signature_vectors(out, small, keys["other"])
    encoding_vectors(out, small)
    field_vectors(out, small)
    relation_vectors(out, small)
    key_vectors(out, small, keys["alice"])
    chunk_vectors(out, small, model)
    large_vectors(out, big)
    secrets = {name: key.secret.hex() for name, key in keys.items()}
    (folder / "keys.json").write_text(json.dumps(secrets, indent=1) + "\n")
    (folder / "index.json").write_text(json.dumps(out.entries, indent=1) + "\n")
    total = sum(os.path.getsize(each) for each in folder.iterdir())
    print(f"{len(out.entries)} vectors, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
