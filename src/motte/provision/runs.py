"""A training run's books at the broker: what was released is charged before it leaves, and old checkpoints get no key.

The enclave, under the session of its :class:`~motte.provision.release.Release`:

* ``charge``: before anything with noise leaves, ``value`` more releases. The broker's total only rises, whatever the
  host
  restores, and stops at the budget that the owner set. After a resume the run goes on from the broker's total.
* ``prepare``: the key for checkpoint ``value`` (the newest committed + 1), to seal it with.
* ``commit``: checkpoint ``value`` lies safely on disk. From now on no older one gets a key.

A crash between the last two leaves the checkpoint before, which still gets its key: nothing was lost, and what was
released meanwhile stays charged.

Each request carries a code (HMAC-SHA256) under the session key, and a random echo that the signed answer repeats: an
answer that the host kept from an earlier request, or from a second enclave of the same run, is not taken for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from motte.errors import DecryptError, HandshakeError
from motte.limits import MAX_BROKER_ANSWER_BYTES, MAX_BROKER_REQUEST_BYTES, MAX_RELEASE, MAX_RUN_CHARGE
from motte.provision.heads import Head, check_not_behind, read_head
from motte.provision.messages import RUN_ID_BYTES
from motte.provision.release import LEASE_ID_BYTES, Release, RunState
from motte.provision.statements import answer_checks, read_answer, sign
from motte.seal import primitives
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.strict_json import Fields, canonical, parse

Action = Literal["charge", "prepare", "commit"]
ACTIONS: Final = ("charge", "prepare", "commit")
ECHO_BYTES: Final = 32
REQUEST_FORMAT: Final = "motte-run-request-1"
ANSWER_FORMAT: Final = "motte-run-answer-1"
_INFO: Final = b"motte-broker-checkpoint-1\x00"
_CODE: Final = "code"


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One order of the enclave to the broker; **unverified** there until its code is checked."""

    lease: bytes
    run: bytes
    action: Action
    value: int
    echo: bytes

    def _body(self) -> dict[str, Any]:
        return {
            "action": self.action,
            "echo": self.echo.hex(),
            "format": REQUEST_FORMAT,
            "lease": self.lease.hex(),
            "run": self.run.hex(),
            "value": self.value,
        }

    def encode(self, session: bytes) -> bytes:
        """As it travels, with its code."""
        body = self._body()
        return canonical({**body, _CODE: primitives.message_code(session, canonical(body)).hex()})

    def check_code(self, session: bytes, code: bytes) -> None:
        """Return only if ``code`` was made under ``session``. Raises: DecryptError."""
        primitives.check_message_code(session, canonical(self._body()), code)

    @staticmethod
    def decode(data: bytes) -> tuple[RunRequest, bytes]:
        """Read an **unverified** request and its code. Raises: FormatError."""
        fields = Fields(parse(data, max_bytes=MAX_BROKER_REQUEST_BYTES, what="request"), where="request")
        fields.choice("format", (REQUEST_FORMAT,))
        action = fields.choice("action", ACTIONS)
        request = RunRequest(
            lease=fields.hexadecimal("lease", length_bytes=LEASE_ID_BYTES),
            run=fields.hexadecimal("run", length_bytes=RUN_ID_BYTES),
            action="charge" if action == "charge" else "prepare" if action == "prepare" else "commit",
            value=fields.integer("value", low=1, high=MAX_RUN_CHARGE),
            echo=fields.hexadecimal("echo", length_bytes=ECHO_BYTES),
        )
        code = fields.hexadecimal(_CODE, length_bytes=primitives.KEY_BYTES)
        fields.done()
        return request, code

    def info(self) -> bytes:
        """The context in which a checkpoint's key is sealed."""
        return _INFO + self.run + self.value.to_bytes(8, "big") + self.lease + self.echo


def encode_answer(
    request: RunRequest, state: RunState, sealed: bytes, head_document: Mapping[str, Any], broker: SignerPrivateKey
) -> bytes:
    """The broker's signed answer, as it travels; ``sealed`` is empty but for ``prepare``."""
    body = {
        "action": request.action,
        "echo": request.echo.hex(),
        "format": ANSWER_FORMAT,
        "head": dict(head_document),
        "lease": request.lease.hex(),
        "run": request.run.hex(),
        "sealed": sealed.hex(),
        "state": state.to_json(),
        "value": request.value,
    }
    return canonical(sign(body, broker))


class RunSession:
    """The enclave's books of one training run. Not safe from several threads.

    Args:
        carry: takes a request to the broker and gives back its **unverified** answer
            (:meth:`motte.provision.client.BrokerClient.run`, or a frame to the host that carries it).
        private_key: of the handshake, as :meth:`motte.provision.handshake.Handshake.finish` gave it.

    Raises:
        HandshakeError: the release is for no training run (H-1).
    """

    def __init__(
        self, release: Release, private_key: bytes, broker: SignerPublicKey, carry: Callable[[bytes], bytes]
    ) -> None:
        if release.resume is None or release.run_state is None:
            raise HandshakeError("the keys were not released for a training run", check="H-1")
        self._release, self._private, self._broker, self._carry = release, private_key, broker, carry
        self._run = release.resume.run
        self._head: Head = release.head
        self.state: RunState = release.run_state

    def charge(self, releases: int) -> RunState:
        """Charge ``releases`` more; **only when this returns may they leave**.

        Raises:
            BrokerRefused: the budget is used up, or the lease has ended. HandshakeError, RollbackError: an answer
            that is not ours; nothing may leave. LinkError: no answer; whether they were charged is unknown.
        """
        before = self.state.charged
        self._order("charge", releases)
        if self.state.charged < before + releases:
            raise HandshakeError(
                "the broker did not charge what was asked",
                check="H-5",
                expected=f"at least {before + releases}",
                got=str(self.state.charged),
            )
        return self.state

    def prepare(self, checkpoint: int) -> bytes:
        """The key (32 bytes) to seal checkpoint number ``checkpoint`` with. Raises: as :meth:`charge`."""
        request, sealed = self._order("prepare", checkpoint)
        try:
            return primitives.hpke_open(self._private, sealed, info=request.info())
        except DecryptError as problem:
            raise HandshakeError("the checkpoint's key does not open with our key", check="H-6") from problem

    def commit(self, checkpoint: int) -> RunState:
        """Tell the broker that the checkpoint is whole and on disk. Raises: as :meth:`charge`."""
        self._order("commit", checkpoint)
        return self.state

    def _order(self, action: Action, value: int) -> tuple[RunRequest, bytes]:
        echo = primitives.random_bytes(ECHO_BYTES)
        request = RunRequest(self._release.lease.id, self._run, action, value, echo)
        answer = self._carry(request.encode(self._release.session))
        fields = read_answer(answer, form=ANSWER_FORMAT, key=self._broker, max_bytes=MAX_BROKER_ANSWER_BYTES)
        length = primitives.KEY_BYTES + primitives.HPKE_EXTRA_BYTES if action == "prepare" else 0
        with answer_checks():
            head = read_head(fields.any("head"), self._broker, where="answer.head")
            repeated = (
                fields.hexadecimal("lease", length_bytes=LEASE_ID_BYTES),
                fields.hexadecimal("run", length_bytes=RUN_ID_BYTES),
                fields.choice("action", ACTIONS),
                fields.integer("value", low=1, high=MAX_RELEASE),
                fields.hexadecimal("echo", length_bytes=ECHO_BYTES),
            )
            sealed = fields.hexadecimal("sealed", length_bytes=length)
            state = RunState.take(fields.any("state"), "answer.state")
            fields.done()
        asked = (request.lease, request.run, request.action, request.value, request.echo)
        if repeated != asked or state is None:
            raise HandshakeError("the broker answered another question than ours", check="H-5", where="answer")
        check_not_behind(self._head, head)
        self._head, self.state = head, state
        return request, sealed
