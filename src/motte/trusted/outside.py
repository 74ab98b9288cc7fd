"""The layers of a loaded bundle that run split between the worker and an accelerator. Imports torch.

Which ones, and how, was decided by the owner: the placement in the plan, inside the encrypted and signed manifest, and
the public weights in the signed header. The host gives an address and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from motte.accelerator.interface import Accelerator, LayerTraffic
from motte.engines.interface import NodeRunner
from motte.linear import compute
from motte.offload.graph_layers import SplitNode
from motte.offload.session import Session
from motte.offload.settings import Asymmetric
from motte.offload.split_layer import SplitLayer
from motte.trusted.gate import Gate


class Outside:
    """A session with one accelerator, for the checked ``nodes`` of one bundle.

    ``runners`` run those nodes in place of the engine.
    """

    def __init__(self, nodes: Sequence[SplitNode], scheme: Asymmetric, accelerator: Accelerator) -> None:
        self.name = accelerator.name
        self._gate = Gate(accelerator, {node.name: node.linear.operation for node in nodes})
        self._session = Session(scheme, self._gate)
        self._before: Mapping[str, LayerTraffic] = {}
        self.runners: Mapping[str, NodeRunner] = {node.linear.node: self._runner(node) for node in nodes}

    def begin_run(self) -> None:
        """A new request is answered from here on.

        Without noise every run is a step of its own. With noise all runs are one: noise is derived from the step and
        the clean bytes, so that the same batch asked for again leaves with the same noise, and nobody can average it
        away by asking often.
        """
        self._before = dict(self._gate.stats())
        if self._session.scheme.noise is None or self._session.step == 0:
            self._session.begin_step()
        else:
            # What left in this run is counted again, identical or not: the books say at least what left.
            self._session.releases.new_step()
        self._session.timeline.clear()

    def end_run(self) -> dict[str, Any]:
        """The books of the run that :meth:`begin_run` began: plain values, for the client."""
        now = self._gate.stats()
        moved = [(traffic, self._before.get(name, LayerTraffic())) for name, traffic in now.items()]
        times = self._session.timeline.by_layer().values()
        return {
            "layers": sum(1 for new, old in moved if new.received_frames > old.received_frames),
            "sent_bytes": sum(new.sent_bytes - old.sent_bytes for new, old in moved),
            "received_bytes": sum(new.received_bytes - old.received_bytes for new, old in moved),
            "seconds": {
                "inside": sum(each.trusted_s for each in times),
                "send": sum(each.send_s for each in times),
                "wait": sum(each.wait_s for each in times),
            },
        }

    def close(self) -> None:
        """End the accelerator's session."""
        self._session.close()

    def _runner(self, node: SplitNode) -> NodeRunner:
        layer = self._session.layer(node.name, node.linear.operation, node.position)
        # functional.pad counts axes from the last one.
        pad = [extent for before_after in reversed(node.linear.pad) for extent in before_after]

        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
            y = _product(layer, (functional.pad(x, pad) if pad else x).contiguous(), weight)
            if bias is None:
                return y
            # The bias is added here, and never leaves.
            trailing = 0 if layer.operation.family == "linear" else len(layer.operation.kernel)
            return y.add_(bias.reshape(-1, *[1] * trailing))

        return run


def _product(layer: SplitLayer, x: Tensor, weight: Tensor) -> Tensor:
    positions = x.shape[1:-1] if layer.operation.family == "linear" else x.shape[2:]
    if torch.Size(positions).numel() <= 1:
        # One vector for each sample, at the sizes of this request: there is nothing to decompose, so it stays inside.
        return compute.forward(layer.operation, x, weight)
    return layer.infer(x, weight)
