"""The enclave's side of a handshake, as a state machine: each step once and in order, or an error and no keys.

It speaks bytes and knows no network: whoever carries them (an untrusted host, :mod:`motte.provision.client`) can delay
or drop them, no more. After any failure the object refuses all use; a new handshake has a new key and a new nonce.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from motte.attest.evidence import Evidence
from motte.attest.report_data import report_data
from motte.errors import HandshakeError
from motte.provision.heads import Head, check_not_behind
from motte.provision.messages import Ask, Challenge, Proof, Resume, Target
from motte.provision.release import Expected, Release, open_release
from motte.seal.header import BundleHeader
from motte.seal.keys import SignerPublicKey
from motte.seal.primitives import new_x25519

State = Literal["new", "asked", "proved", "done", "failed"]
Issue = Callable[[bytes], Evidence]
"""Makes evidence over 64 bytes of report data: ``issue`` of a platform, its devices bound."""


@dataclass(frozen=True, slots=True)
class Enclave:
    """What one enclave is, for a handshake: how it proves itself, and what it is committed to before it does.

    Attributes:
        issue: makes its evidence.
        tls_spki_digest: of the key that its TLS certificate carries, 32 bytes.
        configuration_digest: of :class:`motte.attest.configuration.RunConfiguration`, made from the owner-signed
        bundle.
    """

    issue: Issue
    tls_spki_digest: bytes
    configuration_digest: bytes


class Handshake:
    """One handshake for the data keys of one bundle.

    Args:
        broker: the broker's public key. It comes from the owner-signed configuration, never from the host.
        header: **verified**, of the bundle as it was opened (:attr:`motte.seal.reader.SignedBundle.header`).
        resume: the training run that the keys are for.
        known_head: the newest head of this broker's log that we know; None: none yet.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        broker: SignerPublicKey,
        header: BundleHeader,
        enclave: Enclave,
        *,
        resume: Resume | None = None,
        known_head: Head | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._broker, self._enclave, self._resume, self._clock = broker, enclave, resume, clock
        self._target, self._sections = Target.of(header), len(header.sections)
        self._known_head = known_head
        self._private = b""
        self._expected: Expected | None = None
        self._state: State = "new"

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._state

    def ask(self) -> bytes:
        """Step 1: the question to send. Raises: HandshakeError: not the first step (H-1)."""
        self._step("new", "asked")
        return Ask(self._target, self._resume).encode()

    def prove(self, answer: bytes) -> bytes:
        """Step 2: take the **unverified** challenge, make evidence over its nonce, and give the proof to send.

        Raises:
            HandshakeError: out of order (H-1), or the challenge is refused (H-2 to H-4).
            RollbackError: the broker's log is behind what we know (H-8).
            ResourceError: no evidence can be made here.
        """
        self._step("asked", "failed")
        challenge = Challenge.decode(answer, self._broker)
        if challenge.target != self._target:
            raise HandshakeError("a challenge for another bundle than ours", check="H-4", where="answer")
        if self._known_head is not None:
            check_not_behind(self._known_head, challenge.head)
        self._known_head = challenge.head
        # New for every handshake: what was sealed to an earlier key opens no more once this object has gone.
        self._private, public = new_x25519()
        enclave = self._enclave
        bound = report_data(
            nonce=challenge.nonce,
            public_key=public,
            tls_spki_digest=enclave.tls_spki_digest,
            configuration_digest=enclave.configuration_digest,
        )
        evidence = enclave.issue(bound)
        self._expected = Expected(
            self._broker, self._target, self._sections, challenge.nonce, public, enclave.tls_spki_digest, self._resume
        )
        self._state = "proved"
        return Proof(
            challenge.nonce,
            self._target,
            public,
            enclave.tls_spki_digest,
            enclave.configuration_digest,
            evidence,
        ).encode()

    def finish(self, answer: bytes) -> tuple[Release, bytes]:
        """Step 3: take the **unverified** answer: the release, and the private key that its session goes on with.

        Raises:
            HandshakeError: out of order (H-1), or refused (H-2 to H-7). RollbackError: H-8.
        """
        self._step("proved", "failed")
        private, self._private = self._private, b""
        if self._expected is None or self._known_head is None:
            raise HandshakeError("nothing was asked for", check="H-1")
        release = open_release(answer, private, self._expected, now=self._clock())
        check_not_behind(self._known_head, release.head)
        self._state = "done"
        return release, private

    def _step(self, demanded: State, following: State) -> None:
        # ``following`` is "failed" where something can still go wrong: only a step that came through moves on.
        if self._state != demanded:
            got, self._state = self._state, "failed"
            raise HandshakeError("a step out of order", check="H-1", expected=f"state {demanded}", got=f"state {got}")
        self._state = following
