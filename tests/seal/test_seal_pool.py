"""pool: every chunk once, the first error, and no thread that outlives the call."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.seal.pool import for_each_chunk


def same(work: Callable[[int], int]) -> Callable[[], Callable[[int], int]]:
    return lambda: work


@settings(deadline=None, max_examples=50)
@given(chunks=st.integers(1, 40), threads=st.integers(1, 8))
def test_every_chunk_once(chunks: int, threads: int) -> None:
    seen: list[int] = []
    done: list[int] = []

    def work(chunk: int) -> int:
        seen.append(chunk)
        return chunk

    for_each_chunk(chunks, threads, same(work), done.append)
    assert sorted(seen) == sorted(done) == list(range(chunks))


def test_after_an_error_no_chunk_is_begun() -> None:
    begun: list[int] = []
    failed = threading.Event()

    def work(chunk: int) -> int:
        begun.append(chunk)
        if chunk == 0:
            failed.set()
            raise ValueError("the first")
        failed.wait(30)
        return 0

    with pytest.raises(ValueError, match="the first"):
        for_each_chunk(100_000, 2, same(work))
    assert len(begun) < 50_000


def test_the_first_of_several_errors_is_raised() -> None:
    both = threading.Barrier(2)

    def work(chunk: int) -> int:
        both.wait(30)
        raise ValueError(f"chunk {chunk}")

    with pytest.raises(ValueError, match="chunk 0"):
        for_each_chunk(2, 2, same(work))


def test_an_interrupt_goes_before_an_error() -> None:
    both = threading.Barrier(2)

    def work(chunk: int) -> int:
        both.wait(30)
        if chunk == 0:
            raise ValueError("an error")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for_each_chunk(2, 2, same(work))


def test_no_thread_outlives_an_interrupt_of_the_caller() -> None:
    started, ended = threading.Event(), threading.Event()

    def work(chunk: int) -> int:
        if threading.current_thread() is threading.main_thread():
            started.wait(30)
            raise KeyboardInterrupt
        started.set()
        threading.Event().wait(0.05)
        ended.set()
        return 0

    with pytest.raises(KeyboardInterrupt):
        for_each_chunk(1000, 2, same(work))
    assert ended.is_set()
    assert not [each for each in threading.enumerate() if each.name == "motte-chunks"]
