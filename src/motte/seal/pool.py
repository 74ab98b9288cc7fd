"""Chunks worked on by several threads. AES, SHA-256 and file access release the interpreter lock on whole chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from motte.errors import SettingError

MAX_THREADS: Final = 256
Progress = Callable[[int], None]
"""Called with the bytes done since the last call; from one thread at a time, not always the same one."""


def for_each_chunk(
    chunks: int, threads: int, start_worker: Callable[[], Callable[[int], int]], progress: Progress | None = None
) -> None:
    """Call a worker's function once for every chunk in ``range(chunks)``, on ``threads`` threads at most.

    The calling thread is one of them, so ``threads=1`` starts none. Chunks are begun in order. After an error no
    new chunk is begun; every thread has ended when this returns or raises, Ctrl-C included.

    Args:
        start_worker: called once per thread, on the calling one. What it returns may keep buffers of its own; it is
            given the number of a chunk, and returns how many bytes of progress that was.

    Raises:
        SettingError: ``threads`` is not in 1..256.
        Exception: of the chunks that failed, the error of the first.
    """
    check_threads(threads)
    lock = threading.Lock()
    stop = threading.Event()
    failures: list[tuple[int, BaseException]] = []
    following = iter(range(chunks))

    def loop(work: Callable[[int], int]) -> None:
        while not stop.is_set():
            with lock:
                chunk = next(following, None)
            if chunk is None:
                return
            try:
                count = work(chunk)
                if progress is not None:
                    with lock:
                        progress(count)
            except BaseException as problem:  # noqa: BLE001 - raised again below, in the caller's thread
                failures.append((chunk, problem))
                stop.set()
                return

    workers = [start_worker() for _ in range(min(threads, chunks))]
    others = [threading.Thread(target=loop, args=(work,), name="motte-chunks") for work in workers[1:]]
    try:
        for thread in others:
            thread.start()
        loop(workers[0])
    except BaseException:  # an interrupt between two chunks
        stop.set()
        raise
    finally:
        _join(others, stop)
    if failures:
        # An interrupt goes first: it must not be turned into an error of the file.
        failures.sort(key=lambda each: (isinstance(each[1], Exception), each[0]))
        raise failures[0][1]


def _join(threads: list[threading.Thread], stop: threading.Event) -> None:
    # A thread that outlived this call could write to a descriptor that by then is another file's: an interrupt
    # while waiting makes the threads end sooner, and is raised only when they have ended.
    interrupt: BaseException | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as problem:  # noqa: BLE001 - raised again below
                stop.set()
                interrupt = problem
    if interrupt is not None:
        raise interrupt


def check_threads(threads: int) -> None:
    """Refuse a number of threads outside 1..256.

    Raises:
        SettingError: so it is.
    """
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise SettingError("not a number of threads", expected=f"1 to {MAX_THREADS}", got=repr(threads))
