"""What the deploy benchmarks share: bundles made for one run, the unprotected peers of ``motte bench``, a report.

A peer runs in a process of its own with the same threads, OpenMP wait policy, weights and input as the sealed model.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from motte.bench.inputs import InputSpec, make_inputs, specs_of
from motte.bench.peer import Peer, PeerSpec
from motte.link.frames import WireTensor
from motte.measure.compare import Comparison
from motte.measure.record import PROCESS, UNPROTECTED, Setting, state
from motte.measure.record_file import append
from motte.run.tensors import to_wire
from motte.zoo.weights import WeightsChoice

CONSOLE = Console(width=110)
INPUT_SEED = 1
WEIGHT_SEED = 0
ENCODER = "minilm-l6-v2"
ENCODER_TOKENS = 128


@dataclass(frozen=True)
class SealedModel:
    """A bundle made for this run."""

    path: Path
    key: object
    signer: object
    parts: int
    part_bytes: tuple[int, ...]
    inputs: tuple[InputSpec, ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """The seeded inputs that both sides use, by name, in the model's order."""
        return make_inputs(self.inputs, INPUT_SEED)

    def wire(self) -> list[WireTensor]:
        """The same as they cross the link."""
        return [to_wire(array, where=name) for name, array in self.arrays().items()]


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

    built = build(name, weights=weights_of(name))
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
        specs = specs_of(captured.graph, dims)
        del captured, built
        yield SealedModel(path, recipient, signer.public, plan.parts, sizes, specs)


@contextmanager
def peer(
    name: str, inputs: Sequence[InputSpec], *, threads: int, engine: str = "torch", precision: str = "f32"
) -> Iterator[Peer]:
    """The unsplit, unprotected model ``name`` in a process of its own: the eager module; or, in another engine, what
    PyTorch's exporter makes of it, optimised and with constant weights."""
    spec = PeerSpec(
        job="infer", model=name, weights=weights_of(name), input_shape=None, engine=engine, inputs=tuple(inputs),
        seed=INPUT_SEED, threads=threads, precision=precision,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="motte-peer-") as folder:
        if engine != "torch":
            spec = replace(spec, folder=Path(folder))
            Peer(replace(spec, job="export")).close()
        with Peer(spec) as started:
            yield started


def weights_of(name: str) -> WeightsChoice:
    """Those that both sides use."""
    return WeightsChoice() if name.startswith("resnet20") else WeightsChoice(random_seed=WEIGHT_SEED)


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
