"""How much trusted memory a model needs for one batch, computed from shapes before anything starts.

Parameters, gradients, optimizer state, what autograd keeps and what split layers keep are exact for what they count.
The workspace is an estimate: the layer that needs most while it runs. Not counted: the interpreter and its libraries
(some 300 MiB), the caching of the allocator, and the loader's batches beyond one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from motte.errors import ResourceError
from motte.limits import GIB, KIB, MIB
from motte.offload.layers import Inputs, LinearLayer, Trace, fake_call, trace
from motte.offload.placement import Placement, most_rank, place_all, planned_rank
from motte.offload.settings import Asymmetric

_SAID: Final = {
    "parameters": "parameters and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "weight_copies": "copies of split weights",
    "activations": "activations",
    "principal": "principal parts",
    "residuals": "retained residuals",
    "workspace": "workspace",
}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of trusted memory.

    Attributes:
        parameters: parameters and buffers of the model, tied ones once.
        gradients: one for each trained parameter.
        optimizer: ``optimizer_states`` tensors for each trained parameter.
        weight_copies: of the weights of split layers, by which a change is noticed (training only).
        activations: kept for the backward pass, the inputs of the model included; for inference the most that is alive
            at a time.
        principal: the principal parts of the activations of split layers, kept for the backward pass.
        residuals: what was sent out, kept inside to check the answers of the backward pass.
        workspace: the most that one layer needs while it runs.
    """

    parameters: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    principal: int
    residuals: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(int(getattr(self, each.name)) for each in fields(self))

    def breakdown(self) -> str:
        """``activations 1.2 GiB, parameters 44.7 MiB, ...``, largest first, nothing that is 0."""
        sizes = {each.name: int(getattr(self, each.name)) for each in fields(self)}
        ordered = sorted((item for item in sizes.items() if item[1]), key=lambda item: -item[1])
        return ", ".join(f"{_SAID[name]} {_size(size)}" for name, size in ordered)


def training_memory(
    model: nn.Module,
    scheme: Asymmetric | None,
    input_shape: Inputs,
    batch: int,
    *,
    optimizer_states: int = 1,
    dtype_bytes: int = 4,
    placement: Placement | None = None,
    keywords: Mapping[str, Tensor] | None = None,
) -> MemoryNeed:
    """What training ``model`` needs inside.

    Args:
        scheme: None: everything runs inside, in plain form.
        input_shape: of one input without its batch, or example tensors, which say their batch themselves.
        batch: samples of one step; ignored where tensors are given.
        optimizer_states: tensors of the size of a parameter that the optimizer keeps: 0 for SGD, 1 with momentum, 2 for
            Adam.
        dtype_bytes: of one element of gradients and optimizer state.
        placement: which layers are split; None: :func:`motte.offload.placement.place_all`.

    Raises:
        UnsupportedError: the model does not run on shapes alone.
    """
    inputs = _with_batch(input_shape, batch)
    # A forward pass of a training step, whatever mode the model is in now.
    seen = _traced(model, inputs, keywords, training=True)
    split = _split_layers(seen, scheme, placement)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needs = [_SplitNeed.of(layer, position, scheme) for position, layer in enumerate(split)] if scheme else []
    return MemoryNeed(
        parameters=_stored_bytes(model),
        gradients=trained * dtype_bytes,
        optimizer=trained * dtype_bytes * optimizer_states,
        weight_copies=sum(math.prod(layer.weight) * layer.element_bytes for layer in split),
        activations=seen.kept_bytes([layer.name for layer in split]) + seen.input_bytes,
        principal=sum(need.principal for need in needs),
        residuals=sum(need.residual for need in needs),
        workspace=max([need.workspace for need in needs] + [_plain_workspace(layer) for layer in seen.layers] + [0]),
    )


def inference_memory(
    model: nn.Module,
    scheme: Asymmetric | None,
    input_shape: Inputs,
    batch: int,
    *,
    placement: Placement | None = None,
    keywords: Mapping[str, Tensor] | None = None,
) -> MemoryNeed:
    """What answering one batch needs inside; arguments as for :func:`training_memory`.

    Raises:
        UnsupportedError: the model does not run on shapes alone.
    """
    inputs = _with_batch(input_shape, batch)
    seen = _traced(model, inputs, keywords, training=False)
    split = _split_layers(seen, scheme, placement)
    needs = [_SplitNeed.of(layer, position, scheme) for position, layer in enumerate(split)] if scheme else []
    return MemoryNeed(
        parameters=_stored_bytes(model),
        gradients=0,
        optimizer=0,
        weight_copies=0,
        activations=_peak_alive(model, inputs, keywords),
        principal=max([need.principal for need in needs] + [0]),
        residuals=max([need.residual for need in needs] + [0]),
        workspace=max([need.workspace for need in needs] + [0]),
    )


def refuse_above(need: MemoryNeed, limit_bytes: int) -> None:
    """Refuse before the start what does not fit.

    Raises:
        ResourceError: ``need`` is above ``limit_bytes``; says of what it is made and what helps.
    """
    if need.total <= limit_bytes:
        return
    raise ResourceError(
        "this does not fit into the stated memory",
        expected=f"at most {_size(limit_bytes)}",
        got=f"{_size(need.total)}: {need.breakdown()}",
        hint=_what_helps(need),
    )


def _what_helps(need: MemoryNeed) -> str:
    ways = ["a smaller batch"]
    if need.gradients:
        ways.append("torch.utils.checkpoint on the largest blocks")
    if need.principal:
        ways.append("a lower rank")
    if need.residuals:
        ways.append("residual_dtype='bfloat16'")
    fixed = need.parameters + need.gradients + need.optimizer + need.weight_copies
    if 2 * fixed > need.total:
        ways.append("an optimizer with less state" if need.optimizer else "a smaller model")
    return ", ".join(ways[:-1]) + f" or {ways[-1]}" if len(ways) > 1 else ways[0]


# --- split layers ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _SplitNeed:
    principal: int
    residual: int
    workspace: int

    @staticmethod
    def of(layer: LinearLayer, position: int, scheme: Asymmetric | None) -> _SplitNeed:
        operation = layer.operation
        if scheme is None or operation is None:
            return _SplitNeed(0, 0, 0)
        size = layer.element_bytes
        wire = {"same": size, "float32": 4, "bfloat16": 2}[scheme.residual_dtype]
        principal = residual = workspace = 0
        for shape in layer.shapes:
            count, given = shape[0], math.prod(shape)
            made = math.prod(operation.output_shape(shape))
            rank = planned_rank(scheme.rank, position, most_rank(operation, shape))
            channels = operation.in_channels
            principal += count * rank * (channels + given // max(1, count) // channels) * size
            residual += given * wire
            # Remainder and residual, the same again under noise; both halves of the product; each sample's weights.
            clean = (2 + (scheme.noise is not None)) * given * max(size, 4)
            own = count * rank * math.prod(operation.weight_shape) // max(1, operation.in_channels // operation.groups)
            workspace = max(workspace, clean + made * (size + max(size, 4)) + own * max(size, 4))
        return _SplitNeed(principal, residual, workspace)


def _split_layers(seen: Trace, scheme: Asymmetric | None, placement: Placement | None) -> list[LinearLayer]:
    if scheme is None:
        return []
    chosen = place_all(seen.layers, scheme) if placement is None else placement
    return [seen[name] for name in chosen.split]


def _plain_workspace(layer: LinearLayer) -> int:
    """Output gradient and input gradient of one layer at a time."""
    if layer.operation is None:
        return 0
    sizes = [math.prod(shape) + math.prod(layer.operation.output_shape(shape)) for shape in layer.shapes]
    return max(sizes, default=0) * layer.element_bytes


# --- the plain model ------------------------------------------------------------------------------------------------
def _stored_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _with_batch(input_shape: Inputs, batch: int) -> Inputs:
    if isinstance(input_shape, Tensor):
        return input_shape
    extents = [each for each in input_shape if isinstance(each, int)]
    return (batch, *extents) if extents else input_shape


def _traced(model: nn.Module, inputs: Inputs, keywords: Mapping[str, Tensor] | None, *, training: bool) -> Trace:
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        return trace(model, inputs, keywords)
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most that were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._known: set[int] = set()
        self._parameters: list[Tensor] = []

    def begin(self, inputs: Sequence[Tensor], state: Iterable[Tensor]) -> None:
        """Parameters and buffers are counted elsewhere."""
        self._known = {int(each.untyped_storage()._cdata) for each in state}
        self._parameters = list(state)
        for each in inputs:
            self._see(each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self._see(each)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _peak_alive(model: nn.Module, inputs: Inputs, keywords: Mapping[str, Tensor] | None) -> int:
    """Most bytes of activations alive at a time in a forward pass without autograd, the inputs included."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        alive = _Alive()
        with torch.no_grad():
            fake_call(model, inputs, keywords, around=alive)
        return alive.most
    finally:
        for module, mode in modes.items():
            module.training = mode


def _size(count: int) -> str:
    for scale, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"
