"""A handle on an input that the accelerator keeps for a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable


class Held:
    """Dropping the last reference releases the input.

    Args:
        number: the accelerator's.
        forget: called once with the number, possibly from a garbage collection: it must not send anything.
    """

    def __init__(self, number: int, forget: Callable[[int], None]) -> None:
        self.number = number
        self.used = False
        self._finalizer = weakref.finalize(self, forget, number)

    def release(self) -> None:
        """Release it now."""
        self._finalizer()
