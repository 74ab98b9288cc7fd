"""A training run's books: what it may still release, and which of its checkpoints has a key (K-11, K-13).

``charged`` and ``checkpoint`` only rise. They are on disk before the enclave hears of them, so before anything leaves.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, Row, select

from motte.errors import DecryptError, KeyAccessError, RollbackError
from motte.provision.broker import log, tables
from motte.provision.broker.state import Broker, run_context, unwrapped
from motte.provision.messages import Resume
from motte.provision.release import RunState
from motte.provision.runs import RunRequest, encode_answer
from motte.seal import primitives

_RUNS, _LEASES = tables.runs.c, tables.leases.c


def take_run(db: Connection, model: str, resume: Resume | None) -> RunState | None:
    """Where the run stands, if ``resume`` may go on (K-11).

    A model for which a run is enrolled is training data: nobody gets its keys but an enrolled run.

    Raises:
        KeyAccessError: not an enrolled run of this model, or held. RollbackError: not its newest checkpoint.
    """
    if resume is None:
        if db.execute(select(_RUNS.run).where(_RUNS.model == model).limit(1)).one_or_none() is not None:
            raise KeyAccessError("keys of this model go to enrolled training runs only", check="K-11", where=model)
        return None
    row = db.execute(select(tables.runs).where(_RUNS.run == resume.run)).one_or_none()
    if row is None or row.model != model:
        raise KeyAccessError("not an enrolled training run of this model", check="K-11", got=resume.run.hex())
    _check_held(row)
    if resume.checkpoint != row.checkpoint:
        raise RollbackError(
            "not the newest checkpoint of the run",
            check="K-11",
            expected=str(row.checkpoint),
            got=str(resume.checkpoint),
            hint="an older one would let out anew what was released since; it gets no key",
        )
    return RunState(row.charged, row.checkpoint)


def checkpoint_key(broker: Broker, db: Connection, run: bytes, checkpoint: int) -> bytes:
    """The key of one checkpoint of one run: derived from a root that stays here."""
    wrapped = db.execute(select(_RUNS.wrapped_root).where(_RUNS.run == run)).scalar_one()
    root = unwrapped(broker, wrapped, run_context(run))
    return primitives.derived_key(root, b"broker checkpoint " + run + checkpoint.to_bytes(8, "big"))


def run_order(broker: Broker, data: bytes) -> bytes:
    """Carry out an **unverified** :class:`RunRequest` of an enclave with a lease.

    Raises:
        FormatError: malformed (K-1). KeyAccessError: no such lease, or ended, or no budget left (K-12, K-13).
        RollbackError: a checkpoint that is not the next one (K-13).
    """
    request, code = RunRequest.decode(data)
    with broker.store.write() as db:
        lease = db.execute(select(tables.leases).where(_LEASES.id == request.lease)).one_or_none()
        try:
            request.check_code(broker.session_key(request.lease), code)
        except DecryptError as problem:
            raise KeyAccessError("not an order of the enclave that holds this lease", check="K-12") from problem
        if lease is None or lease.ended or time.time() >= lease.expires_at or lease.run != request.run:
            raise KeyAccessError(
                "the lease has ended, or is for another run",
                check="K-12",
                got=request.lease.hex(),
                hint="ask for the keys again, with fresh evidence",
            )
        row = db.execute(select(tables.runs).where(_RUNS.run == request.run)).one()
        _check_held(row)
        state, sealed = _carry_out(broker, db, row, request, lease.public_key)
        facts: dict[str, Any] = {
            "action": request.action,
            "lease": request.lease.hex(),
            "run": request.run.hex(),
            "value": request.value,
            **state.to_json(),
        }
        document = log.append(db, broker.signer, "run", facts)
    return encode_answer(request, state, sealed, document, broker.signer)


def _carry_out(
    broker: Broker, db: Connection, row: Row[Any], request: RunRequest, public_key: bytes
) -> tuple[RunState, bytes]:
    changed: dict[str, int] = {}
    sealed = b""
    if request.action == "charge":
        if row.charged + request.value > row.budget:
            raise KeyAccessError(
                "the run has released all that it may",
                check="K-13",
                expected=f"at most {row.budget}",
                got=f"{row.charged} and {request.value} more",
            )
        changed["charged"] = row.charged + request.value
    elif request.value != row.checkpoint + 1 and not (request.action == "commit" and request.value == row.checkpoint):
        # A commit that is told twice is one: its answer may have been lost.
        raise RollbackError(
            "not the next checkpoint of the run", check="K-13", expected=str(row.checkpoint + 1), got=str(request.value)
        )
    elif request.action == "prepare":
        key = checkpoint_key(broker, db, request.run, request.value)
        sealed = primitives.hpke_seal(public_key, key, info=request.info())
    else:
        changed["checkpoint"] = request.value
    if changed:
        db.execute(tables.runs.update().where(_RUNS.run == row.run).values(**changed))
    return RunState(changed.get("charged", row.charged), changed.get("checkpoint", row.checkpoint)), sealed


def _check_held(row: Row[Any]) -> None:
    if row.held:
        raise KeyAccessError(
            "the run was under way when the broker was restored from a backup, and nobody knows what it released since",
            check="K-11",
            got=row.run.hex(),
            hint="enroll a new run",
        )
