"""Reading a plan's lines, **unverified**: a keyword and words, separated by one space, in a fixed order."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from motte.errors import FormatError
from motte.limits import MAX_NAME_BYTES

Check = Callable[[str], str | None]
"""What is wrong with a word: the expected form, or None."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
_LONGEST_FRACTION = 32
"""Characters; the longest text that Python writes for a float has 24."""


def matching(pattern: re.Pattern[str], expected: str) -> Check:
    """A word that is all of ``pattern``."""
    return lambda word: None if pattern.fullmatch(word) else expected


def exactly(wanted: str) -> Check:
    """This word and no other."""
    return lambda word: None if word == wanted else wanted


def one_of(allowed: tuple[str, ...]) -> Check:
    """One of these words."""
    return lambda word: None if word in allowed else " or ".join(allowed)


def number(most: int, least: int = 1) -> Check:
    """A decimal number without sign or leading zero."""
    return lambda word: (
        None if _NUMBER.fullmatch(word) and least <= int(word) <= most else f"a number from {least} to {most}"
    )


def fraction(most: float = math.inf) -> Check:
    """A positive finite number, as Python writes a float: there is one text for each."""

    def check(word: str) -> str | None:
        expected = "a positive number as Python writes a float" + ("" if math.isinf(most) else f", at most {most}")
        try:
            value = float(word) if len(word) <= _LONGEST_FRACTION else math.nan
        except ValueError:
            return expected
        return None if repr(value) == word and 0 < value <= most and math.isfinite(value) else expected

    return check


def name_word(word: str) -> str | None:
    """A printable name."""
    # Printable leaves out every control character and every other line end and space of Unicode, and lone surrogates.
    good = word.isprintable() and 1 <= len(word.encode("utf-8", "replace")) <= MAX_NAME_BYTES
    return None if good else f"a printable name of 1 to {MAX_NAME_BYTES} bytes"


class LineReader:
    """Takes the lines in order. ``line`` is the number of the next one, from 1."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self.line = 1

    def at(self, keyword: str) -> bool:
        """Whether the next line begins with ``keyword``."""
        return self.line <= len(self._lines) and self._lines[self.line - 1].split(" ", 1)[0] == keyword

    def begins(self, text: str) -> bool:
        """Whether the next line begins with exactly ``text``."""
        return self.line <= len(self._lines) and self._lines[self.line - 1].startswith(text)

    def take(self, keyword: str, *checks: Check) -> tuple[str, ...]:
        """The words after ``keyword``, which must be the next line's."""
        words = self._words(keyword)
        if words[0] != keyword or len(words) != len(checks) + 1:
            raise self.error(keyword if words[0] != keyword else f"{keyword} and {len(checks)} words")
        return self._checked(words[1:], checks)

    def take_text(self, keyword: str, *checks: Check, text: Check) -> tuple[str, ...]:
        """Like :meth:`take`, but the last item is all the rest of the line, spaces included, and ``text`` checks it."""
        words = self._words(keyword, most=len(checks) + 2)
        if words[0] != keyword or len(words) != len(checks) + 2:
            raise self.error(keyword if words[0] != keyword else f"{keyword}, {len(checks)} words and a text")
        return self._checked(words[1:], (*checks, text))

    def take_all(self, keyword: str, *checks: Check, most: int) -> list[tuple[str, ...]]:
        """Every line from here on that begins with ``keyword``."""
        return self._bounded(keyword, lambda: self.take(keyword, *checks), most)

    def take_all_text(self, keyword: str, *checks: Check, text: Check, most: int) -> list[tuple[str, ...]]:
        """Every line from here on that begins with ``keyword``, as :meth:`take_text`."""
        return self._bounded(keyword, lambda: self.take_text(keyword, *checks, text=text), most)

    def done(self) -> None:
        """Refuse lines that are left over."""
        if self.line <= len(self._lines):
            raise self.error("dim, tile and cut lines and the offload section in this order, and nothing else")

    def error(self, expected: str) -> FormatError:
        """The next line is not what it should be."""
        got = repr(self._lines[self.line - 1])[:80]
        return FormatError("not a line of a plan", where=f"plan line {self.line}", expected=expected, got=got)

    def _words(self, keyword: str, most: int = 0) -> list[str]:
        if self.line > len(self._lines):
            raise FormatError("the plan ends early", where=f"plan line {self.line}", expected=keyword)
        return self._lines[self.line - 1].split(" ", most - 1)

    def _checked(self, words: list[str], checks: tuple[Check, ...]) -> tuple[str, ...]:
        for word, check in zip(words, checks, strict=True):
            expected = check(word)
            if expected is not None:
                raise self.error(expected)
        self.line += 1
        return tuple(words)

    def _bounded(self, keyword: str, take: Callable[[], tuple[str, ...]], most: int) -> list[tuple[str, ...]]:
        def lines() -> Iterator[tuple[str, ...]]:
            while self.at(keyword):
                yield take()

        found = []
        for words in lines():
            found.append(words)
            if len(found) > most:
                raise FormatError(
                    "too many lines", where=f"plan line {self.line - 1}", expected=f"at most {most} {keyword}"
                )
        return found
