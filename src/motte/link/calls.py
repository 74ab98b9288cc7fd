"""Frames between a trusted process and its accelerator (docs/spec/accelerator.md): small, strict, and free of torch.

A frame is a header of 60 bytes, the descriptors of its tensors and of the places for its answers, an extra part that
few kinds have, and the bytes of those tensors that are not in shared memory. Nothing in a frame that carries a tensor
is text: decoding one costs a few microseconds. Everything that a reader meets is **unverified**, and refused unless
it is exactly what this kind of frame holds.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple

from motte.errors import FrameError
from motte.limits import MAX_CALL_META_BYTES, MAX_CALL_TENSORS, MAX_FRAME_BYTES, MAX_GRAPH_DIMS

MAGIC: Final = b"MOTA"
VERSION: Final = 1
HEADER: Final = struct.Struct(">4sBBHQQIBBHQQIQ")
"""magic, version, op, flags, sequence, step, layer, tensors, places, reserved, held, compute_ns, meta, body bytes."""
PLACE_ALIGNMENT: Final = 64
MAX_RELEASED: Final = 4096
"""Held inputs that one RELEASE frame may name."""
NO_LAYER: Final = 0

_TENSOR: Final = struct.Struct(">BBBBQ")
_DTYPE_CODES: Final[Mapping[str, int]] = {"f64": 1, "f32": 2, "bf16": 3}
_DTYPE_NAMES: Final[Mapping[int, str]] = {code: name for name, code in _DTYPE_CODES.items()}
DTYPE_BYTES: Final[Mapping[str, int]] = {"f64": 8, "f32": 4, "bf16": 2}
"""Element types that may cross to an accelerator, with their size in bytes."""


class Op(IntEnum):
    """What a frame says. ANSWER and REFUSAL come from the accelerator only, HELLO from both sides."""

    HELLO = 1
    REGISTER = 2
    WEIGHT = 3
    FORWARD = 4
    BACKWARD = 5
    RELEASE = 6
    ANSWER = 7
    REFUSAL = 8


class Flag:
    """HOLD: keep the input. QUIET: keep it, compute and answer nothing. RESENT: the same tensor bytes left before.

    Plain integers: arithmetic on enum flags takes a microsecond each time.
    """

    NONE: Final = 0
    HOLD: Final = 1
    QUIET: Final = 2
    NEED_INPUT: Final = 4
    NEED_WEIGHT: Final = 8
    RESENT: Final = 16


_OPS: Final[Mapping[int, Op]] = {int(op): op for op in Op}
_CACHED_META_BYTES: Final = 256
TO_ACCELERATOR: Final = frozenset({Op.HELLO, Op.REGISTER, Op.WEIGHT, Op.FORWARD, Op.BACKWARD, Op.RELEASE})
FROM_ACCELERATOR: Final = frozenset({Op.HELLO, Op.ANSWER, Op.REFUSAL})


class Tensor(NamedTuple):
    """Type, shape and whereabouts of one tensor: ``offset`` in the shared region, or None: inline in the body.

    A named tuple, as :class:`Call` is: several are made for every frame, and a frozen data class costs four times that.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int | None = None

    @property
    def bytes(self) -> int:
        """Size in bytes, computed from dtype and shape."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Call(NamedTuple):
    """One frame without the bytes of its tensors.

    ``held`` numbers an input that the accelerator keeps, 0 is none; ``compute_ns`` is what an accelerator says that it
    computed; ``extra`` is the JSON of HELLO, REGISTER and REFUSAL, and the numbers of RELEASE.
    """

    op: Op
    sequence: int
    step: int = 0
    layer: int = NO_LAYER
    flags: int = Flag.NONE
    held: int = 0
    compute_ns: int = 0
    tensors: tuple[Tensor, ...] = ()
    places: tuple[Tensor, ...] = ()
    extra: bytes = b""

    @property
    def inline_bytes(self) -> int:
        """Bytes of the tensors that travel in the frame's body."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.offset is None)

    @property
    def region_bytes(self) -> int:
        """Bytes of the tensors that lie in shared memory."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.offset is not None)


class Rule(NamedTuple):
    """What a kind of frame may hold, and must."""

    flags: int = 0
    tensors: tuple[int, int] = (0, 0)
    layer: bool = False
    extra: bool = False
    times: bool = False


RULES: Final[Mapping[Op, Rule]] = {
    Op.HELLO: Rule(extra=True),
    Op.REGISTER: Rule(flags=Flag.RESENT, layer=True, extra=True),
    Op.WEIGHT: Rule(flags=Flag.RESENT, tensors=(1, 1), layer=True),
    Op.FORWARD: Rule(flags=Flag.RESENT | Flag.HOLD | Flag.QUIET, tensors=(1, 1), layer=True),
    Op.BACKWARD: Rule(flags=Flag.RESENT | Flag.NEED_INPUT | Flag.NEED_WEIGHT, tensors=(1, 1), layer=True),
    Op.RELEASE: Rule(extra=True),
    Op.ANSWER: Rule(tensors=(1, 2), layer=True, times=True),
    Op.REFUSAL: Rule(extra=True),
}


class Header(NamedTuple):
    """The decoded and bounded 60 bytes, everything but the descriptors known."""

    call: Call
    tensors: int
    places: int
    meta_bytes: int
    body_bytes: int


def encode(call: Call) -> bytes:
    """Header, descriptors and extra part; the body follows it."""
    op, sequence, step, layer, flags, held, compute_ns, tensors, places, extra = call
    described, inline_bytes = _encode_tensors(tensors, places)
    meta = described + extra
    return (
        HEADER.pack(
            MAGIC, VERSION, op, flags, sequence, step, layer, len(tensors), len(places), 0, held, compute_ns,
            len(meta), inline_bytes,
        )
        + meta
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _encode_tensors(tensors: tuple[Tensor, ...], places: tuple[Tensor, ...]) -> tuple[bytes, int]:
    # Cached: layers send the same shapes step after step.
    inline = sum(tensor.bytes for tensor in tensors if tensor.offset is None)
    return b"".join(_encode_tensor(tensor) for tensor in (*tensors, *places)), inline


def _encode_tensor(tensor: Tensor) -> bytes:
    dims = len(tensor.shape)
    place = 0 if tensor.offset is None else 1
    fixed = _TENSOR.pack(_DTYPE_CODES[tensor.dtype], dims, place, 0, tensor.offset or 0)
    return fixed + struct.pack(f">{dims}I", *tensor.shape)


def decode_header(raw: bytes | bytearray | memoryview, *, peer: str, allowed: frozenset[Op], start: int = 0) -> Header:
    """Read the first 60 bytes of a frame from ``peer``, of a kind that is ``allowed`` from it; they are at ``start``.

    Raises:
        FrameError: another protocol or version, a kind that does not come from this side, or sizes out of bounds.
    """
    (magic, version, kind, flags, sequence, step, layer, tensors, places, reserved, held, nanoseconds, meta, body) = (
        HEADER.unpack_from(raw, start)
    )
    if magic != MAGIC or version != VERSION:
        raise FrameError(
            "not a frame of this version", where=peer, expected=f"{MAGIC!r} {VERSION}", got=f"{magic!r} {version}"
        )
    op = _OPS.get(kind)
    if op is None or op not in allowed:
        raise FrameError("unexpected kind of frame", where=peer, got=str(kind))
    if reserved or flags & ~RULES[op].flags:
        raise FrameError("unknown flags", where=_at(peer, op), got=f"{flags:#x}, {reserved:#x}")
    if meta > MAX_CALL_META_BYTES or body > MAX_FRAME_BYTES:
        raise FrameError(
            "frame too large",
            where=_at(peer, op),
            expected=f"at most {MAX_CALL_META_BYTES} + {MAX_FRAME_BYTES} bytes",
            got=f"{meta} + {body}",
        )
    if tensors > MAX_CALL_TENSORS or places > MAX_CALL_TENSORS:
        raise FrameError("too many tensors", where=_at(peer, op), got=f"{tensors} and {places}")
    return Header(Call(op, sequence, step, layer, flags, held, nanoseconds), tensors, places, meta, body)


def decode_meta(header: Header, meta: bytes, *, peer: str, region_bytes: int) -> Call:
    """Read what follows the header; ``region_bytes`` is the size of the shared memory, 0 where there is none.

    Raises:
        FrameError: a descriptor that is malformed or points outside, or contents that this kind of frame cannot have.
    """
    bare = header.call
    read = _decode_known if len(meta) <= _CACHED_META_BYTES else _decode
    layer, held, timed = bare.layer != NO_LAYER, bare.held != 0, bare.compute_ns != 0
    try:
        tensors, places, extra = read(
            meta,
            header.tensors,
            header.places,
            header.body_bytes,
            region_bytes,
            bare.op,
            bare.flags,
            layer,
            held,
            timed,
        )
    except FrameError as problem:
        facts = {"expected": problem.expected, "got": problem.got}
        raise FrameError(problem.message, where=_at(peer, bare.op), **facts) from problem
    return Call(
        bare.op, bare.sequence, bare.step, bare.layer, bare.flags, bare.held, bare.compute_ns, tensors, places, extra
    )


_Meta = tuple[tuple[Tensor, ...], tuple[Tensor, ...], bytes]


def _decode(
    meta: bytes,
    tensors: int,
    places: int,
    body_bytes: int,
    region_bytes: int,
    op: Op,
    flags: int,
    layer: bool,
    held: bool,
    timed: bool,
) -> _Meta:
    """Descriptors and extra part, all rules checked; ``layer``, ``held`` and ``timed`` say which of them are not 0."""
    found: list[Tensor] = []
    at = 0
    for _ in range(tensors + places):
        tensor, at = _decode_tensor(meta, at, region_bytes)
        found.append(tensor)
    inline = sum(tensor.bytes for tensor in found[:tensors] if tensor.offset is None)
    if inline != body_bytes:
        raise FrameError("body of another length than its tensors", expected=f"{inline} bytes", got=f"{body_bytes}")
    extra = meta[at:]
    _check(op, flags, tensors, places, len(extra), layer, held, timed)
    return tuple(found[:tensors]), tuple(found[tensors:]), extra


_decode_known = lru_cache(maxsize=4096)(_decode)
"""The same bytes mean the same: layers answer with the same shapes step after step. Refusals are not kept."""


def _decode_tensor(meta: bytes, at: int, region_bytes: int) -> tuple[Tensor, int]:
    if at + _TENSOR.size > len(meta):
        raise FrameError("descriptors are cut off")
    code, dims, place, reserved, offset = _TENSOR.unpack_from(meta, at)
    at += _TENSOR.size
    if code not in _DTYPE_NAMES or dims > MAX_GRAPH_DIMS or place > 1 or reserved or (not place and offset):
        raise FrameError("not a descriptor of a tensor", got=f"{code} {dims} {place} {reserved} {offset}")
    if at + 4 * dims > len(meta):
        raise FrameError("descriptors are cut off")
    tensor = Tensor(_DTYPE_NAMES[code], struct.unpack_from(f">{dims}I", meta, at), offset if place else None)
    if tensor.bytes > MAX_FRAME_BYTES:
        raise FrameError("tensor too large", expected=f"at most {MAX_FRAME_BYTES} bytes", got=f"{tensor.shape}")
    if place and (offset % PLACE_ALIGNMENT or offset + tensor.bytes > region_bytes):
        raise FrameError(
            "tensor outside of the shared memory",
            expected=f"within {region_bytes} bytes, a multiple of {PLACE_ALIGNMENT}",
            got=f"{tensor.bytes} bytes at {offset}",
        )
    return tensor, at + 4 * dims


def _check(
    op: Op, flags: int, tensors: int, places: int, extra_bytes: int, layer: bool, held: bool, timed: bool
) -> None:
    """What the kind of frame demands of its contents as a whole."""
    rule = RULES[op]
    if not rule.tensors[0] <= tensors <= rule.tensors[1]:
        raise FrameError("wrong number of tensors", got=str(tensors))
    if places != answers_of(op, flags):
        raise FrameError("wrong number of places", got=str(places))
    if layer != rule.layer and op is not Op.REFUSAL:
        raise FrameError("a layer is missing, or out of place")
    if (extra_bytes != 0) != rule.extra:
        raise FrameError("an extra part is missing, or out of place", got=f"{extra_bytes} bytes")
    if timed and not rule.times:
        raise FrameError("a time is out of place")
    holds = op is Op.BACKWARD or flags & Flag.HOLD != 0
    if held != holds or (flags & Flag.QUIET and not flags & Flag.HOLD):
        raise FrameError("the number of a held input is missing, or out of place")
    if op is Op.BACKWARD and not places:
        raise FrameError("nothing is asked for")
    if op is Op.RELEASE and (extra_bytes % 8 or extra_bytes > 8 * MAX_RELEASED):
        raise FrameError("not a list of held inputs", got=f"{extra_bytes} bytes")


def answers_of(op: Op, flags: int) -> int:
    """How many tensors the answer to such a request has."""
    if op is Op.FORWARD:
        return 0 if flags & Flag.QUIET else 1
    if op is Op.BACKWARD:
        return (flags & Flag.NEED_INPUT != 0) + (flags & Flag.NEED_WEIGHT != 0)
    return 0


def encode_numbers(numbers: tuple[int, ...]) -> bytes:
    """The extra part of RELEASE."""
    return struct.pack(f">{len(numbers)}Q", *numbers)


def decode_numbers(extra: bytes) -> tuple[int, ...]:
    """The held inputs that a decoded RELEASE names."""
    return struct.unpack(f">{len(extra) // 8}Q", extra)


def _at(peer: str, op: Op) -> str:
    return f"{peer}, {op.name} frame"
