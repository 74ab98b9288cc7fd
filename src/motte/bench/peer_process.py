"""The process of a native peer: ``python -P -m motte.bench.peer_process``, driven over its standard input and output.

One JSON object a line in each direction. The first line says what to be; the answer is ``ready``. Then it answers
``run``, ``answer``, ``memory`` and ``books`` until its input ends. It runs what was asked for **unprotected**; started
by :mod:`motte.bench.peer`.

====================  =========================================================================================
``export``            writes the model as ONNX and ends: so that the process that runs it holds no torch
``infer``             the whole model on one engine; inputs lie in its memory, answers stay there
``train``             one SGD step on one batch: plain, or split with an accelerator (motte.bench.train_step)
====================  =========================================================================================
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from motte.bench.inputs import InputSpec, make_inputs
from motte.errors import MotteError, UnsupportedError
from motte.limits import MIB
from motte.measure.memory import read_memory
from motte.strict_json import canonical, parse
from motte.zoo.weights import WeightsChoice

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

    Arrays = Mapping[str, NDArray[Any]]

ONNX_NAME = "model.onnx"


class Work(Protocol):
    """What a peer does again and again."""

    def run(self) -> None:
        """Once."""
        ...

    def answer(self, inputs: Arrays) -> Sequence[NDArray[Any]]:
        """The outputs for other inputs, by name, at the same sizes."""
        ...

    def books(self) -> dict[str, Any]:
        """What there is to tell beside time and memory, as JSON values."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class TorchWork:
    """The eager module under ``torch.inference_mode``; on a device the input and the answer cross."""

    def __init__(self, spec: Mapping[str, Any], inputs: Arrays) -> None:
        import torch

        self._device = torch.device(spec["device"])
        self._model: nn.Module = build_model(spec).to(self._device)
        self._outside = spec["outside"]
        self._inputs = self._tensors(inputs)
        if not self._outside:
            self._inputs = {name: each.to(self._device) for name, each in self._inputs.items()}
        self._output: Any = None

    def run(self) -> None:
        """One forward pass."""
        self._output = self._forward(self._inputs)

    def answer(self, inputs: Arrays) -> Sequence[NDArray[Any]]:
        """See :class:`Work`."""
        found = self._forward(self._tensors(inputs))
        outputs = [found] if not isinstance(found, list | tuple) else found
        return [each.cpu().contiguous().numpy() for each in outputs]

    def books(self) -> dict[str, Any]:
        """Bytes of the inputs and outputs, which cross to an accelerator."""
        outputs = self._output if isinstance(self._output, list | tuple) else [self._output]
        return {
            "input_bytes": sum(each.nbytes for each in self._inputs.values()),
            "output_bytes": sum(each.nbytes for each in outputs if each is not None),
        }

    def close(self) -> None:
        """See :class:`Work`."""

    def _forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        import torch

        with torch.inference_mode():
            found = self._model(**{name: each.to(self._device) for name, each in inputs.items()})
            return _moved(found) if self._outside else found

    @staticmethod
    def _tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
        import torch

        return {name: torch.from_numpy(each) for name, each in inputs.items()}


class RuntimeWork:
    """The exported model in onnxruntime or openvino, with their own defaults but for the thread count."""

    def __init__(self, spec: Mapping[str, Any], inputs: Arrays) -> None:
        path, threads = str(Path(spec["folder"]) / ONNX_NAME), int(spec["threads"])
        self._inputs = dict(inputs)
        if spec["engine"] == "openvino":
            self._call = _openvino(path, threads, str(spec["precision"]))
        else:
            self._call = _onnxruntime(path, threads)
        self._output: Sequence[NDArray[Any]] = ()

    def run(self) -> None:
        """One forward pass."""
        self._output = self._call(self._inputs)

    def answer(self, inputs: Arrays) -> Sequence[NDArray[Any]]:
        """See :class:`Work`."""
        return self._call(inputs)

    def books(self) -> dict[str, Any]:
        """Bytes of the inputs and outputs."""
        return {
            "input_bytes": sum(each.nbytes for each in self._inputs.values()),
            "output_bytes": sum(each.nbytes for each in self._output),
        }

    def close(self) -> None:
        """See :class:`Work`."""


def _onnxruntime(path: str, threads: int) -> Callable[[Arrays], Sequence[NDArray[Any]]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})


def _openvino(path: str, threads: int, precision: str) -> Callable[[Arrays], Sequence[NDArray[Any]]]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", options | {"INFERENCE_PRECISION_HINT": precision})
    names = [each.get_any_name() for each in compiled.inputs]
    request = compiled.create_infer_request()

    def call(inputs: Arrays) -> Sequence[NDArray[Any]]:
        found = request.infer([inputs[name] for name in names])
        return [found[index] for index in range(len(compiled.outputs))]

    return call


def build_model(spec: Mapping[str, Any]) -> nn.Module:
    """The model that ``spec`` names, with its weights, in eval mode."""
    from motte.zoo.registry import build

    given = spec["weights"]
    choice = WeightsChoice(
        file=None if given["file"] is None else Path(given["file"]), random_seed=given["random_seed"]
    )
    return build(spec["model"], weights=choice, input_shape=spec["input_shape"]).model


def export(spec: Mapping[str, Any], inputs: Arrays) -> None:
    """Write the model as PyTorch's own exporter makes it, optimised as by default."""
    import warnings

    import torch

    tensors = {name: torch.from_numpy(each) for name, each in inputs.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(build_model(spec), (), kwargs=tensors, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as problem:
        raise UnsupportedError("the model cannot be exported", got=str(problem).splitlines()[0][:200]) from problem
    if program is None:
        raise UnsupportedError("the model cannot be exported", got="nothing")
    program.save(str(Path(spec["folder"]) / ONNX_NAME), external_data=True)


def make_work(spec: Mapping[str, Any], inputs: Arrays) -> Work:
    """What ``spec`` asks for."""
    if spec["job"] == "train":
        from motte.bench.train_step import TrainWork

        return TrainWork(spec, inputs)
    return TorchWork(spec, inputs) if spec["engine"] == "torch" else RuntimeWork(spec, inputs)


def serve(source: IO[str], sink: IO[str]) -> None:
    """Answer line by line until ``source`` ends."""

    def say(value: Mapping[str, Any]) -> None:
        sink.write(canonical(value).decode("ascii") + "\n")
        sink.flush()

    line = source.readline()
    if not line:
        return
    spec = parse(line, max_bytes=MIB, what="the peer's settings")
    work: Work | None = None
    try:
        _import_engine(spec)
        say({"imported": None})
        inputs = make_inputs([InputSpec(n, d, tuple(s)) for n, d, s in spec["inputs"]], int(spec["seed"]))
        if spec["job"] == "export":
            export(spec, inputs)
            say({"ready": None})
            return
        work = make_work(spec, inputs)
        say({"ready": None})
        for line in source:
            say(_reply(work, parse(line, max_bytes=MIB, what="a request")))
    except MotteError as problem:
        facts = {name: getattr(problem, name) for name in ("expected", "got", "where", "hint")}
        say({"error": {"kind": type(problem).__name__, "message": problem.message, **facts}})
    finally:
        if work is not None:
            work.close()


def _import_engine(spec: Mapping[str, Any]) -> None:
    """What the peer computes with; reading it belongs to its start, not to the loading of the model."""
    if spec["engine"] != "torch" and spec["job"] != "export":
        importlib.import_module(spec["engine"])
        return
    import torch

    torch.set_num_threads(int(spec["threads"]))
    torch.set_num_interop_threads(1)


def _reply(work: Work, asked: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    match asked["do"]:
        case "run":
            work.run()
            return {"done": None}
        case "answer":
            folder = Path(asked["folder"])
            given = {
                name: np.load(folder / f"input-{index}.npy", allow_pickle=False)
                for index, name in enumerate(asked["names"])
            }
            outputs = work.answer(given)
            for index, array in enumerate(outputs):
                np.save(folder / f"output-{index}.npy", array, allow_pickle=False)
            return {"done": len(outputs)}
        case "memory":
            memory = read_memory()
            return {"done": {"rss_bytes": memory.rss_bytes, "rss_peak_bytes": memory.peak_rss_bytes}}
        case "books":
            return {"done": work.books()}
        case other:
            raise MotteError("unknown request", got=repr(other)[:80])


def _moved(found: Any) -> Any:
    if isinstance(found, list | tuple):
        return [each.cpu() for each in found]
    return found.cpu()


def main() -> None:
    """Keep the two ends of the link for ourselves: what a user's model prints goes to standard error."""
    ours = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(ours, "w", encoding="utf-8") as sink:
        serve(sys.stdin, sink)


if __name__ == "__main__":
    main()
