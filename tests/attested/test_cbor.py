"""The part of CBOR that we read: one encoding for one value, and nothing from outside breaks the reader."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.attest.cbor import MAX_DEPTH, MAX_ITEMS, Tagged, Value, decode, encode
from motte.errors import EvidenceError

# RFC 8949, appendix A, as far as it is of this part.
VECTORS: list[tuple[Value, str]] = [
    (0, "00"),
    (10, "0a"),
    (23, "17"),
    (24, "1818"),
    (100, "1864"),
    (1000, "1903e8"),
    (1000000, "1a000f4240"),
    (1000000000000, "1b000000e8d4a51000"),
    (18446744073709551615, "1bffffffffffffffff"),
    (Tagged(1, 1363896240), "c11a514b67b0"),
    (Tagged(24, b"dIETF"), "d818456449455446"),
    (Tagged(32, "http://www.example.com"), "d82076687474703a2f2f7777772e6578616d706c652e636f6d"),
    (b"", "40"),
    (b"\x01\x02\x03\x04", "4401020304"),
    ("", "60"),
    ("IETF", "6449455446"),
    ("ü", "62c3bc"),
    ("𐅑", "64f0908591"),
    ((), "80"),
    ((1, 2, 3), "83010203"),
    ((1, (2, 3), (4, 5)), "8301820203820405"),
    (tuple(range(1, 26)), "98190102030405060708090a0b0c0d0e0f101112131415161718181819"),
    ({}, "a0"),
    ({"a": 1, "b": (2, 3)}, "a26161016162820203"),
    ({"a": "A", "b": "B"}, "a26161614161626142"),
]
REFUSED = {
    "nothing": "",
    "two values": "0000",
    "a negative number": "20",
    "a float": "f93c00",
    "a simple value": "f6",
    "not the shortest number": "1817",
    "not the shortest number, 2 bytes": "1900ff",
    "not the shortest number, 4 bytes": "1a0000ffff",
    "not the shortest number, 8 bytes": "1b00000000ffffffff",
    "not the shortest length": "580141",
    "an indefinite length": "5f4100ff",
    "a reserved length": "1c",
    "bytes cut off": "4401",
    "more bytes than there can be": "5bffffffffffffffff00",
    "an array cut off": "8201",
    "an array of too many": "9b00000000ffffffff",
    "text that is not UTF-8": "61ff",
    "a key twice": "a2616101616102",
    "keys out of order": "a2616201616101",
    "a shorter key behind a longer one": "a262616101616201",
    "a key that is no text": "a10001",
    "a tag of nothing": "c1",
}
values = st.recursive(
    st.integers(0, (1 << 64) - 1) | st.binary(max_size=300) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=30), inner, max_size=5)
        | st.builds(Tagged, st.integers(0, (1 << 64) - 1), inner)
    ),
    max_leaves=12,
)


def read(data: bytes) -> Value:
    return decode(data, what="test", check="X-5")


@pytest.mark.parametrize(("value", "text"), VECTORS, ids=[text for _, text in VECTORS])
def test_published_vectors(value: Value, text: str) -> None:
    assert encode(value) == bytes.fromhex(text)
    assert read(bytes.fromhex(text)) == value


@pytest.mark.parametrize("flaw", REFUSED)
def test_everything_else_is_refused(flaw: str) -> None:
    with pytest.raises(EvidenceError) as caught:
        read(bytes.fromhex(REFUSED[flaw]))
    assert caught.value.check == "X-5"


def test_bounds() -> None:
    assert read(encode(tuple(range(MAX_ITEMS))))
    with pytest.raises(EvidenceError, match="not CBOR"):
        read(encode(tuple(range(MAX_ITEMS + 1))))
    assert read(b"\x81" * (MAX_DEPTH - 1) + b"\x00")
    for deep in (b"\x81" * MAX_DEPTH + b"\x00", b"\xc1" * 100_000 + b"\x00", b"\x81" * 100_000):
        with pytest.raises(EvidenceError, match="not CBOR"):
            read(deep)
    for wrong in (-1, 1 << 64, 1.5, None, True):
        with pytest.raises(ValueError, match=r"CBOR|64 bits"):
            encode(wrong)  # type: ignore[arg-type]


def levels(value: Value) -> int:
    inner: tuple[Value, ...] = ()
    if isinstance(value, Tagged):
        inner = (value.value,)
    elif isinstance(value, dict):
        inner = tuple(value.values())
    elif isinstance(value, tuple):
        inner = value
    return 1 + max(map(levels, inner), default=0)


@given(values)
def test_what_was_written_is_read(value: Value) -> None:
    if levels(value) > MAX_DEPTH:
        with pytest.raises(EvidenceError):
            read(encode(value))
    else:
        assert read(encode(value)) == value


@given(st.binary(max_size=200) | st.tuples(values, st.integers(0, 300), st.integers(1, 255)))
def test_noise_and_flipped_bytes_give_the_one_encoding_or_an_error(given: bytes | tuple[Value, int, int]) -> None:
    if isinstance(given, bytes):
        data = given
    else:
        changed = bytearray(encode(given[0]))
        changed[given[1] % len(changed)] ^= given[2]
        data = bytes(changed)
    try:
        found = read(data)
    except EvidenceError:
        return
    assert encode(found) == data
