"""What a run has cost each private record so far, as :mod:`motte.offload.accounting` counts it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from torch import nn

from motte.offload.accounting import DELTA, TrainingRun
from motte.offload.releases import KINDS, Kind
from motte.offload.settings import Energy, Entropy

if TYPE_CHECKING:
    from motte.offload.session import Session
    from motte.offload.statement import PrivacyStatement
    from motte.train.data import DataSet
    from motte.train.distributed import World
    from motte.train.schemes import Placed
    from motte.train.settings import TrainSettings

_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, slots=True)
class Spent:
    """The privacy that a run cost.

    Attributes:
        epsilon: None where nothing leaves, so that there is nothing to count; infinite where nothing is promised.
        because: one sentence: why it is none or infinite, or at which delta and adjacency it holds.
        statement: the whole accounting; None where none was made.
    """

    epsilon: float | None
    because: str
    statement: PrivacyStatement | None = None

    def __str__(self) -> str:
        if self.epsilon is None:
            return f"nothing spent: {self.because}"
        if math.isinf(self.epsilon):
            return f"infinite, because {self.because}"
        return f"{self.epsilon:.4g} {self.because}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite epsilon is the text ``infinite``."""
        epsilon = "infinite" if self.epsilon is not None and math.isinf(self.epsilon) else self.epsilon
        statement = None if self.statement is None else self.statement.to_json()
        return {"epsilon": epsilon, "because": self.because, "statement": statement}


def spent_privacy(settings: TrainSettings, data: DataSet, place: Placed, batch_size: int, world: World) -> Spent:
    """Count what has left in this run up to now, the steps before a resume included.

    Not counted, and visible to a host: how long things took, and at which epochs ``best`` was written.

    Args:
        batch_size: samples of a whole batch.

    Raises:
        SettingError: figures out of any range.
    """
    session = place.session
    if settings.scheme == "accelerator":
        return Spent(math.inf, "inputs, labels and weights lie open on the device")
    if world.size > 1 and not world.attested:
        return Spent(math.inf, "gradients between the trusted processes cross the network unencrypted")
    if data.private and settings.insecure_plaintext_log and settings.log_dir is not None:
        return Spent(math.inf, "loss and accuracy on the private data are logged in the clear")
    if session is None:
        return Spent(None, f"nothing leaves under the scheme {settings.scheme}")
    if not session.layers:
        return Spent(None, "no layer is split, so nothing leaves")
    if world.size > 1:
        # Each accelerator is sent every update of the weights under noise of its own.
        return Spent(math.inf, "releases to several accelerators are not added up")
    if session.step == 0:
        return Spent(0.0, "before the first step")
    batch = min(batch_size, len(data.train))
    run = TrainingRun(
        # A last batch that is not full is left out, so that an epoch uses this many records at most.
        records=len(data.train) // batch * batch,
        batch_size=batch,
        epochs=1,
        offloaded_layers=len(session.layers),
        noise=session.scheme.noise,
        coupled_samples=batch if _couples(place.plain, session) else 1,
        delta=DELTA if settings.delta is None else settings.delta,
    )
    statement = run.so_far(session.step, repeated=_repeated(session))
    if statement.infinite_because is not None:
        return Spent(math.inf, statement.infinite_because, statement)
    return Spent(statement.epsilon, f"at delta {statement.delta:g}, adjacency {statement.adjacency}", statement)


def _couples(model: nn.Module, session: Session) -> bool:
    """Whether one record can change what another one of its batch releases."""
    batch_rank = isinstance(session.scheme.rank, Energy | Entropy)
    return batch_rank or any(isinstance(module, _BATCH_NORMS) for module in model.modules())


def _repeated(session: Session) -> dict[Kind, int]:
    """Releases beyond one a layer and step, from the books: layers called twice, steps run again on other bytes."""
    expected = len(session.layers) * session.step
    found = {}
    for kind in cast("tuple[Kind, ...]", KINDS):
        total = sum(count.total for (_, each), count in session.releases.counts.items() if each == kind)
        found[kind] = max(0, total - expected)
    return found
