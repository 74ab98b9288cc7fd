"""The unsplit, unprotected model: ``python runtime_peer.py RUNTIME NAME BATCH THREADS``. See bench_engines.py.

``torch`` is the eager module; the others run what PyTorch's own exporter makes of it, optimised as by default, with the
weights in the file, as people deploy such models. Asked on standard input, a line each.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import torch
from peers import WEIGHT_SEED, input_arrays

from motte.zoo.registry import build
from motte.zoo.weights import WeightsChoice

Run = Callable[[], "np.ndarray"]


def eager(model: torch.nn.Module, inputs: list[np.ndarray]) -> Run:
    """Under ``torch.inference_mode``."""
    tensors = [torch.from_numpy(x) for x in inputs]

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(*tensors).contiguous().numpy()

    return run


def exported(model: torch.nn.Module, inputs: list[np.ndarray], path: Path) -> list[str]:
    """Write the optimised ONNX file of ``model``; the names of its inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, tuple(map(torch.from_numpy, inputs)), dynamo=True, verbose=False)
    program.save(str(path), external_data=True)
    return [value.name for value in program.model.graph.inputs]


def onnxruntime(path: Path, names: list[str], inputs: list[np.ndarray], threads: int) -> Run:
    """An inference session with its own defaults, but for the thread count."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = dict(zip(names, inputs, strict=True))
    return lambda: session.run(None, feeds)[0]


def openvino(path: Path, inputs: list[np.ndarray], threads: int, precision: str) -> Run:
    """A compiled model for the lowest latency."""
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(str(path), "CPU", options | {"INFERENCE_PRECISION_HINT": precision})
    request = compiled.create_infer_request()
    return lambda: request.infer(list(inputs))[0]


def main() -> None:
    """Answer ``run``, ``output PATH`` and ``quit``."""
    runtime, name, batch, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    model = build(name, weights=WeightsChoice(random_seed=WEIGHT_SEED)).model
    inputs = input_arrays(name, batch)
    with tempfile.TemporaryDirectory(prefix="motte-peer-") as folder:
        path = Path(folder) / "model.onnx"
        if runtime == "torch":
            run = eager(model, inputs)
        else:
            names = exported(model, inputs, path)
            del model
            if runtime == "onnxruntime":
                run = onnxruntime(path, names, inputs, threads)
            else:
                run = openvino(path, inputs, threads, runtime.removeprefix("openvino-"))
        output = None
        print("ready", flush=True)
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            match word:
                case "run":
                    output = run()
                    print("done", flush=True)
                case "output":
                    np.save(rest, output, allow_pickle=False)
                    print("done", flush=True)
                case "quit":
                    return
                case other:
                    raise SystemExit(f"unknown request {other!r}")


if __name__ == "__main__":
    main()
