"""VGG-19 (575 MB of weights) streamed through 64 MiB of weight memory, against the resident eager model.

    python benchmarks/bench_streamed.py [--name vgg19] [--weight-memory-mib 64] [--batch 1 8] [--repeats 11]

The baseline holds all weights in plain memory and decrypts nothing. The sealed model reads, authenticates and decrypts
every weight again for every answer. Printed beside the times: what the worker holds for weights, and its resident set
before and at its highest, from its own books. SIMULATED: no hardware protection.
"""

from __future__ import annotations

from peers import CONSOLE, EagerPeer, arguments, digest, input_array, report, sealed

import motte
from motte.limits import MIB
from motte.measure.compare import compare
from motte.run.tensors import to_wire


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
        found = compare(candidates, warmup=2, repeats=options.repeats)
        same = peer.digest() == digest(answers[-1].outputs[0].data)
        memory = model.stats()
        peer_peak = peer.memory()
        peer.close()
    report(
        found, series="streamed", what="input given to answer open", threads=options.threads, records=options.records,
        model=name, batch=batch, weight_memory_bytes=bound,
    )  # fmt: skip
    waits = sorted(answer.seconds["wait_for_weights"] for answer in answers)
    growth = memory["rss_peak_bytes"] - memory["rss_before_open_bytes"]
    CONSOLE.print(
        f"{name} batch {batch}: outputs {'equal to the bit' if same else 'differ (tiled parts: rounding)'}; "
        f"weights held at most {memory['weight_arena_bytes'] / MIB:.1f} MiB + engine copy "
        f"{memory['engine_copy_bytes'] / MIB:.1f} of {bound / MIB:.0f} MiB; "
        f"activations at most {answers[-1].activation_peak_bytes / MIB:.1f} MiB (computed); "
        f"the worker grew by at most {growth / MIB:.1f} MiB (the eager peer held {peer_peak / MIB:.0f} MiB); "
        f"waiting for weights {waits[len(waits) // 2] * 1e3:.0f} ms a call"
    )


if __name__ == "__main__":
    main()
