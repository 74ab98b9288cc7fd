"""What tracing costs: the same work with and without a sampler at 20 Hz beside it, in turn, in random order.

    python benchmarks/bench_sampling.py [--repeats 60] [--stretch 0.5] [--threads N] [--require]

The work, a ResNet-20 in this process, uses every core that it may, so that the sampler has to take its time from it.
Without sampling the sampler sleeps. Also printed: the processor time that the sampler takes, which is the lower bound
of its cost and hardly noisy, and what the marks around a segment take, which lies outside of what is timed.
The bound that is judged: sampling slows this work by less than 1 %.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import psutil
import torch
from peers import CONSOLE, arguments, report

from motte.measure.compare import compare
from motte.measure.gate import Bound, Gate
from motte.measure.sampler import Recorder, Sampler
from motte.zoo.resnet20 import ResNet20

BOUND = "sampling at 20 Hz slows the work by less than 1 %"
BATCH = 4


def main() -> None:
    """Compare, print, and say whether the bound holds."""
    parser = arguments(__doc__, repeats=60)
    parser.add_argument("--stretch", type=float, default=0.5, help="seconds of work a round: ten samples at 20 Hz")
    parser.add_argument("--require", action="store_true", help="exit with 1 where the bound does not hold")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, x = ResNet20().eval(), torch.randn(BATCH, 1, 28, 28)
    steps = steps_of(model, x, options.stretch)
    with Sampler() as sampler, torch.inference_mode():
        case = sampler.recorder()
        process = psutil.Process(sampler.pid)
        cost: list[float] = []

        def without() -> float:
            began = time.perf_counter()
            for _ in range(steps):
                model(x)
            return time.perf_counter() - began

        def sampled() -> float:
            case.watch("work", os.getpid())
            before, began = cpu_s(process), time.perf_counter()
            took = without()
            cost.append((cpu_s(process) - before) / (time.perf_counter() - began))
            case.forget("work")
            return took

        candidates: dict[str, Callable[[], float]] = {"without": without, "sampled at 20 Hz": sampled}
        found = compare(candidates, repeats=options.repeats, timing="reported", warmup=2)
        case.watch("work", os.getpid())
        marks = sorted(mark_s(case) for _ in range(20))
    report(
        found, series="bench_sampling", what=f"{steps} steps of a ResNet-20: first call until last answer",
        threads=options.threads, records=options.records, batch=BATCH,
    )  # fmt: skip
    cost.sort()
    CONSOLE.print(f"the sampler takes {100 * cost[len(cost) // 2]:.2f} % of one core ({100 * cost[-1]:.2f} % at most)")
    CONSOLE.print(f"two marks around a segment take {1e3 * marks[10]:.1f} ms, outside of it")
    outcome = Gate((Bound(BOUND, high=1.01),)).check({BOUND: found.ratio("sampled at 20 Hz")})[0]
    CONSOLE.print(str(outcome))
    sys.exit(1 if options.require and not outcome.passed else 0)


def steps_of(model: torch.nn.Module, x: torch.Tensor, stretch_s: float) -> int:
    """How many steps take about ``stretch_s``."""
    with torch.inference_mode():
        for _ in range(5):
            model(x)
        began = time.perf_counter()
        for _ in range(20):
            model(x)
    return max(1, round(stretch_s * 20 / (time.perf_counter() - began)))


def cpu_s(process: psutil.Process) -> float:
    """Processor seconds of the sampler, on the scheduler's clock."""
    return time.clock_gettime((~process.pid << 3) | 2)


def mark_s(case: Recorder) -> float:
    """Seconds that both marks of an empty segment take."""
    began = time.perf_counter()
    with case.segment("steady", since="asked", until="answered"):
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
