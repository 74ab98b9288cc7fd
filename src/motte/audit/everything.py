"""The ceiling: a plain model whose every convolution and linear layer tells an accelerator all that it meets.

What ``accelerator-only`` hands over, in the same frames as a split model's: whole activations, output gradients and
weights of all layers, the first and the last included. The model computes as it always does; the answers are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from motte.offload.layers import operator_shape, padding_of
from motte.offload.modules import can_split, operation_of
from motte.offload.protect import parametrised
from motte.offload.split_layer import DTYPES

if TYPE_CHECKING:
    from motte.accelerator.interface import Accelerator


@contextmanager
def telling(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """While the block lasts, every layer of ``model`` that has a split form tells ``accelerator`` what it meets.

    A call of the model is a step. A layer is silent where it meets no batch axis, or a dtype that cannot cross.
    """
    teller = _Teller(accelerator)
    hooks: list[Any] = [model.register_forward_pre_hook(teller.begin, with_kwargs=True, prepend=True)]
    for name, module in parametrised(model).items():
        if can_split(module):
            hooks.append(module.register_forward_hook(teller.watcher(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Teller:
    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._step = 0
        self._weights: dict[str, int] = {}

    def begin(self, _module: nn.Module, _arguments: Any, _keywords: Any) -> None:
        self._step += 1

    def watcher(self, name: str) -> Any:
        def ran(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            x = arguments[0] if arguments else None
            if isinstance(x, Tensor) and isinstance(output, Tensor):
                self._tell(name, module, x.detach(), output)

        return ran

    def _tell(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        if operator_shape(module, tuple(x.shape)) is None or x.dtype not in DTYPES:
            return
        accelerator, step = self._accelerator, self._step
        amounts, mode = padding_of(module)
        given = (functional.pad(x, amounts, mode=mode) if amounts else x).contiguous()
        accelerator.register(name, operation_of(module))
        weight = module.get_parameter("weight")
        if self._weights.get(name) != weight._version:
            self._weights[name] = weight._version
            accelerator.put_weight(name, weight.detach())
        hold = output.requires_grad
        accelerator.forward(name, given, step=step, hold=hold).result()
        if not hold:
            return
        held = accelerator.last_held()

        def back(gradient: Tensor) -> None:
            sent = gradient.detach().contiguous()
            accelerator.backward(name, held, sent, step=step, need_input=True, need_weight=True).result()
            accelerator.release([held])

        output.register_hook(back)
