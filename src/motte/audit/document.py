"""``audit.json``, format ``motte-audit/1`` (docs/spec/audit.md): everything that an audit found; a strict reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast, get_args

from motte.audit.finding import SUITES, Bracket, Budget, Finding, Knowledge, Position, Suite
from motte.audit.interface import Check
from motte.audit.measures.exposure import Exposure
from motte.audit.measures.figure import Figure
from motte.audit.observe import Row
from motte.errors import MeasureError, RecordError, SettingError
from motte.limits import MAX_AUDIT_ITEMS, MAX_AUDIT_TEXT_BYTES, MAX_GRAPH_DIMS, MAX_RESULTS_FILE_BYTES
from motte.strict_json import Fields, canonical, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from motte.audit.epsilon import EmpiricalEpsilon

T = TypeVar("T")
FORMAT: Final = "motte-audit/1"
Verdict = Literal["held", "not held", "not tested"]
VERDICTS: Final[tuple[str, ...]] = get_args(Verdict)
_POSITIONS: Final = tuple(str(each) for each in Position)
_KINDS: Final = ("trusted", "asymmetric", "accelerator")
_DIRECTIONS: Final = ("sent", "received")
_ROW_KINDS: Final = ("activation", "gradient", "weight", "output", "input-gradient", "weight-gradient")
_METHODS: Final = ("hypothesis test", "gaussian", "one run")
_PHASES: Final = ("inference", "training")
_BIG: Final = 1 << 62


# --- what it holds --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeReport:
    """What one scheme lets leave.

    Attributes:
        audited: the scheme in words; findings and figures name it so.
        kind: what runs where.
        noised: whether what leaves is noised.
        declared: layers that may run outside, as the scheme itself says.
        first, last: the layers with a weight that run first and last.
        chosen: whether the user named layers, so that the default placement says nothing.
        inference, training: what crossed, as rows.
    """

    audited: str
    kind: Literal["trusted", "asymmetric", "accelerator"]
    noised: bool
    chosen: bool
    declared: tuple[str, ...]
    first: str
    last: str
    inference: tuple[Row, ...]
    training: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """One claim of THREAT_MODEL.md, and what the audit says of it, in a plain sentence."""

    claim: str
    verdict: Verdict
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFile:
    """A grid of images: ``file`` is relative to the folder of results; ``rows`` are titles, top down."""

    title: str
    file: str
    audited: str
    position: Position | None
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveData:
    """A curve with its points, in order."""

    title: str
    audited: str
    position: Position | None
    x_label: str
    y_label: str
    log_axes: bool
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that ended in an error: it found nothing, which is not the same as finding that nothing is there."""

    audited: str
    job: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditDocument:
    """A whole audit.

    Attributes:
        made: UTC, ``2026-01-31T12:00:00Z``.
        seconds: that it took.
        epsilons: measured lower bounds beside stated upper ones, each with its scheme.
    """

    made: str
    versions: Mapping[str, str]
    model: str
    weights_origin: str
    data: str
    provenance: str
    suite: Suite
    seed: int
    budget: Budget
    seconds: float
    schemes: tuple[SchemeReport, ...]
    findings: tuple[Finding, ...] = ()
    checks: tuple[Check, ...] = ()
    epsilons: tuple[tuple[str, EmpiricalEpsilon], ...] = ()
    figures: tuple[Figure, ...] = ()
    claims: tuple[ClaimVerdict, ...] = ()
    pictures: tuple[PictureFile, ...] = ()
    curves: tuple[CurveData, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def contradictions(self) -> tuple[str, ...]:
        """Schemes of which an attack proves more than the accountant states: an error of motte's."""
        return tuple(audited for audited, each in self.epsilons if each.contradiction)


# --- writing --------------------------------------------------------------------------------------------------------
def to_json(document: AuditDocument) -> dict[str, Any]:
    """Plain JSON values in the order of the specification."""
    return {
        "format": FORMAT,
        "made": document.made,
        "versions": dict(document.versions),
        "model": document.model,
        "weights_origin": document.weights_origin,
        "data": document.data,
        "provenance": document.provenance,
        "suite": document.suite,
        "seed": document.seed,
        "budget": asdict(document.budget),
        "seconds": document.seconds,
        "schemes": [_scheme_json(each) for each in document.schemes],
        "findings": [_finding_json(each) for each in document.findings],
        "checks": [asdict(each) for each in document.checks],
        "epsilons": [{"audited": audited} | each.to_json() for audited, each in document.epsilons],
        "figures": [asdict(each) for each in document.figures],
        "claims": [asdict(each) for each in document.claims],
        "pictures": [asdict(each) | {"rows": list(each.rows)} for each in document.pictures],
        "curves": [asdict(each) | {"points": [list(point) for point in each.points]} for each in document.curves],
        "failures": [asdict(each) for each in document.failures],
    }


def encode(document: AuditDocument) -> bytes:
    """The file ``audit.json``."""
    return canonical(to_json(document))


def _scheme_json(scheme: SchemeReport) -> dict[str, Any]:
    values = {each.name: getattr(scheme, each.name) for each in fields(scheme)}
    rows = {phase: [row_json(row) for row in values[phase]] for phase in _PHASES}
    return values | {"declared": list(scheme.declared)} | rows


def row_json(row: Row) -> dict[str, Any]:
    """One row as plain JSON values."""
    exposed = None if row.exposed is None else {"energy": row.exposed.energy, "aligned": row.exposed.aligned}
    values = {each.name: getattr(row, each.name) for each in fields(row)}
    return values | {"dtypes": list(row.dtypes), "shapes": [list(each) for each in row.shapes], "exposed": exposed}


def _finding_json(finding: Finding) -> dict[str, Any]:
    values = {each.name: getattr(finding, each.name) for each in fields(finding)}
    values |= {
        str(each): [getattr(finding, each).value, getattr(finding, each).low, getattr(finding, each).high]
        for each in Position
    }
    values |= {"knowledge": [str(each) for each in finding.knowledge], "notes": list(finding.notes)}
    return values | {"budget": asdict(finding.budget), "position_percent": finding.position_percent}


# --- reading --------------------------------------------------------------------------------------------------------
def decode_audit(raw: bytes, *, where: str) -> AuditDocument:
    """Read **unverified** bytes.

    Raises:
        RecordError: not an audit of this format, or one that contradicts itself.
    """
    fields = Fields(
        parse(raw, max_bytes=MAX_RESULTS_FILE_BYTES, what=where, error=RecordError), where=where, error=RecordError
    )
    fields.choice("format", (FORMAT,))
    try:
        document = _read(fields)
    except (SettingError, MeasureError) as problem:
        raise RecordError(problem.message, where=where, expected=problem.expected, got=problem.got) from problem
    fields.done()
    return document


def _read(fields: Fields) -> AuditDocument:
    versions = fields.any("versions")
    if not isinstance(versions, dict) or not all(isinstance(each, str) for pair in versions.items() for each in pair):
        raise RecordError("not a table of versions", where=f"{fields.where}.versions")
    return AuditDocument(
        made=_text(fields, "made"),
        versions=versions,
        model=_text(fields, "model"),
        weights_origin=_text(fields, "weights_origin"),
        data=_text(fields, "data"),
        provenance=_text(fields, "provenance"),
        suite=cast(Suite, fields.choice("suite", SUITES)),
        seed=fields.integer("seed", low=0, high=_BIG),
        budget=_budget(fields.fields("budget")),
        seconds=fields.number("seconds"),
        schemes=_items(fields, "schemes", _scheme),
        findings=_items(fields, "findings", _finding),
        checks=_items(fields, "checks", _check),
        epsilons=_items(fields, "epsilons", _epsilon),
        figures=_items(fields, "figures", _figure),
        claims=_items(fields, "claims", _claim),
        pictures=_items(fields, "pictures", _picture),
        curves=_items(fields, "curves", _curve),
        failures=_items(
            fields, "failures", lambda each: Failure(*(_text(each, name) for name in ("audited", "job", "message")))
        ),
    )


def _items(fields: Fields, name: str, read: Callable[[Fields], T]) -> tuple[T, ...]:
    def one(value: object, where: str) -> T:
        inner = Fields(value, where=where, error=RecordError)
        found = read(inner)
        inner.done()
        return found

    return tuple(fields.items(name, max_items=MAX_AUDIT_ITEMS, read=one))


def _text(fields: Fields, name: str) -> str:
    return fields.text(name, max_bytes=MAX_AUDIT_TEXT_BYTES)


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    def one(value: object, where: str) -> str:
        if not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) > MAX_AUDIT_TEXT_BYTES:
            raise RecordError("not a text in bounds", where=where)
        return value

    return tuple(fields.items(name, max_items=MAX_AUDIT_ITEMS, read=one))


def _maybe(fields: Fields, name: str, read: Callable[[Fields], T]) -> T | None:
    """The field ``name``, which may be null; ``read`` takes it from an object that holds nothing else."""
    value = fields.any(name)
    return None if value is None else read(Fields({name: value}, where=fields.where, error=RecordError))


def _budget(fields: Fields) -> Budget:
    whole = {
        name: fields.integer(name, low=1, high=_BIG)
        for name in ("steps", "queries", "samples", "public_samples", "repeats")
    }
    made = Budget(seconds=fields.number("seconds"), **whole)
    fields.done()
    return made


def _scheme(fields: Fields) -> SchemeReport:
    return SchemeReport(
        audited=_text(fields, "audited"),
        kind=cast(Any, fields.choice("kind", _KINDS)),
        noised=fields.boolean("noised"),
        chosen=fields.boolean("chosen"),
        declared=_texts(fields, "declared"),
        first=_text(fields, "first"),
        last=_text(fields, "last"),
        inference=_items(fields, "inference", _row),
        training=_items(fields, "training", _row),
    )


def _row(fields: Fields) -> Row:
    layer = _text(fields, "layer")

    def exposed(only: Fields) -> Exposure:
        inner = only.fields("exposed")
        found = Exposure(layer, inner.number("energy"), inner.number("aligned"))
        inner.done()
        return found

    return Row(
        layer=layer,
        direction=cast(Any, fields.choice("direction", _DIRECTIONS)),
        kind=cast(Any, fields.choice("kind", _ROW_KINDS)),
        tensors=fields.integer("tensors", low=1, high=_BIG),
        dtypes=_texts(fields, "dtypes"),
        shapes=tuple(fields.items("shapes", max_items=MAX_AUDIT_ITEMS, read=_shape)),
        bytes=fields.integer("bytes", low=0, high=_BIG),
        energy=fields.number("energy"),
        exposed=_maybe(fields, "exposed", exposed),
    )


def _shape(value: object, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and len(value) <= MAX_GRAPH_DIMS
    if not good or any(type(each) is not int or not 0 <= each < _BIG for each in cast(Sequence[object], value)):
        raise RecordError("not a shape", where=where)
    return tuple(cast(Sequence[int], value))


def _bracket(fields: Fields, name: str) -> Bracket:
    def number(value: object, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecordError("not a finite number", where=where)
        return float(value)

    values = fields.items(name, max_items=3, read=number)
    if len(values) != 3:
        raise RecordError("a bracket is a value and its interval", where=f"{fields.where}.{name}")
    return Bracket(*values)


def _finding(fields: Fields) -> Finding:
    made = Finding(
        attack=_text(fields, "attack"),
        audited=_text(fields, "audited"),
        metric=_text(fields, "metric"),
        unit=_text(fields, "unit"),
        higher_is_worse=fields.boolean("higher_is_worse"),
        layer=_maybe(fields, "layer", lambda only: _text(only, "layer")),
        scheme=_bracket(fields, "scheme"),
        floor=_bracket(fields, "floor"),
        ceiling=_bracket(fields, "ceiling"),
        knowledge=tuple(_known(each, fields.where) for each in _texts(fields, "knowledge")),
        budget=_budget(fields.fields("budget")),
        seed=fields.integer("seed", low=0, high=_BIG),
        notes=_texts(fields, "notes"),
    )
    stated = _maybe(fields, "position_percent", lambda only: only.number("position_percent"))
    derived = made.position_percent
    if (stated is None) != (derived is None) or not math.isclose(
        stated or 0.0, derived or 0.0, rel_tol=1e-9, abs_tol=1e-9
    ):
        raise RecordError(
            "the position is not that of the brackets", where=fields.where, expected=str(derived), got=str(stated)
        )
    return made


def _known(text: str, where: str) -> Knowledge:
    try:
        return Knowledge(text)
    except ValueError as problem:
        raise RecordError("unknown knowledge of an attacker", where=where, got=repr(text)[:80]) from problem


def _check(fields: Fields) -> Check:
    return Check(_text(fields, "name"), _text(fields, "claim"), fields.boolean("held"), _text(fields, "how"))


def _epsilon(fields: Fields) -> tuple[str, EmpiricalEpsilon]:
    from motte.audit.epsilon import EmpiricalEpsilon

    audited = _text(fields, "audited")
    upper = fields.any("upper")
    if upper != "infinite" and (isinstance(upper, bool) or not isinstance(upper, int | float)):
        raise RecordError("not an upper bound", where=fields.where, expected="a number or infinite")
    made = EmpiricalEpsilon(
        lower=fields.number("lower"),
        upper=math.inf if upper == "infinite" else float(upper),
        upper_because=_text(fields, "upper_because"),
        delta=fields.number("delta"),
        adjacency=_text(fields, "adjacency"),
        confidence=fields.number("confidence"),
        method=cast(Any, fields.choice("method", _METHODS)),
        trials=fields.integer("trials", low=0, high=_BIG),
        counted=_text(fields, "counted"),
    )
    if fields.boolean("contradiction") != made.contradiction:
        raise RecordError("the contradiction is not that of the bounds", where=fields.where)
    return audited, made


def _figure(fields: Fields) -> Figure:
    return Figure(
        name=_text(fields, "name"),
        audited=_maybe(fields, "audited", lambda only: _text(only, "audited")),
        layer=_maybe(fields, "layer", lambda only: _text(only, "layer")),
        value=_maybe(fields, "value", lambda only: only.number("value")),
        unit=_text(fields, "unit"),
        note=_text(fields, "note"),
        missing=_maybe(fields, "missing", lambda only: _text(only, "missing")),
    )


def _claim(fields: Fields) -> ClaimVerdict:
    return ClaimVerdict(
        _text(fields, "claim"), cast(Verdict, fields.choice("verdict", VERDICTS)), _text(fields, "sentence")
    )


def _position(fields: Fields) -> Position | None:
    return _maybe(fields, "position", lambda only: Position(only.choice("position", _POSITIONS)))


def _picture(fields: Fields) -> PictureFile:
    file = _text(fields, "file")
    if file.startswith("/") or ".." in file.split("/") or "\\" in file:
        raise RecordError("a picture lies in the folder of results", where=fields.where, got=repr(file)[:80])
    return PictureFile(
        title=_text(fields, "title"),
        file=file,
        audited=_text(fields, "audited"),
        position=_position(fields),
        rows=_texts(fields, "rows"),
    )


def _curve(fields: Fields) -> CurveData:
    def point(value: object, where: str) -> tuple[float, float]:
        if not isinstance(value, list) or len(value) != 2:
            raise RecordError("not a point", where=where)
        if any(
            isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each) for each in value
        ):
            raise RecordError("not a point", where=where)
        return float(value[0]), float(value[1])

    return CurveData(
        title=_text(fields, "title"),
        audited=_text(fields, "audited"),
        position=_position(fields),
        x_label=_text(fields, "x_label"),
        y_label=_text(fields, "y_label"),
        log_axes=fields.boolean("log_axes"),
        points=tuple(fields.items("points", max_items=MAX_AUDIT_ITEMS, read=point)),
    )
