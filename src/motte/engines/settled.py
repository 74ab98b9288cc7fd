"""How much memory an engine takes for weights: read before and after, once what was freed has been given back."""

from __future__ import annotations

import contextlib
import ctypes

from motte.measure.memory import read_memory


def settled_bytes() -> int:
    """Anonymous memory of this process, after the C library has given back what it holds in reserve."""
    # What was freed but kept would hide as much new memory. Only the GNU C library can be told.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return read_memory().anonymous_bytes
