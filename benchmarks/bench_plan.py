"""How long planning takes: ResNet-101 by every objective, and a chain of 10,000 nodes.

    python benchmarks/bench_plan.py [--repeats 5] [--records records/plan.jsonl]

One thread, no tensors: a plan needs the graph and its sizes only. From the graph in memory to the plan, the digest of
the graph's text included; capture is not. The targets are 1 s and 10 s.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from motte.capture.graph import Dim, Graph, Node, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.measure.record import UNPROTECTED, Setting, state
from motte.measure.record_file import append
from motte.plan.plan import Plan
from motte.plan.planner import plan_parts, plan_streamed, plan_under

MIB = 1 << 20
DIMS = {"batch": 1}
SETTING = Setting(threads=1, dtype="none", device="cpu", engine="none", enclave=UNPROTECTED)


def resnet101() -> Graph:
    """Captured from random weights; the plan depends on sizes only."""
    import torch

    from motte.capture import capture
    from motte.zoo.vision_ops import import_torchvision

    model = import_torchvision().models.resnet101(weights=None).eval()
    return capture(model, (torch.zeros(2, 3, 224, 224),), dims={"x": {0: "batch"}}, name="resnet101").graph


def chain(count: int) -> Graph:
    """``count`` linear layers of random widths, one after the other."""
    random = np.random.default_rng(0)
    widths = [int(width) for width in random.choice((256, 512, 1024, 2048), size=count + 1)]

    def value(name: str, width: int) -> Value:
        return Value(name, TensorType("f32", (Size("batch"), width)))

    weights = {f"w{i}": Weight(f"w{i}", "f32", (widths[i + 1], widths[i]), (0, 1)) for i in range(count)}
    names = ["x", *(f"n{i}" for i in range(count))]
    nodes = tuple(
        Node(
            names[i + 1],
            "aten.linear.default",
            (Ref(names[i]), WeightRef(f"w{i}")),
            {},
            (value(names[i + 1], widths[i + 1]),),
        )
        for i in range(count)
    )
    return Graph("chain", (Dim("batch", 1, 64),), (value("x", widths[0]),), weights, nodes, (names[-1],), ("output",))


def cases(graph: Graph, bound_mib: int) -> dict[str, Callable[[], Plan]]:
    """What is timed, by name."""
    times = {node.name: 1e-6 * (1 + index % 7) for index, node in enumerate(graph.nodes)}
    found: dict[str, Callable[[], Plan]] = {}
    for objective in ("weights", "memory", "time", "boundary"):
        for parts in (12, 128):
            found[f"{parts} parts, {objective}"] = lambda objective=objective, parts=parts: plan_parts(
                graph, parts=parts, objective=objective, dims=DIMS, times=times if objective == "time" else None
            )
    found[f"every part under {bound_mib} MiB"] = lambda: plan_under(graph, max_part_bytes=bound_mib * MIB, dims=DIMS)
    found[f"streamed in {bound_mib} MiB"] = lambda: plan_streamed(graph, weight_memory_bytes=bound_mib * MIB, dims=DIMS)
    return found


def main() -> None:
    """Median and range of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=Path, help="append one record a figure to this file")
    options = parser.parse_args()
    table = Table("graph", "nodes", "plan", "parts", "median s", "min", "max", title=f"planning, n = {options.repeats}")
    for graph, bound_mib in ((resnet101(), 32), (chain(10_000), 64)):
        for name, make in cases(graph, bound_mib).items():
            samples = []
            parts = make().parts
            for _ in range(options.repeats):
                start = time.perf_counter()
                make()
                samples.append(time.perf_counter() - start)
            median = statistics.median(samples)
            figures = (f"{each:.3f}" for each in (median, min(samples), max(samples)))
            table.add_row(graph.name, str(len(graph.nodes)), name, str(parts), *figures)
            if options.records:
                record = state(
                    series="plan",
                    what=f"graph in memory to plan: {graph.name}, {name}",
                    value=median,
                    unit="s",
                    setting=SETTING,
                    statistic="median",
                    samples=samples,
                    parameters={"graph": graph.name, "nodes": len(graph.nodes), "parts": parts},
                )
                append(options.records, record)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
