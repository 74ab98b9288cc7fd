"""The unsplit eager model: ``python eager_peer.py NAME BATCH THREADS``, asked on standard input. See peers.py."""

from __future__ import annotations

import resource
import sys

import torch
from peers import WEIGHT_SEED, digest, input_array

from motte.zoo.registry import build
from motte.zoo.weights import WeightsChoice


def main() -> None:
    """Answer ``run``, ``digest``, ``memory`` and ``quit``, a line each."""
    name, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    weights = None if name.startswith("resnet20") else WeightsChoice(random_seed=WEIGHT_SEED)
    model = build(name, weights=weights).model
    x = torch.from_numpy(input_array(name, batch))
    output = None
    print("ready", flush=True)
    for line in sys.stdin:
        match line.strip():
            case "run":
                with torch.inference_mode():
                    output = model(x)
                print("done", flush=True)
            case "digest":
                print(digest(output.contiguous().numpy().tobytes()), flush=True)
            case "memory":
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
            case "quit":
                return
            case other:
                raise SystemExit(f"unknown request {other!r}")


if __name__ == "__main__":
    main()
