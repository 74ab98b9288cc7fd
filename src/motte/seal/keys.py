"""Keys of people: recipients (X25519), who can open bundles, and signers (Ed25519), whose bundles are believed.

A public key is one word that fits on a command line::

    motte-recipient-1-<64 hexadecimal digits of the key><8 of a checksum>
    motte-signer-1-<...>

A private key is a file ``NAME.key`` that only its owner can read, with the word of the public key in ``NAME.pub``.
A file holds exactly what :meth:`RecipientPrivateKey.file_text` writes, byte for byte, or it is refused.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal, TypeVar

from motte.errors import FormatError, InputError, ResourceError
from motte.seal import primitives
from motte.seal.atomic import atomic_file

Kind = Literal["recipient", "signer"]
_MAX_KEY_FILE_BYTES: Final = 4096
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SECRET_LINE: Final = re.compile(r"secret: ([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class _PublicKey(ABC):
    """What both kinds of public key share: 32 bytes, checked to be usable when the object is made."""

    raw: bytes
    kind: ClassVar[Kind]

    def __post_init__(self) -> None:
        if len(self.raw) != primitives.KEY_BYTES:
            raise FormatError(
                f"not a {self.kind}'s key", expected=f"{primitives.KEY_BYTES} bytes", got=f"{len(self.raw)} bytes"
            )
        if not self._usable():
            raise FormatError(f"a {self.kind}'s key of small order, which protects nothing", got=self.raw.hex())

    @abstractmethod
    def _usable(self) -> bool:
        """Whether the key protects anything at all."""

    @property
    def key_id(self) -> str:
        """Sixteen hexadecimal digits that name this key to people."""
        return primitives.key_id(self.kind, self.raw)

    def __str__(self) -> str:
        return f"motte-{self.kind}-1-{self.raw.hex()}{primitives.key_checksum(self.kind, self.raw).hex()}"


@dataclass(frozen=True, slots=True)
class RecipientPublicKey(_PublicKey):
    """An X25519 public key to which bundles are sealed."""

    kind: ClassVar[Kind] = "recipient"

    def _usable(self) -> bool:
        return primitives.x25519_usable(self.raw)

    @classmethod
    def parse(cls, text: str) -> RecipientPublicKey:
        """Read ``motte-recipient-1-...``.

        Raises:
            FormatError: not that, mistyped, or of small order.
        """
        return cls(_parse_word("recipient", text))


@dataclass(frozen=True, slots=True)
class SignerPublicKey(_PublicKey):
    """An Ed25519 public key whose signatures on bundles are believed."""

    kind: ClassVar[Kind] = "signer"

    def _usable(self) -> bool:
        return primitives.ed25519_usable(self.raw)

    @classmethod
    def parse(cls, text: str) -> SignerPublicKey:
        """Read ``motte-signer-1-...``.

        Raises:
            FormatError: not that, mistyped, or of small order.
        """
        return cls(_parse_word("signer", text))


def _parse_word(kind: Kind, text: str) -> bytes:
    prefix = f"motte-{kind}-1-"
    if not text.startswith(prefix):
        raise FormatError(f"not a {kind}'s public key", expected=f"{prefix}...", got=repr(text[:40]))
    digits = text[len(prefix) :]
    length = 2 * (primitives.KEY_BYTES + 4)
    if len(digits) != length or not set(digits) <= set("0123456789abcdef"):
        raise FormatError(
            f"a {kind}'s public key is cut or mistyped", expected=f"{length} digits 0-9a-f", got=repr(digits[:100])
        )
    raw, checksum = bytes.fromhex(digits[:-8]), bytes.fromhex(digits[-8:])
    if primitives.key_checksum(kind, raw) != checksum:
        raise FormatError(f"a {kind}'s public key is mistyped: its checksum does not match", got=text[:120])
    return raw


@dataclass(frozen=True, slots=True)
class RecipientPrivateKey:
    """An X25519 private key. Its bytes never appear in ``repr`` or in an error."""

    secret: bytes = field(repr=False)

    @classmethod
    def new(cls) -> RecipientPrivateKey:
        """A fresh key."""
        return cls(primitives.new_x25519()[0])

    @property
    def public(self) -> RecipientPublicKey:
        """Its public key."""
        return RecipientPublicKey(primitives.x25519_public(self.secret))

    def file_text(self) -> str:
        """What its key file holds. Secret."""
        return _file_text("recipient", str(self.public), self.secret)


@dataclass(frozen=True, slots=True)
class SignerPrivateKey:
    """An Ed25519 private key (the seed). Its bytes never appear in ``repr`` or in an error."""

    secret: bytes = field(repr=False)

    @classmethod
    def new(cls) -> SignerPrivateKey:
        """A fresh key."""
        return cls(primitives.new_ed25519()[0])

    @property
    def public(self) -> SignerPublicKey:
        """Its public key."""
        return SignerPublicKey(primitives.ed25519_public(self.secret))

    def file_text(self) -> str:
        """What its key file holds. Secret."""
        return _file_text("signer", str(self.public), self.secret)


PrivateKey = RecipientPrivateKey | SignerPrivateKey
PublicKey = RecipientPublicKey | SignerPublicKey
P = TypeVar("P", RecipientPrivateKey, SignerPrivateKey)
Q = TypeVar("Q", RecipientPublicKey, SignerPublicKey)


def _file_text(kind: Kind, public: str, secret: bytes) -> str:
    what = "open the bundles sealed to it" if kind == "recipient" else "sign bundles in its name"
    return (
        f"# A private key of motte. Whoever reads this file can {what}.\n"
        f"kind: {kind}\npublic: {public}\nsecret: {secret.hex()}\n"
    )


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rotation:
    """What :func:`rotate` did, and what it leaves to do."""

    old: PublicKey
    new: PublicKey
    kept_as: Path
    """The file of the old private key."""
    next_steps: tuple[str, ...]
    """One sentence each."""


def key_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of the key ``name``: (private, public).

    Raises:
        InputError: not a name for a key.
    """
    if _NAME.fullmatch(name) is None:
        raise InputError("not a name for a key", expected="letters, digits, '_', '.', '-'", got=repr(name[:120]))
    return folder / f"{name}.key", folder / f"{name}.pub"


def new(folder: Path, name: str, kind: type[P]) -> P:
    """Make a key pair: ``folder/name.key`` (mode 0600) and ``folder/name.pub``. Nothing is ever overwritten.

    Args:
        kind: :class:`RecipientPrivateKey` or :class:`SignerPrivateKey`.

    Raises:
        InputError: one of the files exists, or ``name`` is not a name.
    """
    private, public = key_paths(folder, name)
    for path in (private, public):
        if os.path.lexists(path):
            raise InputError("a key of this name exists", where=str(path), hint="rotate it, or choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as problem:
        raise ResourceError("cannot create the folder of keys", where=str(folder), got=problem.strerror) from problem
    key = kind.new()
    _write(private, public, key, overwrite=False)
    return key


def _write(private: Path, public: Path, key: PrivateKey, *, overwrite: bool) -> None:
    with atomic_file(private, overwrite=overwrite, mode=0o600) as fd:
        os.write(fd, key.file_text().encode("ascii"))
    with atomic_file(public, overwrite=overwrite, mode=0o644) as fd:
        os.write(fd, f"{key.public}\n".encode("ascii"))


def load(path: Path, kind: type[P]) -> P:
    """Read a private key file.

    Raises:
        InputError: no such file, readable by others, or a key of the other kind.
        FormatError: not exactly a key file.
    """
    text = _read(path, private=True)
    wanted: Kind = "recipient" if kind is RecipientPrivateKey else "signer"
    other = "signer" if wanted == "recipient" else "recipient"
    lines = text.split("\n")
    if len(lines) > 1 and lines[1] == f"kind: {other}":
        raise InputError(
            "a key of the other kind", where=str(path), expected=f"a {wanted}'s key", got=f"a {other}'s key"
        )
    found = _SECRET_LINE.fullmatch(lines[3]) if len(lines) == 5 else None
    # The contents of a private key file stay out of the error.
    if found is None:
        raise FormatError(f"not the file of a {wanted}'s private key", where=str(path))
    key = kind(bytes.fromhex(found.group(1)))
    if key.file_text() != text:
        raise FormatError(
            "a private key file that does not agree with itself", where=str(path), expected=f"a file of {key.public}"
        )
    return key


def load_public(source: str | Path, kind: type[Q]) -> Q:
    """Read a public key: the word itself, or a file with exactly that word and a newline.

    Raises:
        InputError: no such file.
        FormatError: not a public key of this kind.
    """
    if isinstance(source, str) and source.startswith("motte-"):
        return kind.parse(source)
    text = _read(Path(source), private=False)
    if not text.endswith("\n") or text.count("\n") != 1:
        raise FormatError("not the file of a public key", where=str(source), expected="one line")
    return kind.parse(text[:-1])


def _read(path: Path, *, private: bool) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        raise InputError("cannot read the key", where=str(path), got=problem.strerror) from problem
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MAX_KEY_FILE_BYTES:
            raise FormatError("not the file of a key", where=str(path))
        if private and facts.st_mode & 0o077:
            raise InputError(
                "the private key can be read by others",
                where=str(path),
                expected="mode 0600",
                got=f"mode {stat.S_IMODE(facts.st_mode):04o}",
                hint=f"chmod 600 {path}",
            )
        data = os.pread(fd, _MAX_KEY_FILE_BYTES + 1, 0)
    finally:
        os.close(fd)
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as problem:
        raise FormatError("not the file of a key", where=str(path)) from problem


def rotate(folder: Path, name: str, kind: type[P]) -> Rotation:
    """Put a new pair in the place of ``name``; the old one is kept as ``name.1`` (then ``name.2``, the next free).

    A crash in between leaves the old pair under both names, or the new private key beside the old public file;
    no key is ever lost.

    Raises:
        InputError, FormatError: as :func:`load`.
    """
    private, public = key_paths(folder, name)
    old = load(private, kind)
    number = 1
    while any(os.path.lexists(path) for path in key_paths(folder, f"{name}.{number}")):
        number += 1
    kept_private, kept_public = key_paths(folder, f"{name}.{number}")
    _write(kept_private, kept_public, old, overwrite=False)
    key = kind.new()
    _write(private, public, key, overwrite=True)
    return Rotation(old.public, key.public, kept_private, _next_steps(old.public, key.public, kept_private))


def _next_steps(old: PublicKey, fresh: PublicKey, kept: Path) -> tuple[str, ...]:
    if old.kind == "recipient":
        return (
            f"In every bundle in use: recipients add {fresh}, then recipients remove {old}.",
            f"Keep {kept} until no bundle is sealed to it any more, then delete it.",
            "If the old key may be known to others, they can open every bundle that was sealed to it: "
            "only sealing anew, under new data keys, protects weights that they have not read yet.",
        )
    return (
        f"Tell everybody who demands --signer {old} to demand {fresh}.",
        "Bundles signed by the old key stay valid for whoever still demands it: seal them again under the new one, "
        "with a higher release.",
        f"Keep {kept} only as long as bundles must be signed under the old name.",
    )
