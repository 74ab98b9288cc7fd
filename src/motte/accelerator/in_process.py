"""An accelerator inside our own process, for tests: real frames, encoded, decoded and checked, without a socket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motte.accelerator.calculator import Calculator
from motte.accelerator.client import AcceleratorClient
from motte.accelerator.server import AcceleratorServer, Offer, calculator_for
from motte.link.calls import Call
from motte.link.recording import Recorder
from motte.link.wire import Deadline, MemoryWire, Wire

NAME = "accelerator in this process"


class InProcessAccelerator(AcceleratorClient):
    """Computes at once, on ``device``. A subclass that overrides :meth:`answer` is a lying accelerator.

    Args:
        device: of the calculator.
        recorder: sees every frame.
        retries: as for any accelerator; :meth:`break_off` plays the death of the peer.
    """

    def __init__(self, device: str = "cpu", recorder: Recorder | None = None, *, retries: int = 0) -> None:
        self._make = calculator_for(device)
        self._server: _LyingServer | None = None
        super().__init__(self._dial_here, name=NAME, timeout_s=60.0, retries=retries, recorder=recorder)

    def answer(self, layer: str, y: Tensor) -> Tensor:
        """What becomes of an honest product ``y`` before it is given back; of the same shape and dtype."""
        return y

    def break_off(self) -> None:
        """End the connection from the accelerator's side; it forgets everything."""
        if self._server is not None:
            self._server.close()

    @property
    def calculator(self) -> Calculator:
        """What the accelerator holds at the moment."""
        if self._server is None:
            raise RuntimeError("there is no connection")
        return self._server.calculator

    def _dial_here(self, deadline: Deadline, again: bool) -> Wire:
        ours, theirs = MemoryWire.pair(NAME, "client in this process")
        self._server = _LyingServer(theirs, self._make(), self)
        theirs.take = self._server.take
        return ours

    def _names(self) -> dict[int, str]:
        return {layer.number: name for name, layer in self._layers.items()}


class _LyingServer(AcceleratorServer):
    def __init__(self, wire: Wire, calculator: Calculator, owner: InProcessAccelerator) -> None:
        super().__init__(wire, calculator, Offer(threads=torch.get_num_threads()))
        self._owner = owner

    def answer(self, call: Call, tensors: Sequence[Tensor], compute_ns: int) -> None:
        name = self._owner._names()[call.layer]
        super().answer(call, [self._owner.answer(name, each).contiguous() for each in tensors], compute_ns)
