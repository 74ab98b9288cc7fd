"""A strict reader and a canonical writer of JSON, for everything that comes from outside.

Python's own ``json`` accepts duplicate keys, NaN and unbounded nesting. The reader here refuses all three, bounds the
size before it parses, and :class:`Fields` makes a forgotten or unknown key an error instead of a default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from motte.errors import FormatError

T = TypeVar("T")
_MAX_DEPTH = 32
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A string, or the beginning of one that never ends. Possessive, so that no input makes it look twice at a byte."""
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def canonical(value: object) -> bytes:
    """The one encoding of ``value``: sorted keys, no spaces, ASCII, no NaN. What is signed is always this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def parse(data: bytes | str, *, max_bytes: int, what: str, error: type[FormatError] = FormatError) -> Any:
    """Parse **unverified** JSON: no duplicate keys, no NaN, at most ``max_bytes`` long and 32 levels deep.

    Raises:
        error: whatever is wrong, with ``what`` as its place.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    if len(raw) > max_bytes:
        raise error(f"{what} too large", expected=f"at most {max_bytes} bytes", got=f"{len(raw)} bytes")
    _bound_depth(raw, what, error)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            raise error("duplicate field", where=what, got=repr(next(n for n in names if names.count(n) > 1)))
        return found

    def constant(text: str) -> NoReturn:
        raise error("not a number of JSON", where=what, got=text)

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as problem:
        raise error("not valid JSON", where=what, got=str(problem)) from problem


def _bound_depth(raw: bytes, what: str, error: type[FormatError]) -> None:
    # The C scanner recurses; bounding the nesting first keeps hostile input from reaching the interpreter's limit.
    # Strings are taken out first, in C, and so is everything else that is no bracket: what is left is short.
    if raw.count(b"[") + raw.count(b"{") <= _MAX_DEPTH:
        return
    depth = 0
    for byte in _STRING.sub(b"", raw).translate(None, _NO_BRACKETS):
        if byte in (0x5B, 0x7B):
            depth += 1
            if depth > _MAX_DEPTH:
                raise error("nested too deeply", where=what, expected=f"at most {_MAX_DEPTH} levels")
        else:
            depth -= 1


class Fields:
    """The fields of one JSON object, each taken exactly once; :meth:`done` refuses what nobody asked for.

    >>> fields = Fields({"size": 3}, where="header")
    >>> fields.integer("size", low=0, high=10)
    3
    >>> fields.done()
    """

    def __init__(self, value: object, *, where: str, error: type[FormatError] = FormatError) -> None:
        if not isinstance(value, dict):
            raise error("not an object", where=where, got=type(value).__name__)
        self._left: dict[str, Any] = dict(value)
        self.where = where
        self._error = error

    def has(self, name: str) -> bool:
        """Whether the optional field ``name`` is there and was not taken yet."""
        return name in self._left

    def any(self, name: str) -> Any:
        """Take a field of any type."""
        if name not in self._left:
            raise self._error("missing field", where=f"{self.where}.{name}")
        return self._left.pop(name)

    def integer(self, name: str, *, low: int, high: int) -> int:
        """Take an integer in [low, high]; a bool is none."""
        value = self.any(name)
        if type(value) is not int or not low <= value <= high:
            raise self._error(
                "not an integer in range",
                where=f"{self.where}.{name}",
                expected=f"{low} to {high}",
                got=repr(value)[:80],
            )
        return value

    def text(self, name: str, *, max_bytes: int) -> str:
        """Take a string of at most ``max_bytes`` UTF-8 bytes."""
        value = self.any(name)
        # "surrogatepass": a lone surrogate is legal in a JSON escape; it is refused here rather than met later.
        if not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) > max_bytes:
            raise self._error(
                "not a string",
                where=f"{self.where}.{name}",
                expected=f"at most {max_bytes} bytes",
                got=repr(value)[:80],
            )
        if not value.isascii() and any(0xD800 <= ord(char) <= 0xDFFF for char in value):
            raise self._error("lone surrogate in a string", where=f"{self.where}.{name}")
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Take a string that must be one of ``allowed``."""
        value = self.any(name)
        if not isinstance(value, str) or value not in allowed:
            raise self._error(
                "unknown value", where=f"{self.where}.{name}", expected=" or ".join(allowed), got=repr(value)[:80]
            )
        return value

    def boolean(self, name: str) -> bool:
        """Take true or false."""
        value = self.any(name)
        if not isinstance(value, bool):
            raise self._error("not true or false", where=f"{self.where}.{name}", got=repr(value)[:80])
        return value

    def number(self, name: str) -> float:
        """Take a finite number."""
        value = self.any(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300:
            raise self._error("not a finite number", where=f"{self.where}.{name}", got=repr(value)[:80])
        return float(value)

    def hexadecimal(self, name: str, *, length_bytes: int) -> bytes:
        """Take lower-case hexadecimal of exactly ``length_bytes`` bytes."""
        value = self.any(name)
        good = isinstance(value, str) and len(value) == 2 * length_bytes and set(value) <= set("0123456789abcdef")
        if not good:
            raise self._error(
                "not lower-case hexadecimal",
                where=f"{self.where}.{name}",
                expected=f"{length_bytes} bytes",
                # Keys travel in such fields: an error never quotes one.
                got=f"{len(value)} characters" if isinstance(value, str) else type(value).__name__,
            )
        return bytes.fromhex(value)

    def items(self, name: str, *, max_items: int, read: Callable[[Any, str], T]) -> list[T]:
        """Take a list of at most ``max_items``; ``read(item, where)`` turns each into what it stands for."""
        value = self.any(name)
        if not isinstance(value, list) or len(value) > max_items:
            got = f"{len(value)} items" if isinstance(value, list) else type(value).__name__
            raise self._error(
                "not a list in bounds", where=f"{self.where}.{name}", expected=f"at most {max_items} items", got=got
            )
        return [read(item, f"{self.where}.{name}[{index}]") for index, item in enumerate(value)]

    def fields(self, name: str) -> Fields:
        """Take a nested object."""
        return Fields(self.any(name), where=f"{self.where}.{name}", error=self._error)

    def done(self) -> None:
        """Refuse every field that was not taken."""
        if self._left:
            raise self._error("unknown field", where=self.where, got=", ".join(sorted(map(repr, self._left)))[:200])
