"""The pool hands out live, empty workers, each once; it replaces what is gone, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motte.errors import (
    MotteError,
    ResourceError,
    SettingError,
    UnsupportedError,
    WorkerClosed,
    WorkerDied,
    WorkerStalled,
)
from motte.run import pool as pool_module
from motte.run.pool import Pool, PooledModel
from motte.run.settings import LoadSettings
from motte.run.tensors import to_wire

SLEEPER = "exec sleep 1000"
FOREVER_S = 1000.0
pytestmark = pytest.mark.usefixtures("nothing_remains")
needs_onnxruntime = pytest.mark.skipif(not pool_module.find_spec("onnxruntime"), reason="onnxruntime is not installed")


def until(true: Callable[[], bool]) -> None:
    """Wait for it; a minute is for a machine that is busy with something else."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def idle_pids(pool: Pool) -> list[int]:
    return [worker.pid for worker in pool._spares.ready]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def small(size: int, **options: Any) -> Pool:
    return Pool(size, threads=1, **options)


def right(net, model) -> bool:
    return bool(np.allclose(model(net.x), net.expected, atol=1e-5))


@needs_onnxruntime
def test_several_threads_load_at_once_each_a_worker_of_its_own_and_the_pool_fills_again(net) -> None:
    with small(2) as pool:
        until(lambda: pool.ready == 2)
        first = set(idle_pids(pool))
        answered: dict[int, bool] = {}

        def use() -> None:
            with pool.load(net.lowered, **net.keys) as model:
                answered[model.pid] = right(net, model)
                together.wait(60)

        # All three hold a model at the same time, so one of them is the pool's third worker.
        together = threading.Barrier(3)
        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(answered.values()) == [True, True, True]
        assert first < set(answered)
        until(lambda: pool.ready == 2)
        assert not set(idle_pids(pool)) & set(answered)
        left = idle_pids(pool)
    assert all(gone(pid) for pid in [*left, *answered])
    with pytest.raises(WorkerClosed, match="pool was closed"):
        pool.load(net.lowered, **net.keys)


@needs_onnxruntime
def test_a_worker_that_died_idle_is_replaced_and_never_handed_out(net, monkeypatch: pytest.MonkeyPatch) -> None:
    with small(1) as pool:
        until(lambda: pool.ready == 1)
        (dead,) = idle_pids(pool)
        os.kill(dead, signal.SIGKILL)
        # Nobody asks: the pool looks by itself.
        until(lambda: bool(idle_pids(pool)) and idle_pids(pool) != [dead])
        # One that dies after our look is followed by the next one.
        (second,) = idle_pids(pool)
        monkeypatch.setattr(pool, "_drop_dead", lambda: None)
        os.kill(second, signal.SIGKILL)
        with pool.load(net.lowered, **net.keys) as model:
            assert model.pid not in (dead, second)
            assert right(net, model)


@needs_onnxruntime
def test_a_bundle_that_the_engine_cannot_run_says_why_and_its_worker_is_not_used_again(net) -> None:
    with small(1) as pool:
        until(lambda: pool.ready == 1)
        (used,) = idle_pids(pool)
        with pytest.raises(UnsupportedError, match=r"onnxruntime; not lowered: part 1: it is planted") as caught:
            pool.load(net.torch_only, **net.keys)
        assert "engine='torch'" in str(caught.value.hint)
        assert gone(used)
        with pool.load(net.lowered, **net.keys) as model:
            assert model.pid != used
            assert right(net, model)


@needs_onnxruntime
def test_a_batch_is_asked_again_of_the_next_worker_and_no_more_often_than_allowed(net) -> None:
    wire = [to_wire(net.x, where="x")]
    with small(3, refill=False) as pool:
        until(lambda: pool.ready == 3)
        settings = LoadSettings(timeout_s=60)
        with PooledModel(pool, net.lowered, **net.keys, settings=settings, retries=2) as pooled:
            first = pooled.run(wire)
            os.kill(pooled.model.pid, signal.SIGKILL)
            assert bytes(pooled.run(wire).outputs[0].data) == bytes(first.outputs[0].data)
            assert pooled.reloads == 1
            # A stall is as good a reason as a death.
            pooled.model._settings = LoadSettings(timeout_s=0.3)
            os.kill(pooled.model.pid, signal.SIGSTOP)
            assert bytes(pooled.run(wire).outputs[0].data) == bytes(first.outputs[0].data)
            assert pooled.reloads == 2
            os.kill(pooled.model.pid, signal.SIGKILL)
            # Three were started and three are gone: the reason is the last worker's, not that there is no other.
            with pytest.raises(WorkerDied, match="SIGKILL"):
                pooled.run(wire)
        with pytest.raises(WorkerClosed):
            pooled.run(wire)
        with pytest.raises(WorkerClosed, match="handed out all"):
            pool.load(net.lowered, **net.keys)


@needs_onnxruntime
def test_ctrl_c_ends_every_worker() -> None:
    script = (
        "import time\nfrom motte.run.pool import Pool\n"
        "with Pool(2, threads=1) as pool:\n"
        "    while not pool.ready:\n        time.sleep(0.01)\n"
        "    print(*[w.pid for w in (*pool._spares.ready, *pool._spares.starting)], flush=True)\n"
        "    time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    with process.stdout:
        pids = [int(word) for word in process.stdout.readline().split()]
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert pids
    assert all(gone(pid) for pid in pids)


# --- workers that do not come up ------------------------------------------------------------------------------------


def test_a_start_that_fails_is_told_to_who_waits_and_not_repeated_for_nobody(program, tmp_path: Path) -> None:
    count = tmp_path / "starts"
    program(f"echo started >> {count}\necho no such engine >&2\nexit 3")
    with small(2, engine="torch") as pool:
        with pytest.raises(WorkerDied, match=r"no such engine.*exit status 3"):
            pool.load(tmp_path / "x", keys="k", signer="s")
        tried = count.read_text().count("started")
        time.sleep(2 * pool_module._LOOK_S)
        assert count.read_text().count("started") == tried <= 4
        # Whoever asks has it tried again.
        program(SLEEPER)
        with pytest.raises(ResourceError, match="no worker of the pool was ready in time"):
            pool.load(tmp_path / "x", keys="k", signer="s", wait_s=0.2)


def test_a_start_that_takes_too_long_is_a_stall(program, tmp_path: Path) -> None:
    program(SLEEPER)
    with small(1, engine="torch", start_timeout_s=0.2) as pool, pytest.raises(WorkerStalled, match=r"within 0.2 s"):
        pool.load(tmp_path / "x", keys="k", signer="s", wait_s=60)


def test_closing_while_workers_start_ends_them_and_who_waits(program, tmp_path: Path) -> None:
    program(SLEEPER)
    failures: list[MotteError] = []
    with small(2, engine="torch", start_timeout_s=FOREVER_S) as pool:

        def wait() -> None:
            try:
                pool.load(tmp_path / "x", keys="k", signer="s")
            except MotteError as problem:
                failures.append(problem)

        waiter = threading.Thread(target=wait)
        waiter.start()
        until(lambda: bool(pool._spares.starting) and pool._spares.waiting == 1)
        starting = [worker.pid for worker in pool._spares.starting]
    waiter.join()
    assert isinstance(failures[0], WorkerClosed)
    assert all(gone(pid) for pid in starting)
    pool.close()


# --- what a pool cannot do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"engine": "auto"}, SettingError, "a pool cannot choose the engine"),
        ({"engine": "tensorflow"}, SettingError, "unknown engine"),
        ({"engine": "torch", "precision": "bf16"}, SettingError, "only openvino"),
        ({"engine": "torch", "threads": -1}, SettingError, "negative"),
        ({"engine": "torch", "size": 0}, SettingError, "not a size"),
        ({"engine": "torch", "size": 257}, SettingError, "not a size"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_before_anything_starts(options, kind, message: str) -> None:
    with pytest.raises(kind, match=message):
        Pool(options.pop("size", 1), **options)


def test_an_engine_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"not installed.*onnxruntime"):
        Pool(1)


def test_settings_that_started_workers_cannot_follow_are_refused(program, tmp_path: Path) -> None:
    program(SLEEPER)
    with small(1, engine="torch") as pool:
        for options, message in (
            ({"engine": "openvino"}, r"another setting.*engine.*expected torch, got openvino"),
            ({"threads": 2}, r"another setting.*threads.*expected 1, got 2"),
            ({"settings": LoadSettings(engine="onnxruntime")}, r"another setting.*engine"),
            ({"accelerator": "local"}, "a pool has no accelerator"),
            ({"thread": 1}, "unknown setting"),
            ({"settings": LoadSettings(), "threads": 1}, "either settings or keywords"),
        ):
            with pytest.raises(SettingError, match=message):
                pool.load(tmp_path / "x", keys="k", signer="s", **options)
        assert pool._spares.handed_out == 0
