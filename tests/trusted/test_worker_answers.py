"""The worker answers exactly as the whole model does, in both memory modes, and refuses what does not fit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from motte.errors import InputError, ResourceError, SettingError, WorkerClosed
from motte.run.tensors import to_wire


def whole(sealed, x):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return sealed.model(x)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_equal_to_the_whole_bit_for_bit(sealed, mode: str) -> None:
    with sealed.load(mode=mode, weight_memory_bytes=1 << 20, dims={"batch": 5}) as model:
        for batch in (1, 5, 2):
            x = torch.randn(batch, 3, 16, 16)
            assert torch.equal(model(x), whole(sealed, x))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_streamed_in_any_number_of_parts(seal_parts, parts: int) -> None:
    sealed = seal_parts(parts)
    with sealed.load(mode="streamed", weight_memory_bytes=1 << 20) as model:
        for _ in range(3):
            x = torch.randn(2, 3, 16, 16)
            assert torch.equal(model(x), whole(sealed, x))


def test_numpy_in_numpy_out_by_name_and_strided(sealed, loaded) -> None:
    x = torch.randn(2, 16, 16, 3)
    expected = whole(sealed, x.permute(0, 3, 1, 2).contiguous()).numpy()
    got = loaded(x=x.numpy().transpose(0, 3, 1, 2))
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, expected)


def test_bad_inputs_are_refused_by_name_and_the_worker_lives_on(sealed, loaded) -> None:
    good = torch.randn(2, 3, 16, 16)
    with pytest.raises(InputError, match=r"another type.*x.*f32 \[batch, 3, 16, 16\].*f64"):
        loaded(good.double())
    with pytest.raises(InputError, match="another type"):
        loaded(torch.randn(2, 4, 16, 16))
    with pytest.raises(InputError, match="wrong inputs"):
        loaded(good, good)
    with pytest.raises(InputError, match="wrong inputs"):
        loaded(y=good)
    with pytest.raises(InputError, match="not a torch tensor or numpy array"):
        loaded([[1.0]])
    assert torch.equal(loaded(good), whole(sealed, good))


def test_larger_than_the_stated_batch_is_refused_in_streamed_mode(sealed) -> None:
    with sealed.load(mode="streamed", weight_memory_bytes=1 << 20, dims={"batch": 4}) as model:
        with pytest.raises(InputError, match=r"larger than the size stated.*batch.*at most 4.*got 5"):
            model(torch.randn(5, 3, 16, 16))
        assert model(torch.randn(4, 3, 16, 16)).shape == (4, 10)


def test_a_bound_that_the_plan_cannot_keep_is_refused_before_anything_is_opened(sealed) -> None:
    with pytest.raises(ResourceError, match="does not fit the weight memory"):
        sealed.load(mode="streamed", weight_memory_bytes=4096)
    with pytest.raises(ResourceError, match="does not fit the weight memory"):
        sealed.load(mode="resident", weight_memory_bytes=sum(sealed.part_bytes) - 1)


def test_streamed_arena_holds_two_neighbours_and_no_more(sealed) -> None:
    with sealed.load(mode="streamed", weight_memory_bytes=1 << 20) as model:
        sizes = sealed.part_bytes
        neighbours = max(a + b for a, b in zip(sizes, [*sizes[1:], sizes[0]], strict=True))
        held = model.stats()["weight_arena_bytes"]
        assert neighbours <= held <= neighbours + 4096
        assert held < sum(sizes)
        model(torch.zeros(1, 3, 16, 16))
        # The kernel's count of what is in memory, in whole pages.
        assert 0 < model.stats()["weight_resident_bytes"] <= held + 4096


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "cached"}, "unknown mode"),
        ({"mode": "streamed"}, "needs a bound"),
        ({"thread": 1}, "unknown setting"),
        ({"threads": -1}, "negative"),
        ({"timeout_s": 0}, "time limit must be positive"),
    ],
)
def test_bad_settings_are_refused(sealed, options, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        sealed.load(**options)


def test_unknown_dimension_is_refused(sealed) -> None:
    with pytest.raises(InputError, match=r"no such dimension.*batch.*bach"):
        sealed.load(dims={"bach": 3})


def test_calls_from_many_threads_are_each_answered_with_their_own(sealed, loaded) -> None:
    inputs = [torch.randn(1, 3, 16, 16) for _ in range(8)]
    answers: dict[int, torch.Tensor] = {}

    def call(index: int) -> None:
        answers[index] = loaded(inputs[index])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        assert torch.equal(answers[index], whole(sealed, x))


def test_turns_are_taken_in_the_order_of_asking() -> None:
    from motte.run.model import _Turns

    turns, order, ready = _Turns(), [], [threading.Event() for _ in range(6)]

    def ask(index: int) -> None:
        with turns._lock:
            pass
        ready[index].set()
        with turns.turn():
            order.append(index)

    with turns.turn():
        threads = []
        for index in range(6):
            threads.append(threading.Thread(target=ask, args=(index,)))
            threads[-1].start()
            ready[index].wait()
            while len(turns._waiting) < index + 2:
                pass
    for thread in threads:
        thread.join()
    assert order == list(range(6))


def test_a_closed_model_says_so(sealed) -> None:
    model = sealed.load()
    model.close()
    model.close()
    with pytest.raises(WorkerClosed):
        model(torch.randn(1, 3, 16, 16))


def test_a_new_input_needs_nothing_but_a_call(sealed, loaded) -> None:
    before = sealed.path.read_bytes()
    answers = [loaded(torch.full((1, 3, 16, 16), float(value))) for value in range(3)]
    assert not torch.equal(answers[0], answers[1])
    assert sealed.path.read_bytes() == before


def test_times_are_apart(sealed) -> None:
    with sealed.load() as model:
        segments = model.clock.segments()
        assert [segment.name for segment in segments.items] == [
            "read header",
            "start worker",
            "key release",
            "open and load",
        ]
        assert set(model.worker_seconds) == {"attest", "verify", "open", "load"}
        assert model.worker_seconds["attest"] == 0.0
        assert sum(model.worker_seconds.values()) <= segments["open and load"].seconds
        answered = model.run([to_wire(np.zeros((1, 3, 16, 16), np.float32), where="x")])
        # What a call reports began after the parts were open, and holds neither start nor opening.
        assert 0 < answered.seconds["run"] < segments["start worker"].seconds


def test_memory_is_that_of_the_worker_alone(sealed) -> None:
    ballast = np.ones(64 << 20, dtype=np.uint8)
    with sealed.load() as model:
        stats = model.stats()
        assert stats["rss_bytes"] <= stats["rss_peak_bytes"]
        assert stats["rss_before_open_bytes"] <= stats["rss_bytes"]
        status = Path(f"/proc/{model.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        assert abs(int(line.split()[1]) * 1024 - stats["rss_bytes"]) < 8 << 20
    assert ballast.sum() == 64 << 20
