"""The configuration of a run: everything that decides what leaves the trusted process, as one digest in its evidence.

It is made only from a bundle whose owner's signature was checked, by callers to the right of this package, before any
evidence is made. Host-chosen arguments, environment, clock and measurements have no way into it: whoever wants another
noise, accelerator or broker gets another digest, and a policy's ``Configuration`` refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from motte.digests import sha256
from motte.errors import InputError
from motte.limits import MAX_NAME_BYTES, MAX_RELEASE
from motte.seal.header import BundleHeader
from motte.seal.keys import SignerPublicKey
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

    @staticmethod
    def of(header: BundleHeader) -> RunConfiguration:
        """The configuration that the **verified** ``header`` of a bundle names: all runs of one release share it.

        Raises:
            InputError: the header says nothing of runs; it was sealed without terms.
        """
        terms = header.run
        if terms is None:
            raise InputError(
                "this bundle was sealed without the terms of its runs, so that no evidence can speak for one",
                where=header.bundle_id.hex(),
                hint="let its owner seal it again with motte seal",
            )
        return RunConfiguration(
            bundle_id=header.bundle_id,
            release=header.release,
            signer=header.signer.raw,
            broker=terms.broker,
            scheme=terms.scheme,
            placement=terms.placement,
            noise=terms.noise,
            integrity=terms.integrity,
            ranks=terms.ranks,
            # Several trusted processes are each other's peers: what they demand of each other is bound too.
            peers=terms.peers if terms.ranks == 1 else (*terms.peers, f"ranks {terms.ranks_policy}"),
        )

    def broker_key(self) -> SignerPublicKey:
        """The key that signs the answers of the broker that the owner named.

        Raises:
            InputError: the owner named none. FormatError: its key is mistyped.
        """
        if not self.broker:
            raise InputError(
                "the owner of this bundle named no broker", hint="seal it with --broker, or run it with a recipient key"
            )
        return SignerPublicKey.parse(self.broker.rpartition("+")[2])

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
        return sha256(_DOMAIN, canonical(self.fields()))


def _require(good: bool, name: str, expected: str) -> None:
    if not good:
        raise InputError("a run's configuration is out of bounds", where=name, expected=expected)
