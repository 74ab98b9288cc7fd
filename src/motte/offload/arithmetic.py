"""How the trusted side computes: without autograd, and in the dtype that is written down, whatever surrounds the call.

Under ``torch.autocast`` a float32 product is quietly rounded to bfloat16. A residual, a check of integrity or a clip
that is computed so would no longer be what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

import torch
from torch import Tensor

from motte.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16)
"""Of what the schemes compute on."""


def as_written(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` without autograd and without autocast."""

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return plain


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16, which is for storing and sending; the dtype itself otherwise."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


def known_dtype(tensor: Tensor, what: str) -> None:
    """Refuse what no scheme computes on.

    Raises:
        InputError: neither float32, float64 nor bfloat16.
    """
    if tensor.dtype not in DTYPES:
        expected = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise InputError(f"{what} of an unknown dtype", expected=expected, got=str(tensor.dtype))
