"""The linear layers of a model with the shapes that they meet, found by one run on fake tensors: no time, no memory.

Also what such a run tells about memory: what autograd keeps for the backward pass, by storage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from motte.errors import SettingError, UnsupportedError
from motte.linear.operation import LinearOperation
from motte.offload.modules import can_split, operation_of
from motte.offload.rules import is_vector
from motte.offload.split_layer import DTYPES

Inputs = Tensor | tuple[int, ...] | Sequence[Tensor]
"""What a model is called with: a tensor, its shape with the batch in front (float32), or a tuple of tensors."""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """One convolution or linear layer.

    Attributes:
        name: the path of the module that holds the weight.
        operation: its geometry; None where the module has no split form.
        shapes: what it is given, call by call, with the batch, after padding that is done inside.
        element_bytes: of one element of its activation.
        weight: shape of its weight.
        must_stay: why it can never run split; None: it can.
        meets_raw_input: whether what it is given is an input of the model, or no layer ran before it.
        runs_last: whether no layer with a weight runs after it, so that its output gradient tells the labels.
        per_sample: whether the first axis of its input is the batch of the model.
        input_gradient: whether the backward pass goes on through it to its input.
        weight_gradient: whether its weight is trained.
    """

    name: str
    operation: LinearOperation | None
    shapes: tuple[tuple[int, ...], ...]
    element_bytes: int
    weight: tuple[int, ...]
    must_stay: str | None
    meets_raw_input: bool
    runs_last: bool
    per_sample: bool
    input_gradient: bool
    weight_gradient: bool

    @property
    def multiply_adds(self) -> int:
        """Of one forward pass, all calls."""
        return 0 if self.operation is None else sum(self.operation.multiply_adds(shape) for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class Trace:
    """One fake forward pass.

    Attributes:
        layers: in order of registration.
        batch: samples of the pass.
        elsewhere: multiply-adds of products that are no layer of the list: attention, modules without a split form.
        kept: the distinct storages that autograd keeps for the backward pass, each with the layers inside which it was
            kept ("": somewhere else). Parameters, buffers and the inputs of the model are not among them.
        input_bytes: of the inputs of the model.
    """

    layers: tuple[LinearLayer, ...]
    batch: int
    elsewhere: int
    kept: tuple[tuple[frozenset[str], int], ...]
    input_bytes: int

    def kept_bytes(self, split: Collection[str] = ()) -> int:
        """What autograd keeps when the layers ``split`` keep nothing of their input in the plain way."""
        return sum(size for owners, size in self.kept if not owners <= set(split))

    def __getitem__(self, name: str) -> LinearLayer:
        """The layer ``name``.

        Raises:
            SettingError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers)
        raise SettingError("no such convolution or linear layer in the model", got=name, expected=known[:400] or "none")


def trace(model: nn.Module, inputs: Inputs, keywords: Mapping[str, Tensor] | None = None) -> Trace:
    """Run ``model``, in the mode that it is in, on fake tensors like ``inputs``. The model is not changed.

    Raises:
        UnsupportedError: it does not run without numbers, such as one that branches on its data.
    """
    watch = _Watch(model)
    with FlopCounterMode(display=False, custom_mapping=_MORE) as flops, torch.enable_grad():
        given = fake_call(model, inputs, keywords, around=watch)
    layers = watch.layers()
    own = sum(layer.multiply_adds for layer in layers)
    return Trace(
        layers=layers,
        batch=given[0].shape[0] if given and given[0].dim() else 1,
        elsewhere=max(0, flops.get_total_flops() // 2 - own),
        kept=watch.kept(),
        input_bytes=sum(each.numel() * each.element_size() for each in given),
    )


class Around(Protocol):
    """What surrounds a run on fake tensors."""

    def begin(self, inputs: Sequence[Tensor], state: Iterable[Tensor]) -> None:
        """The run is about to begin with these tensors."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(self, *problem: Any) -> None: ...


def fake_call(
    model: nn.Module, inputs: Inputs, keywords: Mapping[str, Tensor] | None, *, around: Around
) -> tuple[Tensor, ...]:
    """Call ``model`` on fake tensors with fake parameters; returns its fake inputs.

    Raises:
        UnsupportedError: it does not run without numbers.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            arguments = tuple(_fake(each) for each in _arguments(inputs))
            named = {name: _fake(each) for name, each in (keywords or {}).items()}
            state = _fake_state(model)
            around.begin((*arguments, *named.values()), state.values())
            with around:
                torch.func.functional_call(model, state, arguments, named)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as problem:
        got = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        hint = "a model that branches on its data has no work that can be told beforehand"
        raise UnsupportedError("the model does not run on shapes alone", got=got, hint=hint) from problem
    return (*arguments, *named.values())


# --- one run --------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Seen:
    module: nn.Module
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    raw: bool = False
    unbatched: bool = False
    input_gradient: bool = False


class _Watch:
    """Hooks on every layer while the run lasts, and on what autograd saves."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parametrised = {
            name: module
            for name, module in model.named_modules()
            if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
        }
        self._seen = {name: _Seen(module) for name, module in self._parametrised.items() if _is_linear(module)}
        self._order: list[str] = []
        self._inside: list[str] = []
        self._raw: set[int] = set()
        self._known: set[int] = set()
        self._storages: dict[int, tuple[set[str], int]] = {}
        self._alive: list[Any] = []
        self._batch = 0
        self._hooks: list[Any] = []
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed)

    def begin(self, inputs: Sequence[Tensor], state: Iterable[Tensor]) -> None:
        self._raw = {_storage(each) for each in inputs}
        self._known = self._raw | {_storage(each) for each in state}
        self._batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 1

    def __enter__(self) -> None:
        for name, module in self._parametrised.items():
            self._hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after(name)))
        self._saving.__enter__()

    def __exit__(self, *problem: Any) -> None:
        self._saving.__exit__(*problem)
        for hook in self._hooks:
            hook.remove()

    def _before(self, name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            first = not self._order
            self._order.append(name)
            given = next((each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor)), None)
            seen = self._seen.get(name)
            if seen is None or given is None:
                return
            self._inside.append(name)
            shape = operator_shape(seen.module, tuple(given.shape))
            if shape is None:
                seen.unbatched = True
            else:
                seen.shapes.append(shape)
            seen.dtypes.add(given.dtype)
            seen.raw |= first or _storage(given) in self._raw
            seen.input_gradient |= given.requires_grad

        return hook

    def _after(self, name: str) -> Any:
        def hook(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            if self._inside and self._inside[-1] == name:
                self._inside.pop()

        return hook

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage in self._known:
            return tensor
        owners, _ = self._storages.setdefault(storage, (set(), tensor.untyped_storage().nbytes()))
        owners.add(self._inside[-1] if self._inside else "")
        # Held until the end, so that no storage gets the identity of one that is gone.
        self._alive.append(tensor)
        return tensor

    def kept(self) -> tuple[tuple[frozenset[str], int], ...]:
        return tuple((frozenset(owners), size) for owners, size in self._storages.values())

    def layers(self) -> tuple[LinearLayer, ...]:
        last = self._order[-1] if self._order else None
        return tuple(self._layer(name, seen, last) for name, seen in self._seen.items())

    def _layer(self, name: str, seen: _Seen, last: str | None) -> LinearLayer:
        weight = seen.module.weight
        operation = operation_of(seen.module) if can_split(seen.module) else None
        return LinearLayer(
            name=name,
            operation=operation,
            shapes=tuple(seen.shapes),
            element_bytes=next(iter(seen.dtypes), torch.float32).itemsize,
            weight=tuple(weight.shape) if isinstance(weight, Tensor) else (),
            must_stay=_must_stay(seen, operation),
            meets_raw_input=seen.raw,
            runs_last=name == last,
            per_sample=all(shape[0] == self._batch for shape in seen.shapes),
            input_gradient=seen.input_gradient,
            weight_gradient=isinstance(weight, Tensor) and weight.requires_grad,
        )


def _must_stay(seen: _Seen, operation: LinearOperation | None) -> str | None:
    if operation is None:
        return f"{type(seen.module).__name__} has no split form"
    if seen.unbatched:
        return "its input has no batch axis"
    if not seen.shapes:
        return "it does not run as a module of its own"
    if not seen.dtypes <= set(DTYPES):
        return "its element type is not split"
    if any(is_vector(operation, shape) for shape in seen.shapes):
        return "one vector per sample has nothing to decompose"
    return None


def _is_linear(module: nn.Module) -> bool:
    convolution = nn.modules.conv._ConvNd
    return isinstance(module, nn.Linear | convolution)


def operator_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that the operator meets, padding that is done inside included; None without a batch axis."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return shape if len(shape) >= 2 else None
    dims = len(module.kernel_size)
    if len(shape) != dims + 2:
        return None
    both, _ = padding_of(module)
    added = [sum(both[2 * axis : 2 * axis + 2]) for axis in reversed(range(len(both) // 2))]
    return (*shape[:2], *(extent + more for extent, more in zip(shape[2:], added or [0] * dims, strict=True)))


def padding_of(module: nn.Module) -> tuple[tuple[int, ...], str]:
    """What is padded inside, before the operator: amounts and mode for ``torch.nn.functional.pad``, () for nothing."""
    if not isinstance(module, nn.modules.conv._ConvNd) or not can_split(module) or module.transposed:
        return (), "constant"
    amounts = tuple(int(amount) for amount in module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # An operator that pads by itself says so.
    return ((), mode) if any(operation_of(module).padding) else (amounts, mode)


def _arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    shape = tuple(each for each in inputs if isinstance(each, int))
    if shape:
        return (torch.empty(shape, device="meta"),)
    return tuple(each for each in inputs if isinstance(each, Tensor))


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype)


def _fake_state(model: nn.Module) -> dict[str, Tensor]:
    # Tied parameters stay tied: each is known by all its names.
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    both = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in both:
        if id(tensor) not in made:
            made[id(tensor)] = _fake(tensor).requires_grad_(tensor.requires_grad)
        state[name] = made[id(tensor)]
    return state


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_MORE: Final = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What torch's own counter leaves out: attention on a CPU."""
