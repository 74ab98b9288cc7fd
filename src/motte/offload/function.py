"""The autograd function of a split layer: one for every family of linear operators.

What autograd saves is saved through it, so that version checks and ``torch.utils.checkpoint`` see it. A checkpoint's
second forward pass releases the very bytes of the first, since it belongs to the same step.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from motte.offload.decompose import Principal
from motte.offload.split_layer import Piece, SplitLayer


class SplitProduct(torch.autograd.Function):
    """y = op(x, weight) with gradients to both; no bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: SplitLayer, keep: bool) -> Tensor:
        """``x`` and ``weight`` as :meth:`SplitLayer.forward` takes them."""
        y, kept = layer.forward(x, weight, keep=keep)
        ctx.layer = layer
        ctx.shape = tuple(x.shape)
        if kept is None:
            ctx.save_for_backward(weight)
        else:
            ctx.pieces = [(piece.shape, piece.held) for piece in kept]
            tensors = ((piece.principal.left, piece.principal.right, piece.sent) for piece in kept)
            ctx.save_for_backward(weight, *itertools.chain.from_iterable(tensors))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients to x and weight."""
        weight, *saved = ctx.saved_tensors
        need_input, need_weight = ctx.needs_input_grad[:2]
        if not saved:
            # A batch of nothing: nothing left, and nothing has a gradient.
            to_input = gradient.new_zeros(ctx.shape) if need_input else None
            return to_input, torch.zeros_like(weight) if need_weight else None, None, None
        kept = tuple(
            Piece(Principal(left, right), shape, sent, held)
            for (shape, held), (left, right, sent) in zip(ctx.pieces, zip(*[iter(saved)] * 3, strict=True), strict=True)
        )
        layer: SplitLayer = ctx.layer
        to_input, to_weight = layer.backward(
            kept, weight, gradient.contiguous(), need_input=need_input, need_weight=need_weight
        )
        return to_input, to_weight, None, None


def split_product(layer: SplitLayer, x: Tensor, weight: Tensor) -> Tensor:
    """The product of a split layer, differentiable once."""
    keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return SplitProduct.apply(x, weight, layer, keep)  # type: ignore[no-any-return, no-untyped-call]
