"""torch's collectives over a :class:`motte.train.attested_star.Star`, for DistributedDataParallel and the loop.

torch takes a process group that is written in Python ("third-party backends"); what the training loop and
DistributedDataParallel call is here, and everything else raises in torch's own base class. Tensors of numbers cross as
their bytes; nothing is unpickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, distributed
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import HashStore, ProcessGroup, Work
from torch.futures import Future

from motte.errors import UnsupportedError

if TYPE_CHECKING:
    from motte.train.attested_star import Star

BACKEND: Final = "motte-attested"


def use_star(star: Star) -> None:
    """Make ``star`` the default process group of this process, until :func:`leave_star`."""

    def make(store: object, rank: int, size: int, timeout: object) -> StarGroup:
        return StarGroup(star)

    distributed.Backend.register_backend(BACKEND, make, devices=["cpu"])
    # torch wants a store in order to meet the others; they have met already, and this one is in our memory.
    distributed.init_process_group(BACKEND, store=HashStore(), rank=star.rank, world_size=star.size)


def leave_star() -> None:
    """Have no default process group any more. The star stays open."""
    distributed.destroy_process_group()


class StarGroup(ProcessGroup):
    """Blocking collectives of CPU tensors; the work that each returns is done already.

    Raises:
        UnsupportedError: a tensor elsewhere, or another reduction than the sum. LinkError: what the star raises.
    """

    def __init__(self, star: Star) -> None:
        super().__init__(star.rank, star.size)  # type: ignore[call-arg]  # torch's stub leaves this overload out
        self._star = star

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:  # type: ignore[override]  # the overload that torch calls
        """Each of ``tensors`` becomes its sum over all processes."""
        if opts is not None and opts.reduceOp != distributed.ReduceOp.SUM:
            raise UnsupportedError("a reduction other than the sum", got=str(opts.reduceOp))
        for tensor in tensors:
            flat = _flat(tensor)

            def add(theirs: memoryview, flat: Tensor = flat) -> None:
                if len(theirs):
                    flat.add_(torch.frombuffer(theirs, dtype=flat.dtype))

            self._star.sum(_bytes(flat), add)
            _put_back(tensor, flat)
        return _done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None) -> Work:  # type: ignore[override]  # the overload that torch calls
        """``outputs[i]`` becomes ``inputs[i]`` of every process."""
        for found, own in zip(outputs, inputs, strict=True):
            for tensor, piece in zip(found, self._star.gather(_bytes(_flat(own))), strict=True):
                if len(piece):
                    tensor.copy_(torch.frombuffer(piece, dtype=own.dtype).view(own.shape))
        return _done(outputs)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:  # type: ignore[override]  # the overload that torch calls
        """Each of ``tensors`` becomes process 0's."""
        if opts is not None and opts.rootRank != 0:
            raise UnsupportedError("a broadcast from another process than 0", got=str(opts.rootRank))
        for tensor in tensors:
            flat = _flat(tensor)
            self._star.spread(_bytes(flat))
            _put_back(tensor, flat)
        return _done(tensors)

    def barrier(self, opts: object = None) -> Work:
        """All processes have come here."""
        self._star.gather(memoryview(b""))
        return _done(None)

    def getBackendName(self) -> str:
        """Its name."""
        return BACKEND


def _flat(tensor: Tensor) -> Tensor:
    """``tensor`` with one dimension: its own memory where that is contiguous, else a copy."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise UnsupportedError("only dense tensors of the CPU cross between trusted processes", got=str(tensor.device))
    return tensor.detach().contiguous().reshape(-1)


def _bytes(flat: Tensor) -> memoryview:
    """The memory of ``flat``, writable."""
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def _put_back(tensor: Tensor, flat: Tensor) -> None:
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))


def _done(value: object) -> Work:
    future: Future[Any] = Future()
    future.set_result(value)
    work: Work = _distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]  # not in its stub
    return work
