"""An audit in pieces: what one run adds to the folder of another of the same model, data and schemes.

Attacks of the full suite take hours; run one at a time, they come to one document. What was found again replaces what
was there; what was not asked for again stays. Claims are decided anew over all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from motte.audit.claims import Evidence, decide
from motte.audit.document import AuditDocument, PictureFile, decode_audit
from motte.errors import InputError, ResourceError
from motte.limits import MAX_RESULTS_FILE_BYTES

if TYPE_CHECKING:
    from motte.audit.run import Audit, AuditRequest

T = TypeVar("T")


def read_audit(folder: Path) -> AuditDocument | None:
    """The **unverified** document of a folder; None: there is none yet.

    Raises:
        RecordError: not an audit. ResourceError: it cannot be read, or is too large.
    """
    path = folder / "audit.json"
    try:
        size = path.stat().st_size
        if size > MAX_RESULTS_FILE_BYTES:
            raise ResourceError("an audit is too large", where=str(path), expected=f"{MAX_RESULTS_FILE_BYTES} bytes")
        return decode_audit(path.read_bytes(), where=str(path))
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise ResourceError("cannot read an audit", where=str(path), got=problem.strerror) from problem


def refuse_other(old: AuditDocument, request: AuditRequest) -> None:
    """Refuse to add to an audit of something else, before hours are spent.

    Raises:
        InputError: another model, data set, suite, seed, number of records or list of schemes.
    """
    from motte.audit.interface import BUDGETS

    budget = BUDGETS[request.suite]
    _same("model", old.model, request.built.name)
    _same("data", old.data, request.data.name)
    _same("suite", old.suite, request.suite)
    _same("seed", old.seed, request.seed)
    _same("private records", old.budget.samples, budget.samples)
    _same("public records", old.budget.public_samples, budget.public_samples)
    _same("schemes", [each.audited for each in old.schemes], [str(each) for each in request.audited])


def _same(what: str, old: object, new: object) -> None:
    if old != new:
        hint = "another --out, or the same command but for --attack and --budget"
        raise InputError(f"the audit there is of another {what}", expected=str(old), got=str(new), hint=hint)


def added(old: AuditDocument, audit: Audit) -> Audit:
    """``audit`` with what ``old`` found beside it. Its pictures are those of ``audit``, with numbers that are free;
    those of ``old`` that stay are named in ``kept``.

    Raises:
        InputError: weights or records of another origin.
    """
    new = audit.document
    _same("weights", old.weights_origin, new.weights_origin)
    _same("provenance", old.provenance, new.provenance)
    stays = _left(old.pictures, new.pictures, lambda each: (each.title, each.audited, each.position))
    fresh = _renumbered(new.pictures, 1 + max((_number(each) for each in old.pictures), default=-1))
    findings = _joined(old.findings, new.findings, lambda each: (each.attack, each.audited, each.metric, each.layer))
    checks = _joined(old.checks, new.checks, lambda each: each.name)
    epsilons = _joined(old.epsilons, new.epsilons, lambda each: (each[0], each[1].method, each[1].upper_because))
    retried = set(audit.ran)
    document = replace(
        new,
        seconds=old.seconds + new.seconds,
        findings=findings,
        checks=checks,
        epsilons=epsilons,
        figures=_joined(old.figures, new.figures, lambda each: (each.name, each.audited, each.layer)),
        claims=decide(Evidence(schemes=new.schemes, findings=findings, checks=checks, epsilons=epsilons)),
        pictures=(*stays, *fresh),
        curves=_joined(old.curves, new.curves, lambda each: (each.title, each.audited, each.position)),
        failures=(*(each for each in old.failures if (each.audited, each.job) not in retried), *new.failures),
    )
    return replace(audit, document=document, kept=tuple(each.file for each in stays))


def _left(old: Iterable[T], new: Iterable[T], key: Callable[[T], Hashable]) -> tuple[T, ...]:
    again = {key(each) for each in new}
    return tuple(each for each in old if key(each) not in again)


def _joined(old: Iterable[T], new: tuple[T, ...], key: Callable[[T], Hashable]) -> tuple[T, ...]:
    return (*_left(old, new, key), *new)


def _number(picture: PictureFile) -> int:
    digits = PurePosixPath(picture.file).name.partition("-")[0]
    return int(digits) if digits.isdecimal() else -1


def _renumbered(pictures: Iterable[PictureFile], first: int) -> tuple[PictureFile, ...]:
    found = []
    for number, each in enumerate(pictures, first):
        path = PurePosixPath(each.file)
        found.append(replace(each, file=str(path.with_name(f"{number:03d}-{path.name.partition('-')[2]}"))))
    return tuple(found)
