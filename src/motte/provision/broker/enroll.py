"""What an owner gives a broker to hold: releases of models, training runs; and takes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from motte.errors import InputError, KeyAccessError, RollbackError, TrustError
from motte.limits import MAX_RUN_CHARGE
from motte.provision.broker import log, tables
from motte.provision.broker.policies import get_policy
from motte.provision.broker.state import Broker, facts_of, kek_context, run_context
from motte.provision.messages import RUN_ID_BYTES, header_digest
from motte.provision.registration import Registration
from motte.seal import primitives
from motte.seal.header import BundleHeader
from motte.seal.keys import RecipientPrivateKey

_BUNDLES, _MODELS, _RUNS = tables.bundles.c, tables.models.c, tables.runs.c


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What :func:`register` did: the lowest release of the model that gets keys now, and the signed head."""

    min_release: int
    head_document: dict[str, Any]
    known_already: bool


def register_remote(broker: Broker, data: bytes) -> Enrolled:
    """Take an **unverified** registration from the network.

    Raises:
        FormatError, SignatureError, InputError: malformed, or not by the bundle's signer.
        KeyAccessError: this signer may not register under this policy (K-14). Others as :func:`register`.
    """
    registration = Registration.decode(data, broker.signer.public)
    with broker.store.read() as db:
        owners = get_policy(db, registration.policy).owners
    if registration.header.signer not in owners:
        raise KeyAccessError(
            "this signer may not register bundles under this policy",
            check="K-14",
            where=registration.policy,
            got=str(registration.header.signer),
            hint="the broker's owner allows it with: motte broker policy set --owner",
        )
    return register(broker, registration, broker.recipient, remote=True)


def register(
    broker: Broker, registration: Registration, opener: RecipientPrivateKey, *, remote: bool = False
) -> Enrolled:
    """Hold one release's key-encryption key, wrapped.

    Args:
        registration: **verified**: its header is signed by the signer that it names, and that signer is wanted here.
        opener: a recipient of the bundle: the broker's own key, or the owner's where the file is at hand.

    Raises:
        KeyAccessError: the bundle is not sealed to ``opener``. DecryptError: its entry does not open.
        TrustError: the model is another signer's, or under another policy, or the number stands for another header
        (K-15). RollbackError: below the lowest release of the model (K-3).
    """
    header = registration.header
    kek = _kek(header, opener)
    with broker.store.write() as db:
        get_policy(db, registration.policy)
        known = _existing(db, registration)
        if known:
            return Enrolled(_model_floor(db, registration.model), log.newest_head(db), known_already=True)
        floor = _put_model(db, registration, remote=remote)
        context = kek_context(header.bundle_id, header.release)
        db.execute(
            tables.bundles.insert().values(
                bundle_id=header.bundle_id,
                release=header.release,
                model=registration.model,
                header=header.encode().decode("ascii"),
                header_digest=header_digest(header),
                wrapped_kek=broker.wrapper.wrap(kek, context),
                configurations=facts_of([each.hex() for each in registration.configurations]),
                revoked=False,
            )
        )
        facts = {
            "bundle_id": header.bundle_id.hex(),
            "configurations": [each.hex() for each in registration.configurations],
            "header_digest": header_digest(header).hex(),
            "lease_s": registration.lease_s,
            "min_release": floor,
            "model": registration.model,
            "policy": registration.policy,
            "release": header.release,
            "signer": str(header.signer),
        }
        document = log.append(db, broker.signer, "registered", facts)
    return Enrolled(floor, document, known_already=False)


def enroll_run(broker: Broker, model: str, run: bytes, budget: int) -> dict[str, Any]:
    """Let one training run on a model's data begin; from now on keys of this model go to enrolled runs only.

    Args:
        run: 16 bytes, random, new for every run.
        budget: releases that it may be charged for in all.

    Raises:
        InputError: no such model, or the run exists.
    """
    if len(run) != RUN_ID_BYTES or not 1 <= budget <= MAX_RUN_CHARGE:
        raise InputError("not a run", expected=f"{RUN_ID_BYTES} bytes and 1 to {MAX_RUN_CHARGE} releases")
    with broker.store.write() as db:
        _model_floor(db, model)
        if db.execute(select(_RUNS.run).where(_RUNS.run == run)).one_or_none() is not None:
            raise InputError("a training run of this id exists", got=run.hex())
        root = primitives.random_bytes(primitives.KEY_BYTES)
        values = {"run": run, "model": model, "budget": budget, "charged": 0, "checkpoint": 0, "held": False}
        db.execute(tables.runs.insert().values(**values, wrapped_root=broker.wrapper.wrap(root, run_context(run))))
        return log.append(db, broker.signer, "run enrolled", {"budget": budget, "model": model, "run": run.hex()})


def revoke(broker: Broker, model: str, *, release: int | None = None, min_release: int | None = None) -> dict[str, Any]:
    """Give no more keys of a model: of all of it, of one ``release``, or of all below ``min_release``.

    Leases that run on it are ended at the broker. Keys that an enclave holds already stay where they are until it ends.

    Raises:
        InputError: no such model or release. RollbackError: ``min_release`` would fall.
    """
    if release is not None and min_release is not None:
        raise InputError("one release, or all below one", got="both")
    with broker.store.write() as db:
        floor = _model_floor(db, model)
        chosen = _BUNDLES.model == model
        if min_release is not None:
            if min_release < floor:
                raise RollbackError(
                    "the lowest release never falls", check="K-3", expected=f"at least {floor}", got=str(min_release)
                )
            db.execute(tables.models.update().where(_MODELS.name == model).values(min_release=min_release))
            chosen &= _BUNDLES.release < min_release
        elif release is not None:
            chosen &= _BUNDLES.release == release
            if db.execute(tables.bundles.update().where(chosen).values(revoked=True)).rowcount != 1:
                raise InputError("no such release of this model", where=model, got=str(release))
        else:
            db.execute(tables.models.update().where(_MODELS.name == model).values(revoked=True))
        ended = 0
        leases = tables.leases
        for row in db.execute(select(_BUNDLES.bundle_id, _BUNDLES.release).where(chosen)).all():
            held = (leases.c.bundle_id == row.bundle_id) & (leases.c.release == row.release) & ~leases.c.ended
            ended += db.execute(leases.update().where(held).values(ended=True)).rowcount
        facts = {"leases_ended": ended, "min_release": min_release, "model": model, "release": release}
        return log.append(db, broker.signer, "revoked", facts)


def _kek(header: BundleHeader, opener: RecipientPrivateKey) -> bytes:
    entry = next((each for each in header.recipients if each.key == opener.public), None)
    if entry is None:
        raise KeyAccessError(
            "the bundle is not sealed to this key",
            check="B-16",
            got=str(opener.public),
            hint="seal it with the broker as one of its recipients (motte broker init and serve print its key)",
        )
    info = primitives.kek_info(header.bundle_id, header.release)
    kek = primitives.hpke_open(opener.secret, entry.sealed_kek, info=info)
    # A key that does not open what it is for is not held: found now, and not in an enclave's handshake.
    unwrap_data_keys(header, kek)
    return kek


def unwrap_data_keys(header: BundleHeader, kek: bytes) -> tuple[bytes, ...]:
    """The data key of every section (B-19). Secret. Raises: DecryptError."""
    return tuple(
        primitives.unwrap_data_key(
            kek,
            section.wrapped_key,
            bundle_id=header.bundle_id,
            release=header.release,
            section=section.index,
        )
        for section in header.sections
    )


def _existing(db: Connection, registration: Registration) -> bool:
    """Whether this very registration was made before.

    Raises:
        TrustError: its number stands for another header of the model (K-15).
    """
    header = registration.header
    same_number = (_BUNDLES.model == registration.model) & (_BUNDLES.release == header.release)
    same_bundle = (_BUNDLES.bundle_id == header.bundle_id) & (_BUNDLES.release == header.release)
    row = db.execute(select(tables.bundles).where(same_number | same_bundle)).first()
    if row is None:
        return False
    wanted = facts_of([each.hex() for each in registration.configurations])
    if (row.model, row.header_digest, row.configurations) != (registration.model, header_digest(header), wanted):
        raise TrustError(
            "this release is registered already, as something else",
            check="K-15",
            where=f"{registration.model} release {header.release}",
            hint="a release number stands for one header and its configurations for ever: seal under a higher one",
        )
    return True


def _model_floor(db: Connection, model: str) -> int:
    row = db.execute(select(_MODELS.min_release).where(_MODELS.name == model)).one_or_none()
    if row is None:
        raise InputError("no model of this name", got=model)
    return int(row.min_release)


def _put_model(db: Connection, registration: Registration, *, remote: bool) -> int:
    """Make or change the model's row: its new lowest release."""
    header = registration.header
    floor = header.release if registration.min_release is None else registration.min_release
    row = db.execute(select(tables.models).where(_MODELS.name == registration.model)).one_or_none()
    values: dict[str, Any] = {"lease_s": registration.lease_s, "policy": registration.policy}
    if row is None:
        made = {"name": registration.model, "signer": header.signer.raw, "min_release": floor, "revoked": False}
        db.execute(tables.models.insert().values(**values, **made))
        return floor
    if row.signer != header.signer.raw or (remote and row.policy != registration.policy):
        raise TrustError(
            "the model is another signer's, or under another policy",
            check="K-15",
            where=registration.model,
            hint="only the broker's owner moves a model to another policy (motte broker add)",
        )
    if header.release < row.min_release:
        raise RollbackError(
            "a release below the lowest allowed",
            check="K-3",
            expected=f"at least {row.min_release}",
            got=str(header.release),
        )
    floor = max(floor, int(row.min_release))
    db.execute(tables.models.update().where(_MODELS.name == registration.model).values(**values, min_release=floor))
    return floor
