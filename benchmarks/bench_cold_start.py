"""From nothing to the first answer of the shipped model, on each engine, and from a pool of started workers.

    python benchmarks/bench_cold_start.py [--engines onnxruntime openvino torch] [--repeats 7]

Each round starts a new worker of each engine, one after the other in random order. From the pool: a worker is ready,
and its bundle is loaded and answers; the pool's next start waits meanwhile. The files are in the page cache after the
first (warm-up) round, so this is the cost of starting, not of a cold disk. SIMULATED: no hardware protection.
"""

from __future__ import annotations

import random
import statistics
import time

from peers import CONSOLE, SealedModel, arguments, sealed
from rich.table import Table

import motte

NAME = "resnet20-fashion-mnist"
POOL = "onnxruntime, from a pool"


def main() -> None:
    """Median and range of every segment."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino", "torch"])
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*options.engines, POOL)}
    order = random.Random(0)  # noqa: S311 - an order of measurements
    with (
        sealed(NAME, batch=1, weight_memory=1 << 20, lower=True) as bundle,
        motte.Pool(1, engine="onnxruntime", threads=options.threads) as pool,
    ):
        for index in range(options.repeats + 1):
            for name in order.sample(list(rounds), len(rounds)):
                if name == POOL:
                    pool.wait()
                found = once(bundle, options.threads, name, pool)
                # Before the next round begins the pool has started its next worker, so that it takes no time of others.
                pool.wait()
                if index:
                    rounds[name].append(found)
    for name, found in rounds.items():
        show(name, found)


def show(name: str, rounds: list[dict[str, float]]) -> None:
    """One table."""
    table = Table("segment", "median s", "min", "max", title=f"{NAME} on {name}, n = {len(rounds)}")
    for segment in rounds[0]:
        values = [each[segment] for each in rounds]
        table.add_row(segment, f"{statistics.median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}")
    CONSOLE.print(table)


def once(bundle: SealedModel, threads: int, name: str, pool: motte.Pool) -> dict[str, float]:
    """One start and one answer; seconds by segment, and in all."""
    began = time.perf_counter()
    keys = {"keys": bundle.key, "signer": bundle.signer}
    if name == POOL:
        loaded = pool.load(bundle.path, **keys)
    else:
        loaded = motte.load(bundle.path, **keys, settings=motte.LoadSettings(threads=threads, engine=name))
    with loaded as model:
        opened = time.perf_counter()
        model.run(bundle.wire())
        ended = time.perf_counter()
        found = {segment.name: segment.seconds for segment in model.clock.segments().items}
        found |= {f"  of it, {name} (worker)": value for name, value in model.worker_seconds.items()}
    return {**found, "first inference": ended - opened, "all, to the first answer": ended - began}


if __name__ == "__main__":
    main()
