"""What crossed: every frame between a trusted process and its accelerator, in memory or in a file.

The file is specified in docs/spec/recording.md. Frames are recorded on the trusted side: what is sent before it leaves,
what is received after it was copied in. A recording that cannot be kept is an error, never a gap.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol

from motte.errors import FormatError, ResourceError
from motte.limits import (
    GIB,
    MAX_CALL_META_BYTES,
    MAX_FRAME_BYTES,
    MAX_NAME_BYTES,
    MAX_RECORDING_BYTES,
    MAX_REGION_BYTES,
)
from motte.link.calls import FROM_ACCELERATOR, HEADER, TO_ACCELERATOR, Call, Op, Tensor, decode_header, decode_meta
from motte.seal.atomic import atomic_file

Direction = Literal["sent", "received"]
FILE_MAGIC: Final = b"motte-recording-1\n"
_ENTRY: Final = struct.Struct(">BHIQ")
_DIRECTIONS: Final[tuple[Direction, Direction]] = ("sent", "received")
_END: Final = 0xFF


@dataclass(frozen=True, slots=True)
class RecordedFrame:
    """One frame as it crossed, seen from the trusted side.

    ``head`` holds its bytes without tensors; ``tensors`` those of each tensor in ``call.tensors``, wherever it crossed.
    """

    direction: Direction
    layer: str
    call: Call
    head: bytes
    tensors: tuple[bytes, ...]

    @property
    def op(self) -> Op:
        """What the frame says."""
        return self.call.op

    @property
    def step(self) -> int:
        """The step that it belongs to."""
        return self.call.step

    @property
    def described(self) -> tuple[Tensor, ...]:
        """Type and shape of each of :attr:`tensors`."""
        return self.call.tensors

    @property
    def stream_bytes(self) -> int:
        """Bytes that went through the socket."""
        return len(self.head) + self.call.inline_bytes

    @property
    def region_bytes(self) -> int:
        """Bytes that went through shared memory."""
        return self.call.region_bytes


class Recorder(Protocol):
    """Sees every frame. What it raises keeps a frame from being sent."""

    def record(self, frame: RecordedFrame) -> None:
        """One more frame."""
        ...


class Recording:
    """Frames in memory, in the order in which they crossed.

    Args:
        max_bytes: how much may be kept.
    """

    def __init__(self, *, max_bytes: int = 4 * GIB) -> None:
        self.frames: list[RecordedFrame] = []
        self.bytes = 0
        self._max_bytes = max_bytes

    def record(self, frame: RecordedFrame) -> None:
        """See :class:`Recorder`.

        Raises:
            ResourceError: the bound is reached.
        """
        size = len(frame.head) + sum(map(len, frame.tensors))
        if self.bytes + size > self._max_bytes:
            raise ResourceError(
                "the recording is full",
                expected=f"at most {self._max_bytes} bytes",
                got=f"{self.bytes + size}",
                hint="record into a file (RecordingFile), or fewer steps",
            )
        self.bytes += size
        self.frames.append(frame)

    def sent(self) -> list[RecordedFrame]:
        """What left."""
        return [frame for frame in self.frames if frame.direction == "sent"]

    def received(self) -> list[RecordedFrame]:
        """What came back."""
        return [frame for frame in self.frames if frame.direction == "received"]

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Write all of it, atomically.

        Raises:
            InputError: the file exists. ResourceError: no room.
        """
        with RecordingFile(path, overwrite=overwrite) as file:
            for frame in self.frames:
                file.record(frame)

    @staticmethod
    def read(path: Path, *, max_bytes: int = 4 * GIB) -> Recording:
        """Read a whole file; :func:`read_recording` reads one frame at a time.

        Raises:
            FormatError: not a complete recording. ResourceError: larger than ``max_bytes``.
        """
        made = Recording(max_bytes=max_bytes)
        for frame in read_recording(path):
            made.record(frame)
        return made


class RecordingFile:
    """Frames straight into a file, which appears under ``path`` when it is closed without an error.

    Args:
        max_bytes: how large the file may become.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, max_bytes: int = MAX_RECORDING_BYTES) -> None:
        self._max_bytes = min(max_bytes, MAX_RECORDING_BYTES)
        self._frames = 0
        with ExitStack() as stack:
            fd = stack.enter_context(atomic_file(path, overwrite=overwrite, mode=0o600))
            self._file = stack.enter_context(os.fdopen(fd, "wb", closefd=False))
            self._stack = stack.pop_all()
        self._file.write(FILE_MAGIC)
        self._bytes = len(FILE_MAGIC)

    def record(self, frame: RecordedFrame) -> None:
        """See :class:`Recorder`.

        Raises:
            ResourceError: the bound is reached.
        """
        layer = frame.layer.encode("utf-8")
        body = sum(map(len, frame.tensors))
        self._bytes += _ENTRY.size + len(layer) + len(frame.head) + body
        if self._bytes > self._max_bytes:
            raise ResourceError("the recording is full", expected=f"at most {self._max_bytes} bytes")
        self._file.write(_ENTRY.pack(_DIRECTIONS.index(frame.direction), len(layer), len(frame.head), body))
        self._file.write(layer)
        self._file.write(frame.head)
        for tensor in frame.tensors:
            self._file.write(tensor)
        self._frames += 1

    def __enter__(self) -> RecordingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        if kind is None:
            self._file.write(_ENTRY.pack(_END, 0, 0, self._frames))
            self._file.flush()
            self._stack.close()
        else:
            # The file object must not write into the descriptor after it was closed.
            with contextlib.suppress(OSError):
                self._file.flush()
            self._stack.__exit__(kind, problem, None)


def read_recording(path: Path) -> Iterator[RecordedFrame]:
    """The frames of a file, one at a time. **Unverified**: nobody signs a recording.

    Raises:
        FormatError: malformed, cut off, or with bytes after its end.
        ResourceError: it cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as problem:
        raise ResourceError("cannot read a recording", where=str(path), got=problem.strerror) from problem
    with file:
        where = str(path)
        if file.read(len(FILE_MAGIC)) != FILE_MAGIC:
            raise FormatError("not a recording of this version", where=where)
        count = 0
        while True:
            direction, name_bytes, head_bytes, body_bytes = _ENTRY.unpack(_exactly(file, _ENTRY.size, where))
            if direction == _END:
                if (name_bytes, head_bytes, body_bytes) != (0, 0, count) or file.read(1):
                    raise FormatError("the end of the recording does not fit", where=where, got=f"{body_bytes} frames")
                return
            if direction >= len(_DIRECTIONS) or name_bytes > MAX_NAME_BYTES:
                raise FormatError("not an entry of a recording", where=where, got=f"{direction}, {name_bytes} bytes")
            if not HEADER.size <= head_bytes <= HEADER.size + MAX_CALL_META_BYTES or body_bytes > 2 * MAX_FRAME_BYTES:
                raise FormatError("frame out of bounds", where=where, got=f"{head_bytes} + {body_bytes} bytes")
            yield _read_entry(file, _DIRECTIONS[direction], name_bytes, head_bytes, body_bytes, where)
            count += 1


def _read_entry(
    file: BinaryIO, direction: Direction, name_bytes: int, head_bytes: int, body_bytes: int, where: str
) -> RecordedFrame:
    try:
        layer = _exactly(file, name_bytes, where).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise FormatError("not the name of a layer", where=where) from problem
    head = _exactly(file, head_bytes, where)
    allowed = TO_ACCELERATOR if direction == "sent" else FROM_ACCELERATOR
    header = decode_header(head[: HEADER.size], peer=where, allowed=allowed)
    if HEADER.size + header.meta_bytes != head_bytes:
        raise FormatError("frame of another length", where=where)
    call = decode_meta(header, head[HEADER.size :], peer=where, region_bytes=MAX_REGION_BYTES)
    if sum(tensor.bytes for tensor in call.tensors) != body_bytes:
        raise FormatError("tensors of another length", where=where, got=f"{body_bytes} bytes")
    tensors = tuple(_exactly(file, tensor.bytes, where) for tensor in call.tensors)
    return RecordedFrame(direction, layer, call, head, tensors)


def _exactly(file: BinaryIO, count: int, where: str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise FormatError("the recording is cut off", where=where, expected=f"{count} bytes", got=f"{len(data)}")
    return data
