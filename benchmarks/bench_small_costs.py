"""What every call pays however small its arithmetic: split layers of the shipped model, and an image over the link.

    python benchmarks/bench_small_costs.py split [--batch 1] [--runs 40]
    python benchmarks/bench_small_costs.py link [--runs 400]

One figure, in milliseconds, for this source tree. To compare two trees run it in turn with ``PYTHONPATH=TREE/src``,
several times each, and take the medians. ``split``: one thread, the accelerator in the same process, so that nothing
but our own work and the products is in it. ``link``: 600 KB sealed to a second process, and 4 KB back.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
WARMUP = 5


def split(batch: int, runs: int) -> float:
    """Median milliseconds of one protected answer."""
    import torch

    import motte.zoo.vision_ops  # noqa: F401 - before torchvision
    from motte.accelerator.in_process import InProcessAccelerator
    from motte.offload.protect import protect
    from motte.offload.settings import Asymmetric, Schedule
    from motte.zoo.shipped_models import build
    from motte.zoo.weights import WeightsChoice

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    x = torch.randn(batch, 1, 28, 28)
    scheme = Asymmetric(noise=None, rank=Schedule(start=2, factor=2, cap=32))
    model = build(WeightsChoice()).model.eval()
    protected = protect(model, scheme, accelerator=InProcessAccelerator(), example_input=x)
    with torch.no_grad():
        return _median(lambda: protected(x), runs)


def link(runs: int) -> float:
    """Median milliseconds of one sealed image there and one sealed answer back."""
    from motte.errors import MotteError
    from motte.link.frames import Frame, Kind, WireTensor
    from motte.link.local import Link
    from motte.seal.primitives import ChannelCipher

    ours, theirs = socket.socketpair()
    key = os.urandom(32)
    if os.fork() == 0:
        ours.close()
        far = Link(theirs, peer="client")
        far.secure(sending=ChannelCipher(key, b"answers"), receiving=ChannelCipher(key, b"images"))
        try:
            while True:
                far.receive()
                far.send(Frame(Kind.ANSWER, {}, [WireTensor("f32", (1000,), bytes(4000))]))
        except MotteError:
            os._exit(0)
    theirs.close()
    near = Link(ours, peer="worker")
    near.secure(sending=ChannelCipher(key, b"images"), receiving=ChannelCipher(key, b"answers"))
    image = Frame(Kind.RUN, {}, [WireTensor("f32", (1, 3, 224, 224), os.urandom(3 * 224 * 224 * 4))])

    def once() -> None:
        near.send(image)
        near.receive()

    found = _median(once, runs)
    near.close()
    os.wait()
    return found


def _median(run: Callable[[], object], runs: int) -> float:
    seconds = []
    for turn in range(WARMUP + runs):
        began = time.perf_counter()
        run()
        if turn >= WARMUP:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e3


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("split", "link"), help="both if not given")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=0)
    options = parser.parse_args()
    for what in ("split", "link") if options.what is None else (options.what,):
        took = link(options.runs or 400) if what == "link" else split(options.batch, options.runs or 40)
        print(f"{what}: {took:.3f} ms")


if __name__ == "__main__":
    main()
