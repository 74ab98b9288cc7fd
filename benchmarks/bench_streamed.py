"""VGG-19 (575 MB of weights) streamed through 64 MiB of weight memory, against the resident eager model.

    python benchmarks/bench_streamed.py [--name vgg19] [--weight-memory-mib 64] [--batch 1 8] [--repeats 11]
                                        [--engines torch onnxruntime]

The baseline holds all weights in plain memory and decrypts nothing. The sealed model reads, authenticates and decrypts
every weight again for every answer. SIMULATED: no hardware protection.

Weight memory: what the worker set aside for opened parts and what of it the kernel holds in memory (mincore), beside
the engine's largest copy of a weight, which is computed. Activations and the engine's scratch are no weights: they are
in the growth of the worker's whole resident set, printed beside it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from peers import CONSOLE, SealedModel, arguments, digest, peer, report, sealed

import motte
from motte.limits import MIB
from motte.measure.compare import compare
from motte.run.told import Answered

WARMUP = 2


def main() -> None:
    """Each batch in turn."""
    parser = arguments(__doc__, repeats=11)
    parser.add_argument("--name", default="vgg19")
    parser.add_argument("--weight-memory-mib", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--engines", nargs="+", default=["torch", "onnxruntime"])
    options = parser.parse_args()
    bound = options.weight_memory_mib * MIB
    for batch in options.batch:
        with sealed(options.name, batch=batch, weight_memory=bound, lower=True) as bundle:
            one(options.name, bundle, batch, bound, options)


def one(name: str, bundle: SealedModel, batch: int, bound: int, options: Namespace) -> None:
    """Measure one batch size: the eager peer and a worker of each engine, in one run."""
    wire = bundle.wire()
    with ExitStack() as stack:
        eager = stack.enter_context(peer(name, bundle.inputs, threads=options.threads))
        candidates = {"eager, unsplit, resident": eager.run}
        workers: dict[str, tuple[motte.Model, list[Answered]]] = {}
        for engine in options.engines:
            settings = motte.LoadSettings(
                mode="streamed", weight_memory_bytes=bound, threads=options.threads, dims={"batch": batch},
                timeout_s=300, engine=engine,
            )  # fmt: skip
            model = stack.enter_context(
                motte.load(bundle.path, keys=bundle.key, signer=bundle.signer, settings=settings)
            )
            answers: list[Answered] = []
            workers[engine] = (model, answers)
            candidates[f"{engine}, {bundle.parts} sealed parts, streamed"] = lambda model=model, answers=answers: (
                answers.append(model.run(wire))
            )
        found = compare(candidates, warmup=WARMUP, repeats=options.repeats)
        (plain,) = eager.answer(bundle.arrays())
        for engine, (model, answers) in workers.items():
            same = digest(plain.tobytes()) == digest(answers[-1].outputs[0].data)
            show(f"{name} batch {batch}, {engine}", same, model.stats(), answers, bound)
        CONSOLE.print(f"the eager peer's process held {eager.memory()['rss_peak_bytes'] / MIB:.0f} MiB")
    report(
        found, series="streamed", what="input given to answer open", threads=options.threads, records=options.records,
        model=name, batch=batch, weight_memory_bytes=bound,
    )  # fmt: skip


def show(title: str, same: bool, memory: Mapping[str, int], answers: Sequence[Answered], bound: int) -> None:
    """Equality, waiting and memory of one worker."""
    waits = sorted(answer.seconds["wait_for_weights"] for answer in answers)
    weights = memory["weight_arena_bytes"] + memory["engine_copy_bytes"]
    growth = memory["rss_peak_bytes"] - memory["rss_before_open_bytes"]
    CONSOLE.print(
        f"{title}: outputs {'equal to the bit' if same else 'differ from eager (rounding)'}; "
        f"waiting for weights {waits[len(waits) // 2] * 1e3:.0f} ms a call\n"
        f"weight memory {weights / MIB:.1f} MiB of {bound / MIB:.1f}: "
        f"opened parts {memory['weight_arena_bytes'] / MIB:.1f} "
        f"(in memory by the kernel's count {memory['weight_resident_bytes'] / MIB:.1f}), engine's largest copy "
        f"{memory['engine_copy_bytes'] / MIB:.1f} (computed)\n"
        f"activations at most {answers[-1].activation_peak_bytes / MIB:.1f} MiB (computed); the worker's resident set "
        f"grew by at most {growth / MIB:.1f} MiB"
    )
    if weights > bound or memory["weight_resident_bytes"] > memory["weight_arena_bytes"] + 4096:
        raise SystemExit("error: the weight memory is above the bound")


if __name__ == "__main__":
    main()
