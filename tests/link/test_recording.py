"""Recordings: what was recorded is what is read, and a file that is not whole is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import FormatError, InputError, ResourceError
from motte.link.calls import Call, Flag, Op, Tensor, encode
from motte.link.recording import FILE_MAGIC, RecordedFrame, Recording, RecordingFile, read_recording


def recorded(call: Call, direction: Any, layer: str = "") -> RecordedFrame:
    tensors = tuple(bytes([index + 1]) * tensor.bytes for index, tensor in enumerate(call.tensors))
    return RecordedFrame(direction, layer, call, encode(call), tensors)


SMALL, SHARED = Tensor("f32", (2, 3)), Tensor("bf16", (4, 4), 4096)
FRAMES = [
    recorded(Call(Op.HELLO, 0, extra=b"{}"), "sent"),
    recorded(Call(Op.HELLO, 0, extra=b"{}"), "received"),
    recorded(Call(Op.WEIGHT, 1, 7, 1, tensors=(SHARED,)), "sent", "layer1.0.conv1"),
    recorded(Call(Op.FORWARD, 2, 7, 1, Flag.HOLD, 1, tensors=(SMALL,), places=(SHARED,)), "sent", "layer1.0.conv1"),
    recorded(Call(Op.ANSWER, 2, 7, 1, compute_ns=5, tensors=(SHARED,)), "received", "layer1.0.conv1"),
    recorded(Call(Op.ANSWER, 3, 7, 2, tensors=(SMALL, SHARED)), "received", "größe"),
]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    recording = Recording()
    for frame in FRAMES:
        recording.record(frame)
    recording.write(tmp_path / "r.motterec")
    return tmp_path / "r.motterec"


def test_what_was_recorded_is_what_is_read(written: Path) -> None:
    assert list(read_recording(written)) == FRAMES
    read = Recording.read(written)
    assert read.frames == FRAMES
    assert read.sent() == [frame for frame in FRAMES if frame.direction == "sent"]
    assert read.received() == [frame for frame in FRAMES if frame.direction == "received"]
    assert (FRAMES[4].op, FRAMES[4].step, FRAMES[4].described) == (Op.ANSWER, 7, (SHARED,))


def test_bytes_are_counted_by_way(written: Path) -> None:
    last = FRAMES[-1]
    assert last.stream_bytes == len(last.head) + SMALL.bytes
    assert last.region_bytes == SHARED.bytes


def test_every_cut_is_noticed(written: Path) -> None:
    whole = written.read_bytes()
    for length in range(len(whole)):
        written.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            list(read_recording(written))
    written.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="the end of the recording"):
        list(read_recording(written))


def test_a_frame_taken_out_is_noticed(written: Path, tmp_path: Path) -> None:
    with RecordingFile(tmp_path / "short") as file:
        for frame in FRAMES[:-1]:
            file.record(frame)
    whole, short = written.read_bytes(), (tmp_path / "short").read_bytes()
    entry_bytes = 15
    written.write_bytes(short[:-entry_bytes] + whole[-entry_bytes:])
    with pytest.raises(FormatError, match="the end of the recording"):
        list(read_recording(written))


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_never_gives_anything_but_frames_or_a_format_error(place: int, change: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r"
        with RecordingFile(path) as file:
            for frame in FRAMES:
                file.record(frame)
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= change
        path.write_bytes(data)
        try:
            found = list(read_recording(path))
        except FormatError:
            return
        assert len(found) == len(FRAMES)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RecordingFile(tmp_path / "r") as file:
            file.record(FRAMES[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with RecordingFile(tmp_path / "r") as file:
        file.record(FRAMES[0])
        assert not (tmp_path / "r").exists()
    assert (tmp_path / "r").read_bytes().startswith(FILE_MAGIC)
    with pytest.raises(InputError, match="exists already"):
        RecordingFile(tmp_path / "r")


def test_a_full_recording_is_an_error(tmp_path: Path) -> None:
    recording = Recording(max_bytes=len(FRAMES[0].head))
    recording.record(FRAMES[0])
    with pytest.raises(ResourceError, match="full"):
        recording.record(FRAMES[1])
    assert len(recording.frames) == 1

    def too_much() -> None:
        with RecordingFile(tmp_path / "r", max_bytes=200) as file:
            for frame in FRAMES:
                file.record(frame)

    with pytest.raises(ResourceError, match="full"):
        too_much()
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_allowed_is_not_taken_into_memory(written: Path) -> None:
    with pytest.raises(ResourceError, match="full"):
        Recording.read(written, max_bytes=100)
    with pytest.raises(ResourceError, match="cannot read"):
        Recording.read(written.with_name("none"))
