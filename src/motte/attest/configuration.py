"""The configuration of a run: everything that decides what leaves the trusted process, as one digest in its evidence.

It is made only from a bundle whose owner's signature was checked, by callers to the right of this package, before any
evidence is made. Host-chosen arguments, environment, clock and measurements have no way into it: whoever wants another
noise, accelerator or broker gets another digest, and a policy's ``Configuration`` refuses it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from motte.errors import InputError
from motte.limits import MAX_NAME_BYTES, MAX_RELEASE
from motte.strict_json import canonical

MAX_RANKS: Final = 65_536
MAX_TEXT_BYTES: Final = 64 * 1024
_DOMAIN: Final = b"motte-run-configuration-1\x00"
_BUNDLE_ID_BYTES: Final = 16
_SIGNER_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfiguration:
    """One run as its owner signed it. Two runs that differ in any field have different digests.

    Attributes:
        bundle_id: 16 bytes, and ``release`` from 1: what is run.
        signer: Ed25519 public key (32 bytes) that signed the bundle.
        broker: where keys come from (URL and key, as the bundle spells it); empty: no broker.
        scheme: the offload scheme, such as ``asymmetric``; ``trusted``: nothing is offloaded.
        placement: which layers and parts run where, as the plan spells it.
        noise: the noise of every release, as the plan spells it; None: **none is added**.
        integrity: how answers of the accelerator are checked; ``off``: not at all.
        ranks: trusted processes that work together, at least 1.
        peers: what names the other side of every link, accelerators included (addresses or key digests), in order.

    Raises:
        InputError: a field is out of its bounds.
    """

    bundle_id: bytes
    release: int
    signer: bytes
    broker: str = ""
    scheme: str
    placement: str
    noise: str | None
    integrity: str
    ranks: int = 1
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "peers", tuple(self.peers))
        _require(len(self.bundle_id) == _BUNDLE_ID_BYTES, "bundle_id", f"{_BUNDLE_ID_BYTES} bytes")
        _require(len(self.signer) == _SIGNER_BYTES, "signer", f"{_SIGNER_BYTES} bytes")
        _require(type(self.release) is int and 1 <= self.release <= MAX_RELEASE, "release", f"1 to {MAX_RELEASE}")
        _require(type(self.ranks) is int and 1 <= self.ranks <= MAX_RANKS, "ranks", f"1 to {MAX_RANKS}")
        _require(len(self.peers) <= MAX_RANKS, "peers", f"at most {MAX_RANKS}")
        for name in ("scheme", "placement", "integrity"):
            _require(bool(getattr(self, name)), name, "a word")
        _require(self.noise != "", "noise", "a text, or None for no noise")
        for text in (self.broker, self.scheme, self.placement, self.integrity, self.noise or "-"):
            _require(len(text.encode("utf-8", "surrogatepass")) <= MAX_TEXT_BYTES, "text", f"{MAX_TEXT_BYTES} bytes")
        for peer in self.peers:
            _require(0 < len(peer.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES, "peers", "names in bounds")

    def fields(self) -> dict[str, Any]:
        """The fields as plain JSON values, for people and for logs."""
        return {
            "bundle_id": self.bundle_id.hex(),
            "release": self.release,
            "signer": self.signer.hex(),
            "broker": self.broker,
            "scheme": self.scheme,
            "placement": self.placement,
            "noise": self.noise,
            "integrity": self.integrity,
            "ranks": self.ranks,
            "peers": list(self.peers),
        }

    def digest(self) -> bytes:
        """32 bytes: SHA-256 of the domain string and the canonical JSON of all fields."""
        return hashlib.sha256(_DOMAIN + canonical(self.fields())).digest()


def _require(good: bool, name: str, expected: str) -> None:
    if not good:
        raise InputError("a run's configuration is out of bounds", where=name, expected=expected)
