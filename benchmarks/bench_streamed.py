"""VGG-19 (575 MB of weights) streamed through 64 MiB of weight memory, against the resident eager model.

    python benchmarks/bench_streamed.py [--name vgg19] [--weight-memory-mib 64] [--batch 1 8] [--repeats 11]

The baseline holds all weights in plain memory and decrypts nothing. The sealed model reads, authenticates and decrypts
every weight again for every answer. SIMULATED: no hardware protection.

Memory, from the kernel's books of the worker: how far its resident set grew at its highest over what it was before any
part was opened. Activations and the engine's scratch are in that, too. What they take is measured with a second worker
that holds the same parts resident and runs the same input as often: its growth less all weights. The difference of the
two is the weight memory that was really held beside the engine's copies, which are computed and added. The workers'
allocators fragment differently, more so at a larger batch: read the difference with that in mind.
"""

from __future__ import annotations

from peers import CONSOLE, EagerPeer, arguments, digest, input_array, report, sealed

import motte
from motte.limits import MIB
from motte.measure.compare import compare
from motte.run.tensors import to_wire

WARMUP = 2


def main() -> None:
    """Each batch in turn."""
    parser = arguments(__doc__, repeats=11)
    parser.add_argument("--name", default="vgg19")
    parser.add_argument("--weight-memory-mib", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    bound = options.weight_memory_mib * MIB
    for batch in options.batch:
        with sealed(options.name, batch=batch, weight_memory=bound) as bundle:
            one(options.name, bundle, batch, bound, options)


def one(name: str, bundle: object, batch: int, bound: int, options: object) -> None:
    """Measure one batch size."""
    other_bytes = beside_the_weights(name, bundle, batch, options)
    settings = motte.LoadSettings(
        mode="streamed", weight_memory_bytes=bound, threads=options.threads, dims={"batch": batch}, timeout_s=300
    )
    with motte.load(bundle.path, keys=bundle.key, signer=bundle.signer, settings=settings) as model:
        peer = EagerPeer(name, batch=batch, threads=options.threads)
        wire = to_wire(input_array(name, batch), where="input")
        answers = []
        candidates = {
            "eager, unsplit, resident": peer.run,
            f"{bundle.parts} sealed parts, streamed": lambda: answers.append(model.run([wire])),
        }
        found = compare(candidates, warmup=WARMUP, repeats=options.repeats)
        same = peer.digest() == digest(answers[-1].outputs[0].data)
        memory = model.stats()
        peer_peak = peer.memory()
        peer.close()
    report(
        found, series="streamed", what="input given to answer open", threads=options.threads, records=options.records,
        model=name, batch=batch, weight_memory_bytes=bound,
    )  # fmt: skip
    waits = sorted(answer.seconds["wait_for_weights"] for answer in answers)
    held = memory["rss_peak_bytes"] - memory["rss_before_open_bytes"] - other_bytes + memory["engine_copy_bytes"]
    CONSOLE.print(
        f"{name} batch {batch}: outputs {'equal to the bit' if same else 'differ (tiled parts: rounding)'}; "
        f"waiting for weights {waits[len(waits) // 2] * 1e3:.0f} ms a call\n"
        f"weight memory, bound {bound / MIB:.1f} MiB: computed {memory['weight_arena_bytes'] / MIB:.1f} + engine copy "
        f"{memory['engine_copy_bytes'] / MIB:.1f} MiB, measured with the copy {held / MIB:.1f} MiB; "
        f"activations and scratch measured {other_bytes / MIB:.1f} MiB, activations computed "
        f"{answers[-1].activation_peak_bytes / MIB:.1f} MiB; the eager peer's process held {peer_peak / MIB:.0f} MiB"
    )
    if memory["weight_arena_bytes"] + memory["engine_copy_bytes"] > bound:
        raise SystemExit("error: the weight memory is above the bound")


def beside_the_weights(name: str, bundle: object, batch: int, options: object) -> int:
    """Bytes by which a resident worker grows beyond its weights in as many calls: activations, copies and scratch."""
    settings = motte.LoadSettings(threads=options.threads, timeout_s=300)
    with motte.load(bundle.path, keys=bundle.key, signer=bundle.signer, settings=settings) as model:
        for _ in range(options.repeats + WARMUP):
            model.run([to_wire(input_array(name, batch), where="input")])
        memory = model.stats()
    return memory["rss_peak_bytes"] - memory["rss_before_open_bytes"] - memory["weight_arena_bytes"]


if __name__ == "__main__":
    main()
