"""SHA-256 and its message code, and SHA-512, by the one cryptographic library that a worker loads.

Python's own ``hashlib`` and ``hmac`` would bring a second OpenSSL into every worker: 5 MB more to trust and to hold.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.hashes import SHA256, SHA512, Hash
from cryptography.hazmat.primitives.hmac import HMAC

Data = bytes | bytearray | memoryview


def sha256(*pieces: Data) -> bytes:
    """SHA-256 of the pieces, one behind the other; 32 bytes (FIPS 180-4)."""
    return sha256_of(pieces)


def sha256_of(pieces: Iterable[Data]) -> bytes:
    """:func:`sha256` of pieces that need not be there at once."""
    found = Hash(SHA256())
    for piece in pieces:
        found.update(piece)
    return found.finalize()


def sha512(*pieces: Data) -> bytes:
    """SHA-512 of the pieces, one behind the other; 64 bytes (FIPS 180-4)."""
    found = Hash(SHA512())
    for piece in pieces:
        found.update(piece)
    return found.finalize()


def hmac_sha256(key: bytes, message: Data) -> bytes:
    """HMAC-SHA-256, 32 bytes (RFC 2104)."""
    found = HMAC(key, SHA256())
    found.update(message)
    return found.finalize()


def hmac_sha256_is(code: bytes, key: bytes, message: Data) -> bool:
    """Whether ``code`` is :func:`hmac_sha256` of ``message``, in a time that does not depend on where it differs."""
    found = HMAC(key, SHA256())
    found.update(message)
    try:
        found.verify(code)
    except InvalidSignature:
        return False
    return True
