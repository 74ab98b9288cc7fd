"""The frame: a fixed header, then a body that is either in clear (before the keys are released) or sealed.

Header, 28 bytes, big-endian: magic ``MOTL``, version u8, kind u8, flags u16, sequence u64, meta bytes u32, body bytes
u64. ``flags`` bit 0: meta and body are one sealed blob (its length is ``meta + body + 16``). ``meta`` is one JSON
object; the body is the concatenated bytes of the tensors that ``meta["tensors"]`` lists.

Everything a reader meets is **unverified**: it is bounded before it is allocated, and an unknown kind, flag, field or
dtype is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from motte.capture.graph import DTYPE_BYTES
from motte.errors import FrameError
from motte.limits import MAX_FRAME_BYTES, MAX_FRAME_META_BYTES, MAX_FRAME_TENSORS, MAX_GRAPH_DIMS
from motte.strict_json import Fields, canonical, parse

MAGIC: Final = b"MOTL"
VERSION: Final = 1
PROTOCOL: Final = 4
"""Of what client and worker say in frames, and in which order."""
HEADER: Final = struct.Struct(">4sBBHQIQ")
CHANNELS: Final = ("plain", "attested")
"""Whether frames go through the stream as it is, or through TLS inside of it (docs/spec/attested_channel.md)."""
SEALED_FLAG: Final = 1
TAG_BYTES: Final = 16


class Kind(IntEnum):
    """What a frame says. HELLO, READY, ANSWER and ERROR go away from the worker, BROKER both ways, all others
    towards it."""

    HELLO = 1
    OPEN = 2
    GRANT = 3
    READY = 4
    RUN = 5
    ANSWER = 6
    STATS = 7
    ERROR = 8
    TCB = 9
    BUNDLE = 10
    BROKER = 11


CLEAR_KINDS: Final = frozenset({Kind.HELLO, Kind.OPEN, Kind.BUNDLE, Kind.GRANT, Kind.ERROR})
"""Kinds that may cross before a session key exists; of them BUNDLE alone, which is ciphertext, carries a tensor."""


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as it crosses: element type by its graph name, shape, and the bytes in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def bytes(self) -> int:
        """Size of ``data`` in bytes, computed from dtype and shape."""
        count = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: its kind, its fields and its tensors."""

    kind: Kind
    meta: Mapping[str, Any] = field(default_factory=dict)
    tensors: Sequence[WireTensor] = ()


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The decoded and bounded 28 bytes."""

    kind: Kind
    sealed: bool
    sequence: int
    meta_bytes: int
    body_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the header."""
        return self.meta_bytes + self.body_bytes + (TAG_BYTES if self.sealed else 0)

    def encode(self) -> bytes:
        """The 28 bytes; they are the associated data of a sealed payload."""
        flags = SEALED_FLAG if self.sealed else 0
        return HEADER.pack(MAGIC, VERSION, self.kind, flags, self.sequence, self.meta_bytes, self.body_bytes)


def encode_payload(frame: Frame) -> tuple[bytearray, int]:
    """The JSON of ``meta`` (with the tensors' types) and behind it the body, in one buffer; and the length of the JSON.

    Raises:
        FrameError: a tensor whose bytes do not match its type, or a payload beyond the bounds.
    """
    types = []
    for tensor in frame.tensors:
        if len(tensor.data) != tensor.bytes:
            raise FrameError(
                "tensor bytes do not match its shape",
                where=frame.kind.name,
                expected=str(tensor.bytes),
                got=str(len(tensor.data)),
            )
        types.append({"dtype": tensor.dtype, "shape": list(tensor.shape)})
    meta = canonical({"fields": dict(frame.meta), "tensors": types})
    _bound(frame.kind, len(meta), sum(tensor.bytes for tensor in frame.tensors))
    return bytearray().join((meta, *(tensor.data for tensor in frame.tensors))), len(meta)


def decode_header(raw: bytes, *, peer: str) -> FrameHeader:
    """Read the header of a frame from ``peer``.

    Raises:
        FrameError: not a frame of this version, an unknown kind or flag, or sizes beyond the bounds.
    """
    magic, version, kind, flags, sequence, meta_bytes, body_bytes = HEADER.unpack(raw)
    if magic != MAGIC or version != VERSION:
        raise FrameError(
            "not a frame of this version", where=peer, expected=f"{MAGIC!r} {VERSION}", got=f"{magic!r} {version}"
        )
    if kind not in Kind.__members__.values():
        raise FrameError("unknown kind of frame", where=peer, got=str(kind))
    if flags & ~SEALED_FLAG:
        raise FrameError("unknown flags", where=peer, got=f"{flags:#x}")
    header = FrameHeader(Kind(kind), bool(flags & SEALED_FLAG), sequence, meta_bytes, body_bytes)
    _bound(header.kind, meta_bytes, body_bytes)
    if not header.sealed and (header.kind not in CLEAR_KINDS or (body_bytes and header.kind is not Kind.BUNDLE)):
        raise FrameError("this kind of frame must be sealed", where=peer, got=header.kind.name)
    return header


def decode_payload(header: FrameHeader, meta: bytes, body: memoryview, *, peer: str) -> Frame:
    """Read a payload that was copied in and, where sealed, authenticated.

    Raises:
        FrameError: JSON or tensor types that are malformed, or a body of another length than they say.
    """
    where = f"{peer}, {header.kind.name} frame"
    fields = Fields(
        parse(meta, max_bytes=MAX_FRAME_META_BYTES, what=where, error=FrameError), where=where, error=FrameError
    )
    inner = fields.any("fields")
    types = fields.items("tensors", max_items=MAX_FRAME_TENSORS, read=_tensor_type)
    fields.done()
    if not isinstance(inner, dict):
        raise FrameError("fields are not an object", where=where)
    tensors, offset = [], 0
    for dtype, shape in types:
        tensor = WireTensor(dtype, shape, b"")
        if offset + tensor.bytes > len(body):
            raise FrameError("tensors longer than the body", where=where, got=f"{len(body)} bytes")
        tensors.append(WireTensor(dtype, shape, body[offset : offset + tensor.bytes]))
        offset += tensor.bytes
    if offset != len(body):
        raise FrameError("body longer than its tensors", where=where, expected=f"{offset} bytes", got=f"{len(body)}")
    return Frame(header.kind, inner, tuple(tensors))


def _tensor_type(value: object, where: str) -> tuple[str, tuple[int, ...]]:
    fields = Fields(value, where=where, error=FrameError)
    dtype = fields.choice("dtype", tuple(DTYPE_BYTES))
    shape = fields.items("shape", max_items=MAX_GRAPH_DIMS, read=_extent)
    fields.done()
    return dtype, tuple(shape)


def _extent(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_FRAME_BYTES:
        raise FrameError("not an extent", where=where, got=repr(value)[:80])
    return value


def _bound(kind: Kind, meta_bytes: int, body_bytes: int) -> None:
    if meta_bytes > MAX_FRAME_META_BYTES or body_bytes > MAX_FRAME_BYTES:
        raise FrameError(
            "frame too large",
            where=kind.name,
            expected=f"at most {MAX_FRAME_META_BYTES} + {MAX_FRAME_BYTES} bytes",
            got=f"{meta_bytes} + {body_bytes}",
            hint="send fewer samples at once",
        )
