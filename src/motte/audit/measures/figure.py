"""One figure that a measure gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from motte.errors import MeasureError


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured figure, or the reason why there is none.

    Args:
        name: ``exposed energy``.
        audited: the scheme in words; None: of the model or the data alone.
        layer: None: of all layers, or of none.
        value: None where ``missing`` says why.
        unit: ``share``, ``bit``, ``nat``, ``dB``.
        note: what the figure bounds, and what it does not say.

    Raises:
        MeasureError: neither a value nor a reason, both, or a value that is not finite.
    """

    name: str
    audited: str | None
    layer: str | None
    value: float | None
    unit: str
    note: str = ""
    missing: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.missing is None):
            raise MeasureError("a figure has a value, or the reason why it has none", where=self.name)
        if self.value is not None and not math.isfinite(self.value):
            raise MeasureError("a figure must be finite", where=self.name, got=str(self.value))
