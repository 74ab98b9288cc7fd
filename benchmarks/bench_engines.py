"""Twelve sealed parts on each engine, resident, against the same engine unprotected and unsplit, and against eager.

    python benchmarks/bench_engines.py [NAME ...] [--engines torch onnxruntime openvino] [--bf16] [--repeats 11]

One run, all candidates interleaved, same threads, seeded random weights, outputs compared with eager's. A sealed model
is measured at the client, from before the input is sealed until the answer is open; an unprotected one from the
request to the end of its inference, in a process of its own, with its input in its memory. The unprotected ones run
the file that PyTorch's exporter makes, optimised and with constant weights. MiniLM runs 128 tokens.
SIMULATED: no hardware protection.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack

import numpy as np
from peers import CONSOLE, ENCODER, arguments, names_or_all, peer, report, sealed

import motte
from motte.measure.compare import compare, compare_samples
from motte.zoo.published_cuts import CLASSICS


def main() -> None:
    """All eight classics and the encoder, or those named."""
    parser = arguments(__doc__, repeats=11)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--bf16", action="store_true", help="unprotected openvino in bf16 as well")
    options = parser.parse_args()
    for name in names_or_all(options.names, [*CLASSICS, ENCODER]):
        one(name, options)


def one(name: str, options: Namespace) -> None:
    """Measure one model."""
    batch, threads = options.batch, options.threads
    bare = [engine for engine in options.engines if engine != "torch"]
    runtimes = {"eager, unsplit": ("torch", "f32")} | {f"{engine}, unprotected": (engine, "f32") for engine in bare}
    if options.bf16:
        runtimes["openvino bf16, unprotected"] = ("openvino", "bf16")
    with ExitStack() as stack:
        bundle = stack.enter_context(sealed(name, batch=batch, lower=True))
        wire = bundle.wire()
        peers = {
            label: stack.enter_context(peer(name, bundle.inputs, threads=threads, engine=engine, precision=precision))
            for label, (engine, precision) in runtimes.items()
        }
        candidates = {label: each.run for label, each in peers.items()}
        models = {}
        for engine in options.engines:
            settings = motte.LoadSettings(threads=threads, engine=engine, timeout_s=300)
            model = motte.load(bundle.path, keys=bundle.key, signer=bundle.signer, settings=settings)
            models[engine] = stack.enter_context(model)
            candidates[f"{engine}, {bundle.parts} sealed parts"] = lambda model=model: model.run(wire)
        found = compare(candidates, warmup=3, repeats=options.repeats)
        reference = peers["eager, unsplit"].answer(bundle.arrays())[0]
        for engine, model in models.items():
            answer = model.run(wire).outputs[0]
            got = np.frombuffer(answer.data, dtype=np.float32).reshape(answer.shape)
            difference = float(np.abs(got - reference).max() / np.abs(reference).max())
            memory = model.stats()
            CONSOLE.print(
                f"{name}, {engine}: largest difference from eager {difference:.2g}; weights "
                f"{memory['weight_arena_bytes'] / 2**20:.0f} MiB, the engine's copies "
                f"{_mib(memory['engine_copy_bytes'])}, whole worker {memory['rss_bytes'] / 2**20:.0f} MiB"
            )
            if not difference <= 1e-4:
                raise SystemExit(f"error: {engine} answers otherwise than eager")
    report(
        found, series="engines", what="input given to answer open", threads=threads, records=options.records,
        model=name, batch=batch,
    )  # fmt: skip
    for engine in bare:
        names = (f"{engine}, unprotected", f"{engine}, {bundle.parts} sealed parts")
        ratio = compare_samples({each: found[each].samples for each in names}, baseline=names[0]).ratio(names[1])
        CONSOLE.print(
            f"{name}: sealed parts on {engine} take {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            f" of {engine} unprotected"
        )


def _mib(count: int | None) -> str:
    return "cannot be told" if count is None else f"{count / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
