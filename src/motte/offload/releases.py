"""The ledger of releases: every private-derived tensor is counted here before it leaves, and a retry is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["residual", "gradient", "update"]
KINDS: Final = ("residual", "gradient", "update")
"""``update`` is the trusted part of a weight gradient: weights that leave later follow from it."""


@dataclass(frozen=True, slots=True)
class ReleaseCount:
    """Releases of one kind by one layer: how many, and how many of them were clipped and noised."""

    total: int = 0
    privatised: int = 0


class Releases:
    """Counts by layer and kind.

    A batch may leave in pieces, each with its own bytes. The pieces of one pass are one release to every record in it,
    so what counts is the piece that left most often.
    """

    def __init__(self, counts: Mapping[tuple[str, Kind], ReleaseCount] | None = None) -> None:
        self._before: dict[tuple[str, Kind], ReleaseCount] = dict(counts or {})
        self._since: dict[tuple[str, Kind], dict[int, ReleaseCount]] = {}
        self._of_step: set[bytes] = set()

    @property
    def counts(self) -> Mapping[tuple[str, Kind], ReleaseCount]:
        """By layer and kind, in the order of first release."""
        found = dict(self._before)
        for key, pieces in self._since.items():
            before = found.get(key, ReleaseCount())
            most = max(pieces.values(), key=lambda count: count.total)
            found[key] = ReleaseCount(before.total + most.total, before.privatised + most.privatised)
        return found

    @property
    def unprotected(self) -> bool:
        """Whether anything left without clipping and noise."""
        return any(count.privatised < count.total for count in self.counts.values())

    def new_step(self) -> None:
        """From now on identical bytes are another release."""
        self._of_step.clear()

    def count(self, layer: str, kind: Kind, release_id: bytes | None, *, piece: int = 0) -> bool:
        """Count one release before it leaves.

        Args:
            release_id: what the noise was derived from; None: no noise.
            piece: its number among the pieces of one pass.

        Returns:
            False for a retry: these very bytes were released in this step already.
        """
        if release_id is not None:
            if release_id in self._of_step:
                return False
            self._of_step.add(release_id)
        pieces = self._since.setdefault((layer, kind), {})
        before = pieces.get(piece, ReleaseCount())
        pieces[piece] = ReleaseCount(before.total + 1, before.privatised + (release_id is not None))
        return True
