"""Recorded frames -> tensors: everything that an attacker has of the link, and nothing else.

Only :class:`motte.link.recording.RecordedFrame` goes in. What comes out lies in memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from motte.accelerator.tensors import from_bytes
from motte.audit.interface import Kind, Sighting
from motte.errors import FormatError, FrameError
from motte.limits import MAX_CALL_META_BYTES
from motte.linear.operation import LinearOperation
from motte.link.calls import Call, Flag, Op
from motte.strict_json import parse

if TYPE_CHECKING:
    from torch import Tensor

    from motte.link.recording import RecordedFrame

_SENT: Final[Mapping[Op, Kind]] = {Op.WEIGHT: "weight", Op.FORWARD: "activation", Op.BACKWARD: "gradient"}


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a recording holds.

    Attributes:
        sightings: every tensor once, in the order in which they crossed; what was sent again is not repeated.
        operations: geometry by layer.
        resent: tensors that left a second time, with the same bytes.
    """

    sightings: tuple[Sighting, ...]
    operations: Mapping[str, LinearOperation]
    resent: int

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weight of each layer as it left last, under its ``state_dict`` name."""
        return {f"{each.layer}.weight": each.tensor for each in self.sightings if each.kind == "weight"}


def decode(frames: Iterable[RecordedFrame], *, where: str = "recording") -> Decoded:
    """Decode **unverified** frames.

    Raises:
        FormatError: a geometry that is none, a tensor of a layer without a name, an answer that nobody asked for.
    """
    sightings: list[Sighting] = []
    operations: dict[str, LinearOperation] = {}
    asked: dict[int, Call] = {}
    resent = 0
    for frame in frames:
        call = frame.call
        if frame.op is Op.REGISTER:
            text = f"{where}, layer {frame.layer}"
            value = parse(call.extra, max_bytes=MAX_CALL_META_BYTES, what=text, error=FrameError)
            operations[frame.layer] = LinearOperation.read(value, text)
        if not frame.tensors:
            continue
        if not frame.layer:
            raise FormatError("a tensor of no layer", where=where, got=frame.op.name)
        if frame.direction == "sent":
            asked[call.sequence] = call
            if call.flags & Flag.RESENT:
                resent += len(frame.tensors)
                continue
            kinds: tuple[Kind, ...] = (_SENT[frame.op],) if frame.op in _SENT else ()
        else:
            kinds = _answers(asked.get(call.sequence))
        if len(kinds) != len(frame.tensors):
            raise FormatError(
                "an answer that nobody asked for, or another than was asked for",
                where=f"{where}, layer {frame.layer}, step {frame.step}",
                expected=f"{len(kinds)} tensors",
                got=str(len(frame.tensors)),
            )
        for kind, raw, described in zip(kinds, frame.tensors, frame.described, strict=True):
            tensor = from_bytes(raw, described.dtype, described.shape)
            sightings.append(Sighting(frame.direction, frame.layer, kind, frame.step, call.sequence, tensor))
    return Decoded(tuple(sightings), operations, resent)


def _answers(request: Call | None) -> tuple[Kind, ...]:
    if request is None:
        return ()
    if request.op is Op.FORWARD:
        return ("output",)
    kinds: list[Kind] = []
    if request.flags & Flag.NEED_INPUT:
        kinds.append("input-gradient")
    if request.flags & Flag.NEED_WEIGHT:
        kinds.append("weight-gradient")
    return tuple(kinds)
