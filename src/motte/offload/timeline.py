"""Where the time of each split layer went: one span per piece of work, in the order in which the work was done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

Work = Literal["decompose", "release", "send", "lowrank", "wait", "check", "merge"]
WORKS: Final = ("decompose", "release", "send", "lowrank", "wait", "check", "merge")
"""``release``: clipping, noise and rounding. ``send``: copying out. ``wait``: for the accelerator's answer, copying in
included. All others are trusted arithmetic."""
MAX_SPANS: Final = 200_000


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work. Times are ``time.perf_counter()`` seconds of the trusted process."""

    step: int
    layer: str
    phase: Literal["forward", "backward"]
    work: Work
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Sums over the spans of one layer, in seconds."""

    trusted_s: float
    send_s: float
    wait_s: float


class Timeline:
    """The latest spans, at most :data:`MAX_SPANS` of them."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)

    @property
    def spans(self) -> tuple[Span, ...]:
        """In the order in which the work ended."""
        return tuple(self._spans)

    @contextmanager
    def span(self, step: int, layer: str, phase: Literal["forward", "backward"], work: Work) -> Iterator[None]:
        """Time a piece of work; one that raises leaves no span."""
        start = time.perf_counter()
        yield
        self._spans.append(Span(step, layer, phase, work, start, time.perf_counter()))

    def by_layer(self) -> dict[str, LayerTime]:
        """Sums by layer, in the order in which layers first appear."""
        sums: dict[str, dict[str, float]] = {}
        for span in self._spans:
            kind = span.work if span.work in ("send", "wait") else "trusted"
            layer = sums.setdefault(span.layer, {"trusted": 0.0, "send": 0.0, "wait": 0.0})
            layer[kind] += span.end_s - span.start_s
        return {name: LayerTime(each["trusted"], each["send"], each["wait"]) for name, each in sums.items()}

    def clear(self) -> None:
        """Forget all spans."""
        self._spans.clear()
