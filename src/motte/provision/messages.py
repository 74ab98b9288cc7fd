"""What an enclave sends to a broker on its way to keys, and the broker's challenge (docs/spec/broker.md, section 3).

enclave                                     broker
Ask: which bundle         -------------->
                          <--------------   Challenge: a nonce for it, signed
Proof: evidence over it   -------------->
                          <--------------   Release: data keys, to the key in the evidence, signed (release.py)
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from motte.attest.evidence import Evidence
from motte.digests import sha256
from motte.errors import FormatError
from motte.limits import MAX_BROKER_ANSWER_BYTES, MAX_BROKER_REQUEST_BYTES, MAX_EVIDENCE_BYTES, MAX_RELEASE
from motte.provision.heads import Head, read_head
from motte.provision.statements import answer_checks, read_answer, sign
from motte.seal.header import BundleHeader, front
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.seal.primitives import BUNDLE_ID_BYTES, KEY_BYTES
from motte.strict_json import Fields, canonical, parse

NONCE_BYTES: Final = 32
DIGEST_BYTES: Final = 32
RUN_ID_BYTES: Final = 16
ASK_FORMAT: Final = "motte-ask-1"
CHALLENGE_FORMAT: Final = "motte-challenge-1"
PROOF_FORMAT: Final = "motte-proof-1"
MAX_TIME: Final = 1 << 40
"""Seconds since 1970 in a message."""
_HEADER_DIGEST: Final = b"motte-header-digest-1\x00"


def header_digest(header: BundleHeader) -> bytes:
    """What names one signed header: SHA-256 over the bytes that its signer signed. Two releases never share it."""
    return sha256(_HEADER_DIGEST, front(header.encode()))


@dataclass(frozen=True, slots=True)
class Target:
    """Which keys are wanted: those of one release of one bundle, named by its header."""

    bundle_id: bytes
    release: int
    header_digest: bytes

    @staticmethod
    def of(header: BundleHeader) -> Target:
        """The target that a header names."""
        return Target(header.bundle_id, header.release, header_digest(header))

    @staticmethod
    def take(fields: Fields) -> Target:
        """From the fields of a message."""
        return Target(
            fields.hexadecimal("bundle_id", length_bytes=BUNDLE_ID_BYTES),
            fields.integer("release", low=0, high=MAX_RELEASE),
            fields.hexadecimal("header_digest", length_bytes=DIGEST_BYTES),
        )

    def to_json(self) -> dict[str, Any]:
        """As fields of a message."""
        return {
            "bundle_id": self.bundle_id.hex(),
            "header_digest": self.header_digest.hex(),
            "release": self.release,
        }

    def to_bytes(self) -> bytes:
        """For HPKE's ``info``: fixed length."""
        return self.bundle_id + self.release.to_bytes(8, "big") + self.header_digest


@dataclass(frozen=True, slots=True)
class Resume:
    """Which training run goes on, and from which of its checkpoints; ``checkpoint`` 0: from the start."""

    run: bytes
    checkpoint: int

    def to_json(self) -> dict[str, Any]:
        """As a field of a message."""
        return {"checkpoint": self.checkpoint, "run": self.run.hex()}

    @staticmethod
    def take(value: Any, where: str) -> Resume | None:
        """From a field of a message; ``null``: no training run."""
        if value is None:
            return None
        fields = Fields(value, where=where)
        resume = Resume(
            fields.hexadecimal("run", length_bytes=RUN_ID_BYTES), fields.integer("checkpoint", low=0, high=MAX_RELEASE)
        )
        fields.done()
        return resume


@dataclass(frozen=True, slots=True)
class Ask:
    """The first message: for which bundle, and which training run, a nonce is wanted."""

    target: Target
    resume: Resume | None = None

    def encode(self) -> bytes:
        """As it travels."""
        resume = None if self.resume is None else self.resume.to_json()
        return canonical({"format": ASK_FORMAT, "resume": resume, **self.target.to_json()})

    @staticmethod
    def decode(data: bytes) -> Ask:
        """Read an **unverified** message (K-1). Raises: FormatError."""
        fields = Fields(parse(data, max_bytes=MAX_BROKER_REQUEST_BYTES, what="ask"), where="ask")
        fields.choice("format", (ASK_FORMAT,))
        ask = Ask(Target.take(fields), Resume.take(fields.any("resume"), "ask.resume"))
        fields.done()
        return ask


@dataclass(frozen=True, slots=True)
class Challenge:
    """The broker's answer: a nonce for this bundle, to be used once before ``expires_at`` (seconds since 1970)."""

    nonce: bytes
    target: Target
    expires_at: int
    head: Head
    head_document: Mapping[str, Any]

    def encode(self, broker: SignerPrivateKey) -> bytes:
        """Signed, as it travels."""
        body = {
            "expires_at": self.expires_at,
            "format": CHALLENGE_FORMAT,
            "head": dict(self.head_document),
            "nonce": self.nonce.hex(),
            **self.target.to_json(),
        }
        return canonical(sign(body, broker))

    @staticmethod
    def decode(data: bytes, broker: SignerPublicKey) -> Challenge:
        """Read an **unverified** answer and check it (H-2, H-3). Raises: HandshakeError."""
        fields = read_answer(data, form=CHALLENGE_FORMAT, key=broker, max_bytes=MAX_BROKER_ANSWER_BYTES)
        with answer_checks():
            document = fields.any("head")
            challenge = Challenge(
                fields.hexadecimal("nonce", length_bytes=NONCE_BYTES),
                Target.take(fields),
                fields.integer("expires_at", low=0, high=MAX_TIME),
                read_head(document, broker, where="answer.head"),
                document,
            )
            fields.done()
        return challenge


@dataclass(frozen=True, slots=True)
class Proof:
    """The second message: evidence whose report data binds nonce, key, TLS key and configuration, and these beside it.

    ``public_key`` is X25519, made by the enclave for this one handshake; an empty ``tls_spki_digest``: no TLS ends
    there. All of it is **unverified** at the broker.
    """

    nonce: bytes
    target: Target
    public_key: bytes
    tls_spki_digest: bytes
    configuration_digest: bytes
    evidence: Evidence

    def encode(self) -> bytes:
        """As it travels."""
        return canonical(
            {
                "configuration_digest": self.configuration_digest.hex(),
                "evidence": base64.b64encode(self.evidence.encode()).decode("ascii"),
                "format": PROOF_FORMAT,
                "nonce": self.nonce.hex(),
                "public_key": self.public_key.hex(),
                "tls_spki_digest": self.tls_spki_digest.hex(),
                **self.target.to_json(),
            }
        )

    @staticmethod
    def decode(data: bytes) -> Proof:
        """Read an **unverified** message (K-1). Raises: FormatError, EvidenceError."""
        fields = Fields(parse(data, max_bytes=MAX_BROKER_REQUEST_BYTES, what="proof"), where="proof")
        fields.choice("format", (PROOF_FORMAT,))
        proof = Proof(
            nonce=fields.hexadecimal("nonce", length_bytes=NONCE_BYTES),
            target=Target.take(fields),
            public_key=fields.hexadecimal("public_key", length_bytes=KEY_BYTES),
            tls_spki_digest=_digest_or_nothing(fields, "tls_spki_digest"),
            configuration_digest=fields.hexadecimal("configuration_digest", length_bytes=DIGEST_BYTES),
            evidence=_evidence(fields.text("evidence", max_bytes=2 * MAX_EVIDENCE_BYTES)),
        )
        fields.done()
        return proof


def _digest_or_nothing(fields: Fields, name: str) -> bytes:
    text = fields.text(name, max_bytes=2 * DIGEST_BYTES)
    return Fields({name: text}, where=fields.where).hexadecimal(name, length_bytes=DIGEST_BYTES) if text else b""


def _evidence(text: str) -> Evidence:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise FormatError("not base64", where="proof.evidence") from problem
    return Evidence.decode(data)
