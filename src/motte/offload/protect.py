"""``motte.protect``: a model whose convolutions and linear layers run split, in any training loop.

The result has the same ``state_dict`` keys and the *same parameter and buffer objects* as the model it was made from:
a trained model is carried over, an optimizer that knew the parameters still does, and the plain model stays usable
beside it, for comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from motte.accelerator.interface import Accelerator
from motte.errors import SettingError, TrustError, UnsupportedError
from motte.offload.cautions import Cautions
from motte.offload.confidential_gpu import ConfidentialGpu, ProvedGpu, on_gpu
from motte.offload.modules import SplitModule, can_split, make_split, operation_of
from motte.offload.rules import Guard, HalfRule, ResearchBooks, Rule, SplitRule
from motte.offload.session import Session
from motte.offload.settings import Asymmetric, LowRank, Residual, Scheme


@dataclass(frozen=True, slots=True)
class LayerSide:
    """Where a parametrised layer runs, and why it stays inside."""

    name: str
    side: Literal["inside", "split", "confidential-gpu"]
    reason: str


def protect(
    model: nn.Module,
    scheme: Scheme | ConfidentialGpu,
    *,
    accelerator: Accelerator | str | None = None,
    example_input: Any = None,
    noise_key: bytes | None = None,
    gpu: ProvedGpu | None = None,
) -> nn.Module:
    """A module like ``model`` whose linear operators run as ``scheme`` says.

    Args:
        model: on the CPU, in trusted memory. It is not changed.
        scheme: ``Asymmetric(...)``, a research mode, or ``ConfidentialGpu(...)``.
        accelerator: an :class:`Accelerator` or an address (``unix:PATH``, ``tcp:HOST:PORT``). Only Asymmetric has one.
        example_input: arguments of one call (a tensor, or a tuple). With it the first and the last layer are those that
            run first and last; without it those that are registered first and last, and a model in which others run
            first or last is found out when it runs.
        noise_key: 32 secret bytes of a session to be continued, see :meth:`Session.state`.
        gpu: for ``ConfidentialGpu``: what proves that the GPU belongs to the trusted side. Nothing else takes one.

    Returns:
        The module, with the attributes ``motte_session`` (:class:`Session`; None where nothing leaves) and
        ``motte_layers`` (a tuple of :class:`LayerSide`).

    Raises:
        SettingError: an unknown layer, a contradiction in the scheme, a model that is protected already.
        UnsupportedError: a model that is not in trusted memory, or whose weights are not there yet.
        AttestationError: ``ConfidentialGpu`` without a proved GPU (check U-1).
    """
    _refuse(model, scheme, accelerator)
    if isinstance(scheme, ConfidentialGpu):
        return _on_gpu(model, scheme, gpu)
    if gpu is not None:
        raise SettingError("only ConfidentialGpu runs on a GPU of the trusted side", got=type(scheme).__name__)
    protected = _copy_sharing_parameters(model)
    layers = parametrised(protected) if example_input is None else _in_order_of_execution(protected, example_input)
    sides = place(layers, scheme)
    guard = Guard()
    session: Session | None = None
    books = ResearchBooks()
    if isinstance(scheme, Asymmetric):
        _refuse_shared(layers, sides, scheme)
        session = Session(scheme, _connected(accelerator), noise_key=noise_key)
        session.cautions = Cautions(scheme)
        session.cautions.placed([side.name for side in sides if side.side == "split"])
    position = 0
    for side in sides:
        module = layers[side.name]
        if side.side == "inside":
            module.register_forward_pre_hook(_Noting(guard, side.name))
            continue
        operation = operation_of(module)
        rule: Rule
        if isinstance(scheme, Asymmetric) and session is not None:
            split = session.layer(side.name, operation, position)
            rule = SplitRule(split, guard, may_see_raw=scheme.offloaded_layers is not None)
        elif isinstance(scheme, LowRank | Residual):
            rule = HalfRule(scheme, operation, side.name, position, books)
        make_split(module, operation, rule)
        position += 1
    _hook_root(protected, guard, session or books, chosen=scheme.trusted_layers is not None or _named(scheme))
    object.__setattr__(protected, "motte_session", session)
    object.__setattr__(protected, "motte_layers", sides)
    return protected


def _on_gpu(model: nn.Module, scheme: ConfidentialGpu, gpu: ProvedGpu | None) -> nn.Module:
    protected = _copy_sharing_parameters(model)
    there = on_gpu(protected, scheme, gpu)
    marked = "SIMULATED: " if gpu is not None and gpu.simulated else ""
    sides = tuple(
        LayerSide(name, "confidential-gpu", f"{marked}a proved GPU of the trusted side")
        if name in there
        else LayerSide(name, "inside", "not placed there")
        for name in parametrised(protected)
    )
    object.__setattr__(protected, "motte_session", None)
    object.__setattr__(protected, "motte_layers", sides)
    return protected


def parametrised(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold a weight of two or more dimensions themselves, by name, in the order of registration.

    Norms, whose weights are vectors, are not among them. A module that stands at two places has its first name.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    }


def place(layers: Mapping[str, nn.Module], scheme: Scheme) -> tuple[LayerSide, ...]:
    """Which of ``layers``, in their order, run split under ``scheme``. Unknown means inside.

    Raises:
        SettingError: the scheme names a layer that is not there, cannot be split, or stands on both sides.
    """
    trusted = scheme.trusted_layers
    named = scheme.offloaded_layers if isinstance(scheme, Asymmetric) else None
    _refuse_unknown(layers, trusted or (), "trusted_layers")
    _refuse_unknown(layers, named or (), "offloaded_layers")
    names = list(layers)
    if trusted is None and named is None:
        trusted = tuple({names[0], names[-1]}) if names else ()
    sides = []
    for name, module in layers.items():
        if named is not None and name in named:
            if name in (trusted or ()):
                raise SettingError("a layer is both trusted and offloaded", got=name)
            if not can_split(module):
                raise SettingError("this layer cannot run split", where=name, got=type(module).__name__)
            sides.append(LayerSide(name, "split", "named"))
        elif named is not None:
            sides.append(LayerSide(name, "inside", "not named"))
        elif name in (trusted or ()):
            reason = "trusted layer" if scheme.trusted_layers is not None else "first or last parametrised layer"
            sides.append(LayerSide(name, "inside", reason))
        elif not can_split(module):
            sides.append(LayerSide(name, "inside", f"{type(module).__name__} has no split form"))
        else:
            sides.append(LayerSide(name, "split", "convolution or linear layer"))
    return tuple(sides)


class _Noting:
    """A pre-hook that tells the guard that a layer ran inside."""

    def __init__(self, guard: Guard, name: str) -> None:
        self._guard = guard
        self._name = name

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        self._guard.ran(self._name, split=False)


def _named(scheme: Scheme) -> bool:
    return isinstance(scheme, Asymmetric) and scheme.offloaded_layers is not None


def _refuse(model: nn.Module, scheme: Scheme | ConfidentialGpu, accelerator: object) -> None:
    if not isinstance(scheme, Scheme | ConfidentialGpu):
        raise SettingError(
            "unknown scheme", expected="Asymmetric, LowRank, Residual or ConfidentialGpu", got=repr(scheme)[:200]
        )
    if isinstance(scheme, Asymmetric) and accelerator is None:
        raise SettingError("the asymmetric scheme needs an accelerator", hint='accelerator="unix:PATH", or an object')
    if not isinstance(scheme, Asymmetric) and accelerator is not None:
        raise SettingError("nothing leaves under this scheme, so it takes no accelerator", got=repr(accelerator)[:200])
    if any(isinstance(module, SplitModule) for module in model.modules()):
        raise SettingError("the model is protected already")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedError("a weight has no shape yet", where=name, hint="run the lazy module once")
        if parameter.device.type != "cpu":
            raise UnsupportedError(
                "the model is not in trusted memory", where=name, expected="cpu", got=str(parameter.device)
            )


def _refuse_unknown(layers: Mapping[str, nn.Module], names: Sequence[str], setting: str) -> None:
    for name in names:
        if name not in layers:
            raise SettingError(f"{setting} names no layer of the model", got=name, expected=", ".join(layers)[:400])


def _refuse_shared(layers: Mapping[str, nn.Module], sides: Sequence[LayerSide], scheme: Asymmetric) -> None:
    """A weight that a trusted layer trains too would leave with that layer's unprivatised gradient in it."""
    if scheme.noise is None or scheme.noise.update is None:
        return
    inside = {id(p): side.name for side in sides if side.side == "inside" for p in layers[side.name].parameters()}
    for side in sides:
        other = inside.get(id(layers[side.name].weight)) if side.side == "split" else None
        if other is not None:
            raise SettingError(
                "a weight is shared by a split and a trusted layer, so its updates cannot be privatised",
                got=f"{side.name} and {other}",
                hint="name both in trusted_layers",
            )


def _copy_sharing_parameters(model: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _in_order_of_execution(model: nn.Module, example_input: Any) -> dict[str, nn.Module]:
    """The parametrised layers in the order in which they first run; those that do not run come before the last one."""
    known, ran = parametrised(model), []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _arguments, name=name: ran.append(name))
        for name, module in known.items()
    ]
    modes = {module: module.training for module in model.modules()}
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        # In eval mode, so that a trial run changes no running statistic.
        model.eval()
        with torch.no_grad():
            model(*arguments)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    first = list(dict.fromkeys(ran))
    last = ran[-1:]
    silent = [name for name in known if name not in first]
    order = [*(name for name in first if name not in last), *silent, *last]
    return {name: known[name] for name in order}


def _connected(accelerator: Accelerator | str | None) -> Accelerator:
    if isinstance(accelerator, str):
        from motte.accelerator.connect import connect

        return connect(accelerator)
    if accelerator is None:
        raise SettingError("the asymmetric scheme needs an accelerator")
    return accelerator


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _hook_root(model: nn.Module, guard: Guard, books: Session | ResearchBooks, *, chosen: bool) -> None:
    def begin(_module: nn.Module, arguments: Any, keywords: Any) -> None:
        books.begin_step()
        guard.begin(list(_tensors([arguments, keywords])))

    def end(module: nn.Module, _arguments: Any, _output: Any) -> None:
        # The gradient that reaches the last layer is (prediction - label): outside, it would give every label away.
        if not module.training or guard.last_ran is None or not guard.last_ran[1]:
            return
        if not chosen:
            raise TrustError(
                "the layer that ran last is split, and its output gradient would give the labels away",
                where=guard.last_ran[0],
                hint="give protect() an example_input, or name the last layer in trusted_layers",
            )
        if isinstance(books, Session) and books.cautions is not None:
            books.cautions.ran_last(guard.last_ran[0])

    model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    model.register_forward_hook(end)
