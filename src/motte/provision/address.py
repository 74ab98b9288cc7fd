"""Where a broker is and how it is known: ``https://HOST:PORT#sha256:PIN+motte-signer-1-KEY``, one word for a command
line.

The pin is of the key of its TLS certificate (:mod:`motte.seal.tls`), the key is the one it signs answers with. Both
come from the broker's owner, never from the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from motte.errors import InputError
from motte.limits import MAX_NAME_BYTES
from motte.seal.keys import SignerPublicKey
from motte.seal.tls import PIN_PREFIX, parse_pin

_EXAMPLE = "https://HOST:PORT#sha256:PIN+motte-signer-1-KEY"


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """A broker: host and port, the pin of its TLS key (32 bytes), the key that signs its answers."""

    host: str
    port: int
    pin: bytes
    key: SignerPublicKey

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}#{PIN_PREFIX}{self.pin.hex()}+{self.key}"

    @staticmethod
    def parse(text: str) -> BrokerAddress:
        """Read the word that ``motte broker serve`` prints.

        Raises:
            InputError: not such a word. FormatError: its key is mistyped.
        """
        if len(text.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise InputError("not a broker's address", expected=_EXAMPLE, got="something longer")
        url, _, known = text.strip().partition("#")
        pin, plus, key = known.partition("+")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as problem:
            raise InputError("not a broker's address", expected=_EXAMPLE, got=repr(text)[:200]) from problem
        if (
            parts.scheme != "https"
            or not host
            or port is None
            or parts.path not in ("", "/")
            or parts.query
            or not plus
        ):
            raise InputError("not a broker's address", expected=_EXAMPLE, got=repr(text)[:200])
        return BrokerAddress(host, port, parse_pin(pin), SignerPublicKey.parse(key))
