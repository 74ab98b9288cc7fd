"""The cryptography behind derived noise: subkeys, a fast keyed digest, a pseudo-random function, a keystream.

Noise that protects a release is a function of a secret key and of what is released, so that a retry of the same bytes
repeats the same noise and other bytes get noise that is independent of it. The chain, each link under a subkey of its
own (HKDF-SHA256, RFC 5869) and a domain string:

1. *Digest.* GMAC of each chunk under a fixed nonce. What is used of GMAC is only that GHASH is almost XOR-universal:
   two different chunks of at most n 16-byte blocks get equal tags with probability (n + 1) / 2^128 over the key
   (McGrew and Viega, "The Security and Performance of the Galois/Counter Mode", INDOCRYPT 2004, lemma 2). Under a
   fixed nonce the tag is GHASH plus a constant, and nothing else is needed, because **no tag ever leaves**: what
   breaks GMAC when a nonce repeats is an adversary who sees tags. They only enter the next link.
2. *Function.* HMAC-SHA256 of everything that names the release, the tags included. A pseudo-random function of an
   almost-universal hash is a pseudo-random function of the message (Wegman and Carter 1981; Black, Halevi, Krawczyk,
   Krovetz, Rogaway, "UMAC", CRYPTO 1999, section 4), and far faster than hashing every byte with SHA-256.
3. *Keystream.* AES-256 in counter mode (SP 800-38A) from a zero counter, under a key that this release alone has. It
   differs from uniform bits by at most blocks^2 / 2^129 (Bellare, Desai, Jokipii, Rogaway, FOCS 1997): below 2^-64
   for :data:`MAX_KEYSTREAM_BYTES`.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from motte.errors import InputError
from motte.limits import GIB, MIB
from motte.seal.primitives import KEY_BYTES, TAG_BYTES

MAX_KEYSTREAM_BYTES: Final = 64 * GIB
"""Under one key: 2^32 blocks."""
MAX_DIGEST_BYTES: Final = 64 * MIB
"""In one tag: 2^22 blocks, so that two different chunks share one with probability below 2^-105."""
BLOCK_BYTES: Final = 16

_SUBKEY_DOMAIN: Final = b"motte-noise-1 subkey\x00"
_PRF_DOMAIN: Final = b"motte-noise-1 function\x00"
_DIGEST_NONCE: Final = b"motte-digest"
_ZEROS: Final = bytes(1 * MIB)


def subkey(key: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose. Keys for different purposes say nothing about each other.

    Raises:
        InputError: ``key`` is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise InputError("not a key", expected=f"{KEY_BYTES} bytes", got=f"{len(key)} bytes")
    kdf = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=_SUBKEY_DOMAIN + purpose.encode())
    return kdf.derive(key)


class SecretDigest:
    """A keyed digest whose values stay inside. Safe to call from several threads: it keeps no state.

    Args:
        key: 32 secret bytes, used for nothing else.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def tag(self, data: memoryview) -> bytes:
        """16 bytes that must never leave: the fixed nonce forges them for whoever sees two.

        Raises:
            InputError: more than :data:`MAX_DIGEST_BYTES`.
        """
        if data.nbytes > MAX_DIGEST_BYTES:
            raise InputError("too much for one tag", expected=f"{MAX_DIGEST_BYTES} bytes", got=f"{data.nbytes} bytes")
        return self._cipher.encrypt(_DIGEST_NONCE, b"", data)[-TAG_BYTES:]


def keyed_function(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of ``parts``, each behind its length so that no two lists of parts collide: 32 bytes."""
    function = hmac.HMAC(key, hashes.SHA256())
    function.update(_PRF_DOMAIN + len(parts).to_bytes(8, "big"))
    for part in parts:
        function.update(len(part).to_bytes(8, "big"))
        function.update(part)
    return function.finalize()


class Keystream:
    """Pseudo-random bytes, addressable. Safe to call from several threads: it keeps no state.

    Args:
        key: 32 secret bytes, used for this one keystream.
    """

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES256(key)

    def fill(self, into: memoryview, *, offset: int) -> None:
        """Write the bytes from ``offset`` (a multiple of 16) into ``into``, one-dimensional bytes.

        Raises:
            InputError: ``offset`` inside a block, or beyond :data:`MAX_KEYSTREAM_BYTES`.
        """
        if offset < 0 or offset % BLOCK_BYTES or offset + len(into) > MAX_KEYSTREAM_BYTES:
            bound = f"a multiple of {BLOCK_BYTES}, and an end of at most {MAX_KEYSTREAM_BYTES}"
            raise InputError("no such place in a keystream", expected=bound, got=f"{offset} + {len(into)} bytes")
        counter = (offset // BLOCK_BYTES).to_bytes(BLOCK_BYTES, "big")
        stream = Cipher(self._algorithm, modes.CTR(counter)).encryptor()
        for start in range(0, len(into), len(_ZEROS)):
            piece = into[start : start + len(_ZEROS)]
            stream.update_into(memoryview(_ZEROS)[: len(piece)], piece)
