"""What the deploy benchmarks share: the unprotected peer in a process of its own, bundles made for one run, a report.

The peer runs the eager ``nn.Module`` under ``torch.inference_mode`` with the same number of threads, the same OpenMP
wait policy and the same weights as the sealed model. It is asked over a pipe and answers when the forward pass is done;
its input is already in its memory, while the sealed model's input and output cross the link encrypted in every call.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from motte.measure.compare import Comparison
from motte.measure.record import PROCESS, UNPROTECTED, Setting, state
from motte.measure.record_file import append

CONSOLE = Console(width=110)
INPUT_SEED = 1
WEIGHT_SEED = 0
PEER = Path(__file__).with_name("eager_peer.py")
RUNTIME_PEER = Path(__file__).with_name("runtime_peer.py")
ENCODER = "minilm-l6-v2"
ENCODER_TOKENS = 128


class _Peer:
    """A process that is asked over a pipe."""

    def __init__(self, *words: str, threads: int) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        self._say("ready")

    def run(self) -> None:
        """One forward pass."""
        self._ask("run", "done")

    def close(self) -> None:
        """End the process."""
        self._process.communicate("quit\n", timeout=60)

    def _ask(self, word: str, expected: str) -> None:
        self._write(word)
        self._say(expected)

    def _say(self, expected: str) -> None:
        if (answer := self._read()) != expected:
            raise RuntimeError(f"the peer said {answer!r} instead of {expected!r}")

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with status {self._process.wait()}")
        return line.strip()


class EagerPeer(_Peer):
    """The unsplit eager model in its own process."""

    def __init__(self, name: str, *, batch: int, threads: int) -> None:
        super().__init__(str(PEER), name, str(batch), str(threads), threads=threads)

    def digest(self) -> str:
        """SHA-256 of the latest output's bytes."""
        self._write("digest")
        return self._read()

    def memory(self) -> int:
        """Resident set in bytes, peak."""
        self._write("memory")
        return int(self._read())


class RuntimePeer(_Peer):
    """The unsplit, unprotected model in a process of its own, run by ``runtime`` (runtime_peer.py)."""

    def __init__(self, runtime: str, name: str, *, batch: int, threads: int) -> None:
        super().__init__(str(RUNTIME_PEER), runtime, name, str(batch), str(threads), threads=threads)

    def output(self, folder: Path) -> object:
        """The latest output, as an array."""
        import numpy as np

        path = folder / "output.npy"
        self._ask(f"output {path}", "done")
        return np.load(path, allow_pickle=False)


@dataclass(frozen=True)
class SealedModel:
    """A bundle made for this run."""

    path: Path
    key: object
    signer: object
    parts: int
    part_bytes: tuple[int, ...]


@contextmanager
def sealed(
    name: str, *, batch: int, cuts: str = "published", weight_memory: int = 0, lower: bool = False
) -> Iterator[SealedModel]:
    """The zoo model ``name`` with seeded random weights, sealed in a temporary folder.

    ``lower``: with its parts as ONNX, which must be possible. An encoder is cut into 12 parts of equal weight.
    """
    from motte.lower.lower import lower as lower_parts
    from motte.lower.lowered import NotLowered
    from motte.plan.planner import plan_cuts, plan_parts, plan_streamed
    from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey
    from motte.seal.manifest import Manifest, lay_out_parts
    from motte.seal.package import seal_model
    from motte.zoo.models import capture_built
    from motte.zoo.published_cuts import PUBLISHED_CUTS
    from motte.zoo.registry import build
    from motte.zoo.weights import WeightsChoice

    built = build(name, weights=None if name.startswith("resnet20") else WeightsChoice(random_seed=WEIGHT_SEED))
    captured = capture_built(built)
    dims = {"batch": batch} | ({"sequence": ENCODER_TOKENS} if name == ENCODER else {})
    if weight_memory:
        plan = plan_streamed(captured.graph, weight_memory_bytes=weight_memory, dims=dims)
    elif name == ENCODER:
        plan = plan_parts(captured.graph, parts=12, objective="weights", dims=dims)
    else:
        cut_after = PUBLISHED_CUTS[name]
        plan = plan_cuts(captured.graph, cut_after=cut_after, objective=cuts, dims=dims)
    lowered = lower_parts(captured.graph, plan) if lower else None
    if isinstance(lowered, NotLowered):
        raise SystemExit(f"error: {name} does not lower: {lowered}")
    manifest = Manifest(captured.graph, plan, built.signature, lowered)
    with tempfile.TemporaryDirectory(prefix="motte-bench-") as folder:
        path = Path(folder) / f"{name}.motte"
        recipient, signer = RecipientPrivateKey.new(), SignerPrivateKey.new()
        seal_model(path, manifest, captured.weights, release=1, recipients=[recipient.public], signer=signer)
        sizes = tuple(part.layout.bytes for part in lay_out_parts(manifest))
        del captured, built
        yield SealedModel(path, recipient, signer.public, plan.parts, sizes)


def input_array(name: str, batch: int) -> object:
    """The seeded input (batch, C, H, W) f32 that both sides use."""
    import numpy as np

    shape = (1, 28, 28) if name.startswith("resnet20") else (3, 224, 224)
    return np.random.default_rng(INPUT_SEED).standard_normal((batch, *shape), dtype=np.float32)


def input_arrays(name: str, batch: int) -> list[object]:
    """Every input of the model in order: for an encoder ids, mask and types of :data:`ENCODER_TOKENS` tokens."""
    import numpy as np

    if name != ENCODER:
        return [input_array(name, batch)]
    shape = (batch, ENCODER_TOKENS)
    ids = np.random.default_rng(INPUT_SEED).integers(1000, 20_000, shape)
    return [ids, np.ones(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)]


def digest(data: bytes | memoryview) -> str:
    """SHA-256 of an output's bytes."""
    return hashlib.sha256(data).hexdigest()


def arguments(doc: str, **defaults: int) -> argparse.ArgumentParser:
    """The options that every deploy benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=defaults.get("repeats", 15))
    parser.add_argument("--records", type=Path, help="append every figure to this JSON-lines file")
    return parser


def report(
    comparison: Comparison, *, series: str, what: str, threads: int, records: Path | None, **parameters: str | int
) -> None:
    """Print one comparison, and append its figures to ``records``."""
    table = Table("candidate", "n", "median ms", "IQR ms", "ratio", "95 % interval", title=f"{series}: {parameters}")
    for row in comparison.rows():
        ratio = "baseline" if row["ratio"] is None else f"{row['ratio']:.3f}"
        interval = "" if row["ratio"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        median, spread = f"{row['median'] * 1e3:.1f}", f"{row['spread'] * 1e3:.1f}"
        table.add_row(row["name"], str(row["repeats"]), median, spread, ratio, interval)
    CONSOLE.print(table)
    if records is None:
        return
    for one in comparison.series:
        bare = "sealed" not in one.name
        engine = next((name for name in ("onnxruntime", "openvino") if name in one.name), "torch")
        dtype = "bf16" if "bf16" in one.name else "f32"
        setting = Setting(
            threads=threads, dtype=dtype, device="cpu", engine=engine, enclave=UNPROTECTED if bare else PROCESS
        )
        record = state(
            series=f"{series}, {one.name}", what=what, value=one.median, unit="s", statistic="median",
            samples=one.samples, setting=setting, parameters=parameters,
        )  # fmt: skip
        append(records, record)


def names_or_all(given: Sequence[str], known: Sequence[str]) -> list[str]:
    """The models named on the command line, or all."""
    unknown = set(given) - set(known)
    if unknown:
        raise SystemExit(f"error: no such model: {', '.join(sorted(unknown))}")
    return list(given or known)
