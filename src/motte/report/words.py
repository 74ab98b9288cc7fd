"""Figures as words: seconds, bytes, factors, and text from files made fit to be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

from motte.bench.results import Case

_BINARY: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_UNSAFE: Final = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
MODE_WORDS: Final = {
    "native": "native",
    "resident": "trusted, resident",
    "streamed": "trusted, streamed",
    "asymmetric": "asymmetric",
    "accelerator": "accelerator only",
}
"""Modes as figures and tables call them."""


def visible(text: str) -> str:
    """``text`` in one line, with what would hide or reorder it written out as an escape."""
    return "".join(
        f"\\u{{{ord(char):x}}}" if unicodedata.category(char) in _UNSAFE else char for char in " ".join(text.split(" "))
    )


def seconds(value: float) -> str:
    """Three significant digits in s, ms or us."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale * 0.9995:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value * 1e6)} us"


def bytes_(value: float) -> str:
    """Three significant digits in B, KiB, MiB, GiB or TiB."""
    unit = 0
    while value >= 1023.5 and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    return f"{digits(value)} {_BINARY[unit]}"


def count(value: float) -> str:
    """Three significant digits with k, M, G, T."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale * 0.9995:
            return f"{digits(value / scale)} {unit}"
    return digits(value)


def digits(value: float) -> str:
    """Three significant digits, never in the form 1e+03; a nought stays ``0``."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return f"{value:#.3g}"


def counted(number: int, word: str) -> str:
    """``1 part``, ``12 parts``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def span(values: Sequence[float]) -> tuple[float, float]:
    """The least and the most of ``values``."""
    return min(values), max(values)


def way(case: Case) -> str:
    """How a case runs, without its model: ``native``, ``trusted, resident, 12 parts``."""
    words = MODE_WORDS[case.mode] + (f" ({case.scheme})" if case.scheme else "")
    return words if case.mode in ("native", "accelerator") else f"{words}, {counted(case.parts, 'part')}"


def setting(case: Case) -> str:
    """What else tells two cases of a model apart: ``batch 1, torch``."""
    return f"batch {case.batch}, {case.engine}"
