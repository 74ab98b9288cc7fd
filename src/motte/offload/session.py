"""A session: one scheme, one accelerator, the noise key, the step counter and the books of what left.

A step is one forward pass of the root module, and all that follows from it. A step that failed keeps its number when
it is tried again: noise is derived from step, layer and the clean bytes, so that the second try sends the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from motte.accelerator.interface import Accelerator
from motte.errors import SettingError
from motte.linear.operation import LinearOperation
from motte.offload.held import Held
from motte.offload.noise import Noise
from motte.offload.releases import Kind, ReleaseCount, Releases
from motte.offload.settings import Asymmetric
from motte.offload.split_layer import SplitLayer
from motte.offload.timeline import Timeline

if TYPE_CHECKING:
    from motte.offload.cautions import Cautions


@dataclass(frozen=True)
class SessionState:
    """What a checkpoint must keep, **secret**: with the noise key the noise can be taken off what was released."""

    noise_key: bytes
    step: int
    releases: Mapping[tuple[str, Kind], ReleaseCount]

    def __repr__(self) -> str:
        return f"SessionState(step={self.step}, noise_key=...)"


class Session:
    """Everything that the split layers of one model share. Belongs to one thread at a time.

    Args:
        scheme: validated settings.
        accelerator: driven by this session alone.
        noise_key: 32 secret bytes of an earlier session, to continue it; None: fresh ones.
    """

    def __init__(self, scheme: Asymmetric, accelerator: Accelerator, *, noise_key: bytes | None = None) -> None:
        self.scheme = scheme
        self.accelerator = accelerator
        self.noise = Noise.fresh() if noise_key is None else Noise(noise_key)
        self.releases = Releases()
        self.timeline = Timeline()
        self.cautions: Cautions | None = None
        """Says what training gives away, where somebody can hear it; a worker never trains."""
        self.step = 0
        self._failed = False
        self._layers: dict[str, SplitLayer] = {}
        self._forgotten: list[int] = []
        self._used: list[Held] = []

    def layer(self, name: str, operation: LinearOperation, position: int) -> SplitLayer:
        """The split layer ``name``; ``position`` counts split layers from 0, for rank schedules.

        Raises:
            SettingError: the name is taken.
        """
        if name in self._layers:
            raise SettingError("two layers of one session have the same name", got=name)
        self._layers[name] = SplitLayer(self, name, operation, position)
        return self._layers[name]

    @property
    def layers(self) -> Mapping[str, SplitLayer]:
        """The split layers by name."""
        return dict(self._layers)

    def begin_step(self) -> None:
        """A new forward pass of the root module begins: a new step, unless the one before failed."""
        if not self._failed:
            self.step += 1
            self.releases.new_step()
        self._failed = False
        used, self._used = self._used, []
        for held in used:
            held.release()
        self.release_forgotten()

    def fail(self) -> None:
        """The present step failed: the next one is its second try and keeps its number."""
        self._failed = True

    def use(self, held: Held) -> None:
        """``held`` has had its backward pass, and may go when the next step begins."""
        if not held.used:
            held.used = True
            self._used.append(held)

    def forget(self, number: int) -> None:
        """Note that a held input is no longer needed. Sends nothing: it may be called while anything is under way."""
        self._forgotten.append(number)

    def release_forgotten(self) -> None:
        """Tell the accelerator which held inputs it may drop."""
        forgotten, self._forgotten = self._forgotten, []
        if forgotten:
            self.accelerator.release(forgotten)

    def state(self) -> SessionState:
        """For a sealed checkpoint."""
        return SessionState(self.noise.key, self.step, self.releases.counts)

    def restore(self, state: SessionState) -> None:
        """Continue from a checkpoint: steps after it, run again on the same bytes, release the same bytes."""
        self.noise = Noise(state.noise_key)
        self.step = state.step
        self.releases = Releases(state.releases)

    def close(self) -> None:
        """End the accelerator's session."""
        self.accelerator.close()

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        # A copied model (an average of weights, a teacher) runs through the same accelerator and the same books.
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session cannot be pickled: save state_dict() and protect the model again")
