"""What leaves when a model runs split, and where the time of each split layer goes: seen from the trusted side.

The plan's own split layers run here, in this process, over real frames; a recorder sees every one of them. So what is
stated of exposure was sent, and not merely computed. Inputs are the bench's noise: a photo's activations have another
spectrum, and another share of energy in the residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from motte.accelerator.in_process import InProcessAccelerator
from motte.accelerator.interface import LayerTraffic
from motte.accelerator.process import LocalAccelerator
from motte.bench.case import Case, LayerTime
from motte.engines.interface import NodeRunner
from motte.engines.torch_engine import TorchEngine, TorchProgram
from motte.errors import MeasureError
from motte.link.calls import Op
from motte.link.recording import RecordedFrame
from motte.offload.graph_layers import SplitNode, graph_layers, public_names, split_nodes
from motte.offload.placement import from_plan
from motte.offload.settings import Asymmetric
from motte.offload.timeline import LayerTime as Spent
from motte.plan.plan import Plan
from motte.trusted.outside import Outside

if TYPE_CHECKING:
    from motte.bench.subject import Subject

STEPS: Final = 5
"""Timed steps of the per-layer table, after one that is not."""
_TORCH: Final = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exposure:
    """``share``: the mean over all linear layers of the part of each activation's energy (squared norm) that was sent,
    0 for a layer that stays inside; noise not counted. ``layers``: where the time of each split layer went."""

    share: float
    layers: tuple[LayerTime, ...]


@dataclass
class _Energies:
    """A recorder of squared norms: what the layers were given, and what of it was sent."""

    given: dict[str, float] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)

    def record(self, frame: RecordedFrame) -> None:
        """See :class:`motte.link.recording.Recorder`."""
        if frame.direction == "sent" and frame.op is Op.FORWARD:
            for described, data in zip(frame.described, frame.tensors, strict=True):
                self.sent[frame.layer] = self.sent.get(frame.layer, 0.0) + _energy(described.dtype, data)

    def take(self, layer: str, x: Tensor) -> None:
        """``x`` is what the layer gets, before anything is taken from it."""
        self.given[layer] = self.given.get(layer, 0.0) + float(x.to(torch.float64).square().sum())

    def shares(self) -> dict[str, float]:
        """By layer, 0 to 1. The remainder of a projection has at most the energy of the whole, rounding aside."""
        return {
            name: min(1.0, self.sent.get(name, 0.0) / given) if given else 0.0 for name, given in self.given.items()
        }


class _Watched(Outside):
    """With its books open."""

    def spent(self) -> Mapping[str, Spent]:
        """Of the latest run, by layer."""
        return self._session.timeline.by_layer()

    def traffic(self) -> Mapping[str, LayerTraffic]:
        """So far, by layer."""
        return self._gate.stats()


def measure_exposure(
    case: Case, subject: Subject, plan: Plan, weights: Mapping[str, Tensor], inputs: Sequence[Any], *, device: str,
    threads: int, steps: int = STEPS,
) -> Exposure:  # fmt: skip
    """Run ``plan``'s split layers here.

    Args:
        weights: the captured tensors by name.
        inputs: numpy arrays in the graph's order.
        device: of the accelerator, which is started for this.

    Raises:
        LinkError, TrustError: the accelerator failed, or lied.
        MeasureError: the plan splits nothing.
    """
    section = plan.offload
    if section is None:
        raise MeasureError("this plan sends nothing out", where=str(case))
    scheme, _ = from_plan(section)
    nodes = split_nodes(subject.graph, section, public_names(subject.graph, section))
    run = _Run(subject, nodes, weights, inputs, device, threads)
    energies = run.energies(replace(scheme, noise=None))
    every = len(graph_layers(subject.graph))
    shares = _by_layer(energies.shares(), nodes, section.split)
    layers = run.times(scheme, case, steps)
    return Exposure(sum(shares.values()) / every if every else 0.0, layers)


@dataclass
class _Run:
    subject: Subject
    nodes: Sequence[SplitNode]
    weights: Mapping[str, Tensor]
    inputs: Sequence[Any]
    device: str
    threads: int

    def energies(self, scheme: Asymmetric) -> _Energies:
        found = _Energies()
        here = InProcessAccelerator(recorder=found)
        try:
            outside = _Watched(self.nodes, scheme, here)
            self._once(outside, self._program(outside, found))
        finally:
            here.close()
        return found

    def times(self, scheme: Asymmetric, case: Case, steps: int) -> tuple[LayerTime, ...]:
        spent: dict[str, list[tuple[Spent, LayerTraffic]]] = {}
        with LocalAccelerator(self.device, threads=self.threads) as local:
            outside = _Watched(self.nodes, scheme, local.link)
            program = self._program(outside, None)
            self._once(outside, program)  # weights cross, memory is touched for the first time
            for _ in range(steps):
                before = dict(outside.traffic())
                self._once(outside, program)
                after = outside.traffic()
                for name, times in outside.spent().items():
                    moved = _difference(after.get(name, LayerTraffic()), before.get(name, LayerTraffic()))
                    spent.setdefault(name, []).append((times, moved))
        return tuple(_layer_time(case, name, samples) for name, samples in spent.items())

    def _program(self, outside: Outside, energies: _Energies | None) -> TorchProgram:
        names = {node.linear.node: node.name for node in self.nodes}
        runners = {
            node: run if energies is None else _watching(run, names[node], energies)
            for node, run in outside.runners.items()
        }
        return TorchEngine().compile(self.subject.graph, runners=runners)

    def _once(self, outside: Outside, program: TorchProgram) -> None:
        outside.begin_run()
        given = [torch.from_numpy(np.array(each)) for each in self.inputs]
        program.run(given, self.weights, self.subject.dims)
        outside.end_run()


def _watching(run: NodeRunner, layer: str, energies: _Energies) -> NodeRunner:
    def watched(x: Tensor, *others: Any, **named: Any) -> Any:
        energies.take(layer, x)
        return run(x, *others, **named)

    return watched


def _by_layer(shares: Mapping[str, float], nodes: Sequence[SplitNode], split: Sequence[str]) -> dict[str, float]:
    """The mean over the calls of each layer: one that runs twice is one layer."""
    calls: dict[str, list[float]] = {}
    for node in nodes:
        calls.setdefault(split[node.position], []).append(shares.get(node.name, 0.0))
    return {name: sum(each) / len(each) for name, each in calls.items()}


def _layer_time(case: Case, name: str, samples: Sequence[tuple[Spent, LayerTraffic]]) -> LayerTime:
    return LayerTime(
        case=case,
        layer=name,
        direction="forward",
        trusted_s=median(times.trusted_s for times, _ in samples),
        transfer_s=median(times.send_s + moved.receive_s for times, moved in samples),
        accelerator_s=median(moved.compute_s for _, moved in samples),
        # What was spent on copying in is part of the span of waiting.
        wait_s=median(max(0.0, times.wait_s - moved.receive_s) for times, moved in samples),
        bytes_out=int(median(moved.sent_bytes for _, moved in samples)),
        bytes_in=int(median(moved.received_bytes for _, moved in samples)),
    )


def _difference(after: LayerTraffic, before: LayerTraffic) -> LayerTraffic:
    names = LayerTraffic.__dataclass_fields__
    return LayerTraffic(**{name: max(0, getattr(after, name) - getattr(before, name)) for name in names})


def _energy(dtype: str, data: bytes) -> float:
    if not data:
        return 0.0
    values = torch.frombuffer(bytearray(data), dtype=_TORCH[dtype]).to(torch.float64)
    return float(values.square().sum())
