"""A wrapping key that never leaves a PKCS#11 token: the token encrypts and decrypts, we hold a session and no key.

AES-256-GCM inside the token (CKM_AES_GCM, PKCS#11 v3.0, 6.13.3), nonces from us: some tokens want to make their own,
and are refused by the self-test at the start. Needs the package ``python-pkcs11`` and the token's library.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from motte.errors import DecryptError, InputError, KeyAccessError, ResourceError
from motte.limits import MAX_NAME_BYTES
from motte.provision.broker.wrapping import Unlock
from motte.seal.primitives import random_bytes
from motte.strict_json import Fields

_NONCE_BYTES: Final = 12
_TAG_BITS: Final = 128
_DOMAIN: Final = b"motte-pkcs11-1\x00"


class Pkcs11Wrapper:
    """See :class:`motte.provision.broker.wrapping.KeyWrapper`. Made by :meth:`create` and :meth:`open` only."""

    def __init__(self, session: Any, key: Any, token: str, label: str) -> None:
        self._session, self._key = session, key
        self.parameters: Mapping[str, Any] = {"kind": "pkcs11", "label": label, "token": token}
        # A PKCS#11 session takes one operation at a time.
        self._lock = threading.Lock()

    @staticmethod
    def create(unlock: Unlock) -> Pkcs11Wrapper:
        """A new AES-256 key in the token: sensitive, not extractable, under a random label.

        Raises:
            InputError: no token or PIN named. ResourceError: no such library or token, or it cannot do this.
            KeyAccessError: a wrong PIN.
        """
        session, token = _session(unlock)
        from pkcs11 import Attribute, KeyType
        from pkcs11.exceptions import PKCS11Error

        label = f"motte-broker-{random_bytes(8).hex()}"
        try:
            template = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
            key = session.generate_key(KeyType.AES, 256, label=label, store=True, template=template)
        except PKCS11Error as problem:
            raise _unable("the token cannot make the key", problem) from problem
        made = Pkcs11Wrapper(session, key, token, label)
        made.unwrap(made.wrap(b"self-test", b""), b"")
        return made

    @staticmethod
    def open(unlock: Unlock, fields: Fields) -> Pkcs11Wrapper:
        """The key that the stored parameters name.

        Raises:
            As :meth:`create`; KeyAccessError also if the token does not hold the key.
        """
        wanted, label = (fields.text(name, max_bytes=MAX_NAME_BYTES) for name in ("token", "label"))
        fields.done()
        session, token = _session(unlock)
        from pkcs11 import ObjectClass
        from pkcs11.exceptions import PKCS11Error

        try:
            key = session.get_key(object_class=ObjectClass.SECRET_KEY, label=label)
        except PKCS11Error as problem:
            raise KeyAccessError("the token does not hold the broker's key", expected=wanted, got=token) from problem
        return Pkcs11Wrapper(session, key, wanted, label)

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        """Encrypt in the token: nonce, ciphertext, tag."""
        nonce = random_bytes(_NONCE_BYTES)
        return nonce + self._do("encrypt", secret, nonce, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """Decrypt in the token. Raises: DecryptError."""
        return self._do("decrypt", wrapped[_NONCE_BYTES:], wrapped[:_NONCE_BYTES], context)

    def close(self) -> None:
        """End the session."""
        with self._lock:
            self._session.close()

    def _do(self, what: str, data: bytes, nonce: bytes, context: bytes) -> bytes:
        from pkcs11 import Mechanism
        from pkcs11.exceptions import PKCS11Error
        from pkcs11.mechanisms import GCMParams

        parameters = GCMParams(nonce, _DOMAIN + context, _TAG_BITS)
        try:
            with self._lock:
                done = getattr(self._key, what)(data, mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
        except PKCS11Error as problem:
            if what == "decrypt":
                # Tokens do not say which it was: a tag that does not match, or their own trouble.
                raise DecryptError("the token does not open the wrapped secret") from problem
            raise _unable("the token cannot encrypt with AES-GCM", problem) from problem
        return bytes(done)


def _session(unlock: Unlock) -> tuple[Any, str]:
    try:
        import pkcs11
        from pkcs11.exceptions import PinIncorrect, PKCS11Error, UserAlreadyLoggedIn
    except ImportError as problem:
        raise ResourceError("no way to talk to a PKCS#11 token", hint="pip install python-pkcs11") from problem
    if unlock.module is None or unlock.token is None or unlock.pin is None:
        raise InputError("a token needs its library, its label and its PIN")
    try:
        token = pkcs11.lib(str(unlock.module)).get_token(token_label=unlock.token)
        try:
            session = token.open(user_pin=unlock.pin, rw=True)
        except UserAlreadyLoggedIn:  # the login is the process's, not the session's
            session = token.open(rw=True)
    except PinIncorrect as problem:
        raise KeyAccessError("the token refuses this PIN", where=unlock.token) from problem
    except (PKCS11Error, RuntimeError) as problem:
        raise _unable("the token cannot be used", problem) from problem
    return session, unlock.token


def _unable(message: str, problem: Exception) -> ResourceError:
    return ResourceError(message, got=f"{type(problem).__name__} {problem}".strip()[:200])
