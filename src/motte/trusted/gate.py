"""The door of the worker: an accelerator that takes only what the signed header and the frozen placement allow.

It stands between everything that computes and the link, and it knows neither: it holds a closed list of layers, made
from the header's public weights and the plan. So a fault elsewhere in the trusted base cannot send out another weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

from motte.accelerator.interface import Accelerator, Gradients, LayerTraffic, Pending
from motte.errors import TrustError
from motte.linear.operation import LinearOperation

if TYPE_CHECKING:
    from torch import Tensor


class Gate:
    """An :class:`~motte.accelerator.interface.Accelerator` for inference with the layers ``allowed``, by name.

    A weight is sent once: it comes from an authenticated part, which is the same every time, also where a streamed
    worker opens it at another address. Everything that only training needs is refused.
    """

    def __init__(self, accelerator: Accelerator, allowed: Mapping[str, LinearOperation]) -> None:
        self.name = accelerator.name
        self._accelerator = accelerator
        self._allowed = dict(allowed)
        self._sent: set[str] = set()

    def register(self, layer: str, operation: LinearOperation) -> int:
        """See :class:`motte.accelerator.interface.Accelerator`.

        Raises:
            TrustError: not a layer that may leave.
        """
        if self._known(layer) != operation:
            raise TrustError("this layer may not leave the worker in another form", where=layer, got=repr(operation))
        return self._accelerator.register(layer, operation)

    def put_weight(self, layer: str, weight: Tensor) -> None:
        """Send it the first time; see :class:`motte.accelerator.interface.Accelerator`."""
        self._known(layer)
        if layer not in self._sent:
            self._accelerator.put_weight(layer, weight)
            self._sent.add(layer)

    def forward(self, layer: str, x: Tensor, *, step: int, hold: bool) -> Pending[Tensor]:
        """See :class:`motte.accelerator.interface.Accelerator`. Nothing is held."""
        self._known(layer)
        if hold:
            self._refuse("to hold an input")
        return self._accelerator.forward(layer, x, step=step, hold=False)

    def last_held(self) -> int:
        """Refused."""
        self._refuse("to hold an input")

    def backward(
        self, layer: str, held: int, gradient: Tensor, *, step: int, need_input: bool, need_weight: bool
    ) -> Pending[Gradients]:
        """Refused."""
        self._refuse("a gradient")

    def release(self, held: Iterable[int]) -> None:
        """Nothing is held."""

    def stats(self) -> Mapping[str, LayerTraffic]:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        return self._accelerator.stats()

    def close(self) -> None:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        self._accelerator.close()

    def _known(self, layer: str) -> LinearOperation:
        if layer not in self._allowed:
            raise TrustError("this layer may not leave the worker", where=self.name, got=layer)
        return self._allowed[layer]

    def _refuse(self, what: str) -> NoReturn:
        raise TrustError("a worker that answers never asks an accelerator for this", where=self.name, got=what)
