"""The cryptographic primitives of bundles, keys and the channel to the worker.

Two more files call one: ``seal/keystream.py`` (bits for noise) and ``seal/tls.py`` (certificates for a link to another
machine). A test holds the list.

Each use has its own domain string, so that no output of one can stand in for another's. All primitives come from
``cryptography`` (OpenSSL); none is written here. The choices:

AES-256-GCM for chunks. Authenticated, in hardware on every machine that has a TEE, about 3 GB/s a core. GCM needs a
nonce that never repeats under a key: every section has a data key of its own, used for that section once, so a
counter is enough and no randomness can collide. GCM is not key-committing and its tags bind nobody who knows the
key; the signed digests of the ciphertext do (docs/spec/bundle.md, "What is checked when").

The nonce of chunk ``i`` is STREAM's (Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance", CRYPTO 2015; age uses the same): 11 bytes of counter, then the end mark. Bundle,
section, place and end mark stand in the associated data too: the data key alone would bind the section, but a
writer that reused one by mistake would lose that silently.

SHA-256 in two levels for a section: chunks are hashed on any number of cores, and one chunk can be compared alone.
Over ciphertext only, since a digest of plaintext would confirm guessed weights.

AES-256-GCM with a random 96-bit nonce for wrapped data keys: at most 4,097 messages under a key-encryption key that
is new whenever the header is signed, far below the 2^32 at which random nonces become a risk (SP 800-38D, 8.3).

HPKE base mode, X25519 + HKDF-SHA256 + AES-256-GCM (RFC 9180), for keys sent to somebody's public key: a standard with
published vectors, single-shot, bound to its context by ``info``. It does not say who sent; the signature does.

HKDF-SHA256 (RFC 5869) for keys that follow from another one: a person who holds one private key then needs no second
file for the key that signs their checkpoints and logs. The purpose is bound, so no two uses share a key.

scrypt (RFC 7914) for keys that follow from a passphrase: hard to guess in hardware because of its memory. The default,
N = 2^17 and r = 8, takes 128 MiB and about half a second (OWASP's recommendation).

AES-256-GCM with a random 96-bit nonce for secrets at rest, their purpose as associated data; a few thousand messages
under one key, far below the 2^32 of SP 800-38D, 8.3.

HMAC-SHA256 (RFC 2104) for messages between two sides that share a key already.

Ed25519 (RFC 8032) for signatures: deterministic, so that no bad random number leaks the key. OpenSSL accepts public
keys of small order, for which anyone can make a signature; they are refused here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from itertools import chain
from typing import Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from motte.digests import hmac_sha256, hmac_sha256_is, sha256, sha256_of
from motte.errors import DecryptError, InputError, SignatureError

KEY_BYTES: Final = 32
"""Of every key: data, key-encryption, channel, X25519 and Ed25519, public and private."""
TAG_BYTES: Final = 16
SIGNATURE_BYTES: Final = 64
DIGEST_BYTES: Final = 32
BUNDLE_ID_BYTES: Final = 16
WRAPPED_KEY_BYTES: Final = 12 + KEY_BYTES + TAG_BYTES
"""A wrapped data key: nonce, ciphertext, tag."""
HPKE_EXTRA_BYTES: Final = 32 + TAG_BYTES
"""By how much an HPKE message is longer than its plaintext: the encapsulated key and the tag."""
MAX_CHANNEL_MESSAGES: Final = 1 << 32
"""Messages in one direction of one channel; after that a new channel is needed."""

_HPKE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_CHUNK_DOMAIN: Final = b"motte-bundle-1 chunk\x00"
_SECTION_DIGEST_DOMAIN: Final = b"motte-bundle-1 section digest\x00"
_HEADER_DOMAIN: Final = b"motte-bundle-1 header\x00"
_WRAP_DOMAIN: Final = b"motte-bundle-1 data key\x00"
_KEK_DOMAIN: Final = b"motte-bundle-1 key-encryption key\x00"
_HPKE_DOMAIN: Final = b"motte-hpke-1\x00"
_CHANNEL_DOMAIN: Final = b"motte-channel-1\x00"
_DERIVED_DOMAIN: Final = b"motte-derived-key-1\x00"
_LOG_DOMAIN: Final = b"motte-log-1 header\x00"
_STATEMENT_DOMAIN: Final = b"motte-statement-1\x00"
_SECRET_DOMAIN: Final = b"motte-secret-1\x00"
_MAC_DOMAIN: Final = b"motte-mac-1\x00"
_KEY_ID_DOMAIN: Final = b"motte-key-id-1\x00"
_SIMULATED_EVIDENCE_DOMAIN: Final = b"motte-simulated-evidence-1\x00"

# The y-coordinates of the eight points of small order, with the non-canonical encodings of 0 and 1 (p and p + 1).
_SMALL_ORDER_Y: Final = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


def random_bytes(count: int) -> bytes:
    """``count`` bytes from the operating system: the only randomness behind keys, nonces and ids."""
    return os.urandom(count)


# --- chunks -------------------------------------------------------------------------------------------------------


class SectionCipher:
    """Seals or opens the chunks of one section. Safe to call from several threads: it keeps no state between chunks.

    Args:
        data_key: 32 bytes, used for this section of this bundle and for nothing else.
        bundle_id: 16 bytes.
        section: 0 for the manifest, 1 to N for the parts.
    """

    def __init__(self, data_key: bytes, *, bundle_id: bytes, section: int) -> None:
        self._cipher = AESGCM(data_key)
        self._bound = _CHUNK_DOMAIN + bundle_id + section.to_bytes(4, "big")

    def _nonce_and_aad(self, index: int, last: bool) -> tuple[bytes, bytes]:
        place = index.to_bytes(11, "big") + (b"\x01" if last else b"\x00")
        return place, self._bound + place

    def seal(self, index: int, last: bool, plaintext: memoryview, into: memoryview) -> None:
        """Encrypt chunk ``index`` into ``into``, which must be 16 bytes longer. ``last`` is the end mark."""
        nonce, aad = self._nonce_and_aad(index, last)
        self._cipher.encrypt_into(nonce, plaintext, aad, into)

    def open(self, index: int, last: bool, ciphertext: memoryview, into: memoryview) -> None:
        """Authenticate and decrypt **unverified** ``ciphertext`` into ``into``, which must be 16 bytes shorter.

        The caller must own ``ciphertext``: nobody else may be able to change it meanwhile.

        Raises:
            DecryptError: it does not authenticate; ``into`` is zeroed (OpenSSL decrypts before it knows the tag).
        """
        nonce, aad = self._nonce_and_aad(index, last)
        try:
            self._cipher.decrypt_into(nonce, ciphertext, aad, into)
        except InvalidTag as problem:
            into[:] = bytes(len(into))
            raise DecryptError(
                "the chunk does not authenticate", hint="the file was altered, or belongs to another bundle"
            ) from problem


def chunk_digest(ciphertext: memoryview | bytes) -> bytes:
    """SHA-256 of one chunk's ciphertext, tag included: 32 bytes."""
    return sha256(ciphertext)


def section_digest(chunk_digests: Iterable[bytes]) -> bytes:
    """The digest of a section's ciphertext: SHA-256 of a domain string and its chunks' digests in order."""
    return sha256_of(chain((_SECTION_DIGEST_DOMAIN,), chunk_digests))


# --- keys in the header -------------------------------------------------------------------------------------------


def _wrap_aad(bundle_id: bytes, release: int, section: int) -> bytes:
    return _WRAP_DOMAIN + bundle_id + release.to_bytes(8, "big") + section.to_bytes(4, "big")


def wrap_data_key(kek: bytes, data_key: bytes, *, bundle_id: bytes, release: int, section: int) -> bytes:
    """Encrypt a data key under the key-encryption key: 12 bytes of random nonce, then ciphertext and tag."""
    nonce = random_bytes(12)
    return nonce + AESGCM(kek).encrypt(nonce, data_key, _wrap_aad(bundle_id, release, section))


def unwrap_data_key(kek: bytes, wrapped: bytes, *, bundle_id: bytes, release: int, section: int) -> bytes:
    """The inverse of :func:`wrap_data_key`.

    Raises:
        DecryptError: another key, bundle, release or section, or altered.
    """
    try:
        return AESGCM(kek).decrypt(wrapped[:12], wrapped[12:], _wrap_aad(bundle_id, release, section))
    except InvalidTag as problem:
        raise DecryptError("the wrapped data key does not authenticate") from problem


def kek_info(bundle_id: bytes, release: int) -> bytes:
    """HPKE's ``info`` for a bundle's key-encryption key: it opens for this bundle and this release only."""
    return _KEK_DOMAIN + bundle_id + release.to_bytes(8, "big")


# --- HPKE ---------------------------------------------------------------------------------------------------------


def new_x25519() -> tuple[bytes, bytes]:
    """A new X25519 key pair: (private, public), 32 bytes each (RFC 7748)."""
    private = random_bytes(KEY_BYTES)
    return private, x25519_public(private)


def x25519_public(private: bytes | memoryview) -> bytes:
    """The public key of a private one."""
    key = X25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes_raw()


def x25519_usable(public: bytes) -> bool:
    """Whether anything can be sealed to ``public``: a point of small order gives everybody the same secret."""
    probe = X25519PrivateKey.from_private_bytes(b"\x01" * KEY_BYTES)
    try:
        probe.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def hpke_seal(public: bytes, plaintext: bytes, *, info: bytes) -> bytes:
    """Encrypt to an X25519 public key: encapsulated key, ciphertext, tag; 48 bytes longer than ``plaintext``.

    It does not authenticate the sender (base mode): sign the result, or what contains it, where that matters.

    Args:
        info: the context; the same bytes are needed to open. It is put behind a domain string of this project.

    Raises:
        InputError: ``public`` is of small order.
    """
    try:
        return _HPKE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public), _HPKE_DOMAIN + info)
    except ValueError as problem:
        raise InputError("nothing can be sealed to this public key", got=public.hex()) from problem


def hpke_open(private: bytes | memoryview, sealed: bytes, *, info: bytes) -> bytes:
    """Decrypt what :func:`hpke_seal` made for our key and the same ``info``. ``sealed`` is **unverified**.

    Raises:
        DecryptError: another recipient, another context, or altered.
    """
    try:
        return _HPKE.decrypt(sealed, X25519PrivateKey.from_private_bytes(private), _HPKE_DOMAIN + info)
    except (InvalidTag, ValueError) as problem:
        raise DecryptError("the HPKE message does not open with this key in this context") from problem


# --- signatures ---------------------------------------------------------------------------------------------------


def new_ed25519() -> tuple[bytes, bytes]:
    """A new Ed25519 key pair: (private seed, public), 32 bytes each."""
    private = random_bytes(KEY_BYTES)
    return private, ed25519_public(private)


def ed25519_public(private: bytes) -> bytes:
    """The public key of a private seed."""
    key = Ed25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes_raw()


def ed25519_usable(public: bytes) -> bool:
    """Whether a signature under ``public`` means anything: for a point of small order anyone can make one."""
    return len(public) == KEY_BYTES and public[:-1] + bytes([public[-1] & 0x7F]) not in _SMALL_ORDER_Y


def sign_header(private: bytes, signed: bytes) -> bytes:
    """Sign the front of a bundle (magic, length, header): 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(_HEADER_DOMAIN + signed)


def verify_header(public: bytes, signature: bytes, signed: bytes) -> None:
    """Return only if ``signature`` over the **unverified** front of a bundle is by ``public``.

    Raises:
        SignatureError: it is not.
    """
    try:
        if not ed25519_usable(public):
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _HEADER_DOMAIN + signed)
    except (InvalidSignature, ValueError) as problem:
        raise SignatureError("the header is not signed by this key, or was altered") from problem


def sign_log(private: bytes, signed: bytes) -> bytes:
    """Sign the front of a sealed log: 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(_LOG_DOMAIN + signed)


def verify_log(public: bytes, signature: bytes, signed: bytes) -> None:
    """Return only if ``signature`` over the **unverified** front of a log is by ``public``.

    Raises:
        SignatureError: it is not.
    """
    try:
        if not ed25519_usable(public):
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _LOG_DOMAIN + signed)
    except (InvalidSignature, ValueError) as problem:
        raise SignatureError("the log is not signed by this key, or was altered") from problem


def sign_statement(private: bytes, purpose: bytes, statement: bytes) -> bytes:
    """Sign ``statement`` for one purpose and no other: 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(_statement(purpose, statement))


def verify_statement(public: bytes, signature: bytes, purpose: bytes, statement: bytes) -> None:
    """Return only if ``signature`` over the **unverified** ``statement`` for ``purpose`` is by ``public``.

    Raises:
        SignatureError: it is not.
    """
    try:
        if not ed25519_usable(public):
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _statement(purpose, statement))
    except (InvalidSignature, ValueError) as problem:
        raise SignatureError("the statement is not signed by this key, or was altered") from problem


def _statement(purpose: bytes, statement: bytes) -> bytes:
    # The length of the purpose stands first: no purpose and statement can be read as another pair.
    return _STATEMENT_DOMAIN + len(purpose).to_bytes(2, "big") + purpose + statement


# --- secrets at rest, and codes of a shared key ---------------------------------------------------------------------


def passphrase_key(passphrase: bytes, salt: bytes, *, log2_n: int) -> bytes:
    """32 secret bytes from a passphrase (scrypt, r = 8, p = 1); 2^(log2_n + 10) bytes of memory while it runs."""
    return Scrypt(salt=salt, length=KEY_BYTES, n=1 << log2_n, r=8, p=1).derive(passphrase)


def wrap_secret(key: bytes, secret: bytes, context: bytes) -> bytes:
    """Encrypt ``secret`` for one purpose: 12 bytes of random nonce, then ciphertext and tag."""
    nonce = random_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, secret, _SECRET_DOMAIN + context)


def unwrap_secret(key: bytes, wrapped: bytes, context: bytes) -> bytes:
    """The inverse of :func:`wrap_secret`.

    Raises:
        DecryptError: another key or purpose, or altered.
    """
    try:
        return AESGCM(key).decrypt(wrapped[:12], wrapped[12:], _SECRET_DOMAIN + context)
    except (InvalidTag, ValueError) as problem:
        raise DecryptError("the wrapped secret does not authenticate") from problem


def message_code(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 of ``message``: 32 bytes."""
    return hmac_sha256(key, _MAC_DOMAIN + message)


def check_message_code(key: bytes, message: bytes, code: bytes) -> None:
    """Return only if ``code`` is that of the **unverified** ``message``.

    Raises:
        DecryptError: it is not.
    """
    if not hmac_sha256_is(code, key, _MAC_DOMAIN + message):
        raise DecryptError("the message is not from who shares this key, or was altered")


def sign_simulated_evidence(private: bytes, statement: bytes) -> bytes:
    """Sign a statement of simulated evidence with a development key: 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(_SIMULATED_EVIDENCE_DOMAIN + statement)


def verify_simulated_evidence(public: bytes, signature: bytes, statement: bytes) -> None:
    """Return only if ``signature`` over the **unverified** ``statement`` is by ``public``.

    Raises:
        SignatureError: it is not.
    """
    try:
        if not ed25519_usable(public):
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _SIMULATED_EVIDENCE_DOMAIN + statement)
    except (InvalidSignature, ValueError) as problem:
        raise SignatureError("the statement is not signed by this key, or was altered") from problem


# --- derived keys -------------------------------------------------------------------------------------------------


def derived_key(secret: bytes, purpose: bytes) -> bytes:
    """32 secret bytes that follow from the 32 bytes of a private key and a purpose, and say nothing of the key."""
    if len(secret) != KEY_BYTES:
        raise InputError("not a private key", expected=f"{KEY_BYTES} bytes", got=f"{len(secret)} bytes")
    kdf = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=_DERIVED_DOMAIN + purpose)
    return kdf.derive(secret)


# --- names of keys ------------------------------------------------------------------------------------------------


def key_id(kind: str, public: bytes) -> str:
    """A short name of a public key for people: 16 hexadecimal digits. Two keys may share one; never look up by it."""
    return sha256(_KEY_ID_DOMAIN, kind.encode(), b"\x00", public).hex()[:16]


def key_checksum(kind: str, public: bytes) -> bytes:
    """Four bytes that catch a mistyped public key, not a forged one."""
    return sha256(b"motte-key-checksum-1\x00", kind.encode(), b"\x00", public)[:4]


# --- the channel to the worker ------------------------------------------------------------------------------------


class ChannelCipher:
    """One direction of a channel: messages arrive once, in order, or not at all.

    The key of the direction is derived (HKDF-SHA256, RFC 5869) from the shared key and ``direction``, so that both
    directions may start from one key and a message reflected to its sender does not open. The nonce is a counter that
    is never sent: a replayed, reordered or dropped message fails, and after a failure the object refuses all use.
    Safe to call from several threads; the order is then the order of the calls.

    Args:
        key: 32 secret bytes, new for every channel.
        direction: what distinguishes this direction, such as ``b"to worker"``.
    """

    def __init__(self, key: bytes, direction: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise InputError("not a channel key", expected=f"{KEY_BYTES} bytes", got=f"{len(key)} bytes")
        kdf = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=_CHANNEL_DOMAIN + direction)
        self._cipher = AESGCM(kdf.derive(key))
        self._count = 0
        self._broken = False
        self._lock = threading.Lock()

    def _nonce(self) -> bytes:
        if self._broken or self._count >= MAX_CHANNEL_MESSAGES:
            raise DecryptError("the channel is used up, or broken by an earlier message", hint="open a new channel")
        return self._count.to_bytes(12, "big")

    def seal(self, plaintext: bytes | memoryview, aad: bytes) -> bytes:
        """Encrypt the next message, 16 bytes longer. ``aad`` must be known to the other side.

        Raises:
            DecryptError: the channel is used up.
        """
        with self._lock:
            nonce = self._nonce()
            self._count += 1  # before the encryption: a nonce is never used again, whatever happens
            return self._cipher.encrypt(nonce, plaintext, aad)

    def open(self, ciphertext: bytes | memoryview, aad: bytes) -> bytes:
        """Decrypt the next message; ``ciphertext`` is **unverified** and must not change meanwhile.

        Raises:
            DecryptError: altered, replayed, out of order, for another ``aad``, or after an earlier failure.
        """
        plaintext = bytearray(max(0, len(ciphertext) - TAG_BYTES))
        self.open_into(ciphertext, aad, memoryview(plaintext))
        return bytes(plaintext)

    def open_into(self, ciphertext: bytes | memoryview, aad: bytes, plaintext: memoryview) -> None:
        """:meth:`open` into ``plaintext``, 16 bytes shorter; after an error nothing in it is to be used.

        Raises:
            DecryptError: as :meth:`open`. ValueError: ``plaintext`` has another length.
        """
        with self._lock:
            nonce = self._nonce()
            try:
                self._cipher.decrypt_into(nonce, ciphertext, aad, plaintext)
            except InvalidTag as problem:
                self._broken = True
                raise DecryptError("a message of the channel does not authenticate, or is out of order") from problem
            self._count += 1
