"""Nonces in memory: issued with the time that we noted ourselves, taken once, then gone.

A broker that must survive a restart keeps its nonces in its database instead; both hand the same ``Fresh`` to a policy.
"""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import Final

from motte.attest.policy import MAX_AGE_S, Fresh
from motte.attest.report_data import NONCE_BYTES
from motte.errors import AttestationError, ResourceError, SettingError
from motte.seal.primitives import random_bytes

MAX_OPEN_NONCES: Final = 65_536
"""Nonces that are issued and neither taken nor expired, of one book."""


class NonceBook:
    """Issues single-use nonces and remembers when. Safe to call from several threads.

    Args:
        max_age_s: seconds after which an issued nonce is no longer taken.

    Raises:
        SettingError: ``max_age_s`` is out of bounds.
    """

    def __init__(self, max_age_s: float) -> None:
        if not 0 < max_age_s <= MAX_AGE_S:
            raise SettingError("not an age in seconds", expected=f"above 0, at most {MAX_AGE_S}", got=repr(max_age_s))
        self.max_age_s = max_age_s
        self._issued: dict[bytes, datetime] = {}
        self._lock = threading.Lock()

    def issue(self, now: datetime) -> bytes:
        """A new nonce of 32 random bytes, noted as issued at ``now`` (aware, UTC).

        Raises:
            ResourceError: too many are open; expired ones have been forgotten already.
        """
        nonce = random_bytes(NONCE_BYTES)
        with self._lock:
            if len(self._issued) >= MAX_OPEN_NONCES:
                oldest = now - timedelta(seconds=self.max_age_s)
                self._issued = {each: at for each, at in self._issued.items() if at >= oldest}
            if len(self._issued) >= MAX_OPEN_NONCES:
                raise ResourceError("too many open nonces", expected=f"at most {MAX_OPEN_NONCES}", hint="try again")
            self._issued[nonce] = now
        return nonce

    def take(self, nonce: bytes) -> Fresh:
        """The condition for evidence about ``nonce``, which is **unverified**; it can be taken once.

        Its age is the condition's business, with the time of its check.

        Raises:
            AttestationError: not a nonce of ours, or taken already (check P-10): replayed evidence ends here.
        """
        with self._lock:
            issued_at = self._issued.pop(nonce, None)
        if issued_at is None:
            raise AttestationError(
                "not an open nonce of ours",
                check="P-10",
                expected="a nonce that we issued and that nobody has used",
                got=nonce.hex()[:64],
                hint="replayed evidence, or a nonce that is too old: ask for a new one",
            )
        return Fresh(self.max_age_s, nonce, issued_at)
