"""Frames to an accelerator: what is encoded is what is decoded, and nothing malformed is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.errors import FrameError
from motte.limits import MAX_CALL_META_BYTES, MAX_CALL_TENSORS, MAX_FRAME_BYTES, MAX_GRAPH_DIMS
from motte.link.calls import (
    DTYPE_BYTES,
    FROM_ACCELERATOR,
    HEADER,
    MAGIC,
    MAX_RELEASED,
    TO_ACCELERATOR,
    VERSION,
    Call,
    Flag,
    HeadReader,
    Op,
    Tensor,
    answers_of,
    decode_header,
    decode_meta,
    decode_numbers,
    encode,
    encode_numbers,
)

BOTH = TO_ACCELERATOR | FROM_ACCELERATOR
REGION = 1 << 20
X = Tensor("f32", (2, 3, 4))
SHARED = Tensor("f64", (4, 4), 4096)

GOOD = [
    Call(Op.HELLO, 0, extra=b"{}"),
    Call(Op.REGISTER, 1, layer=1, extra=b"{}"),
    Call(Op.WEIGHT, 2, step=9, layer=3, tensors=(X,)),
    Call(Op.WEIGHT, 2, layer=3, flags=Flag.RESENT, tensors=(SHARED,)),
    Call(Op.FORWARD, 3, step=1 << 63, layer=(1 << 32) - 1, tensors=(X,), places=(SHARED,)),
    Call(Op.FORWARD, 3, layer=1, flags=Flag.HOLD, held=1 << 63, tensors=(X,), places=(X,)),
    Call(Op.FORWARD, 3, layer=1, flags=Flag.HOLD | Flag.QUIET | Flag.RESENT, held=1, tensors=(X,)),
    Call(Op.BACKWARD, 3, layer=1, flags=Flag.NEED_INPUT, held=1, tensors=(X,), places=(X,)),
    Call(Op.BACKWARD, 3, layer=1, flags=Flag.NEED_INPUT | Flag.NEED_WEIGHT, held=1, tensors=(X,), places=(X, SHARED)),
    Call(Op.RELEASE, 4, extra=encode_numbers((1, 2, 1 << 63))),
    Call(Op.ANSWER, 5, step=4, layer=1, compute_ns=1 << 40, tensors=(X, SHARED)),
    Call(Op.ANSWER, 5, layer=1, tensors=(Tensor("bf16", (0, 5)),)),
    Call(Op.REFUSAL, 5, extra=b"{}"),
]


def decode(frame: bytes, *, region_bytes: int = REGION, allowed: Any = BOTH) -> Call:
    header = decode_header(frame[: HEADER.size], peer="peer", allowed=allowed)
    return decode_meta(header, frame[HEADER.size :], peer="peer", region_bytes=region_bytes)


@pytest.mark.parametrize("call", GOOD, ids=lambda call: f"{call.op.name} {call.flags}")
def test_what_is_encoded_is_what_is_decoded(call: Call) -> None:
    assert decode(encode(call)) == call


BAD = {
    "tensor in a greeting": Call(Op.HELLO, 0, tensors=(X,), extra=b"{}"),
    "greeting without words": Call(Op.HELLO, 0),
    "registration of no layer": Call(Op.REGISTER, 1, extra=b"{}"),
    "weight without a tensor": Call(Op.WEIGHT, 1, layer=1),
    "two weights": Call(Op.WEIGHT, 1, layer=1, tensors=(X, X)),
    "weight with a place": Call(Op.WEIGHT, 1, layer=1, tensors=(X,), places=(X,)),
    "weight with words": Call(Op.WEIGHT, 1, layer=1, tensors=(X,), extra=b"{}"),
    "weight that is held": Call(Op.WEIGHT, 1, layer=1, held=1, tensors=(X,)),
    "weight with a flag of forward": Call(Op.WEIGHT, 1, layer=1, flags=Flag.HOLD, tensors=(X,)),
    "forward without a place": Call(Op.FORWARD, 1, layer=1, tensors=(X,)),
    "forward with two places": Call(Op.FORWARD, 1, layer=1, tensors=(X,), places=(X, X)),
    "forward that holds nothing": Call(Op.FORWARD, 1, layer=1, flags=Flag.HOLD, tensors=(X,), places=(X,)),
    "forward held without the flag": Call(Op.FORWARD, 1, layer=1, held=1, tensors=(X,), places=(X,)),
    "quiet forward that keeps nothing": Call(Op.FORWARD, 1, layer=1, flags=Flag.QUIET, tensors=(X,)),
    "quiet forward with a place": Call(
        Op.FORWARD, 1, layer=1, flags=Flag.QUIET | Flag.HOLD, held=1, tensors=(X,), places=(X,)
    ),
    "backward for nothing": Call(Op.BACKWARD, 1, layer=1, held=1, tensors=(X,)),
    "backward of no input": Call(Op.BACKWARD, 1, layer=1, flags=Flag.NEED_INPUT, tensors=(X,), places=(X,)),
    "release of nothing": Call(Op.RELEASE, 1),
    "release of half a number": Call(Op.RELEASE, 1, extra=bytes(12)),
    "release of too many": Call(Op.RELEASE, 1, extra=bytes(8 * (MAX_RELEASED + 1))),
    "release of a layer": Call(Op.RELEASE, 1, layer=1, extra=bytes(8)),
    "answer without a tensor": Call(Op.ANSWER, 1, layer=1),
    "answer with three tensors": Call(Op.ANSWER, 1, layer=1, tensors=(X, X, X)),
    "answer of no layer": Call(Op.ANSWER, 1, tensors=(X,)),
    "answer with words": Call(Op.ANSWER, 1, layer=1, tensors=(X,), extra=b"{}"),
    "request with a time": Call(Op.FORWARD, 1, layer=1, compute_ns=1, tensors=(X,), places=(X,)),
    "unknown flag": Call(Op.FORWARD, 1, layer=1, flags=1 << 15, tensors=(X,), places=(X,)),
    "place not aligned": Call(Op.ANSWER, 1, layer=1, tensors=(SHARED._replace(offset=1),)),
    "place at the end": Call(Op.ANSWER, 1, layer=1, tensors=(SHARED._replace(offset=REGION - 64),)),
    "place far outside": Call(Op.ANSWER, 1, layer=1, tensors=(SHARED._replace(offset=(1 << 64) - 64),)),
    "tensor beyond the bound": Call(Op.ANSWER, 1, layer=1, tensors=(Tensor("f64", ((1 << 32) - 1, (1 << 32) - 1), 0),)),
    "refusal with a tensor": Call(Op.REFUSAL, 1, tensors=(X,), extra=b"{}"),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_what_a_kind_of_frame_cannot_hold_is_refused(call: Call) -> None:
    with pytest.raises(FrameError) as found:
        decode(encode(call))
    assert "peer" in str(found.value.where)


def raw(**changes: Any) -> bytes:
    """A good answer's header with fields changed, and its descriptors."""
    frame = encode(Call(Op.ANSWER, 5, layer=1, tensors=(X,)))
    first = ("magic", "version", "op", "flags", "sequence", "step", "layer", "tensors", "places", "reserved")
    names = (*first, "held", "compute_ns", "meta_bytes", "body_bytes")
    fields = dict(zip(names, HEADER.unpack(frame[: HEADER.size]), strict=True))
    return HEADER.pack(*(fields | changes).values()) + frame[HEADER.size :]


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": b"MOTL"},
        {"version": VERSION + 1},
        {"version": 0},
        {"op": 0},
        {"op": 200},
        {"reserved": 1},
        {"flags": 1},
        {"meta_bytes": MAX_CALL_META_BYTES + 1},
        {"body_bytes": MAX_FRAME_BYTES + 1},
        {"body_bytes": X.bytes - 1},
        {"body_bytes": 0},
        {"tensors": MAX_CALL_TENSORS + 1},
        {"tensors": 2},
        {"places": MAX_CALL_TENSORS + 1},
        {"held": 1},
    ],
    ids=str,
)
def test_a_changed_header_is_refused(changes: dict[str, Any]) -> None:
    assert decode(raw()).tensors == (X,)
    with pytest.raises(FrameError):
        decode(raw(**changes))


@pytest.mark.parametrize(
    ("byte", "value"), [(0, 0), (0, 4), (1, MAX_GRAPH_DIMS + 1), (1, 4), (1, 2), (2, 2), (3, 1), (11, 64)]
)
def test_a_changed_descriptor_is_refused(byte: int, value: int) -> None:
    frame = bytearray(raw())
    frame[HEADER.size + byte] = value
    with pytest.raises(FrameError):
        decode(bytes(frame))


def test_without_shared_memory_no_place_in_it_is_accepted() -> None:
    frame = encode(Call(Op.ANSWER, 1, layer=1, tensors=(SHARED,)))
    assert decode(frame).tensors == (SHARED,)
    with pytest.raises(FrameError, match="outside of the shared memory"):
        decode(frame, region_bytes=0)


@pytest.mark.parametrize("op", Op)
def test_each_side_takes_only_what_comes_from_the_other(op: Op) -> None:
    call = next(call for call in GOOD if call.op is op)
    for allowed in (TO_ACCELERATOR, FROM_ACCELERATOR):
        if op in allowed:
            assert decode(encode(call), allowed=allowed) == call
        else:
            with pytest.raises(FrameError, match="unexpected kind"):
                decode(encode(call), allowed=allowed)
    assert (op in TO_ACCELERATOR) == (op not in (Op.ANSWER, Op.REFUSAL))
    assert (op in FROM_ACCELERATOR) == (op in (Op.HELLO, Op.ANSWER, Op.REFUSAL))


tensors = st.builds(
    Tensor,
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
    st.none() | st.integers(0, 7).map(lambda page: page * 4096),
)


@given(st.lists(tensors, min_size=1, max_size=2).map(tuple), st.integers(0, (1 << 64) - 1), st.integers(1, 99))
def test_any_answer_survives(described: tuple[Tensor, ...], number: int, layer: int) -> None:
    call = Call(Op.ANSWER, number, step=number, layer=layer, compute_ns=number, tensors=described)
    inside = all(each.offset is None or each.offset + each.bytes <= REGION for each in described)
    if inside:
        assert decode(encode(call)) == call


@given(st.binary(max_size=200), st.sampled_from(GOOD))
def test_noise_is_refused_or_means_exactly_its_bytes(noise: bytes, call: Call) -> None:
    frame = encode(call)
    for candidate in (MAGIC + noise.ljust(HEADER.size, b"\0"), frame[: len(frame) - len(noise) % 30] + noise):
        try:
            header = decode_header(candidate[: HEADER.size], peer="peer", allowed=BOTH)
            end = HEADER.size + header.meta_bytes
            found = decode_meta(header, candidate[HEADER.size : end], peer="peer", region_bytes=REGION)
        except FrameError:
            continue
        assert encode(found) == candidate[:end]


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=50).map(tuple))
def test_numbers_survive(numbers: tuple[int, ...]) -> None:
    assert decode_numbers(encode_numbers(numbers)) == numbers


def test_how_many_answers_a_request_has() -> None:
    assert [answers_of(call.op, call.flags) for call in GOOD] == [0, 0, 0, 0, 1, 1, 0, 1, 2, 0, 0, 0, 0]


# --- heads that are known again --------------------------------------------------------------------------------------
def read(reader: HeadReader, frame: bytes) -> Any:
    return reader.read(memoryview(frame), 0, len(frame))


NUMBERS = {"sequence": 0, "step": 1 << 63, "layer": 7, "held": 3, "compute_ns": 0}


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [0, 1, (1 << 32) - 1])
@pytest.mark.parametrize("call", GOOD, ids=lambda call: f"{call.op.name} {call.flags}")
def test_a_known_head_is_read_as_strictly_as_a_new_one(call: Call, field: str, value: int) -> None:
    reader = HeadReader(peer="peer", allowed=BOTH)
    reader.share(REGION)
    for _ in range(2):
        assert read(reader, encode(call)) == (call, encode(call), call.inline_bytes)
    changed = encode(call._replace(**{field: value}))
    expected, refusal = None, None
    try:
        expected = decode(changed)
    except FrameError as refused:
        refusal = str(refused)
    if refusal is None:
        assert read(reader, changed) == (expected, changed, call.inline_bytes)
        return
    for _ in range(2):
        with pytest.raises(FrameError) as found:
            read(reader, changed)
        assert str(found.value) == refusal


@pytest.mark.parametrize(
    "call", [call for call in GOOD if call.tensors], ids=lambda call: f"{call.op.name} {call.flags}"
)
def test_no_changed_byte_of_a_known_head_goes_unseen(call: Call) -> None:
    frame = encode(call)
    reader = HeadReader(peer="peer", allowed=BOTH)
    reader.share(REGION)
    read(reader, frame)
    for at in range(len(frame)):
        changed = bytearray(frame)
        changed[at] ^= 1
        fresh = HeadReader(peer="peer", allowed=BOTH)
        fresh.share(REGION)
        results = []
        for each in (reader, fresh):
            try:
                results.append(read(each, bytes(changed)))
            except FrameError as refused:
                results.append(str(refused))
        assert results[0] == results[1]
        assert results[0] != read(reader, frame)


def test_what_was_known_of_other_shared_memory_is_forgotten() -> None:
    frame = encode(Call(Op.ANSWER, 1, layer=1, tensors=(SHARED,)))
    reader = HeadReader(peer="peer", allowed=BOTH)
    reader.share(REGION)
    read(reader, frame)
    reader.share(64)
    with pytest.raises(FrameError, match="outside of the shared memory"):
        read(reader, frame)


def test_another_side_knows_nothing_of_it() -> None:
    frame = encode(Call(Op.ANSWER, 1, layer=1, tensors=(X,)))
    read(HeadReader(peer="peer", allowed=FROM_ACCELERATOR), frame)
    with pytest.raises(FrameError, match="unexpected kind"):
        read(HeadReader(peer="peer", allowed=TO_ACCELERATOR), frame)


@pytest.mark.parametrize("cut", range(1, 90, 7))
def test_a_head_in_pieces_is_waited_for_but_not_its_errors(cut: int) -> None:
    frame = encode(Call(Op.ANSWER, 1, layer=1, tensors=(X, X)))
    reader = HeadReader(peer="peer", allowed=BOTH)
    assert reader.read(memoryview(frame), 0, len(frame) - cut if cut < len(frame) else 0) is None
    bad = memoryview(b"MOTL" + frame[4:])
    if len(frame) - cut >= HEADER.size:
        with pytest.raises(FrameError, match="not a frame"):
            reader.read(bad, 0, len(frame) - cut)


def test_only_so_much_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motte.link.calls._MAX_KNOWN", 3)
    reader = HeadReader(peer="peer", allowed=BOTH)
    for extent in (*range(10), *range(10)):
        call = Call(Op.ANSWER, 1, layer=1, tensors=(Tensor("f32", (extent,)),))
        assert read(reader, encode(call))[0] == call
        assert len(reader._known) <= 3
