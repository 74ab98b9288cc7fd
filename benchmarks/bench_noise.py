"""Clipping and noise for what leaves, beside torch's own generator, and what one VGG-16 step of it costs.

    python benchmarks/bench_noise.py [--batch 8] [--values 1048576] [--repeats 9] [--threads 1 2]

Every round runs each candidate once, in a new order; printed are the median rate over rounds, the lowest and highest,
and the median of the ratios within a round. A rate is values over seconds of one call on (batch, values) float32, all
of it: norms, clipping, digest, keystream, Gaussian, sum; the result overwrites the input. ``torch.randn`` is Mersenne
Twister on one thread, which is not fit for this; it draws only and neither clips nor adds.

The cost of a step is values over rate, for VGG-16 at 224 pixels and batch 32 with every convolution split but the
first: residuals in the forward pass, output gradients in the backward, and the trusted part of weight gradients.
"""

from __future__ import annotations

import argparse

import torch

from motte.measure.compare import Comparison, compare
from motte.offload.noise import Kind, Noise
from motte.offload.settings import Mechanism

BATCH, PIXELS = 32, 224
# (input channels, output channels, how often the image was halved before) of the split convolutions.
CONVOLUTIONS = (
    (64, 64, 0), (64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 2), (256, 256, 2), (256, 512, 3),
    (512, 512, 3), (512, 512, 3), (512, 512, 4), (512, 512, 4), (512, 512, 4),
)  # fmt: skip


def vgg16_values() -> dict[str, int]:
    """Values that one training step lets leave, by kind."""
    sizes = [(taken, given, (PIXELS >> halved) ** 2) for taken, given, halved in CONVOLUTIONS]
    return {
        "residual": BATCH * sum(taken * pixels for taken, _, pixels in sizes),
        "gradient": BATCH * sum(given * pixels for _, given, pixels in sizes),
        "update": sum(9 * taken * given for taken, given, _ in sizes),
    }


def show(found: Comparison, values: int) -> None:
    """One line a candidate."""
    for row in found.rows():
        low, high = (values / row[name] / 1e6 for name in ("max", "min"))
        ratio = "" if row["ratio"] is None else f"{1 / row['ratio']:5.2f} of torch.randn's rate"
        rate = f"{values / row['median'] / 1e6:7.1f} M/s ({low:.1f} to {high:.1f})"
        print(f"{row['name']:34} n={row['repeats']} {rate}  {ratio}")


def main() -> None:
    """Measure, then reckon a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--values", type=int, default=1 << 20, help="values of one sample")
    parser.add_argument("--repeats", type=int, default=9, help="rounds after the warm-up, at least 5")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    mechanism = Mechanism(clip=1.0, noise_multiplier=1.0)
    x = torch.randn(options.batch, options.values)
    narrow, into = x.bfloat16(), torch.empty_like(x)
    calls = {"torch.randn, 1 thread": into.normal_}
    for threads in options.threads:
        noise = Noise.fresh(threads=threads)

        def call(values: torch.Tensor, per_sample: bool, noise: Noise = noise) -> torch.Tensor:
            kind: Kind = "residual" if per_sample else "update"
            return noise.privatise(
                values, mechanism, layer="a", kind=kind, step=0, per_sample=per_sample, overwrite=True
            ).tensor

        calls[f"clip and noise, {threads} thr."] = lambda call=call: call(x, True)  # type: ignore[misc]
        calls[f"clip and noise, bf16, {threads} thr."] = lambda call=call: call(narrow, True)  # type: ignore[misc]
        calls[f"noise of an update, {threads} thr."] = lambda call=call: call(x, False)  # type: ignore[misc]
    found = compare(calls, warmup=1, repeats=options.repeats)
    show(found, x.numel())
    print("\none VGG-16 step at batch 32, from these medians:")
    counts = vgg16_values()
    for threads in options.threads:
        sample = found[f"clip and noise, {threads} thr."].median / x.numel()
        update = found[f"noise of an update, {threads} thr."].median / x.numel()
        costs = {kind: count * (update if kind == "update" else sample) for kind, count in counts.items()}
        parts = ", ".join(f"{kind} {counts[kind] / 1e6:.1f} M values {cost:.2f} s" for kind, cost in costs.items())
        print(f"{threads} thread{'s' * (threads > 1)}: {parts}; together {sum(costs.values()):.2f} s")


if __name__ == "__main__":
    main()
