"""Shared memory and the places in it, and addresses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import FrameError, InputError, ResourceError, SettingError
from motte.link.address import DescriptorAddress, TcpAddress, UnixAddress, is_loopback, parse_address
from motte.link.region import ALIGNMENT, Places, Region

PAGES = 16


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * ALIGNMENT)), max_size=60))
def test_places_never_overlap_and_all_come_back(calls: list[tuple[bool, int]]) -> None:
    places = Places(PAGES * ALIGNMENT)
    taken: dict[int, int] = {}
    for take, size in calls:
        if take or not taken:
            offset = places.take(size)
            if offset is None:
                continue
            assert offset % ALIGNMENT == 0
            assert offset + size <= PAGES * ALIGNMENT
            assert all(offset + size <= other or other + length <= offset for other, length in taken.items())
            taken[offset] = size
        else:
            offset = sorted(taken)[size % len(taken)]
            del taken[offset]
            places.give_back(offset)
    for offset in taken:
        places.give_back(offset)
    assert places.taken_bytes == 0
    assert places.take(PAGES * ALIGNMENT) == 0


def test_a_place_is_given_back_once() -> None:
    places = Places(ALIGNMENT)
    offset = places.take(1)
    assert offset == 0
    places.give_back(offset)
    with pytest.raises(KeyError):
        places.give_back(offset)
    assert Places(0).take(1) is None


def test_both_sides_see_the_same_memory_and_neither_can_shrink_it() -> None:
    region, fd = Region.create(1 << 16)
    other = Region.receive(os.dup(fd), 1 << 16, peer="peer")
    region.memory[5:8] = b"abc"
    assert other.memory[5:8] == b"abc"
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fd, 1)
    os.close(fd)
    other.close()
    region.close()


def test_memory_of_another_size_is_refused_and_its_descriptor_closed() -> None:
    _, fd = Region.create(1 << 16)
    for size in ((1 << 16) + 1, 1 << 40):
        theirs = os.dup(fd)
        with pytest.raises((FrameError, SettingError)):
            Region.receive(theirs, size, peer="peer")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(theirs)
    os.close(fd)


def test_a_region_by_path_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(ALIGNMENT))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert Region.open(tmp_path / "file").bytes == ALIGNMENT
    with pytest.raises(ResourceError):
        Region.open(tmp_path / "link")
    with pytest.raises(ResourceError, match="too small"):
        Region.open(tmp_path / "file", 2 * ALIGNMENT)


@pytest.mark.parametrize("size", [0, -1, 1 << 60])
def test_sizes_are_bounded(size: int) -> None:
    with pytest.raises(SettingError):
        Region.create(size)


# --- addresses -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a.sock", UnixAddress(Path("/run/a.sock"))),
        ("unix:a:b", UnixAddress(Path("a:b"))),
        ("tcp:localhost:9000", TcpAddress("localhost", 9000)),
        ("tcp:[::1]:9000", TcpAddress("::1", 9000)),
        ("fd:3", DescriptorAddress(3)),
    ],
)
def test_addresses_survive(text: str, address: object) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "unix", "tcp:", "tcp:host", "tcp:host:", "tcp::9", "tcp:host:65536", "tcp:host:-1", "tcp:host:1x",
     "fd:", "fd:-1", "fd:x", "udp:h:1", "/run/a.sock", "unix:" + "x" * 200, "unix:a\0b", "tcp:host:\u0661"],
)  # fmt: skip
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_address(text)


@pytest.mark.parametrize(
    ("numeric", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
     ("fe80::1%eth0", False), ("128.0.0.1", False)],
)  # fmt: skip
def test_loopback(numeric: str, expected: bool) -> None:
    assert is_loopback(numeric) is expected
