"""A handshake at the broker: a nonce for a question, and keys for evidence over it (K-1 to K-12)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, func, select

from motte.attest.fresh import MAX_OPEN_NONCES
from motte.attest.policy import with_nonce
from motte.attest.report_data import Binding
from motte.attest.verify import Verdict, verify
from motte.errors import KeyAccessError, MotteError, ResourceError, RollbackError
from motte.provision.broker import log, tables
from motte.provision.broker.enroll import unwrap_data_keys
from motte.provision.broker.policies import get_policy
from motte.provision.broker.state import Broker, kek_context, unwrapped
from motte.provision.broker.training import checkpoint_key, take_run
from motte.provision.heads import read_head
from motte.provision.messages import NONCE_BYTES, Ask, Challenge, Proof, Resume, Target
from motte.provision.release import (
    LEASE_ID_BYTES,
    Lease,
    ReleaseTerms,
    encode_release,
    seal_release,
)
from motte.seal import primitives
from motte.seal.header import parse_header

NONCE_LIFE_S: Final = 300
"""A nonce is worth nothing after that; a policy's ``fresh`` may demand less."""
_KEPT_S: Final = 3600
"""For how long a dead nonce is remembered, to tell a replay from a stranger."""
_NONCES, _BUNDLES, _MODELS, _LEASES = tables.nonces.c, tables.bundles.c, tables.models.c, tables.leases.c


class Refused(Exception):
    """A refusal that stands in the log: what was wrong, and the signed head that goes back with it."""

    def __init__(self, problem: MotteError, head_document: dict[str, Any]) -> None:
        super().__init__(str(problem))
        self.problem, self.head_document = problem, head_document


def ask(broker: Broker, data: bytes) -> bytes:
    """Answer an **unverified** :class:`Ask` with a nonce for the bundle that it names.

    Raises:
        FormatError: malformed (K-1). KeyAccessError, RollbackError: no such bundle, or no keys of it (K-2 to K-4,
        K-11). ResourceError: too many nonces are open.
    """
    question = Ask.decode(data)
    nonce, now_ms = primitives.random_bytes(NONCE_BYTES), time.time_ns() // 1_000_000
    expires_at = now_ms // 1000 + NONCE_LIFE_S
    resume, target = question.resume, question.target
    with broker.store.write() as db:
        bundle = _wanted_bundle(db, target)
        take_run(db, bundle.model, resume)
        _make_room(db, now_ms // 1000)
        db.execute(
            tables.nonces.insert().values(
                nonce=nonce,
                bundle_id=target.bundle_id,
                release=target.release,
                header_digest=target.header_digest,
                run=None if resume is None else resume.run,
                checkpoint=None if resume is None else resume.checkpoint,
                issued_at_ms=now_ms,
                expires_at=expires_at,
                used=False,
                replay_logged=False,
            )
        )
        document = log.newest_head(db)
    head = read_head(document, broker.signer.public)
    return Challenge(nonce, target, expires_at, head, document).encode(broker.signer)


def prove(broker: Broker, data: bytes) -> bytes:
    """Answer an **unverified** :class:`Proof`: the data keys, sealed to the key in its evidence, or a refusal.

    Whatever comes of it, the nonce is used afterwards. Keys leave only after the entry that says so is on disk.

    Raises:
        FormatError: malformed (K-1); the nonce is not touched.
        KeyAccessError: not a nonce of ours (K-5).
        Refused: everything else; its entry is on disk.
    """
    proof = Proof.decode(data)
    with broker.store.read() as db:
        nonce = db.execute(select(tables.nonces).where(_NONCES.nonce == proof.nonce)).one_or_none()
    if nonce is None:
        raise KeyAccessError(
            "not a nonce of ours", check="K-5", got=proof.nonce.hex(), hint="ask for a new one; they live for minutes"
        )
    resume = None if nonce.run is None else Resume(nonce.run, nonce.checkpoint)
    with _refusals(broker, proof, nonce.nonce):
        _check_nonce(nonce, proof, time.time())
        with broker.store.read() as db:
            bundle = _wanted_bundle(db, proof.target)
            policy = get_policy(db, bundle.policy)
        _check_configuration(bundle, proof)
        issued_at = datetime.fromtimestamp(nonce.issued_at_ms / 1000, UTC)
        # Many milliseconds of arithmetic, and perhaps a fetch: outside of any transaction.
        verdict = verify(
            proof.evidence,
            with_nonce(policy.policy, proof.nonce, issued_at),
            datetime.now(UTC),
            anchors=policy.anchors,
            binding=Binding(proof.nonce, proof.public_key, proof.tls_spki_digest, proof.configuration_digest),
        )
        return _release(broker, _Granted(proof, resume, verdict))


@dataclass(frozen=True, slots=True)
class _Granted:
    """A proof whose evidence holds; **verified** but for what may have changed since."""

    proof: Proof
    resume: Resume | None
    verdict: Verdict


def _release(broker: Broker, granted: _Granted) -> bytes:
    """Take the nonce, write the entry, and only then let the keys out."""
    proof, resume = granted.proof, granted.resume
    with broker.store.write() as db:
        # All of it again, under the one writer: between two proofs over one nonce, or a revocation, one comes first.
        bundle = _wanted_bundle(db, proof.target)
        state = take_run(db, bundle.model, resume)
        _use(db, proof.nonce)
        lease = Lease(primitives.random_bytes(LEASE_ID_BYTES), int(time.time()) + bundle.lease_s)
        terms = ReleaseTerms(proof.target, proof.nonce, proof.public_key, lease, resume, state)
        # Sealed before the commit, so that no entry tells of a release that could not be made.
        sealed = _seal(broker, db, bundle, terms)
        if resume is not None:
            db.execute(tables.leases.update().where(_LEASES.run == resume.run).values(ended=True))
        db.execute(
            tables.leases.insert().values(
                id=lease.id,
                bundle_id=proof.target.bundle_id,
                release=proof.target.release,
                public_key=proof.public_key,
                run=None if resume is None else resume.run,
                expires_at=lease.expires_at,
                ended=False,
            )
        )
        claims = granted.verdict.claims
        facts = {
            **_facts(proof),
            "instance": claims.instance,
            "lease": lease.id.hex(),
            "measurements": dict(claims.measurements),
            "model": bundle.model,
            "platform": claims.platform,
            "policy": bundle.policy,
            "resume": None if resume is None else resume.to_json(),
            "simulated": claims.simulated,
        }
        document = log.append(db, broker.signer, "released", facts)
    return encode_release(terms, sealed, document, broker.signer)


def _seal(broker: Broker, db: Connection, bundle: Row[Any], terms: ReleaseTerms) -> bytes:
    header = parse_header(bundle.header.encode("ascii"))
    kek = unwrapped(broker, bundle.wrapped_kek, kek_context(bundle.bundle_id, bundle.release))
    resume = terms.resume
    key = None if resume is None or not resume.checkpoint else checkpoint_key(broker, db, resume.run, resume.checkpoint)
    session = broker.session_key(terms.lease.id)
    return seal_release(terms, session=session, data_keys=unwrap_data_keys(header, kek), checkpoint_key=key)


@contextlib.contextmanager
def _refusals(broker: Broker, proof: Proof, nonce: bytes) -> Iterator[None]:
    """Any error of ours: the nonce is used up, and an entry says why. One entry for each nonce, and one for its
    replays.
    """
    try:
        yield
    except MotteError as problem:
        with broker.store.write() as db:
            row = db.execute(select(tables.nonces).where(_NONCES.nonce == nonce)).one_or_none()
            document = log.newest_head(db)
            if row is not None and not (row.used and row.replay_logged):
                changed = {"used": True, "replay_logged": row.used}
                db.execute(tables.nonces.update().where(_NONCES.nonce == nonce).values(**changed))
                reason = {"check": problem.check, "kind": type(problem).__name__, "message": problem.message[:500]}
                facts = {**_facts(proof), **reason, "platform": proof.evidence.platform}
                document = log.append(db, broker.signer, "refused", facts)
        raise Refused(problem, document) from problem


def _facts(proof: Proof) -> dict[str, Any]:
    return {
        "bundle_id": proof.target.bundle_id.hex(),
        "configuration": proof.configuration_digest.hex(),
        "nonce": proof.nonce.hex(),
        "public_key": proof.public_key.hex(),
        "release": proof.target.release,
    }


def _wanted_bundle(db: Connection, target: Target) -> Row[Any]:
    """The bundle with its model's terms (K-2 to K-4)."""
    row = db.execute(
        select(tables.bundles, _MODELS.policy, _MODELS.min_release, _MODELS.lease_s, _MODELS.revoked.label("ended"))
        .join(tables.models, _BUNDLES.model == _MODELS.name)
        .where(_BUNDLES.bundle_id == target.bundle_id, _BUNDLES.release == target.release)
    ).one_or_none()
    if row is None or row.header_digest != target.header_digest:
        raise KeyAccessError(
            "no keys of this bundle are held here",
            check="K-2",
            got=f"{target.bundle_id.hex()} release {target.release}",
            hint="its owner registers it with motte seal --broker, or motte broker add",
        )
    if row.release < row.min_release:
        raise RollbackError(
            "a release below the lowest allowed",
            check="K-3",
            where=row.model,
            expected=f"at least {row.min_release}",
            got=str(row.release),
            hint="get the current bundle; this one may be an old copy put in its place",
        )
    if row.revoked or row.ended:
        raise KeyAccessError("the keys of this bundle were revoked", check="K-4", where=row.model)
    return row


def _check_nonce(nonce: Row[Any], proof: Proof, now: float) -> None:
    if nonce.used:
        raise KeyAccessError("the nonce was used already", check="K-6", got=proof.nonce.hex())
    if now >= nonce.expires_at:
        raise KeyAccessError("the nonce has expired", check="K-5", got=proof.nonce.hex())
    if Target(nonce.bundle_id, nonce.release, nonce.header_digest) != proof.target:
        raise KeyAccessError("the nonce was given out for another bundle", check="K-7", got=proof.nonce.hex())
    if not primitives.x25519_usable(proof.public_key):
        raise KeyAccessError("nothing can be sealed to this public key", check="K-8", got=proof.public_key.hex())


def _check_configuration(bundle: Row[Any], proof: Proof) -> None:
    if proof.configuration_digest.hex() not in json.loads(bundle.configurations):
        raise KeyAccessError(
            "a run configuration that the owner did not sign",
            check="K-9",
            where=bundle.model,
            got=proof.configuration_digest.hex(),
            hint="scheme, placement, noise, integrity, broker, ranks and peers come from the bundle alone",
        )


def _use(db: Connection, nonce: bytes) -> None:
    """Take the nonce, in this very transaction (K-6)."""
    unused = (_NONCES.nonce == nonce) & ~_NONCES.used & (_NONCES.expires_at > int(time.time()))
    if db.execute(tables.nonces.update().where(unused).values(used=True)).rowcount != 1:
        raise KeyAccessError("the nonce was used already", check="K-6", got=nonce.hex())


def _make_room(db: Connection, now: int) -> None:
    db.execute(tables.nonces.delete().where(_NONCES.expires_at < now - _KEPT_S))
    db.execute(tables.leases.delete().where(_LEASES.expires_at < now - _KEPT_S))
    if db.execute(select(func.count()).select_from(tables.nonces)).scalar_one() < MAX_OPEN_NONCES:
        return
    db.execute(tables.nonces.delete().where(_NONCES.expires_at <= now))
    if db.execute(select(func.count()).select_from(tables.nonces)).scalar_one() >= MAX_OPEN_NONCES:
        raise ResourceError("too many nonces are open", expected=f"at most {MAX_OPEN_NONCES}", hint="try again later")
