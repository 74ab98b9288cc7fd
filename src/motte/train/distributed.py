"""Several trusted processes on one run: each its own accelerator and its own piece of every batch.

    torchrun --nproc-per-node 2 -m motte train --insecure-plaintext-collectives ...

Gradients are averaged over attested channels (:mod:`motte.train.attested_star`), each process having proved itself to
process 0 and process 0 to it; or over gloo, **unencrypted**: who sees the network between the processes sees sums over
each process's records. So without one of the two a run is refused: :class:`AttestedCollectives`, or the word
``insecure_plaintext_collectives``. Only tensors of numbers cross; torch's collectives of objects, which unpickle, are
not used.

The sum of pieces equals the whole to rounding, but for layers that couple the samples of a batch: BatchNorm takes the
statistics of each process's own piece (torch's SyncBatchNorm needs CUDA).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from motte.errors import LinkError, SettingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from motte.train.attested_star import AttestedCollectives

_TIMEOUT_S: Final = 1800.0
"""How long one process waits for the others at a collective."""
_WHOLE: Final = re.compile(r"[0-9]{1,6}")
_PEER_WORDS: Final = ("gloo", "Connection reset", "Connection closed", "connection closed", "Timed out", "timed out")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run: this one is ``rank``, 0 to ``size - 1``. Alone, nothing is sent.

    ``attested``: what crosses between them does so over attested channels.
    """

    rank: int = 0
    size: int = 1
    attested: bool = False

    @property
    def main(self) -> bool:
        """Whether this process writes checkpoints, logs and results."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum over all processes, value by value, in float64.

        Raises:
            LinkError: another process ended.
        """
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        sums = torch.tensor(values, dtype=torch.float64)
        with self.faults():
            distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes by rank; all have this one's shape and dtype.

        Raises:
            LinkError: another process ended.
        """
        if self.size == 1:
            return [tensor]
        import torch
        from torch import distributed

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.faults():
            distributed.all_gather(found, tensor)
        return found

    def from_main(self, data: bytes) -> bytes:
        """What process 0 has as ``data``; the others give as many bytes of their own. **Crosses in the clear**, unless
        the world was opened with attested collectives.

        Raises:
            LinkError: another process ended.
        """
        if self.size == 1:
            return data
        import torch
        from torch import distributed

        buffer = torch.tensor(list(data), dtype=torch.uint8)
        with self.faults():
            distributed.broadcast(buffer, src=0)
        return bytes(buffer.tolist())

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over all processes; alone, the model itself."""
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Turn what gloo says of a peer that ended or stalled into an error of ours.

        Raises:
            LinkError: so it is.
        """
        try:
            yield
        except RuntimeError as problem:
            if self.size == 1 or not any(word in str(problem) for word in _PEER_WORDS):
                raise
            raise LinkError(
                "another trusted process of this run ended or stalled",
                where=f"process {self.rank} of {self.size}",
                got=str(problem).splitlines()[0][:200],
                hint="see what it said; then continue the run with --resume",
            ) from problem


@contextlib.contextmanager
def open_world(
    *,
    insecure_plaintext_collectives: bool,
    attested: AttestedCollectives | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[World]:
    """The world that torchrun started us in; alone when it did not.

    Args:
        attested: how the processes meet and prove themselves. The number of processes that it states must be ours.

    Raises:
        SettingError: several processes with neither ``attested`` nor ``insecure_plaintext_collectives``, or with both,
            or an environment that is not one of torchrun.
        AttestationError: a process did not prove itself, or the places are not those of the signed configuration.
        LinkError: they cannot find each other.
    """
    if attested is not None and insecure_plaintext_collectives:
        raise SettingError("collectives are attested or plaintext, not both", where="insecure_plaintext_collectives")
    rank, size = stated_place(environment)
    if attested is not None:
        with _attested_world(attested, rank, size) as world:
            yield world
        return
    if size == 1:
        yield World()
        return
    if not insecure_plaintext_collectives:
        raise SettingError(
            "gradients between the trusted processes would cross the host's network unencrypted",
            where=f"{size} processes",
            hint="run one process, give attested collectives, or say --insecure-plaintext-collectives if everybody on "
            "that network may see them",
        )
    from torch import distributed

    try:
        distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=_TIMEOUT_S))
    except (RuntimeError, ValueError) as problem:
        got = str(problem).splitlines()[0][:200]
        raise LinkError(
            "the trusted processes cannot find each other", got=got, hint="start with torchrun"
        ) from problem
    try:
        yield World(rank, size)
    finally:
        distributed.destroy_process_group()


def stated_place(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """The rank of this process and how many there are, as torchrun **says**: a host may say anything.

    Raises:
        SettingError: not a place in a world.
    """
    given = os.environ if environment is None else environment
    size, rank = _number(given, "WORLD_SIZE", 1), _number(given, "RANK", 0)
    if size < 1 or not rank < size:
        raise SettingError("not a place in a world", where="RANK, WORLD_SIZE", got=f"{rank} of {size}")
    return rank, size


@contextlib.contextmanager
def _attested_world(attested: AttestedCollectives, rank: int, size: int) -> Iterator[World]:
    from motte.train.attested_star import open_star

    with open_star(attested, rank=rank, size=size, timeout_s=_TIMEOUT_S) as star:
        if size == 1:
            yield World()
            return
        from motte.train.star_group import leave_star, use_star

        use_star(star)
        try:
            yield World(rank, size, attested=True)
        finally:
            leave_star()


def own_address(address: str, world: World) -> str:
    """The accelerator of this process: ``{rank}`` in the address stands for its rank.

    Raises:
        SettingError: several processes would share one accelerator.
    """
    if world.size > 1 and "{rank}" not in address:
        raise SettingError(
            "each process needs an accelerator of its own", where="accelerator", expected="{rank} in it", got=address
        )
    return address.replace("{rank}", str(world.rank))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    if _WHOLE.fullmatch(text) is None:
        raise SettingError("not a number of torchrun", where=name, got=repr(text)[:80])
    return int(text)
