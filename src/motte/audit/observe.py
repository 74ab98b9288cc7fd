"""What left, listed: every kind of tensor by layer and direction, with its bytes and its share of the activation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motte.audit.decode import decode
from motte.audit.measures.exposure import Exposure, exposure
from motte.errors import MeasureError
from motte.link.recording import read_recording

if TYPE_CHECKING:
    from torch import Tensor

    from motte.audit.decode import Decoded
    from motte.audit.interface import Kind, Sighting
    from motte.link.recording import Direction


@dataclass(frozen=True, slots=True)
class Row:
    """All tensors of one kind that crossed for one layer.

    Attributes:
        shapes: the distinct ones, in the order in which they appeared.
        energy: squared norm of all of them.
        exposed: what of the layer's activation left; None where it is not known, or for another kind of tensor.
    """

    layer: str
    direction: Direction
    kind: Kind
    tensors: int
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    energy: float
    exposed: Exposure | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """A whole recording.

    Attributes:
        steps: number of steps in which something crossed.
        resent: tensors that left a second time with the same bytes; they are in no row.
    """

    rows: tuple[Row, ...]
    steps: int
    resent: int

    @property
    def bytes_out(self) -> int:
        """Tensor bytes that left, once each."""
        return sum(row.bytes for row in self.rows if row.direction == "sent")


def observed(decoded: Decoded, activations: Mapping[str, Tensor] | None = None) -> Observed:
    """List what ``decoded`` holds.

    Args:
        activations: by layer, (N, ...), for the same inputs in the same order as they ran; None: not known.

    Raises:
        MeasureError: the recording is not of these inputs.
    """
    groups: dict[tuple[str, Direction, Kind], list[Sighting]] = {}
    for each in decoded.sightings:
        groups.setdefault((each.layer, each.direction, each.kind), []).append(each)
    rows = []
    for (layer, direction, kind), sightings in groups.items():
        known = None
        if kind == "activation" and activations is not None:
            known = _exposed(layer, sightings, activations)
        rows.append(
            Row(
                layer=layer,
                direction=direction,
                kind=kind,
                tensors=len(sightings),
                dtypes=_distinct(str(each.tensor.dtype).removeprefix("torch.") for each in sightings),
                shapes=tuple(dict.fromkeys(tuple(each.tensor.shape) for each in sightings)),
                bytes=sum(each.bytes for each in sightings),
                energy=sum(float((each.tensor.double() ** 2).sum()) for each in sightings),
                exposed=known,
            )
        )
    return Observed(
        tuple(rows), len({each.step for each in decoded.sightings if each.kind != "weight"}), decoded.resent
    )


def observe_file(path: Path, activations: Mapping[str, Tensor] | None = None) -> Observed:
    """List a recording file. **Unverified**: nobody signs one.

    Raises:
        FormatError: not a complete recording. ResourceError: it cannot be read.
        MeasureError: it is not of these inputs.
    """
    return observed(decode(read_recording(path), where=str(path)), activations)


def count_inputs(path: Path) -> int:
    """How many inputs ran in a recorded inference: rows of the first split layer's residuals.

    Raises:
        FormatError: not a complete recording. MeasureError: of training, or of nothing.
    """
    decoded = decode(read_recording(path), where=str(path))
    if any(each.kind == "gradient" for each in decoded.sightings):
        raise MeasureError("a recording of training: which records ran, and in which order, is not known")
    first = next((each.layer for each in decoded.sightings if each.kind == "activation"), None)
    if first is None:
        raise MeasureError("nothing of any layer crossed", where=str(path))
    return sum(
        int(each.tensor.shape[0]) for each in decoded.sightings if each.kind == "activation" and each.layer == first
    )


def _exposed(layer: str, sightings: Sequence[Sighting], activations: Mapping[str, Tensor]) -> Exposure | None:
    import torch

    if layer not in activations:
        return None
    return exposure(torch.cat([each.tensor for each in sightings]), activations[layer], layer=layer)


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
