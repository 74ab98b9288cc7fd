"""Broken bundles, each against the check of docs/spec/bundle.md that must refuse it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from motte.audit.attacks.conformance import Trial
from motte.audit.attacks.conformance_drafts import Draft, PlaintextError, flip, put, remove
from motte.errors import BundleError, DecryptError, KeyAccessError, MotteError, RollbackError, SignatureError
from motte.limits import CHUNK_BYTES, MAX_HEADER_BYTES, MAX_MANIFEST_BYTES, MAX_RELEASE
from motte.seal import RecipientPrivateKey, SignerPrivateKey, SignerPublicKey, open_bundle
from motte.seal.header import MAGIC, ciphertext_bytes, front

_UNTOUCHED: Final = 0xEE
Change = Callable[[Draft], None]


class _Reader:
    """Reads bundles as a worker does, as far as it gets."""

    def __init__(self, folder: Path, signer: SignerPublicKey, recipient: RecipientPrivateKey) -> None:
        self._path = folder / "vector.motte"
        self._signer, self._recipient = signer, recipient

    def read(
        self,
        data: bytes,
        *,
        signer: SignerPublicKey | None = None,
        recipient: RecipientPrivateKey | None = None,
        min_release: int = 0,
        digests: bool = False,
    ) -> None:
        """Open everything in ``data``.

        Raises:
            MotteError: it is refused. PlaintextError: and yet plaintext came out.
        """
        self._path.write_bytes(data)
        with open_bundle(self._path, signer=signer or self._signer, min_release=min_release) as bundle:
            if digests:
                bundle.verify_digests()
            with bundle.unlock(bundle.unwrap(recipient or self._recipient)) as unlocked:
                unlocked.manifest()
                for part in range(unlocked.parts):
                    into = bytearray([_UNTOUCHED]) * unlocked.part_bytes(part)
                    try:
                        unlocked.open_part(part, memoryview(into))
                    except MotteError as problem:
                        if any(into):
                            raise PlaintextError("plaintext of a refused part is in its destination") from problem
                        raise


def bundle_trials(folder: Path) -> Iterator[Trial]:
    """All of them; files are written below ``folder``."""
    signer, other = SignerPrivateKey.new(), SignerPrivateKey.new()
    alice, bob, mallory = (RecipientPrivateKey.new() for _ in range(3))
    good = Draft([120, 300, 0, 300], [alice, bob], signer)
    model = Draft([120, 300, 0, 300], [alice, bob], signer)
    reader = _Reader(folder, signer.public, alice)
    yield Trial("an honest bundle", "A2", (), None, partial(reader.read, good.file(), digests=True))
    yield Trial(
        "an honest bundle, by another recipient", "A2", (), None, partial(reader.read, good.file(), recipient=bob)
    )
    yield from _prefixes(reader, good)
    yield from _lengths(reader, good)
    yield from _signatures(reader, good, other)
    yield from _encodings(reader, good)
    yield from _fields(reader, good)
    yield from _relations(reader, good)
    yield from _keys(reader, good, alice, mallory)
    yield from _chunks(reader, good, model)
    yield from _large(reader, Draft([64, 2 * CHUNK_BYTES + 200, CHUNK_BYTES], [alice], signer))


def _refused(
    reader: _Reader, kind: type[MotteError], check: str, name: str, data: bytes, claim: str = "A2", **how: Any
) -> Trial:
    return Trial(name, claim, (kind,), check, partial(reader.read, data, **how))


def _prefixes(reader: _Reader, good: Draft) -> Iterator[Trial]:
    data, header_bytes = good.file(), len(good.text())

    def length(number: int) -> bytes:
        return MAGIC + number.to_bytes(4, "big") + data[12:]

    for name, broken, check in (
        ("nothing at all", b"", "B-1"),
        ("ends after the prefix", data[:12], "B-1"),
        ("ends within the magic", data[:5], "B-1"),
        ("ends within the length", data[:10], "B-1"),
        ("first bit of the magic flipped", flip(data, 0, 7), "B-2"),
        ("last bit of the magic flipped", flip(data, 7), "B-2"),
        ("copied in text mode", data.replace(b"\r\n", b"\n", 1), "B-2"),
        ("without the magic", data[8:], "B-2"),
        ("another kind of file", b"PK\x03\x04" + bytes(200), "B-2"),
        ("a header of no bytes", length(0), "B-3"),
        ("a header of one byte", length(1), "B-3"),
        ("a header beyond the limit", length(MAX_HEADER_BYTES + 1), "B-3"),
        ("a header of 4 GiB", length(0xFFFFFFFF), "B-3"),
        ("a header longer than the file", length(len(data)), "B-3"),
        ("ends within the header", data[: 12 + header_bytes // 2], "B-3"),
        ("ends after the header", data[: 12 + header_bytes], "B-3"),
        ("ends within the signature", data[: 12 + header_bytes + 63], "B-3"),
    ):
        yield _refused(reader, BundleError, check, name, broken)


def _lengths(reader: _Reader, good: Draft) -> Iterator[Trial]:
    data, end = good.file(), len(good.signed_front())
    yield _refused(reader, BundleError, "B-14", "no section at all", data[:end])
    for index, size in enumerate(good.sizes):
        yield _refused(reader, BundleError, "B-14", f"ends within section {index}", data[: end + 1])
        end += ciphertext_bytes(size)
        if index < len(good.sizes) - 1:
            yield _refused(reader, BundleError, "B-14", f"ends after section {index}", data[:end])
    for name, broken in (
        ("the last byte is missing", data[:-1]),
        ("the last tag is missing", data[:-16]),
        ("a byte after the last section", data + b"\x00"),
        ("a newline after the last section", data + b"\n"),
        ("a second bundle after the first", data + data),
        ("two signatures", good.signed_front() + data[-len(good.body()) - 64 :]),
    ):
        yield _refused(reader, BundleError, "B-14", name, broken)


def _signatures(reader: _Reader, good: Draft, other: SignerPrivateKey) -> Iterator[Trial]:
    data, start = good.file(), front(good.text())
    header = good.header
    changes = {
        "bundle id": (header["bundle_id"], _turned(header["bundle_id"])),
        "release, lowered": ('"release":7', '"release":6'),
        "release, raised": ('"release":7', '"release":9'),
        "digest": (header["sections"][1]["digest"], _turned(header["sections"][1]["digest"])),
        "wrapped key": (header["sections"][1]["wrapped_key"], _turned(header["sections"][1]["wrapped_key"])),
        "sealed key": (header["recipients"][0]["sealed_kek"], _turned(header["recipients"][0]["sealed_kek"])),
        "recipient": (header["recipients"][0]["key"], _turned(header["recipients"][0]["key"])),
        "public weight": ('"head.bias"', '"head.bibs"'),
        "size": ('"plaintext_bytes":300', '"plaintext_bytes":301'),
        "format": ("motte-bundle-1", "motte-bundle-0"),
    }
    for name, (old, new) in changes.items():
        broken = data.replace(old.encode(), new.encode(), 1)
        yield _refused(reader, SignatureError, "B-4", f"{name} changed after signing", broken)
    twin = good.clone()
    twin.signer = other
    unnamed = twin.file()
    twin.header["signer"] = other.public.raw.hex()
    sibling = good.clone()
    sibling.header["release"] = 8
    for name, broken in (
        ("first byte of the signature", flip(data, len(start))),
        ("last byte of the signature", flip(data, len(start) + 63)),
        ("zeros for a signature", start + bytes(64) + good.body()),
        ("not signed", start + good.body()),
        ("the header's length one less", flip(data, 11)),
        ("signed by another who names the demanded signer", unnamed),
        ("a sibling's signature", start + sibling.signed_front()[-64:] + good.body()),
    ):
        yield _refused(reader, SignatureError, "B-4", name, broken, "A3")
    yield _refused(reader, SignatureError, "B-4", "signed by another who is named", twin.file(), "A3")
    yield _refused(reader, SignatureError, "B-4", "another signer is demanded", data, "A3", signer=other.public)
    named = good.clone()
    named.header["signer"] = other.public.raw.hex()
    yield _refused(reader, SignatureError, "B-9", "names another signer", named.file(), "A3")
    named.header["signer"] = "01" + "00" * 31
    yield _refused(reader, SignatureError, "B-9", "names a key for which anyone can sign", named.file(), "A3")


def _turned(text: str) -> str:
    return text[:-1] + ("1" if text[-1] == "0" else "0")


def _encodings(reader: _Reader, good: Draft) -> Iterator[Trial]:
    text = good.text()
    release = b'"release":7'

    def instead(old: bytes, new: bytes) -> bytes:
        return text.replace(old, new)

    backwards = json.dumps(dict(sorted(good.header.items(), reverse=True)), separators=(",", ":")).encode()
    for name, encoded, check in (
        ("the closing brace is missing", text[:-1], "B-5"),
        ("two headers", text + text, "B-5"),
        ("a list around the header", b"[" + text + b"]", "B-5"),
        ("bytes that are not UTF-8", instead(b"head.bias", b"head.bi\xff\xfe"), "B-5"),
        ("a byte order mark", b"\xef\xbb\xbf" + text, "B-5"),
        ("NaN for a number", instead(release, b'"release":NaN'), "B-5"),
        ("Infinity for a number", instead(release, b'"release":Infinity'), "B-5"),
        ("5,000 levels deep", b"[" * 5000 + b"]" * 5000, "B-5"),
        ("a number of 5,000 digits", instead(release, b'"release":' + b"9" * 5000), "B-5"),
        ("a field given twice", instead(release, b'"release":7,"release":7'), "B-5"),
        ("two releases", instead(release, b'"release":9,"release":7'), "B-5"),
        ("an object without fields", b"{}", "B-6"),
        ("a format of the future", instead(b"motte-bundle-1", b"motte-bundle-2"), "B-6"),
        ("no format", instead(b'"format":"motte-bundle-1",', b""), "B-6"),
        ("the format is a number", instead(b'"motte-bundle-1"', b"1"), "B-6"),
        ("spaces after commas", json.dumps(good.header, sort_keys=True).encode(), "B-7"),
        ("a newline after the header", text + b"\n", "B-7"),
        ("fields not sorted", backwards, "B-7"),
        ("a needless escape", instead(b"head.bias", b"head.b\\u0069as"), "B-7"),
        ("an exponent", instead(release, b'"release":7e0'), "B-7"),
        ("minus zero", instead(release, b'"release":-0'), "B-7"),
    ):
        yield _refused(reader, BundleError, check, name, good.file(encoded))


_FIELDS: Final[tuple[tuple[str, str, Any], ...]] = (
    ("a field that nobody knows", "comment", "hello"),
    ("the same in a section", "sections.1.offset", 0),
    ("the same in a recipient", "recipients.0.name", "alice"),
    ("a release that is a string", "release", "7"),
    ("a release that is true", "release", True),
    ("a release that is 7.0", "release", 7.0),
    ("a negative release", "release", -1),
    ("a release beyond the bound", "release", MAX_RELEASE + 1),
    ("a bundle id of 15 bytes", "bundle_id", "00" * 15),
    ("hexadecimal in capitals", "bundle_id", "AB" * 16),
    ("a digest of 31 bytes", "sections.1.digest", "00" * 31),
    ("a wrapped key without its tag", "sections.1.wrapped_key", "00" * 44),
    ("a sealed key with a byte more", "recipients.0.sealed_kek", "00" * 81),
    ("a signer that is null", "signer", None),
    ("sections that are an object", "sections", {}),
    ("a section that is a number", "sections.1", 5),
    ("a section of 2^60 bytes", "sections.1.plaintext_bytes", 1 << 60),
    ("a section of -1 bytes", "sections.1.plaintext_bytes", -1),
    ("15 bytes of ciphertext", "sections.1.ciphertext_bytes", 15),
    ("a name that is a number", "public_weights.0", 1),
    ("a name of 513 bytes", "public_weights.0", "a" * 513),
    ("half a character", "public_weights.0", "\ud800"),
    ("2^40 parts", "parts", 1 << 40),
)
_GONE: Final = (
    "bundle_id",
    "parts",
    "public_weights",
    "recipients",
    "release",
    "sections",
    "signer",
    "recipients.0.sealed_kek",
    "sections.1.digest",
    "sections.1.wrapped_key",
    "sections.1.index",
)


def _fields(reader: _Reader, good: Draft) -> Iterator[Trial]:
    for name, path, value in _FIELDS:
        broken = good.clone()
        put(broken.header, path, value)
        yield _refused(reader, BundleError, "B-8", name, broken.file())
    for path in _GONE:
        broken = good.clone()
        remove(broken.header, path)
        yield _refused(reader, BundleError, "B-8", f"without {path}", broken.file())


def _relations(reader: _Reader, good: Draft) -> Iterator[Trial]:
    def swap(header: dict[str, Any]) -> None:
        header["sections"][1], header["sections"][3] = header["sections"][3], header["sections"][1]

    def huge(header: dict[str, Any]) -> None:
        size = MAX_MANIFEST_BYTES + 1
        header["sections"][0].update(plaintext_bytes=size, ciphertext_bytes=ciphertext_bytes(size))

    changes: tuple[tuple[str, str, Callable[[dict[str, Any]], object]], ...] = (
        ("a manifest and no parts", "B-8", lambda h: h.update(parts=0, sections=h["sections"][:1])),
        ("parts, but no sections", "B-10", lambda h: put(h, "sections", [])),
        ("one section too few", "B-10", lambda h: h["sections"].pop()),
        ("one section too many", "B-10", lambda h: h["sections"].append(h["sections"][-1])),
        ("one part fewer than sections say", "B-10", lambda h: put(h, "parts", 2)),
        ("two sections change places", "B-10", swap),
        ("two sections of one number", "B-10", lambda h: put(h, "sections.2.index", 1)),
        ("a number left out", "B-10", lambda h: put(h, "sections.3.index", 4)),
        ("ciphertext without room for a tag", "B-11", lambda h: put(h, "sections.1.ciphertext_bytes", 300)),
        ("one chunk, two tags", "B-11", lambda h: put(h, "sections.1.ciphertext_bytes", 332)),
        ("an empty section as 32 bytes", "B-11", lambda h: put(h, "sections.2.ciphertext_bytes", 32)),
        ("a manifest beyond its bound", "B-11", huge),
        ("sealed to nobody", "B-12", lambda h: put(h, "recipients", [])),
        ("a recipient twice", "B-12", lambda h: h["recipients"].append(h["recipients"][-1])),
        ("recipients not sorted", "B-12", lambda h: h["recipients"].reverse()),
        ("a recipient's key that everybody can open", "B-12", lambda h: put(h, "recipients.0.key", "00" * 32)),
        ("a public weight twice", "B-13", lambda h: put(h, "public_weights", ["a", "a"])),
        ("public weights not sorted", "B-13", lambda h: put(h, "public_weights", ["b", "a"])),
    )
    for name, check, change in changes:
        broken = good.clone()
        change(broken.header)
        yield _refused(reader, BundleError, check, name, broken.file())


def _keys(reader: _Reader, good: Draft, alice: RecipientPrivateKey, mallory: RecipientPrivateKey) -> Iterator[Trial]:
    data = good.file()
    yield _refused(reader, RollbackError, "B-15", "release 7, and 8 demanded", data, "A4", min_release=8)
    yield _refused(reader, KeyAccessError, "B-16", "not sealed to our key", data, "A1", recipient=mallory)
    place = next(at for at, key in enumerate(good.recipients) if key.public == alice.public)
    sealed = good.header["recipients"][place]["sealed_kek"]
    for name, value in (
        ("one bit of the encapsulated key", flip(bytes.fromhex(sealed), 5).hex()),
        ("one bit of the sealed key", flip(bytes.fromhex(sealed), 40).hex()),
        ("one bit of its tag", flip(bytes.fromhex(sealed), 79).hex()),
        ("a point of small order", "00" * 80),
        ("sealed for another bundle", good.seal_kek(alice, bundle_id=bytes(16))),
        ("sealed for another release", good.seal_kek(alice, release=6)),
        ("the other recipient's", good.header["recipients"][1 - place]["sealed_kek"]),
    ):
        broken = good.clone()
        broken.header["recipients"][place].update(sealed_kek=value)
        yield _refused(reader, DecryptError, "B-17", f"key-encryption key: {name}", broken.file(), "B1")
    wrapped = bytes.fromhex(good.header["sections"][1]["wrapped_key"])
    for name, value in (
        ("one bit of the nonce", flip(wrapped, 0).hex()),
        ("one bit of the key", flip(wrapped, 30).hex()),
        ("one bit of the tag", flip(wrapped, 59).hex()),
        ("another section's", good.header["sections"][3]["wrapped_key"]),
        ("wrapped for another bundle", good.wrap(good.data_keys[1], 1, bundle_id=bytes(16))),
        ("wrapped for another release", good.wrap(good.data_keys[1], 1, release=6)),
    ):
        broken = good.clone()
        broken.header["sections"][1].update(wrapped_key=value)
        yield _refused(reader, DecryptError, "B-19", f"data key: {name}", broken.file())


def _chunks(reader: _Reader, good: Draft, model: Draft) -> Iterator[Trial]:
    for section, name in ((0, "the manifest"), (1, "part 0"), (3, "part 2")):
        data = good.chunks[section][0]
        for place, offset in (("first byte", 0), ("middle", len(data) // 2), ("tag", len(data) - 1)):
            yield _altered(reader, good, f"{name}: {place} flipped", section, flip(data, offset), signed=False)
    data = good.plain[1]
    for name, sealed in (
        ("the last chunk is not marked as the last", good.seal_chunk(1, 0, False, data)),
        ("the first chunk is counted as the second", good.seal_chunk(1, 1, True, data)),
        ("sealed for another bundle", good.seal_chunk(1, 0, True, data, bundle_id=bytes(16))),
        ("sealed for another section", good.seal_chunk(1, 0, True, data, section=3)),
        ("sealed under another part's key", good.seal_chunk(3, 0, True, data, section=1)),
        ("not encrypted at all", data + bytes(16)),
        ("zeros", bytes(316)),
        ("the same part of another model", model.chunks[1][0]),
        ("part 2 in its place", good.chunks[3][0]),
    ):
        yield _altered(reader, good, f"part 0, signed: {name}", 1, sealed, signed=True)
    swapped = good.clone()
    swapped.chunks[1], swapped.chunks[3] = swapped.chunks[3], swapped.chunks[1]
    yield _refused(reader, DecryptError, "B-21", "two parts of one size change places", swapped.file())
    for here, there in ((1, 3), (3, 1)):
        swapped.header["sections"][here]["wrapped_key"] = good.wrap(good.data_keys[there], here)
        swapped.redigest(here)
    yield _refused(reader, DecryptError, "B-21", "and their keys with them, all signed", swapped.file())
    forged = good.clone()
    forged.chunks[1] = [good.seal_chunk(1, 0, True, b"\x66" * 300)]
    name = "a part forged by a recipient, digests verified"
    yield _refused(reader, SignatureError, "B-23", name, forged.file(), "D3", digests=True)
    forged = good.clone()
    forged.chunks[0] = [good.seal_chunk(0, 0, True, b"\x66" * 120)]
    name = "a manifest forged by a recipient, without asking"
    yield _refused(reader, SignatureError, "B-23", name, forged.file(), "D3")
    wrong = good.clone()
    wrong.header["sections"][2]["digest"] = "00" * 32
    yield _refused(reader, SignatureError, "B-23", "signed with a wrong digest", wrong.file(), "D3", digests=True)


def _altered(reader: _Reader, good: Draft, name: str, section: int, value: bytes, *, signed: bool) -> Trial:
    broken = good.clone()
    broken.chunks[section] = [value]
    if signed:
        broken.redigest(section)
    return _refused(reader, DecryptError, "B-21", name, broken.file())


def _large(reader: _Reader, big: Draft) -> Iterator[Trial]:
    """Sections of several chunks."""
    yield Trial("an honest bundle of several chunks", "A2", (), None, partial(reader.read, big.file(), digests=True))

    def changed(change: Change) -> bytes:
        broken = big.clone()
        change(broken)
        return broken.file()

    def order(*chunks: int) -> Change:
        return lambda draft: draft.chunks.__setitem__(1, [big.chunks[1][at] for at in chunks])

    def short(draft: Draft) -> None:
        draft.chunks[1] = big.chunks[1][:2]
        size = 2 * CHUNK_BYTES
        draft.header["sections"][1].update(plaintext_bytes=size, ciphertext_bytes=ciphertext_bytes(size))
        draft.redigest(1)

    def foreign(draft: Draft) -> None:
        draft.chunks[1] = [big.chunks[2][0], *big.chunks[1][1:]]

    for name, change in (
        ("chunks 0 and 1 change places", order(1, 0, 2)),
        ("chunk 0 in the place of chunk 1", order(0, 0, 2)),
        ("a chunk of another part", foreign),
        ("the last chunk left out, sizes signed", short),
    ):
        yield _refused(reader, DecryptError, "B-21", name, changed(change))
    yield _refused(reader, BundleError, "B-14", "a chunk left out", changed(order(0, 2)))
    yield _refused(reader, BundleError, "B-14", "a chunk given twice", changed(order(0, 1, 1, 2)))
