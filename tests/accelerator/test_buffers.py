"""Memory for answers: used again when nobody refers to it any more, never before, and bounded."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch

from motte.accelerator.buffers import Buffers, Desk, as_tensor, bytes_of_array
from motte.accelerator.tensors import copy_in, is_finite
from motte.link.calls import DTYPE_BYTES, Tensor

LARGE = Tensor("f32", (512, 1024))


def test_memory_is_used_again_and_only_when_it_is_free() -> None:
    buffers = Buffers()
    first = as_tensor(buffers.take(LARGE), "f32").fill_(1.0)
    place = first.data_ptr()
    part = first[3:5]
    other = as_tensor(buffers.take(LARGE), "f32").fill_(2.0)
    assert other.data_ptr() != place
    del first
    gc.collect()
    assert as_tensor(buffers.take(LARGE), "f32").data_ptr() != place, "a part of it is still in use"
    assert bool((part == 1.0).all())
    numpy = part.numpy()
    del part
    gc.collect()
    assert as_tensor(buffers.take(LARGE), "f32").data_ptr() != place, "an array still shows it"
    del numpy
    gc.collect()
    free = buffers.kept_bytes
    assert free >= LARGE.bytes
    taken = [as_tensor(buffers.take(LARGE), "f32") for _ in range(free // LARGE.bytes)]
    assert place in {tensor.data_ptr() for tensor in taken}
    assert buffers.kept_bytes == 0


def test_what_is_kept_is_bounded() -> None:
    buffers = Buffers(kept_bytes=2 * LARGE.bytes)
    many = [buffers.take(LARGE) for _ in range(5)]
    del many
    gc.collect()
    assert buffers.kept_bytes == 2 * LARGE.bytes


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (1 << 10, 1 << 10)])
def test_bytes_and_tensor_are_the_same_memory(dtype: str, shape: tuple[int, ...]) -> None:
    array = Buffers().take(Tensor(dtype, shape))
    data = bytes_of_array(array)
    assert len(data) == math.prod(shape) * DTYPE_BYTES[dtype]
    if data:
        data[:] = bytes(len(data))
    made = as_tensor(array, dtype)
    assert tuple(made.shape) == shape
    assert bool((made == 0).all())


@pytest.mark.parametrize("size", [1, 100, 1 << 14, (1 << 17) + 1, 3 << 17])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(size: int, value: float, dtype: torch.dtype) -> None:
    for place in {0, size // 2, size - 1}:
        shared = torch.ones(size, dtype=dtype)
        shared[place] = value
        assert not copy_in(shared, torch.empty_like(shared))
        assert not is_finite(shared.numpy())
    huge = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
    huge[0] = -huge[0]
    into = torch.empty_like(huge)
    assert copy_in(huge, into)
    assert torch.equal(into, huge)
    assert is_finite(np.asarray(huge))


def test_what_is_checked_is_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared memory turns bad right after it was read, and good again right after it was read bad."""
    from motte.accelerator import tensors

    shared, into = torch.ones(1 << 18), torch.zeros(1 << 18)
    checked = tensors._is_finite

    def spoil(piece: torch.Tensor) -> bool:
        shared.fill_(math.nan)
        return checked(piece)

    monkeypatch.setattr(tensors, "_is_finite", spoil)
    # The first piece was copied while all was well, the second after everything was spoilt.
    assert not copy_in(shared, into)
    assert bool(torch.isfinite(into[: 1 << 17]).all())
    shared.fill_(1.0)
    shared[: 1 << 17] = math.nan

    def repair(piece: torch.Tensor) -> bool:
        shared.fill_(1.0)
        return checked(piece)

    monkeypatch.setattr(tensors, "_is_finite", repair)
    assert not copy_in(shared, into), "what was read bad stays bad, whatever lies in the shared memory by now"


def test_a_desk_keeps_room_for_small_tensors_only() -> None:
    desk = Desk(Buffers())
    small = Tensor("f32", (4, 16))
    assert desk.room(small) is desk.room(Tensor("f32", (4, 16)))
    assert desk.room(small) is not desk.room(Tensor("f32", (16, 4)))
    assert desk.room(small) is not desk.room(Tensor("bf16", (4, 16)))
    assert desk.room(LARGE) is not desk.room(LARGE)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 3)])
def test_bytes_and_tensor_on_a_desk_are_the_same_memory(dtype: str, shape: tuple[int, ...]) -> None:
    described = Tensor(dtype, shape)
    room = Desk(Buffers()).room(described)
    room.tensor.fill_(1.0)
    if described.bytes:
        room.bytes[:] = bytes(described.bytes)
    assert tuple(room.tensor.shape) == shape
    assert not room.tensor.any()


def test_a_desk_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motte.accelerator.buffers._MAX_ON_DESK", 2)
    desk = Desk(Buffers())
    first = desk.room(Tensor("f32", (1,)))
    desk.room(Tensor("f32", (2,)))
    desk.room(Tensor("f32", (3,)))
    assert desk.room(Tensor("f32", (1,))) is not first
