"""Keys at rest: whatever secret the broker stores is wrapped by a key that does not lie beside it.

    passphrase   scrypt; the passphrase is asked for, or read from a file, when the broker starts
    file         32 random bytes in a file (mode 0600) on another disk, a removable one or a RAM disk
    pkcs11       an AES key that never leaves a token: for production (:mod:`motte.provision.broker.pkcs11`)

Against root on the broker's own machine while it runs nothing of this helps: the broker's machine is trusted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from motte.errors import DecryptError, FormatError, InputError, KeyAccessError
from motte.limits import MAX_KEY_WORD_BYTES
from motte.seal import primitives
from motte.seal.atomic import atomic_file
from motte.strict_json import Fields

SCRYPT_LOG2_N: Final = 17
SALT_BYTES: Final = 16
_CHECK: Final = b"motte-broker wrapping check"


class KeyWrapper(Protocol):
    """Wraps secrets of up to a few kilobytes, each for one purpose. Safe to call from several threads."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What is stored in clear to open it again: ``kind`` and more, nothing secret."""

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        """Encrypt and authenticate ``secret`` for the purpose ``context``."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The inverse. Raises: DecryptError: another key or purpose, or altered."""

    def close(self) -> None:
        """Forget the key."""


@dataclass(frozen=True, slots=True)
class Unlock:
    """What the person who starts a broker brings along to open its wrapping key; exactly one way.

    ``module`` is the token's PKCS#11 library, ``token`` its label, ``pin`` its user PIN.
    """

    passphrase: bytes | None = field(default=None, repr=False)
    key_file: Path | None = None
    module: Path | None = None
    token: str | None = None
    pin: str | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """``passphrase``, ``file`` or ``pkcs11``.

        Raises:
            InputError: none, or more than one.
        """
        given = {
            "passphrase": self.passphrase is not None,
            "file": self.key_file is not None,
            "pkcs11": self.module is not None,
        }
        names = [name for name, there in given.items() if there]
        if len(names) != 1:
            raise InputError(
                "not one way to open the wrapping key",
                expected="a passphrase, a key file, or a PKCS#11 token",
                got=" and ".join(names) or "none",
            )
        return names[0]


class _SoftwareWrapper:
    """A wrapping key in this process's memory."""

    def __init__(self, key: bytes, parameters: Mapping[str, Any]) -> None:
        self._key: bytes | None = key
        self.parameters = parameters

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        return primitives.wrap_secret(self._held(), secret, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        return primitives.unwrap_secret(self._held(), wrapped, context)

    def close(self) -> None:
        self._key = None

    def _held(self) -> bytes:
        if self._key is None:
            raise InputError("the wrapping key was closed")
        return self._key


def new_wrapper(unlock: Unlock, *, log2_n: int = SCRYPT_LOG2_N) -> KeyWrapper:
    """A new wrapping key: a file is made (never overwritten), a token makes one of its own.

    Raises:
        InputError: not one way, an empty passphrase, or the file exists. ResourceError: no such token.
    """
    kind = unlock.kind
    if kind == "file" and unlock.key_file is not None:
        key = primitives.random_bytes(primitives.KEY_BYTES)
        with atomic_file(unlock.key_file, overwrite=False, mode=0o600) as fd:
            os.write(fd, key.hex().encode("ascii") + b"\n")
        return _SoftwareWrapper(key, {"kind": "file"})
    if kind == "pkcs11":
        from motte.provision.broker.pkcs11 import Pkcs11Wrapper

        return Pkcs11Wrapper.create(unlock)
    salt = primitives.random_bytes(SALT_BYTES)
    key = primitives.passphrase_key(_passphrase(unlock), salt, log2_n=log2_n)
    return _SoftwareWrapper(key, {"kind": "passphrase", "log2_n": log2_n, "salt": salt.hex()})


def open_wrapper(parameters: Any, unlock: Unlock) -> KeyWrapper:
    """The wrapping key that ``parameters`` (as stored) describe; whether it is the right one :func:`check_wrapper`
    says.

    Raises:
        InputError: another way than it was made with, or a file that others can read. ResourceError: no such token.
        FormatError: parameters or key file malformed.
    """
    fields = Fields(parameters, where="wrapping")
    kind = fields.choice("kind", ("passphrase", "file", "pkcs11"))
    if unlock.kind != kind:
        raise InputError("the wrapping key is of another kind", expected=kind, got=unlock.kind)
    if kind == "pkcs11":
        from motte.provision.broker.pkcs11 import Pkcs11Wrapper

        return Pkcs11Wrapper.open(unlock, fields)
    if kind == "file" and unlock.key_file is not None:
        fields.done()
        return _SoftwareWrapper(_read_key(unlock.key_file), {"kind": "file"})
    salt = fields.hexadecimal("salt", length_bytes=SALT_BYTES)
    log2_n = fields.integer("log2_n", low=10, high=22)
    fields.done()
    key = primitives.passphrase_key(_passphrase(unlock), salt, log2_n=log2_n)
    return _SoftwareWrapper(key, {"kind": "passphrase", "log2_n": log2_n, "salt": salt.hex()})


def wrapper_check(wrapper: KeyWrapper) -> bytes:
    """What :func:`check_wrapper` compares with."""
    return wrapper.wrap(_CHECK, _CHECK)


def check_wrapper(wrapper: KeyWrapper, check: bytes) -> None:
    """Return only if ``wrapper`` is the one that made ``check``.

    Raises:
        KeyAccessError: a wrong passphrase, file or token.
    """
    try:
        wrapper.unwrap(check, _CHECK)
    except DecryptError as problem:
        raise KeyAccessError(
            "this is not the broker's wrapping key", expected=f"its {wrapper.parameters['kind']}"
        ) from problem


def read_secret_file(path: Path, what: str) -> bytes:
    """The one line of a file that only its owner can read (a passphrase, a PIN), without its line end.

    Raises:
        InputError: no such file, readable by others, empty, or longer than the limit.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            data = file.read(MAX_KEY_WORD_BYTES + 1)
    except OSError as problem:
        raise InputError(f"cannot read the {what}", where=str(path), got=problem.strerror) from problem
    if mode & 0o077:
        raise InputError(
            f"the {what} can be read by others",
            where=str(path),
            expected="mode 0600",
            got=f"mode {mode:04o}",
            hint=f"chmod 600 {path}",
        )
    line = data.removesuffix(b"\n")
    if not line or b"\n" in line or len(data) > MAX_KEY_WORD_BYTES:
        raise InputError(f"not a {what}", where=str(path), expected=f"one line, at most {MAX_KEY_WORD_BYTES} bytes")
    return line


def _passphrase(unlock: Unlock) -> bytes:
    if not unlock.passphrase:
        raise InputError("an empty passphrase protects nothing")
    return unlock.passphrase


def _read_key(path: Path) -> bytes:
    text = read_secret_file(path, "wrapping key")
    if len(text) != 2 * primitives.KEY_BYTES or not set(text) <= set(b"0123456789abcdef"):
        raise FormatError("not a wrapping key", where=str(path), expected=f"{2 * primitives.KEY_BYTES} digits 0-9a-f")
    return bytes.fromhex(text.decode("ascii"))
