"""The grant: one bundle's key-encryption key and fresh session keys, sealed to one worker's ephemeral public key.

HPKE (RFC 9180) single-shot; ``info`` binds bundle and release, so that a grant is useless for another bundle. Until
evidence is verified (the ``process`` kind has none) whoever sits between the two sides could offer a public key of
its own: THREAT_MODEL.md says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from motte.seal.primitives import HPKE_EXTRA_BYTES, ChannelCipher, hpke_open, hpke_seal, random_bytes
from motte.seal.reader import KeyEncryptionKey

KEY_BYTES = 32
KEK_BYTES = 56
"""Of a key-encryption key on its way: bundle id, release, secret."""
GRANT_BYTES = 2 * KEY_BYTES + KEK_BYTES + HPKE_EXTRA_BYTES
"""Of a sealed grant, always."""
SESSION_GRANT_BYTES = 2 * KEY_BYTES + HPKE_EXTRA_BYTES
"""Of a sealed grant of session keys alone, for a worker that gets its data keys from a broker."""
KEY_SOURCES = ("recipient", "broker")
"""Who gives a worker the bundle's keys: the client, which is a recipient; or a broker, against evidence."""
_DOMAIN = b"motte grant 1"
_SESSION_DOMAIN = b"motte session grant 1"


@dataclass(frozen=True, slots=True, repr=False)
class SessionKeys:
    """One key per direction, for one link, used for nothing else. Not printable, so that no log holds them."""

    to_worker: bytes
    to_client: bytes

    def client_ciphers(self) -> tuple[ChannelCipher, ChannelCipher]:
        """(sending, receiving) at the client."""
        return ChannelCipher(self.to_worker, b"to-worker"), ChannelCipher(self.to_client, b"to-client")

    def worker_ciphers(self) -> tuple[ChannelCipher, ChannelCipher]:
        """(sending, receiving) at the worker."""
        return ChannelCipher(self.to_client, b"to-client"), ChannelCipher(self.to_worker, b"to-worker")


def _info(bundle_id: bytes, release: int, domain: bytes = _DOMAIN) -> bytes:
    return domain + bundle_id + release.to_bytes(8, "big")


def make_grant(
    kek: KeyEncryptionKey, worker_public: bytes, *, bundle_id: bytes, release: int
) -> tuple[bytes, SessionKeys]:
    """Seal ``kek`` and new session keys to ``worker_public`` (X25519): the grant, and the keys to keep.

    Raises:
        InputError: nothing can be sealed to that public key.
    """
    keys = SessionKeys(random_bytes(KEY_BYTES), random_bytes(KEY_BYTES))
    # Bytes at fixed places and no JSON: a parser's error would quote what it could not read.
    body = keys.to_worker + keys.to_client + kek.to_bytes()
    return hpke_seal(worker_public, body, info=_info(bundle_id, release)), keys


def open_grant(
    sealed: bytes, worker_private: bytes | memoryview, *, bundle_id: bytes, release: int
) -> tuple[KeyEncryptionKey, SessionKeys]:
    """Open an **unverified** grant inside the worker: the key-encryption key and the session keys.

    Raises:
        DecryptError: made for another worker, bundle or release, or altered.
        FormatError: authentic but malformed.
    """
    body = hpke_open(worker_private, sealed, info=_info(bundle_id, release))
    keys = SessionKeys(body[:KEY_BYTES], body[KEY_BYTES : 2 * KEY_BYTES])
    return KeyEncryptionKey.from_bytes(body[2 * KEY_BYTES :]), keys


def make_session_grant(worker_public: bytes, *, bundle_id: bytes, release: int) -> tuple[bytes, SessionKeys]:
    """Seal new session keys alone to ``worker_public`` (X25519): the grant, and the keys to keep.

    Raises:
        InputError: nothing can be sealed to that public key.
    """
    keys = SessionKeys(random_bytes(KEY_BYTES), random_bytes(KEY_BYTES))
    info = _info(bundle_id, release, _SESSION_DOMAIN)
    return hpke_seal(worker_public, keys.to_worker + keys.to_client, info=info), keys


def open_session_grant(
    sealed: bytes, worker_private: bytes | memoryview, *, bundle_id: bytes, release: int
) -> SessionKeys:
    """Open an **unverified** grant of :func:`make_session_grant` inside the worker.

    Raises:
        DecryptError: made for another worker, bundle or release, or altered.
    """
    body = hpke_open(worker_private, sealed, info=_info(bundle_id, release, _SESSION_DOMAIN))
    return SessionKeys(body[:KEY_BYTES], body[KEY_BYTES:])
