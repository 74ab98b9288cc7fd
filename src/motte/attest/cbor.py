"""The part of CBOR that evidence in a certificate needs (RFC 8949), strict: one value has one encoding.

Unsigned integers, byte strings, text strings, arrays, maps with text keys, tags. Everything else (negative and floating
numbers, simple values, indefinite lengths) is refused, as is a length that is not the shortest one, a map whose keys
are not in the order of their encodings (RFC 8949, 4.2.1) or that stand twice, and a byte behind the value. So
``encode(decode(data)) == data`` for whatever is accepted.

Own code, because a library that reads all of CBOR would be part of what every enclave has to trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from motte.errors import EvidenceError

MAX_DEPTH: Final = 8
MAX_ITEMS: Final = 64
"""Items of one array, entries of one map."""
_UNSIGNED, _BYTES, _TEXT, _ARRAY, _MAP, _TAG = 0, 2, 3, 4, 5, 6
_WIDTHS: Final = {24: 1, 25: 2, 26: 4, 27: 8}
_SHORTEST: Final = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}
"""The smallest number that may be written with each width."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """A value behind a tag (0 to 2^64 - 1)."""

    tag: int
    value: Value


Value = int | bytes | str | Sequence["Value"] | Mapping[str, "Value"] | Tagged


def encode(value: Value) -> bytes:
    """The one encoding of ``value``.

    Raises:
        ValueError: a negative number or one beyond 64 bits, or a kind of value that is not of this part of CBOR.
    """
    if isinstance(value, Tagged):
        return _head(_TAG, value.tag) + encode(value.value)
    if isinstance(value, bytes):
        return _head(_BYTES, len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return _head(_TEXT, len(text)) + text
    if type(value) is int:
        return _head(_UNSIGNED, value)
    if isinstance(value, Mapping):
        entries = sorted((encode(key), encode(each)) for key, each in value.items())
        return _head(_MAP, len(entries)) + b"".join(key + each for key, each in entries)
    if isinstance(value, list | tuple):
        return _head(_ARRAY, len(value)) + b"".join(map(encode, value))
    raise ValueError(f"not a value of this part of CBOR: {type(value).__name__}")


def decode(data: bytes, *, what: str, check: str) -> Value:
    """The one value that the **unverified** ``data`` is; arrays are tuples.

    Args:
        what, check: name of the data and number of the check, for errors.

    Raises:
        EvidenceError: something else, or beyond :data:`MAX_DEPTH` and :data:`MAX_ITEMS`.
    """
    reader = _Reader(data, what, check)
    value = reader.value(MAX_DEPTH)
    if reader.at != len(data):
        raise reader.wrong("bytes behind the value")
    return value


def _head(major: int, number: int) -> bytes:
    if not 0 <= number < 1 << 64:
        raise ValueError("a number beyond 64 bits")
    if number < 24:
        return bytes([major << 5 | number])
    width = next(width for width in (27, 26, 25, 24) if number >= _SHORTEST[width])
    return bytes([major << 5 | width]) + number.to_bytes(_WIDTHS[width], "big")


class _Reader:
    """Reads from ``at`` on; nothing is allocated that is longer than what is left."""

    def __init__(self, data: bytes, what: str, check: str) -> None:
        self._data, self._what, self._check = data, what, check
        self.at = 0

    def wrong(self, why: str) -> EvidenceError:
        """An error that says where."""
        return EvidenceError(
            "not CBOR as it must be", check=self._check, where=self._what, got=f"{why}, byte {self.at}"
        )

    def value(self, depth: int) -> Value:
        """The next value, at most ``depth`` levels of it."""
        if not depth:
            raise self.wrong("nested too deeply")
        major, number = self._head()
        if major == _UNSIGNED:
            return number
        if major == _BYTES:
            return self._take(number)
        if major == _TEXT:
            return self._text(number)
        if major == _TAG:
            return Tagged(number, self.value(depth - 1))
        if number > MAX_ITEMS:
            raise self.wrong("too many items")
        if major == _ARRAY:
            return tuple(self.value(depth - 1) for _ in range(number))
        return self._map(number, depth)

    def _map(self, count: int, depth: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        before = b""
        for _ in range(count):
            start = self.at
            major, number = self._head()
            if major != _TEXT:
                raise self.wrong("a key that is no text")
            key = self._text(number)
            encoded = self._data[start : self.at]
            if encoded <= before:
                raise self.wrong("keys out of order")
            before = encoded
            found[key] = self.value(depth - 1)
        return found

    def _head(self) -> tuple[int, int]:
        first = self._take(1)[0]
        major, short = first >> 5, first & 31
        if major not in (_UNSIGNED, _BYTES, _TEXT, _ARRAY, _MAP, _TAG) or short > 27:
            raise self.wrong("an unknown kind of value or length")
        if short < 24:
            return major, short
        number = int.from_bytes(self._take(_WIDTHS[short]), "big")
        if number < _SHORTEST[short]:
            raise self.wrong("not the shortest form")
        return major, number

    def _text(self, count: int) -> str:
        try:
            return self._take(count).decode()
        except UnicodeDecodeError as problem:
            raise self.wrong("text that is not UTF-8") from problem

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise self.wrong("it ends too early")
        self.at += count
        return self._data[self.at - count : self.at]
