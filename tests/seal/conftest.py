"""Keys, and a bundle of a few parts, for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from motte.limits import CHUNK_BYTES
from motte.seal import (
    BytesPart,
    RecipientPrivateKey,
    SignerPrivateKey,
    UnlockedBundle,
    open_bundle,
    write_bundle,
)


@dataclass
class Sealed:
    """A sealed file with everything that went into it."""

    path: Path
    signer: SignerPrivateKey
    alice: RecipientPrivateKey
    manifest: bytes
    parts: list[bytes]

    def read_all(self, recipient: RecipientPrivateKey | None = None, *, min_release: int = 0) -> list[bytes]:
        """Open it as ``recipient`` (alice): the plaintext of every part."""
        with open_bundle(self.path, signer=self.signer.public, min_release=min_release) as bundle:
            unlocked = bundle.unlock(bundle.unwrap(recipient or self.alice))
            assert unlocked.manifest() == self.manifest
            return [part(unlocked, index) for index in range(unlocked.parts)]


def part(unlocked: UnlockedBundle, index: int, threads: int = 1) -> bytes:
    """One part's plaintext."""
    into = bytearray(unlocked.part_bytes(index))
    unlocked.open_part(index, memoryview(into), threads=threads)
    return bytes(into)


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Sealed]:
    """Four parts: some bytes, none, two and a bit chunks, exactly one chunk; release 5."""
    signer, alice = SignerPrivateKey.new(), RecipientPrivateKey.new()
    manifest, parts = os.urandom(77), [os.urandom(n) for n in (300, 0, 2 * CHUNK_BYTES + 5, CHUNK_BYTES)]
    path = tmp_path / "model.motte"
    write_bundle(
        path,
        release=5,
        manifest=manifest,
        parts=[BytesPart(each) for each in parts],
        recipients=[alice.public],
        signer=signer,
        public_weights=["a", "b"],
    )
    yield Sealed(path, signer, alice, manifest, parts)
    assert not list(tmp_path.glob(".*")), "something half-written was left behind"
