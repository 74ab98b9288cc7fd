"""The plan: which nodes stand in which part, and which large operations are tiled. A small text that round-trips."""

from __future__ import annotations

from dataclasses import dataclass, field

from motte.plan.offload import OffloadPlan

OBJECTIVES = ("weights", "memory", "time", "boundary", "published", "chosen")
"""What the parts were chosen by; ``published`` and ``chosen`` cuts came from a preset and from ``--cut-after``."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The node ``node`` of the captured graph is replaced by ``count`` nodes over slices of its output features."""

    node: str
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Contiguous parts of a (tiled) graph.

    ``graph_digest`` is the SHA-256 of the captured graph's text, so that a plan is never applied to another model.
    ``cut_after`` are the names of the last node of every part but the last, in graph order; nodes of the *tiled*
    graph. ``batch`` and the other dynamic dimensions (``dims``) are the sizes at which memory was counted.
    ``offload`` says which linear layers may leave, and how; None: nothing leaves.
    """

    graph_digest: str
    objective: str
    dims: tuple[tuple[str, int], ...]
    cut_after: tuple[str, ...]
    tiles: tuple[Tile, ...] = field(default=())
    offload: OffloadPlan | None = None

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.cut_after) + 1
