"""The calculator on a CUDA device: copies in, products and copies out on a stream each, so that they overlap.

The client's thread only queues work; a thread of the server waits for it and answers. What the next request brings is
copied in while the present one computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from motte.accelerator.calculator import Calculator, Work

_LOG = logging.getLogger("motte")


class CudaWork(Work):
    """Work that is queued on a device."""

    __slots__ = ("_began", "_copied", "_ended")

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        began: torch.cuda.Event,
        ended: torch.cuda.Event,
        copied: torch.cuda.Event,
    ) -> None:
        super().__init__(tensors)
        self._began, self._ended, self._copied = began, ended, copied

    def wait(self) -> None:
        """See :class:`Work`."""
        self._copied.synchronize()
        self.compute_ns = int(self._began.elapsed_time(self._ended) * 1e6)


class CudaCalculator(Calculator):
    """Like :class:`Calculator`, on a CUDA device."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        # Split sums in bfloat16 would round what a product in bfloat16 is allowed to keep.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._in = torch.cuda.Stream(self.device)
        self._compute = torch.cuda.Stream(self.device)
        self._out = torch.cuda.Stream(self.device)
        self._registered: Tensor | None = None
        self.pinned = False
        """Whether the shared memory is registered with the device, so that copies need no detour."""

    def share(self, region: Tensor) -> None:
        """Register the shared memory with the device. Where that fails, copies go through a buffer, and it is said."""
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostRegister(region.data_ptr(), region.nbytes, 0)
        self.pinned = int(status) == 0
        if self.pinned:
            self._registered = region
        else:
            _LOG.warning(
                "shared memory could not be registered with %s (status %s): slower copies", self.device, status
            )

    def close(self) -> None:
        """Forget everything, and unregister the shared memory."""
        torch.cuda.synchronize(self.device)
        super().close()
        region, self._registered = self._registered, None
        if region is not None:
            torch.cuda.cudart().cudaHostUnregister(region.data_ptr())

    def _take(self, tensor: Tensor, *, keep: bool) -> Tensor:
        with torch.cuda.stream(self._in):
            # From registered memory this returns at once; the client keeps the place as it is until a later answer.
            # From other memory CUDA returns when it has made a copy of its own.
            here = tensor.to(self.device, non_blocking=True)
        # Used on the other stream too: its memory must not be given to somebody else before that is done.
        here.record_stream(self._compute)
        self._compute.wait_stream(self._in)
        return here

    def _start(self, compute: Callable[[], list[Tensor]], into: Sequence[Tensor | None]) -> Work:
        began, ended, copied = (torch.cuda.Event(enable_timing=timed) for timed in (True, True, False))
        with torch.cuda.stream(self._compute):
            products = [each.contiguous() for each in self._timed(compute, began, ended)]
        self._out.wait_stream(self._compute)
        answers = []
        with torch.cuda.stream(self._out):
            for product, place in zip(products, into, strict=True):
                product.record_stream(self._out)
                target = (
                    place if place is not None else torch.empty(product.shape, dtype=product.dtype, pin_memory=True)
                )
                answers.append(target.copy_(product, non_blocking=True))
            copied.record(self._out)
        return CudaWork(answers, began=began, ended=ended, copied=copied)

    def _timed(
        self, compute: Callable[[], list[Tensor]], began: torch.cuda.Event, ended: torch.cuda.Event
    ) -> list[Tensor]:
        # The first copy in has been queued only when ``compute`` takes its input; until then this stream is idle.
        began.record(self._compute)
        products = compute()
        ended.record(self._compute)
        return products
