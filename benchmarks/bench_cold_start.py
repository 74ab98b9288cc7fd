"""From nothing to the first answer of the shipped model: start a worker, release keys, open, load, first inference.

    python benchmarks/bench_cold_start.py [--repeats 7]

Each round starts a new worker. The files are in the page cache after the first (warm-up) round, so this is the cost of
starting, not of a cold disk. SIMULATED: no hardware protection.
"""

from __future__ import annotations

import statistics
import time

from peers import CONSOLE, arguments, input_array, sealed
from rich.table import Table

import motte
from motte.run.tensors import to_wire

NAME = "resnet20-fashion-mnist"


def main() -> None:
    """Median and range of every segment."""
    options = arguments(__doc__, repeats=7).parse_args()
    rounds: list[dict[str, float]] = []
    with sealed(NAME, batch=1, weight_memory=1 << 20) as bundle:
        for index in range(options.repeats + 1):
            found = once(bundle, options.threads)
            if index:
                rounds.append(found)
    table = Table("segment", "median s", "min", "max", title=f"cold start, {NAME}, n = {len(rounds)}")
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        table.add_row(name, f"{statistics.median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}")
    CONSOLE.print(table)


def once(bundle: object, threads: int) -> dict[str, float]:
    """One start and one answer; seconds by segment, and in all."""
    began = time.perf_counter()
    settings = motte.LoadSettings(threads=threads)
    with motte.load(bundle.path, keys=bundle.key, signer=bundle.signer, settings=settings) as model:
        loaded = time.perf_counter()
        model.run([to_wire(input_array(NAME, 1), where="input")])
        ended = time.perf_counter()
        found = {segment.name: segment.seconds for segment in model.clock.segments().items}
        found |= {f"  of it, {name} (worker)": value for name, value in model.worker_seconds.items()}
    return {**found, "first inference": ended - loaded, "all, to the first answer": ended - began}


if __name__ == "__main__":
    main()
