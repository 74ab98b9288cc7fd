"""What lowering gives, as the bundle's manifest carries it. Needs neither torch nor onnx."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motte.engines.interface import OnnxProgram
from motte.engines.select import PRECISIONS
from motte.errors import BundleError
from motte.limits import MAX_GRAPH_DIMS, MAX_LOWERED_BYTES, MAX_LOWERED_CHECKS, MAX_NAME_BYTES, MAX_PARTS
from motte.strict_json import Fields


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """One comparison with the reference: largest |difference| over largest |reference| of any output of any part.

    ``inputs``: ``example`` or ``random``. ``engine_version`` is the one that was compared; another one may differ.
    """

    engine: str
    engine_version: str
    precision: str
    inputs: str
    difference: float


@dataclass(frozen=True, slots=True)
class Lowered:
    """Every part as ONNX, and all of them joined into one.

    ``made_by``: versions of what made it, by package.
    """

    joined: OnnxProgram
    parts: tuple[OnnxProgram, ...]
    checks: tuple[EngineCheck, ...]
    made_by: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Size of all programs; none of them holds a weight."""
        return self.joined.bytes + sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class NotLowered:
    """Why only the torch engine runs this model: one reason for each part that did not lower, by its number from 1."""

    reasons: Mapping[int, str]

    def __str__(self) -> str:
        index, reason = next(iter(self.reasons.items()))
        more = f", and {len(self.reasons) - 1} more" if len(self.reasons) > 1 else ""
        return f"part {index}: {reason}{more}"


def to_json(lowered: Lowered | NotLowered) -> dict[str, Any]:
    """JSON values for the manifest."""
    if isinstance(lowered, NotLowered):
        return {"reasons": {str(index): reason for index, reason in lowered.reasons.items()}}
    return {
        "joined": _program_json(lowered.joined),
        "parts": [_program_json(part) for part in lowered.parts],
        "checks": [check_json(check) for check in lowered.checks],
        "made_by": dict(lowered.made_by),
    }


def check_json(check: EngineCheck) -> dict[str, Any]:
    """JSON values of one comparison."""
    return {
        "engine": check.engine,
        "engine_version": check.engine_version,
        "precision": check.precision,
        "inputs": check.inputs,
        "difference": check.difference,
    }


def from_json(value: object) -> Lowered | NotLowered:
    """Read what :func:`to_json` wrote; **authenticated** bytes, checked all the same.

    Raises:
        BundleError: malformed.
    """
    fields = Fields(value, where="manifest.lowered", error=BundleError)
    if fields.has("reasons"):
        reasons = _texts(fields.any("reasons"), "manifest.lowered.reasons", low=1)
        fields.done()
        try:
            return NotLowered({int(index): reason for index, reason in reasons.items()})
        except ValueError as problem:
            raise BundleError("not a part's number", where="manifest.lowered.reasons", got=str(problem)) from problem
    found = Lowered(
        joined=_program(fields.any("joined"), "manifest.lowered.joined"),
        parts=tuple(fields.items("parts", max_items=MAX_PARTS, read=_program)),
        checks=tuple(fields.items("checks", max_items=MAX_LOWERED_CHECKS, read=read_check)),
        made_by=_texts(fields.any("made_by"), "manifest.lowered.made_by", low=0),
    )
    fields.done()
    return found


def _program_json(program: OnnxProgram) -> dict[str, Any]:
    return {
        "core": base64.b64encode(program.core).decode(),
        "weight_inputs": base64.b64encode(program.weight_inputs).decode(),
        "weight_initializers": base64.b64encode(program.weight_initializers).decode(),
        "dims": list(program.dims),
    }


def _program(value: object, where: str) -> OnnxProgram:
    fields = Fields(value, where=where, error=BundleError)
    found = OnnxProgram(
        core=_bytes(fields, "core"),
        weight_inputs=_bytes(fields, "weight_inputs"),
        weight_initializers=_bytes(fields, "weight_initializers"),
        dims=tuple(fields.items("dims", max_items=MAX_GRAPH_DIMS, read=_name)),
    )
    fields.done()
    return found


def _bytes(fields: Fields, name: str) -> bytes:
    text = fields.text(name, max_bytes=MAX_LOWERED_BYTES)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise BundleError("not base64", where=f"manifest.lowered: {name}", got=str(problem)) from problem


def _name(value: object, where: str) -> str:
    return Fields({"name": value}, where=where, error=BundleError).text("name", max_bytes=MAX_NAME_BYTES)


def read_check(value: object, where: str) -> EngineCheck:
    """Read what :func:`check_json` wrote.

    Raises:
        BundleError: malformed.
    """
    fields = Fields(value, where=where, error=BundleError)
    found = EngineCheck(
        engine=fields.text("engine", max_bytes=MAX_NAME_BYTES),
        engine_version=fields.text("engine_version", max_bytes=MAX_NAME_BYTES),
        precision=fields.choice("precision", PRECISIONS),
        inputs=fields.choice("inputs", ("example", "random")),
        difference=fields.number("difference"),
    )
    fields.done()
    return found


def _texts(value: object, where: str, *, low: int) -> dict[str, str]:
    if not isinstance(value, dict) or not low <= len(value) <= MAX_PARTS:
        raise BundleError("not a table of texts", where=where)
    return {_name(name, where): _name(text, where) for name, text in value.items()}
