"""``motte bench link``: what it costs to send a tensor to an accelerator and to take one back, by size.

``asymmetric``: through the link of split layers, to an accelerator in another process, every value of the answer
checked; the accelerator's own arithmetic, which it states itself, is taken off. ``native``: two copies of as many bytes
within this process, the least that any link can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch

from motte.accelerator.process import LocalAccelerator
from motte.bench.case import Case, CaseResult
from motte.bench.facts import Books, Facts, result_of
from motte.bench.interleave import Progress, interleave
from motte.bench.outcome import Outcome, outcome
from motte.bench.request import Request
from motte.errors import SettingError
from motte.limits import GIB, KIB, MIB
from motte.linear.operation import LinearOperation

DEFAULT_SIZES: Final = (4 * KIB, 1 * MIB, 64 * MIB)
FEATURES: Final = 16
_ROW_BYTES: Final = 4 * FEATURES
_MAX_BYTES: Final = GIB // 4
_LEAST_S: Final = 1e-9


def bench_link(request: Request, sizes: tuple[int, ...], progress: Progress) -> Outcome:
    """Measure tensors of ``sizes`` bytes each way.

    Raises:
        SettingError: a size out of bounds, or twice. LinkError: the accelerator did not come up.
    """
    for size in sizes:
        if not _ROW_BYTES <= size <= _MAX_BYTES or size % _ROW_BYTES:
            expected = f"multiples of {_ROW_BYTES} bytes up to {_MAX_BYTES // MIB}MiB"
            raise SettingError("not a size", where="--sizes", expected=expected, got=str(size))
    if len(set(sizes)) != len(sizes):
        raise SettingError("named twice", where="--sizes", got=", ".join(map(str, sizes)))
    found: list[CaseResult] = []
    progress.expect(len(sizes) * request.repeats)
    progress.say("starting the accelerator")
    torch.set_num_threads(request.threads)
    with LocalAccelerator(request.device, threads=request.threads) as local:
        for size in sizes:
            progress.say(f"measuring {size_word(size)}")
            found += _size(request, local, size, progress)
    return outcome(request, found, [], caveats=["the link alone: no model, nothing protected"])


def size_word(size: int) -> str:
    """``64MiB``, ``4KiB`` or ``192B``."""
    for scale, unit in ((MIB, "MiB"), (KIB, "KiB")):
        if size % scale == 0:
            return f"{size // scale}{unit}"
    return f"{size}B"


def _size(request: Request, local: LocalAccelerator, size: int, progress: Progress) -> list[CaseResult]:
    name = f"tensor-{size_word(size)}"
    named = {"model": name, "parts": 1, "batch": 1, "engine": "torch", "enclave": "none"}
    native, linked = Case(mode="native", **named), Case(mode="asymmetric", **named)  # type: ignore[arg-type]
    x = torch.zeros(size // _ROW_BYTES, FEATURES)
    rounds = interleave(
        {native: _copies(x), linked: _there_and_back(local, name, x)},
        baseline=native,
        warmup=request.warmup,
        repeats=request.repeats,
        seed=request.seed,
        reported=True,
        on_round=lambda _: progress.advance(1),
    )
    books = {native: Books(), linked: Books(bytes_out=size, bytes_in=size)}
    facts = {case: Facts(otherwise="motte bench link does not measure it", books=books[case]) for case in books}
    if rounds.failed:
        raise SettingError("the link failed", got=rounds.failed[0].why)
    return [
        result_of(case, facts[case], measured, threads=request.threads, dtype="f32")
        for case, measured in rounds.measured.items()
    ]


def _copies(x: torch.Tensor) -> Callable[[], float]:
    source, target = torch.zeros_like(x), torch.ones_like(x)

    def run() -> float:
        began = time.perf_counter()
        target.copy_(source)
        source.copy_(target)
        return max(_LEAST_S, time.perf_counter() - began)

    return run


def _there_and_back(local: LocalAccelerator, layer: str, x: torch.Tensor) -> Callable[[], float]:
    local.link.register(layer, LinearOperation("linear", FEATURES, FEATURES))
    local.link.put_weight(layer, torch.eye(FEATURES))

    def run() -> float:
        before = _claimed(local, layer)
        began = time.perf_counter()
        local.link.forward(layer, x, step=1, hold=False).result()
        took = time.perf_counter() - began
        return max(_LEAST_S, took - (_claimed(local, layer) - before))

    return run


def _claimed(local: LocalAccelerator, layer: str) -> float:
    stats = local.link.stats()
    return stats[layer].compute_s if layer in stats else 0.0
