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
_FIELDS: Final = struct.Struct(">8sQQI4sQQIQ")
"""The 60 bytes once more: magic to flags, sequence, step, layer, tensors to reserved, held, compute_ns, meta, body."""
_KNOWN_META_BYTES: Final = 256
_MAX_KNOWN: Final = 4096
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
    def tensor_bytes(self) -> int:
        """Bytes of the tensors, wherever they are."""
        return sum(_sizes(self.tensors))

    @property
    def inline_bytes(self) -> int:
        """Bytes of the tensors that travel in the frame's body."""
        return _sizes(self.tensors)[0]

    @property
    def region_bytes(self) -> int:
        """Bytes of the tensors that lie in shared memory."""
        return _sizes(self.tensors)[1]


@lru_cache(maxsize=_MAX_KNOWN)
def _sizes(tensors: tuple[Tensor, ...]) -> tuple[int, int]:
    inline = sum(tensor.bytes for tensor in tensors if tensor.offset is None)
    return inline, sum(tensor.bytes for tensor in tensors) - inline


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
    meta_bytes = len(described) + len(extra)
    header = HEADER.pack(
        MAGIC, VERSION, op, flags, sequence, step, layer, len(tensors), len(places), 0, held, compute_ns,
        meta_bytes, inline_bytes,
    )  # fmt: skip
    return header + described + extra


@lru_cache(maxsize=_MAX_KNOWN)
def _encode_tensors(tensors: tuple[Tensor, ...], places: tuple[Tensor, ...]) -> tuple[bytes, int]:
    # Cached: layers send the same shapes step after step.
    described = b"".join(_encode_tensor(tensor) for tensor in (*tensors, *places))
    return described, _sizes(tensors)[0]


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
    try:
        call = _decode(header, meta, region_bytes)
        _check(call)
    except FrameError as problem:
        facts = {"expected": problem.expected, "got": problem.got}
        raise FrameError(problem.message, where=_at(peer, header.call.op), **facts) from problem
    return call


class HeadReader:
    """Decodes the heads of frames from one peer, as :func:`decode_header` and :func:`decode_meta` do.

    Layers send the same shapes step after step. So what has passed every check is known again by its bytes: all of
    them but the numbers, of which no check looks at more than whether they are 0. Refusals are not kept.

    Args:
        peer: what the other side is called in errors.
        allowed: kinds of frames that may come from it.
    """

    __slots__ = ("_allowed", "_known", "_peer", "_region_bytes")

    def __init__(self, *, peer: str, allowed: frozenset[Op]) -> None:
        self._peer = peer
        self._allowed = allowed
        self._region_bytes = 0
        self._known: dict[tuple[object, ...], Call] = {}

    def share(self, region_bytes: int) -> None:
        """From now on tensors may lie in shared memory of this size."""
        self._region_bytes = region_bytes
        self._known.clear()

    def read(self, raw: memoryview, start: int, end: int) -> tuple[Call, bytes, int] | None:
        """What the frame at ``start`` says, its bytes up to the body, and the body's size.

        None: they are not all there before ``end``; of those that are, nothing is wrong yet.

        Raises:
            FrameError: it is no frame that may come from there.
        """
        body_at = start + HEADER.size
        if end < body_at:
            return None
        fixed, sequence, step, layer, counts, held, nanoseconds, meta_bytes, body_bytes = _FIELDS.unpack_from(
            raw, start
        )
        body_at += meta_bytes
        if end < body_at:
            decode_header(raw, peer=self._peer, allowed=self._allowed, start=start)
            return None
        head = bytes(raw[start:body_at])
        meta = head[HEADER.size :]
        key = (fixed, counts, body_bytes, meta, not layer, not held, not nanoseconds)
        known = self._known.get(key)
        if known is None:
            header = decode_header(head, peer=self._peer, allowed=self._allowed)
            call = decode_meta(header, meta, peer=self._peer, region_bytes=self._region_bytes)
            if meta_bytes <= _KNOWN_META_BYTES and not call.extra:
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[key] = call
            return call, head, body_bytes
        op, _, _, _, flags, _, _, tensors, places, extra = known
        call = Call(op, sequence, step, layer, flags, held, nanoseconds, tensors, places, extra)
        return call, head, body_bytes


def _decode(header: Header, meta: bytes, region_bytes: int) -> Call:
    found: list[Tensor] = []
    at = 0
    for _ in range(header.tensors + header.places):
        tensor, at = _decode_tensor(meta, at, region_bytes)
        found.append(tensor)
    tensors, places = tuple(found[: header.tensors]), tuple(found[header.tensors :])
    call = header.call._replace(tensors=tensors, places=places, extra=meta[at:])
    if call.inline_bytes != header.body_bytes:
        raise FrameError(
            "body of another length than its tensors",
            expected=f"{call.inline_bytes} bytes",
            got=f"{header.body_bytes}",
        )
    return call


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


def _check(call: Call) -> None:
    """What the kind of frame demands of its contents as a whole. Of numbers it may see only whether they are 0."""
    op, flags, rule = call.op, call.flags, RULES[call.op]
    layer, held, timed = call.layer != NO_LAYER, call.held != 0, call.compute_ns != 0
    tensors, places, extra_bytes = len(call.tensors), len(call.places), len(call.extra)
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
