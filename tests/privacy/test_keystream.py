"""The keystream, the secret digest and the keyed function behind the noise."""

from __future__ import annotations

import pytest

from motte.errors import InputError
from motte.seal.keystream import MAX_DIGEST_BYTES, MAX_KEYSTREAM_BYTES, Keystream, SecretDigest, keyed_function, subkey

KEY = bytes(range(32))


def stream(key: bytes, offset: int, count: int) -> bytes:
    made = bytearray(count)
    Keystream(key).fill(memoryview(made), offset=offset)
    return bytes(made)


def test_the_first_block_is_that_of_aes_256() -> None:
    # AES-256 of the zero block under the zero key, as the known-answer tests of FIPS 197 implementations have it.
    assert stream(bytes(32), 0, 16).hex() == "dc95c078a2408989ad48a21492842087"


def test_any_place_gives_the_same_bytes_as_reading_through() -> None:
    whole = stream(KEY, 0, (3 << 20) + 37)
    for offset, count in ((0, 5), (16, 64), (1 << 20, 33), ((1 << 20) - 16, (2 << 20) + 1)):
        assert stream(KEY, offset, count) == whole[offset : offset + count]


def test_other_keys_give_other_bytes() -> None:
    assert stream(KEY, 0, 64) != stream(KEY[::-1], 0, 64)


@pytest.mark.parametrize(("offset", "count"), [(-16, 16), (8, 16), (MAX_KEYSTREAM_BYTES, 1)])
def test_a_place_outside_is_refused(offset: int, count: int) -> None:
    with pytest.raises(InputError):
        stream(KEY, offset, count)


def test_tags_tell_contents_and_lengths_apart() -> None:
    digest = SecretDigest(KEY)
    data = [b"", b"\x00", b"\x00" * 16, b"\x00" * 17, b"\x01" + b"\x00" * 16, b"\x00" * 15 + b"\x01"]
    assert len({digest.tag(memoryview(each)) for each in data}) == len(data)
    assert digest.tag(memoryview(b"abc")) == SecretDigest(KEY).tag(memoryview(b"abc"))
    assert digest.tag(memoryview(b"abc")) != SecretDigest(KEY[::-1]).tag(memoryview(b"abc"))


def test_too_much_for_one_tag_is_refused() -> None:
    with pytest.raises(InputError):
        SecretDigest(KEY).tag(memoryview(bytes(MAX_DIGEST_BYTES + 1)))


def test_no_two_lists_of_parts_collide() -> None:
    lists = [(), (b"",), (b"", b""), (b"ab",), (b"a", b"b"), (b"", b"ab"), (b"ab", b"")]
    assert len({keyed_function(KEY, *parts) for parts in lists}) == len(lists)
    assert keyed_function(KEY, b"ab") != keyed_function(KEY[::-1], b"ab")


def test_subkeys_differ_by_purpose_and_key() -> None:
    assert len({subkey(KEY, "a"), subkey(KEY, "b"), subkey(KEY[::-1], "a"), KEY}) == 4
    with pytest.raises(InputError):
        subkey(KEY[:31], "a")
