"""The broker's last word: one release's data keys, sealed to the key that the evidence named, and signed.

HPKE (RFC 9180, base mode) to that key; ``info`` binds bundle, release, header digest, nonce, lease and training run, so
that it opens for the one handshake that it answers. HPKE does not say who sent: the broker's signature does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from motte.errors import DecryptError, HandshakeError
from motte.limits import MAX_BROKER_ANSWER_BYTES, MAX_RELEASE, MAX_RUN_CHARGE
from motte.provision.heads import Head, read_head
from motte.provision.messages import MAX_TIME, NONCE_BYTES, Resume, Target
from motte.provision.statements import answer_checks, read_answer, sign
from motte.seal import primitives
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.strict_json import Fields, canonical

RELEASE_FORMAT: Final = "motte-release-1"
LEASE_ID_BYTES: Final = 16
_DOMAIN: Final = b"motte-broker-release-1\x00"
_RUN: Final = b"\x01"


@dataclass(frozen=True, slots=True)
class Lease:
    """For how long the keys may be used; ``expires_at`` in seconds since 1970, by the broker's clock.

    An enclave that has no clock of its own asks the host what time it is. A lease bounds an honest host's mistakes and
    says until when the broker counts the enclave as live; against a host that lies about time it bounds nothing.
    """

    id: bytes
    expires_at: int

    def check(self, now: float) -> None:
        """Return only if the lease still runs at ``now`` (seconds since 1970).

        Raises:
            HandshakeError: it ended (H-7).
        """
        if now >= self.expires_at:
            raise HandshakeError(
                "the lease on the keys has ended",
                check="H-7",
                expected=f"before {self.expires_at}",
                got=f"{int(now)}",
                hint="ask the broker again, with fresh evidence",
            )


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a training run stands, as the broker has it: releases charged, the newest checkpoint that was committed."""

    charged: int
    checkpoint: int

    def to_json(self) -> dict[str, int]:
        """As a field of a message."""
        return {"charged": self.charged, "checkpoint": self.checkpoint}

    @staticmethod
    def take(value: Any, where: str) -> RunState | None:
        """From a field of a message; ``null``: no training run."""
        if value is None:
            return None
        fields = Fields(value, where=where)
        state = RunState(
            fields.integer("charged", low=0, high=MAX_RUN_CHARGE), fields.integer("checkpoint", low=0, high=MAX_RELEASE)
        )
        fields.done()
        return state


@dataclass(frozen=True, slots=True)
class Release:
    """What an enclave holds after a handshake: **verified**, opened, bound to it. Secret.

    Attributes:
        target: whose data keys they are.
        data_keys: 32 bytes for each section, for :meth:`motte.seal.reader.SignedBundle.unlock_with`.
        session: 32 bytes that only the broker and this enclave know: they authenticate :mod:`motte.provision.runs`.
        public_key, tls_spki_digest: the keys that the evidence bound; the client's TLS must end at the second.
        run_state: of a training run; None: none.
        checkpoint_key: opens the checkpoint that the run goes on from; None: it starts.
    """

    target: Target
    nonce: bytes
    public_key: bytes
    tls_spki_digest: bytes
    lease: Lease
    head: Head
    head_document: Mapping[str, Any] = field(repr=False)
    data_keys: tuple[bytes, ...] = field(repr=False)
    session: bytes = field(repr=False)
    resume: Resume | None = None
    run_state: RunState | None = None
    checkpoint_key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ReleaseTerms:
    """Everything about a release but its secrets: what is bound into ``info`` and stands in the signed answer."""

    target: Target
    nonce: bytes
    public_key: bytes
    lease: Lease
    resume: Resume | None = None
    run_state: RunState | None = None

    def info(self) -> bytes:
        """The context of the encryption, of fixed length with and without a training run."""
        run = b"\x00"
        if self.resume is not None:
            run = _RUN + self.resume.run + self.resume.checkpoint.to_bytes(8, "big")
        lease = self.lease.id + self.lease.expires_at.to_bytes(8, "big")
        return _DOMAIN + self.target.to_bytes() + self.nonce + self.public_key + lease + run


def seal_release(
    terms: ReleaseTerms, *, session: bytes, data_keys: Sequence[bytes], checkpoint_key: bytes | None
) -> bytes:
    """Seal the secrets of a release to ``terms.public_key``.

    Raises:
        InputError: nothing can be sealed to that key.
    """
    # Bytes at fixed places and no JSON: a parser's error would quote what it could not read.
    secrets = b"".join([session, *data_keys, checkpoint_key or b""])
    return primitives.hpke_seal(terms.public_key, secrets, info=terms.info())


def encode_release(
    terms: ReleaseTerms, sealed: bytes, head_document: Mapping[str, Any], broker: SignerPrivateKey
) -> bytes:
    """The signed answer, as it travels."""
    body = {
        "format": RELEASE_FORMAT,
        "head": dict(head_document),
        "lease": {"expires_at": terms.lease.expires_at, "id": terms.lease.id.hex()},
        "nonce": terms.nonce.hex(),
        "public_key": terms.public_key.hex(),
        "resume": None if terms.resume is None else terms.resume.to_json(),
        "run_state": None if terms.run_state is None else terms.run_state.to_json(),
        "sealed": sealed.hex(),
        **terms.target.to_json(),
    }
    return canonical(sign(body, broker))


@dataclass(frozen=True, slots=True)
class Expected:
    """What the one asked for must be repeated in the answer."""

    broker: SignerPublicKey
    target: Target
    sections: int
    nonce: bytes
    public_key: bytes
    tls_spki_digest: bytes
    resume: Resume | None


def open_release(answer: bytes, private_key: bytes, expected: Expected, *, now: float) -> Release:
    """Check an **unverified** answer and open it with our private key, inside the enclave (H-2 to H-7).

    Args:
        now: seconds since 1970, of whatever clock there is.

    Raises:
        HandshakeError: ``check`` says why.
    """
    fields = read_answer(answer, form=RELEASE_FORMAT, key=expected.broker, max_bytes=MAX_BROKER_ANSWER_BYTES)
    with_key = expected.resume is not None and expected.resume.checkpoint > 0
    length = primitives.KEY_BYTES * (1 + expected.sections + with_key)
    with answer_checks():
        document = fields.any("head")
        head = read_head(document, expected.broker, where="answer.head")
        terms = ReleaseTerms(
            target=Target.take(fields),
            nonce=fields.hexadecimal("nonce", length_bytes=NONCE_BYTES),
            public_key=fields.hexadecimal("public_key", length_bytes=primitives.KEY_BYTES),
            lease=_take_lease(fields.fields("lease")),
            resume=Resume.take(fields.any("resume"), "answer.resume"),
            run_state=RunState.take(fields.any("run_state"), "answer.run_state"),
        )
        sealed = fields.hexadecimal("sealed", length_bytes=length + primitives.HPKE_EXTRA_BYTES)
        fields.done()
    _check_repeated(terms, expected)
    terms.lease.check(now)
    try:
        secrets = primitives.hpke_open(private_key, sealed, info=terms.info())
    except DecryptError as problem:
        raise HandshakeError("the released keys do not open with our key in this context", check="H-6") from problem
    keys = tuple(secrets[at : at + primitives.KEY_BYTES] for at in range(0, length, primitives.KEY_BYTES))
    return Release(
        target=terms.target,
        nonce=terms.nonce,
        public_key=terms.public_key,
        tls_spki_digest=expected.tls_spki_digest,
        lease=terms.lease,
        head=head,
        head_document=document,
        data_keys=keys[1 : 1 + expected.sections],
        session=keys[0],
        resume=terms.resume,
        run_state=terms.run_state,
        checkpoint_key=keys[-1] if with_key else None,
    )


def _take_lease(fields: Fields) -> Lease:
    lease = Lease(
        fields.hexadecimal("id", length_bytes=LEASE_ID_BYTES), fields.integer("expires_at", low=0, high=MAX_TIME)
    )
    fields.done()
    return lease


def _check_repeated(terms: ReleaseTerms, expected: Expected) -> None:
    """Check H-5: the answer is to our question."""
    for name in ("nonce", "target", "public_key", "resume"):
        if getattr(terms, name) != getattr(expected, name):
            raise HandshakeError("the broker answered another question than ours", check="H-5", where=f"answer.{name}")
    if (terms.run_state is None) != (terms.resume is None):
        raise HandshakeError("a run's state without a run, or none with one", check="H-5", where="answer.run_state")
