"""Twelve sealed parts, resident in the trusted worker, against the unsplit eager model in its own process.

    python benchmarks/bench_resident.py [NAME ...] [--batch 1] [--repeats 15]

Measured at the client, from before the input is sealed until the answer is open; the eager peer is measured from the
request to the end of its forward pass. Same threads, same weights (random, seeded), batch 1, interleaved; the outputs
are compared bit for bit. The worker is SIMULATED: no hardware protection.
"""

from __future__ import annotations

from peers import CONSOLE, arguments, digest, names_or_all, peer, report, sealed

import motte
from motte.measure.compare import compare
from motte.zoo.published_cuts import CLASSICS


def main() -> None:
    """All eight classics, or those named."""
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    for name in names_or_all(options.names, CLASSICS):
        one(name, options.batch, options.threads, options.repeats, options.records)


def one(name: str, batch: int, threads: int, repeats: int, records: object) -> None:
    """Measure one model."""
    with sealed(name, batch=batch) as bundle:
        settings = motte.LoadSettings(threads=threads, engine="torch", timeout_s=300)
        with motte.load(bundle.path, keys=bundle.key, signer=bundle.signer, settings=settings) as model:
            wire = bundle.wire()
            with peer(name, bundle.inputs, threads=threads) as eager:
                candidates = {"eager, unsplit": eager.run, f"{bundle.parts} sealed parts": lambda: model.run(wire)}
                found = compare(candidates, warmup=3, repeats=repeats)
                (plain,) = eager.answer(bundle.arrays())
            same = digest(plain.tobytes()) == digest(model.run(wire).outputs[0].data)
    report(
        found,
        series="resident",
        what="input given to answer open",
        threads=threads,
        records=records,
        model=name,
        batch=batch,
    )
    CONSOLE.print(f"{name}: outputs {'equal to the bit' if same else 'DIFFER'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
