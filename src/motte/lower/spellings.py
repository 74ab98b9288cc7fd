"""Operations that the exporter refuses in one form and takes in another: the same result, said differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The exporter knows attention with exactly one axis of heads."""
    plain = torch.ops.aten.scaled_dot_product_attention.default
    if query.dim() == key.dim() == value.dim() == 3:
        mask = kwargs.get("attn_mask", args[0] if args else None)
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(1)
        rest = {key: item for key, item in kwargs.items() if key != "attn_mask"}
        wide = (tensor.unsqueeze(1) for tensor in (query, key, value))
        found: torch.Tensor = plain(*wide, mask, *args[1:], **rest).squeeze(1)
        return found
    found = plain(query, key, value, *args, **kwargs)
    return found


SPELLINGS: Final[Mapping[str, Callable[..., Any]]] = {
    "aten.scaled_dot_product_attention.default": _attention,
}
