"""What can be known of a bundle without any key. All of it is **unverified** but what ``signature`` says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from motte.errors import SignatureError
from motte.seal import primitives
from motte.seal.header import PREFIX_BYTES, BundleHeader, front, parse_header
from motte.seal.keys import SignerPublicKey
from motte.seal.pool import Progress
from motte.seal.reader import SignedBundle, check_file_bytes, open_file, read_front, read_into

SignatureState = Literal["by the demanded signer", "by the signer that it names", "by another signer", "invalid"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Answers about a well-formed file; believe ``header`` no further than ``signature`` goes."""

    path: Path
    file_bytes: int
    header: BundleHeader
    signature: SignatureState
    """``by the signer that it names``: nobody was demanded, and anyone can sign under a name of their own.
    ``by another signer``: valid, but not by the one demanded."""
    damaged_sections: tuple[int, ...] | None
    """Sections whose ciphertext does not have the digest in the header; None if that was not looked at."""

    @property
    def plaintext_bytes(self) -> int:
        """Of all sections."""
        return sum(section.plaintext_bytes for section in self.header.sections)

    def to_json(self) -> dict[str, object]:
        """The same as plain values, for ``--json``."""
        header = self.header
        return {
            "path": str(self.path),
            "file_bytes": self.file_bytes,
            "bundle_id": header.bundle_id.hex(),
            "release": header.release,
            "signature": self.signature,
            "signer": str(header.signer),
            "recipients": [{"key": str(each.key), "id": each.key.key_id} for each in header.recipients],
            "parts": header.parts,
            "sections": [
                {
                    "index": each.index,
                    "kind": "part" if each.index else "manifest",
                    "plaintext_bytes": each.plaintext_bytes,
                    "ciphertext_bytes": each.ciphertext_bytes,
                    "ciphertext_digest": each.digest.hex(),
                }
                for each in header.sections
            ],
            "public_weights": list(header.public_weights),
            "run": None if header.run is None else header.run.to_json(),
            "damaged_sections": None if self.damaged_sections is None else list(self.damaged_sections),
        }


def inspect(
    path: Path, *, signer: SignerPublicKey | None = None, digests: bool = False, progress: Progress | None = None
) -> Inspection:
    """Read the **unverified** front of a file, and its ciphertext too if ``digests``.

    Args:
        signer: whose signature is looked for; without it, that of the signer named in the header.
        progress: given bytes of ciphertext, when ``digests``.

    Raises:
        InputError: no such file.
        BundleError: it does not follow the specification. An invalid signature is an answer, not an error.
    """
    fd = open_file(path)
    try:
        encoded, file_bytes = read_front(fd, None)
        header = parse_header(encoded)
        check_file_bytes(header, len(encoded), file_bytes)
        signature = memoryview(bytearray(primitives.SIGNATURE_BYTES))
        read_into(fd, signature, PREFIX_BYTES + len(encoded))
        state = _signature_state(header, bytes(signature), front(encoded), signer)
        damaged = _damaged(fd, header, len(encoded), progress) if digests else None
        return Inspection(path, file_bytes, header, state, damaged)
    finally:
        os.close(fd)


def _signature_state(
    header: BundleHeader, signature: bytes, signed: bytes, demanded: SignerPublicKey | None
) -> SignatureState:
    try:
        primitives.verify_header(header.signer.raw, signature, signed)
    except SignatureError:
        return "invalid"
    if demanded is None:
        return "by the signer that it names"
    return "by the demanded signer" if demanded == header.signer else "by another signer"


def _damaged(fd: int, header: BundleHeader, header_bytes: int, progress: Progress | None) -> tuple[int, ...]:
    with SignedBundle(header, header_bytes, fd, owns_fd=False) as bundle:
        return tuple(index for index in range(len(header.sections)) if not bundle.digest_matches(index, progress))
