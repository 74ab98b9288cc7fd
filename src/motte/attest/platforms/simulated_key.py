"""The development key of simulated evidence, as a file: whoever has it makes SIMULATED evidence that says anything."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from motte.errors import FormatError, InputError
from motte.limits import MAX_KEY_WORD_BYTES
from motte.seal import primitives
from motte.seal.atomic import atomic_file

_LINES: Final = re.compile(
    "# A development key of motte: whoever has it makes SIMULATED evidence. It protects nothing.\n"
    "public: ([0-9a-f]{64})\nsecret: ([0-9a-f]{64})\n"
)


@dataclass(frozen=True, slots=True)
class SimulatedKey:
    """An Ed25519 private key (32 bytes, the seed) for :func:`motte.attest.platforms.simulated.issue`."""

    secret: bytes = field(repr=False)

    @staticmethod
    def new() -> SimulatedKey:
        """A fresh key."""
        return SimulatedKey(primitives.new_ed25519()[0])

    @property
    def public(self) -> bytes:
        """32 bytes: what a verifier names in :attr:`motte.attest.anchors.Anchors.simulated_signers`."""
        return primitives.ed25519_public(self.secret)

    def file_text(self) -> str:
        """What its file holds. Secret."""
        return (
            "# A development key of motte: whoever has it makes SIMULATED evidence. It protects nothing.\n"
            f"public: {self.public.hex()}\nsecret: {self.secret.hex()}\n"
        )


def write_key(path: Path, key: SimulatedKey) -> None:
    """Write a new file of mode 0600.

    Raises:
        InputError: it exists. ResourceError: it cannot be written.
    """
    with atomic_file(path, overwrite=False, mode=0o600) as fd:
        os.write(fd, key.file_text().encode("ascii"))


def read_key(path: Path) -> SimulatedKey:
    """Read a file of :func:`write_key`, byte for byte as it was written.

    Raises:
        InputError: no such file, or one that others can read. FormatError: not such a file.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_KEY_WORD_BYTES + 1)
    except OSError as problem:
        raise InputError("cannot read the key", where=str(path), got=problem.strerror) from problem
    if mode & 0o077:
        got, hint = f"mode {stat.S_IMODE(mode):04o}", f"chmod 600 {path}"
        raise InputError("the key can be read by others", where=str(path), expected="mode 0600", got=got, hint=hint)
    found = _LINES.fullmatch(data.decode("ascii", "replace"))
    key = None if found is None else SimulatedKey(bytes.fromhex(found[2]))
    # What stands in a key file stays out of the error.
    if key is None or key.file_text().encode("ascii") != data:
        hint = "make one: motte attest simulated new-key FILE"
        raise FormatError("not the file of a development key", where=str(path), hint=hint)
    return key
