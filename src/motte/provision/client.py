"""The way to a broker: HTTPS with a pinned key, and nothing sent before the pin holds.

It carries bytes. What they are worth is decided by :mod:`motte.provision.handshake` inside the enclave, so an
untrusted host may run this for it.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from motte.errors import BrokerRefused, FormatError, HandshakeError, LinkError, PeerStalled, SettingError
from motte.limits import MAX_AUDIT_PAGE, MAX_BROKER_ANSWER_BYTES, MAX_NAME_BYTES
from motte.provision.address import BrokerAddress
from motte.provision.handshake import Handshake
from motte.provision.heads import DIGEST_BYTES, Head, check_extends, read_head
from motte.provision.messages import MAX_TIME
from motte.provision.registration import Registration
from motte.provision.release import Release
from motte.provision.statements import answer_checks, read_answer
from motte.seal.keys import RecipientPublicKey, SignerPrivateKey
from motte.seal.tls import client_context, pin_of_peer
from motte.strict_json import Fields, parse

IDENTITY_FORMAT: Final = "motte-broker-identity-1"
DEFAULT_TIMEOUT_S: Final = 30.0
_JSON: Final = "application/json"
_FACTS: Final = ("expected", "got", "where", "hint")


class _Pinned(http.client.HTTPSConnection):
    """HTTPS that compares the pin when the handshake is done and before a byte of a request is sent."""

    def __init__(self, address: BrokerAddress, timeout_s: float) -> None:
        super().__init__(address.host, address.port, timeout=timeout_s, context=client_context(None))
        self._address = address

    def connect(self) -> None:
        super().connect()
        try:
            if not isinstance(self.sock, ssl.SSLSocket):
                raise LinkError("no TLS", where=f"{self._address.host}:{self._address.port}")
            where = f"broker {self._address.host}:{self._address.port}"
            pin_of_peer(self.sock, demanded=[self._address.pin], where=where)
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True, slots=True)
class BrokerIdentity:
    """What a broker says of itself: the key that bundles are sealed to, and the newest head. **Verified** by its
    key.
    """

    recipient: RecipientPublicKey
    head: Head
    time: int


class BrokerClient:
    """One connection to one broker, made when needed, kept while it lasts. Use it in a ``with`` block, from one thread.

    Raises:
        SignatureError: the other side holds another key than the pinned one; nothing was sent.
        PeerStalled: no answer in time. LinkError: no connection, or it broke.
        BrokerRefused: the broker said no; ``kind`` and ``check`` say why. Its words are **unverified**.
    """

    def __init__(self, address: BrokerAddress, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        if not timeout_s > 0:
            raise SettingError("the time limit must be positive", where="timeout_s", got=str(timeout_s))
        self.address = address
        self._connection = _Pinned(address, timeout_s)

    def connect(self) -> None:
        """Connect and compare the pin now; otherwise the first question does."""
        where = f"broker {self.address.host}:{self.address.port}"
        try:
            self._connection.connect()
        except TimeoutError as problem:
            raise PeerStalled("the broker did not answer in time", where=where) from problem
        except OSError as problem:
            raise LinkError("no way to the broker", where=where, got=str(problem)[:200]) from problem

    def ask(self, request: bytes) -> bytes:
        """Carry :meth:`Handshake.ask`: the **unverified** challenge."""
        return self._call("POST", "/v1/nonce", request)

    def prove(self, request: bytes) -> bytes:
        """Carry :meth:`Handshake.prove`: the **unverified** answer."""
        return self._call("POST", "/v1/release", request)

    def run(self, request: bytes) -> bytes:
        """Carry a request of :class:`motte.provision.runs.RunSession`: the **unverified** answer."""
        return self._call("POST", "/v1/run", request)

    def obtain(self, handshake: Handshake) -> tuple[Release, bytes]:
        """Carry a whole handshake: the release, and the private key that its session goes on with.

        Raises:
            HandshakeError, RollbackError: the broker's answers are refused. Others as the class says.
        """
        challenge = self.ask(handshake.ask())
        return handshake.finish(self.prove(handshake.prove(challenge)))

    def identity(self) -> BrokerIdentity:
        """What to seal a bundle to, so that this broker can release its keys.

        Raises:
            HandshakeError: not signed by the broker's key, or malformed.
        """
        data = self._call("GET", "/v1/broker", None)
        key = self.address.key
        fields = read_answer(data, form=IDENTITY_FORMAT, key=key, max_bytes=MAX_BROKER_ANSWER_BYTES)
        with answer_checks():
            identity = BrokerIdentity(
                RecipientPublicKey.parse(fields.text("recipient", max_bytes=MAX_NAME_BYTES)),
                read_head(fields.any("head"), key, where="answer.head"),
                fields.integer("time", low=0, high=MAX_TIME),
            )
            fields.done()
        return identity

    def register(self, registration: Registration, signer: SignerPrivateKey) -> Head:
        """Give the broker one more release to hold; ``motte seal --broker`` does this after it has sealed.

        Raises:
            InputError: ``signer`` did not sign the bundle. HandshakeError: the answer is not the broker's.
        """
        data = self._call("POST", "/v1/bundles", registration.encode(signer, self.address.key))
        with answer_checks():
            return read_head(
                parse(data, max_bytes=MAX_BROKER_ANSWER_BYTES, what="answer"), self.address.key, where="answer"
            )

    def head(self) -> tuple[Head, dict[str, Any]]:
        """The newest head of the audit log, and the signed document to keep
        (:func:`motte.provision.heads.save_head`).
        """
        data = self._call("GET", "/v1/audit/head", None)
        with answer_checks():
            document = parse(data, max_bytes=MAX_BROKER_ANSWER_BYTES, what="answer")
            return read_head(document, self.address.key, where="answer"), document

    def check_history(self, known: Head, new: Head) -> None:
        """Return only if the log that ends in ``new`` continues the one that ended in ``known`` (H-8, H-9).

        Raises:
            RollbackError: it was cut short, or restored from a backup. HandshakeError: it was written anew.
        """
        check_extends(known, new, self._digests(known.index, new.index) if new.index > known.index else ())

    def _digests(self, after: int, until: int) -> Iterator[bytes]:
        while after < until:
            data = self._call(
                "GET", f"/v1/audit/digests?after={after}&until={min(until, after + MAX_AUDIT_PAGE)}", None
            )
            with answer_checks():
                value = parse(data, max_bytes=MAX_BROKER_ANSWER_BYTES, what="answer")
                fields = Fields(value, where="answer")
                page = fields.items("digests", max_items=MAX_AUDIT_PAGE, read=_read_digest)
                fields.done()
            if not page:
                raise HandshakeError("the broker's audit log does not continue the one that we know", check="H-9")
            yield from page
            after += len(page)

    def _call(self, method: str, path: str, body: bytes | None) -> bytes:
        where = f"broker {self.address.host}:{self.address.port}"
        headers = {"Accept": _JSON} if body is None else {"Accept": _JSON, "Content-Type": _JSON}
        try:
            kept = self._connection.sock is not None
            try:
                response, data = self._exchange(method, path, body, headers)
            except (ConnectionError, http.client.CannotSendRequest, ssl.SSLEOFError):
                # The server closes idle connections. If it did take the question and its answer was lost, a second one
                # gains nothing: a nonce is used up, and what is charged twice is too much and not too little.
                if not kept:
                    raise
                self._connection.close()
                response, data = self._exchange(method, path, body, headers)
        except TimeoutError as problem:
            self._connection.close()
            raise PeerStalled("the broker did not answer in time", where=where) from problem
        except (OSError, http.client.HTTPException) as problem:
            self._connection.close()
            got = f"{type(problem).__name__}: {problem}"[:200]
            raise LinkError("no answer from the broker", where=where, got=got) from problem
        if len(data) > MAX_BROKER_ANSWER_BYTES:
            self._connection.close()
            raise HandshakeError("the broker's answer is too large", check="H-2", where=where)
        if response.status != 200:
            raise _refusal(data, response.status, where)
        return data

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request(method, path, body=body, headers=headers)
        response = self._connection.getresponse()
        return response, response.read(MAX_BROKER_ANSWER_BYTES + 1)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


def _read_digest(value: Any, where: str) -> bytes:
    return Fields({"digest": value}, where=where).hexadecimal("digest", length_bytes=DIGEST_BYTES)


def _refusal(data: bytes, status: int, where: str) -> BrokerRefused:
    """What an **unverified** answer other than 200 says."""
    words: dict[str, str] = {}
    try:
        value = parse(data, max_bytes=MAX_BROKER_ANSWER_BYTES, what="answer")
        error = value["error"] if isinstance(value, dict) else {}
        words = {name: text for name, text in error.items() if isinstance(name, str) and isinstance(text, str)}
    except (FormatError, KeyError, AttributeError):
        words = {}
    return BrokerRefused(
        f"the broker refuses: {words.get('message', f'status {status}')}"[:MAX_NAME_BYTES],
        kind=words.get("kind"),
        check=words.get("check"),
        **{name: words.get(name) for name in _FACTS} | {"where": words.get("where", where)},
    )
