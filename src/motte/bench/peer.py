"""Our end of a native peer: a process that runs a whole model unprotected, and answers over a pipe.

What is timed with it is the round trip of one short line. Its inputs are in its memory already, while the inputs and
outputs of a sealed model cross the link encrypted in every call: that difference is part of what protection costs.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from motte import errors
from motte.bench.inputs import InputSpec
from motte.bench.tracing import Marks, NoMarks
from motte.enclave.process import worker_environment
from motte.errors import MotteError, ResourceError, WorkerDied, WorkerStalled
from motte.limits import MIB
from motte.strict_json import canonical, parse
from motte.zoo.weights import WeightsChoice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

TIMEOUT_S: Final = 600.0
"""For one answer: the building of a large model on a busy machine, or one step of it."""
_TAIL_BYTES: Final = 2000
_EXIT_WAIT_S: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """What a peer is. ``job``: ``export``, ``infer`` or ``train``. ``outside``: input and answer cross to ``device``.

    ``folder``: where the exported model lies, or is to lie. ``precision``: in which openvino computes. ``train``:
    further settings of a training step.
    """

    job: str
    model: str
    weights: WeightsChoice
    input_shape: str | None
    engine: str
    inputs: Sequence[InputSpec]
    seed: int
    threads: int
    device: str = "cpu"
    outside: bool = False
    folder: Path | None = None
    precision: str = "f32"
    train: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As the process reads it."""
        weights = self.weights
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("inputs", "weights")},
            "inputs": [[each.name, each.dtype, list(each.shape)] for each in self.inputs],
            "weights": {
                "file": None if weights.file is None else str(weights.file),
                "random_seed": weights.random_seed,
            },
            "folder": None if self.folder is None else str(self.folder),
        }


class Peer:
    """A started peer. A context manager; it also ends when this process does.

    Args:
        marks: told where the process starts, and where it loads.

    Attributes:
        start_s: seconds from its spawn until it had imported what it computes with.
        load_s: seconds in which it built or read the model; for ``export`` those of exporting.

    Raises:
        MotteError: what it reported, under its own class. WorkerDied, WorkerStalled: it ended, or said nothing.
    """

    def __init__(self, spec: PeerSpec, marks: Marks | None = None) -> None:
        told = NoMarks() if marks is None else marks
        # A memfd: what a dying peer wrote can be shown, and a full pipe cannot block it.
        self._words = os.memfd_create("motte-peer-stderr")
        self._buffer = b""
        self._open = False
        try:
            began = time.perf_counter()
            with told.segment("start", since="process spawned", until="engine imported"):
                self._spawn(spec)
                told.watch("native", self.pid)
                self._ask(spec.to_json(), "imported")
            self.start_s = time.perf_counter() - began
            began = time.perf_counter()
            with told.segment("load", since="engine imported", until="model built or read"):
                self._ask(None, "ready")
            self.load_s = time.perf_counter() - began
        except BaseException:
            self.close(at_once=True)
            raise

    def _spawn(self, spec: PeerSpec) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "motte.bench.peer_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                env=worker_environment(spec.threads) | _own_settings(),
                # Ctrl-C in a terminal reaches us alone, and we end it in good order.
                start_new_session=True,
            )
        except OSError as problem:
            os.close(self._words)
            raise ResourceError("a process cannot be started", got=str(problem)) from problem
        self._open = True

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes under test."""
        return (self.pid,)

    def run(self) -> None:
        """Once what it does."""
        self._ask({"do": "run"}, "done")

    def timed_run(self) -> float:
        """The seconds of one run."""
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began

    def answer(self, inputs: Arrays) -> list[NDArray[Any]]:
        """The outputs for other inputs, by name."""
        import numpy as np

        with tempfile.TemporaryDirectory(prefix="motte-peer-") as name:
            folder = Path(name)
            for index, array in enumerate(inputs.values()):
                np.save(folder / f"input-{index}.npy", array, allow_pickle=False)
            made = self._ask({"do": "answer", "folder": name, "names": list(inputs)}, "done")
            return [np.load(folder / f"output-{index}.npy", allow_pickle=False) for index in range(int(made))]

    def memory(self) -> Mapping[str, int]:
        """``rss_bytes`` and ``rss_peak_bytes`` of the process."""
        found: Mapping[str, int] = self._ask({"do": "memory"}, "done")
        return found

    def books(self) -> Mapping[str, Any]:
        """What else it has to tell."""
        found: Mapping[str, Any] = self._ask({"do": "books"}, "done")
        return found

    def close(self, *, at_once: bool = False) -> None:
        """End it. Safe to call again."""
        if not self._open:
            return
        self._open = False
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            if not at_once:
                self._process.wait(timeout=_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            pass
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._words)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=kind is not None)

    def _ask(self, value: Mapping[str, Any] | None, wanted: str) -> Any:
        if value is not None:
            self._write(canonical(value) + b"\n")
        answer = parse(self._line(), max_bytes=MIB, what="a peer's answer")
        if "error" in answer:
            raise _reported(answer["error"])
        return answer[wanted]

    def _write(self, data: bytes) -> None:
        pipe = self._process.stdin
        if pipe is None:
            raise RuntimeError("the peer has no input")
        try:
            pipe.write(data)
            pipe.flush()
        except BrokenPipeError as problem:
            raise self._died() from problem

    def _line(self) -> bytes:
        pipe = self._process.stdout
        if pipe is None:
            raise RuntimeError("the peer has no output")
        deadline = time.monotonic() + TIMEOUT_S
        while b"\n" not in self._buffer:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerStalled("the native process did not answer in time", expected=f"within {TIMEOUT_S:g} s")
            piece = os.read(pipe.fileno(), MIB)
            if not piece:
                raise self._died()
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self) -> WorkerDied:
        try:
            status = str(self._process.wait(timeout=_EXIT_WAIT_S))
        except subprocess.TimeoutExpired:
            status = "still running"
        size = os.fstat(self._words).st_size
        tail = os.pread(self._words, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace").strip()
        return WorkerDied(
            "the native process ended" + (f"; its last words: {tail}" if tail else ""),
            where=f"pid {self._process.pid}",
            got=f"status {status}",
        )


def _own_settings() -> dict[str, str]:
    # Where the zoo finds downloaded weights, and the owner's packages: this process is no enclave.
    kept = ("XDG_CACHE_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
    return {name: os.environ[name] for name in kept if name in os.environ}


def _reported(told: Mapping[str, Any]) -> MotteError:
    kind = getattr(errors, str(told["kind"]), MotteError)
    made: MotteError = kind(told["message"], **{name: told[name] for name in ("expected", "got", "where", "hint")})
    return made
