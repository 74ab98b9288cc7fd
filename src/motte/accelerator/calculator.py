"""The calculator: weights and held inputs of one client, and the products that are asked of them.

It runs outside. Nothing here protects anything; its checks only turn a confused caller into a clear error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motte.accelerator.interface import Gradients
from motte.errors import InputError
from motte.limits import MAX_ACCELERATOR_LAYERS, MAX_HELD_INPUTS
from motte.linear.compute import forward, input_gradient, weight_gradient
from motte.linear.operation import LinearOperation


@dataclass(slots=True)
class Work:
    """Products that may still be under way. ``wait`` before reading ``tensors``, which lie in host memory."""

    tensors: Sequence[Tensor]
    compute_ns: int = 0

    def wait(self) -> None:
        """Until the tensors hold the answer and ``compute_ns`` says how long it took."""


class Calculator:
    """One client's state on ``device``.

    Products are computed in the dtype of the input; a bfloat16 input means: multiplied in bfloat16, answered in
    float32. TensorFloat-32 is off, and so are sums in bfloat16 and the caller's autocast: an answer must be as exact as
    its dtype says, or honest answers would have to be let pass that a liar could hide in.

    An input need not outlive the call, nor the work that it returned: what is kept is copied.
    """

    asynchronous = False
    """Whether :class:`Work` may be under way when it is returned, so that reading ahead gains something."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self._operations: dict[int, LinearOperation] = {}
        self._weights: dict[int, Tensor] = {}
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}
        self._held: dict[int, tuple[int, Tensor]] = {}

    def share(self, region: Tensor) -> None:
        """``region``: all of the shared memory, as bytes. A device that can read it by itself prepares for that."""

    # --- state ------------------------------------------------------------------------------------------------------
    def register(self, layer: int, operation: LinearOperation) -> None:
        """Make ``layer`` known, once."""
        if layer in self._operations or len(self._operations) >= MAX_ACCELERATOR_LAYERS:
            raise InputError("layer is known, or too many layers", got=str(layer))
        self._operations[layer] = operation

    def put_weight(self, layer: int, weight: Tensor) -> None:
        """Keep a copy of ``weight`` for ``layer``, in place of the one before."""
        operation = self._operation(layer)
        if tuple(weight.shape) != operation.weight_shape:
            raise InputError(
                "weight of another shape", expected=str(operation.weight_shape), got=str(tuple(weight.shape))
            )
        self._weights[layer] = self._take(weight, keep=True)
        for key in [key for key in self._cast if key[0] == layer]:
            del self._cast[key]

    def hold(self, layer: int, number: int, x: Tensor) -> Tensor:
        """Keep a copy of ``x`` under ``number``; returns the copy, on the device."""
        self._operation(layer).output_shape(x.shape)
        if number in self._held or len(self._held) >= MAX_HELD_INPUTS:
            raise InputError("number is in use, or too many held inputs", got=str(number))
        here = self._take(x, keep=True)
        self._held[number] = (layer, here)
        return here

    def release(self, held: int) -> None:
        """Forget a held input."""
        self._held.pop(held, None)

    def close(self) -> None:
        """Forget everything."""
        for each in (self._weights, self._cast, self._held, self._operations):
            each.clear()

    # --- products ---------------------------------------------------------------------------------------------------
    def forward(self, layer: int, x: Tensor, *, hold: int | None) -> Tensor:
        """The product, on the device; keeps a copy of ``x`` under number ``hold``."""
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self.forward(layer, x, hold=hold)
        operation = self._operation(layer)
        # A shape that does not fit is torch's to refuse.
        here = self._take(x, keep=False) if hold is None else self.hold(layer, hold, x)
        return _answer(forward(operation, here, self._weight(layer, here.dtype)))

    def backward(self, layer: int, held: int, gradient: Tensor, *, need_input: bool, need_weight: bool) -> Gradients:
        """Gradients for a held input, on the device. They have the dtype of ``gradient``, bfloat16 gives float32."""
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self.backward(layer, held, gradient, need_input=need_input, need_weight=need_weight)
        operation = self._operation(layer)
        if held not in self._held or self._held[held][0] != layer:
            raise InputError("no such held input of this layer", got=str(held))
        x = self._held[held][1]
        if tuple(gradient.shape) != operation.output_shape(x.shape):
            expected = str(operation.output_shape(x.shape))
            raise InputError("gradient of another shape", expected=expected, got=str(tuple(gradient.shape)))
        there = self._take(gradient, keep=False)
        to_input = to_weight = None
        if need_input:
            to_input = _answer(input_gradient(operation, x.shape, self._weight(layer, there.dtype), there))
        if need_weight:
            to_weight = _answer(weight_gradient(operation, x.to(there.dtype), there))
        return Gradients(to_input, to_weight)

    # --- products as work, straight into the memory where the answer belongs -----------------------------------------
    def start_forward(self, layer: int, x: Tensor, *, hold: int | None, into: Sequence[Tensor | None]) -> Work:
        """Like :meth:`forward`. ``into`` says where in host memory the answer belongs, None: anywhere."""
        return self._start(lambda: [self.forward(layer, x, hold=hold)], into)

    def start_backward(
        self,
        layer: int,
        held: int,
        gradient: Tensor,
        *,
        need_input: bool,
        need_weight: bool,
        into: Sequence[Tensor | None],
    ) -> Work:
        """Like :meth:`backward`; the tensors are those that were asked for, the input's gradient first."""

        def compute() -> list[Tensor]:
            both = self.backward(layer, held, gradient, need_input=need_input, need_weight=need_weight)
            return [each for each in (both.input, both.weight) if each is not None]

        return self._start(compute, into)

    def _start(self, compute: Callable[[], list[Tensor]], into: Sequence[Tensor | None]) -> Work:
        began = time.perf_counter_ns()
        products = compute()
        took = time.perf_counter_ns() - began
        return Work([_deliver(each, place) for each, place in zip(products, into, strict=True)], took)

    # --- inside -----------------------------------------------------------------------------------------------------
    def _take(self, tensor: Tensor, *, keep: bool) -> Tensor:
        """``tensor`` on the device; with ``keep`` never the caller's own memory."""
        if tensor.is_cpu and self._on_cpu and not keep:
            return tensor
        return tensor.to(self.device, copy=keep)

    def _operation(self, layer: int) -> LinearOperation:
        if layer not in self._operations:
            raise InputError("no such layer", got=str(layer))
        return self._operations[layer]

    def _weight(self, layer: int, dtype: torch.dtype) -> Tensor:
        weight = self._weights.get(layer)
        if weight is None:
            raise InputError("the layer has no weight yet", got=str(layer))
        if weight.dtype == dtype:
            return weight
        key = (layer, dtype)
        if key not in self._cast:
            self._cast[key] = weight.to(dtype)
        return self._cast[key]


def _answer(y: Tensor) -> Tensor:
    return y.float() if y.dtype == torch.bfloat16 else y


def _deliver(product: Tensor, place: Tensor | None) -> Tensor:
    if place is None:
        return product.contiguous()
    if place.shape != product.shape:
        raise InputError("the answer has another shape than its place", expected=str(tuple(product.shape)))
    place.copy_(product)
    return place
