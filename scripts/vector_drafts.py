"""Bundles in pieces that can be broken one by one, for make_vectors.py."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

from motte.limits import CHUNK_BYTES
from motte.seal import primitives
from motte.seal.header import ciphertext_bytes, front
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.strict_json import canonical

_counter = 0


def seeded(count: int) -> bytes:
    """Stands in for the system's randomness: the stream of one seed."""
    global _counter  # noqa: PLW0603 - a stream has a position
    _counter += 1
    return hashlib.shake_256(b"motte test vectors 1" + _counter.to_bytes(8, "big")).digest(count)


def plaintext(section: int, size: int) -> bytes:
    """The plaintext of a section: what a reader of a good vector must find, and of a broken one must not."""
    return hashlib.shake_256(b"motte vector section %d" % section).digest(size)


class Draft:
    """A bundle in pieces that can be broken one by one."""

    def __init__(
        self,
        sizes: list[int],
        recipients: list[RecipientPrivateKey],
        signer: SignerPrivateKey,
        *,
        release: int = 7,
        public_weights: list[str] | None = None,
    ) -> None:
        self.sizes = sizes
        self.signer = signer
        self.recipients = sorted(recipients, key=lambda key: key.public.raw)
        self.bundle_id = primitives.random_bytes(16)
        self.release = release
        self.kek = primitives.random_bytes(32)
        self.data_keys = [primitives.random_bytes(32) for _ in sizes]
        self.chunks = [self.seal_section(index) for index in range(len(sizes))]
        self.header: dict[str, Any] = {
            "bundle_id": self.bundle_id.hex(),
            "format": "motte-bundle-1",
            "parts": len(sizes) - 1,
            "public_weights": public_weights or [],
            "recipients": [{"key": k.public.raw.hex(), "sealed_kek": self.seal_kek(k)} for k in self.recipients],
            "release": release,
            "sections": [self.entry(index) for index in range(len(sizes))],
            "signer": signer.public.raw.hex(),
        }

    def clone(self) -> Draft:
        """A copy to break."""
        other = copy.copy(self)
        other.header = copy.deepcopy(self.header)
        other.chunks = [list(chunks) for chunks in self.chunks]
        return other

    def seal_kek(self, key: RecipientPrivateKey, *, bundle_id: bytes | None = None, release: int | None = None) -> str:
        """The key-encryption key sealed to ``key``, in hexadecimal."""
        info = primitives.kek_info(bundle_id or self.bundle_id, self.release if release is None else release)
        return primitives.hpke_seal(key.public.raw, self.kek, info=info).hex()

    def wrap(self, data_key: bytes, section: int, *, bundle_id: bytes | None = None, release: int | None = None) -> str:
        """A data key wrapped for ``section``, in hexadecimal."""
        return primitives.wrap_data_key(
            self.kek,
            data_key,
            bundle_id=bundle_id or self.bundle_id,
            release=self.release if release is None else release,
            section=section,
        ).hex()

    def seal_chunk(
        self,
        section: int,
        index: int,
        last: bool,
        data: bytes,
        *,
        bundle_id: bytes | None = None,
        as_section: int | None = None,
    ) -> bytes:
        """One chunk's ciphertext under the data key of ``section``."""
        cipher = primitives.SectionCipher(
            self.data_keys[section],
            bundle_id=bundle_id or self.bundle_id,
            section=section if as_section is None else as_section,
        )
        into = bytearray(len(data) + 16)
        cipher.seal(index, last, memoryview(data), memoryview(into))
        return bytes(into)

    def seal_section(self, section: int, **options: Any) -> list[bytes]:
        """All chunks of a section."""
        data = plaintext(section, self.sizes[section])
        pieces = [data[start : start + CHUNK_BYTES] for start in range(0, max(1, len(data)), CHUNK_BYTES)]
        return [self.seal_chunk(section, i, i == len(pieces) - 1, p, **options) for i, p in enumerate(pieces)]

    def entry(self, index: int) -> dict[str, Any]:
        """The header's entry for a section as its chunks are now."""
        digest = primitives.section_digest(primitives.chunk_digest(chunk) for chunk in self.chunks[index])
        return {
            "ciphertext_bytes": ciphertext_bytes(self.sizes[index]),
            "digest": digest.hex(),
            "index": index,
            "plaintext_bytes": self.sizes[index],
            "wrapped_key": self.wrap(self.data_keys[index], index),
        }

    def redigest(self, index: int) -> None:
        """Let the header's digest follow the chunks."""
        self.header["sections"][index]["digest"] = self.entry(index)["digest"]

    def body(self) -> bytes:
        """All ciphertext."""
        return b"".join(chunk for chunks in self.chunks for chunk in chunks)

    def signed_front(self, encoded: bytes | None = None) -> bytes:
        """Magic, length, header, signature."""
        start = front(canonical(self.header) if encoded is None else encoded)
        return start + primitives.sign_header(self.signer.secret, start)

    def file(self, encoded: bytes | None = None) -> bytes:
        """The whole file, signed as it stands."""
        return self.signed_front(encoded) + self.body()


class Collection:
    """The vectors made so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        data: bytes | list[dict[str, Any]],
        flaw: str,
        *,
        stage: str = "ok",
        error: str = "",
        check: str = "",
        inspect: str = "valid",
        digests: str | None = None,
        **demands: Any,
    ) -> None:
        """Keep a vector.

        Args:
            stage: where the reader must refuse: open, unwrap, unlock, a section's number; ``ok`` = nowhere.
            inspect: ``valid`` or ``invalid`` (the signature, once the structure holds), or a check.
            digests: the check that ``verify_digests`` must fail with; None: as ``stage``, or passes.
        """
        entry: dict[str, Any] = {"name": name, "flaw": flaw, "stage": stage, "inspect": inspect}
        if error:
            entry.update(error=error, check=check)
        if digests:
            entry["digests"] = digests
        entry.update(demands)
        if isinstance(data, bytes):
            entry["file"] = f"{name}.motte"
            (self.folder / entry["file"]).write_bytes(data)
        else:
            entry["pieces"] = data
        if any(each["name"] == name for each in self.entries):
            raise SystemExit(f"two vectors named {name}")
        self.entries.append(entry)


def flip(data: bytes, offset: int, bit: int = 0) -> bytes:
    """``data`` with one bit the other way."""
    changed = bytearray(data)
    changed[offset] ^= 1 << bit
    return bytes(changed)


class Pieces:
    """Builds vectors from pieces of one large file.

    ``starts`` are where the chunks of part 0 (three of them) and of part 1 (one) begin, and then where the file ends.
    """

    def __init__(self, out: Collection, big: Draft, name: str) -> None:
        self.out, self.big, self.name, self.base = out, big, name, big.file()
        full = CHUNK_BYTES + 16
        first = len(big.signed_front()) + big.sizes[0] + 16
        self.starts = [first, first + full, first + 2 * full, first + 2 * full + 216, first + 3 * full + 216]
        if len(self.base) != self.starts[-1]:
            raise SystemExit("the layout of the large bundle is not what it was")

    def cut(self, first: int, last: int) -> dict[str, Any]:
        """Bytes of the large file."""
        return {"file": f"{self.name}.motte", "start": first, "stop": last}

    def chunk(self, number: int) -> dict[str, Any]:
        """A whole chunk: 0 to 2 of part 0, 3 of part 1."""
        return self.cut(self.starts[number], self.starts[number + 1])

    def refuse(self, title: str, flaw: str, pieces: list[dict[str, Any]], chunk: int, section: int = 1) -> None:
        """A vector whose chunk ``chunk`` does not open."""
        facts: dict[str, Any] = {"error": "DecryptError", "check": "B-21", "chunk": chunk, "digests": "B-23"}
        self.out.add(title, pieces, flaw, stage=str(section), **facts)

    def refuse_open(self, title: str, flaw: str, pieces: list[dict[str, Any]], check: str) -> None:
        """A vector that is refused before any chunk."""
        self.out.add(title, pieces, flaw, stage="open", error="BundleError", check=check, inspect=check)

    def flipped(self, title: str, offset: int, chunk: int, section: int = 1) -> None:
        """A vector with one bit the other way."""
        changed = flip(self.base[offset : offset + 1], 0)
        pieces = [self.cut(0, offset), literal(changed), self.cut(offset + 1, len(self.base))]
        self.refuse(title, "one bit flipped", pieces, chunk, section)


def literal(data: bytes) -> dict[str, Any]:
    """A piece given in full."""
    return {"hex": data.hex()}
