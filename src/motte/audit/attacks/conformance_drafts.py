"""A bundle in pieces that can be broken one by one, and signed again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from motte.errors import MotteError
from motte.limits import CHUNK_BYTES
from motte.seal import primitives
from motte.seal.header import FORMAT, ciphertext_bytes, front
from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
from motte.strict_json import canonical

RELEASE = 7


class Draft:
    """A bundle, made with fresh keys.

    Args:
        sizes: bytes of each section, the manifest first.
        recipients: to whom it is sealed.
        signer: signs it.
    """

    def __init__(
        self, sizes: Sequence[int], recipients: Sequence[RecipientPrivateKey], signer: SignerPrivateKey
    ) -> None:
        self.sizes, self.signer, self.release = list(sizes), signer, RELEASE
        self.recipients = sorted(recipients, key=lambda key: key.public.raw)
        self.bundle_id = primitives.random_bytes(16)
        self.kek = primitives.random_bytes(32)
        self.data_keys = [primitives.random_bytes(32) for _ in sizes]
        self.plain = [primitives.random_bytes(size) for size in sizes]
        self.chunks = [self.seal_section(index) for index in range(len(sizes))]
        self.header: dict[str, Any] = {
            "bundle_id": self.bundle_id.hex(),
            "format": FORMAT,
            "parts": len(sizes) - 1,
            "public_weights": ["head.bias", "head.weight"],
            "recipients": [
                {"key": each.public.raw.hex(), "sealed_kek": self.seal_kek(each)} for each in self.recipients
            ],
            "release": self.release,
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
        key: int,
        index: int,
        last: bool,
        data: bytes,
        *,
        section: int | None = None,
        bundle_id: bytes | None = None,
    ) -> bytes:
        """One chunk under data key ``key``, bound to ``section`` (that of the key unless given)."""
        cipher = primitives.SectionCipher(
            self.data_keys[key], bundle_id=bundle_id or self.bundle_id, section=key if section is None else section
        )
        into = bytearray(len(data) + primitives.TAG_BYTES)
        cipher.seal(index, last, memoryview(data), memoryview(into))
        return bytes(into)

    def seal_section(self, section: int) -> list[bytes]:
        """All chunks of a section."""
        data = self.plain[section]
        pieces = [data[start : start + CHUNK_BYTES] for start in range(0, max(1, len(data)), CHUNK_BYTES)]
        return [self.seal_chunk(section, at, at == len(pieces) - 1, piece) for at, piece in enumerate(pieces)]

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

    def text(self) -> bytes:
        """The header, encoded."""
        return canonical(self.header)

    def signed_front(self, encoded: bytes | None = None) -> bytes:
        """Magic, length, header, signature."""
        start = front(self.text() if encoded is None else encoded)
        return start + primitives.sign_header(self.signer.secret, start)

    def file(self, encoded: bytes | None = None) -> bytes:
        """The whole file, signed as it stands."""
        return self.signed_front(encoded) + self.body()


def flip(data: bytes, offset: int, bit: int = 0) -> bytes:
    """``data`` with one bit the other way."""
    changed = bytearray(data)
    changed[offset] ^= 1 << bit
    return bytes(changed)


def put(header: dict[str, Any], path: str, value: Any) -> None:
    """Set a field of a header; ``path`` is its names and places, joined with dots."""
    target, last = _way(header, path)
    target[last] = value


def remove(header: dict[str, Any], path: str) -> None:
    """Take a field out of a header."""
    target, last = _way(header, path)
    del target[last]


def _way(header: dict[str, Any], path: str) -> tuple[Any, Any]:
    target: Any = header
    *way, last = path.split(".")
    for step in way:
        target = target[int(step) if step.isdigit() else step]
    return target, int(last) if last.isdigit() else last


class PlaintextError(MotteError):
    """Plaintext of something that was refused was handed out."""
