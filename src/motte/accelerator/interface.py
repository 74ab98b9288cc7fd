"""What the trusted side sees of an accelerator, wherever it runs: products are asked for, answers come later.

Every implementation sends what it is given as it is: noise, clipping and the choice of what may leave happen before,
in :mod:`motte.offload`. What comes back was copied in and has the shape and dtype that was asked for; every value is
still **unverified** until :mod:`motte.offload.integrity` has checked the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from motte.linear.operation import LinearOperation

if TYPE_CHECKING:
    from torch import Tensor

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Answer to a backward request: (input's shape) and (weight's shape), None where it was not asked for."""

    input: Tensor | None
    weight: Tensor | None


class Pending(Protocol[T_co]):
    """An answer that is on its way."""

    def result(self) -> T_co:
        """Wait for it. Call once.

        Raises:
            LinkError: the peer died, stalled or refused. FrameError: its answer is malformed, of another shape or
            dtype, stale, or given twice. Each names the peer, the layer and the step.
        """
        ...


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """What crossed for one layer: frames and bytes of tensors in each direction, and where the time went in seconds."""

    sent_frames: int = 0
    received_frames: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    send_s: float = 0.0
    """Spent on copying out and handing over."""
    wait_s: float = 0.0
    """Spent on waiting for answers that were not there yet."""
    receive_s: float = 0.0
    """Spent on copying in and checking."""
    compute_s: float = 0.0
    """What the accelerator says that it computed: **unverified**, for timelines only."""


class Accelerator(Protocol):
    """One accelerator, driven by one trusted process. Not safe to share between threads."""

    name: str
    """What it is called in errors: ``accelerator unix:/run/a.sock``."""

    def register(self, layer: str, operation: LinearOperation) -> int:
        """Make ``layer`` known; returns its number. The same name and operation give the same number again.

        Raises:
            SettingError: the name is known with another operation.
        """
        ...

    def put_weight(self, layer: str, weight: Tensor) -> None:
        """Send the weight that the following requests of ``layer`` use. It replaces the one before; requests in flight
        and held inputs are not affected, but a later backward request uses the new weight."""
        ...

    def forward(self, layer: str, x: Tensor, *, step: int, hold: bool) -> Pending[Tensor]:
        """Ask for the operator's output. ``x`` is sent before this returns; it may then be changed.

        The answer has x's dtype (bfloat16 is answered in float32). With ``hold`` the accelerator keeps ``x`` until
        it is released; :meth:`last_held` is its number.
        """
        ...

    def last_held(self) -> int:
        """Number of the input that the latest :meth:`forward` with ``hold`` left at the accelerator."""
        ...

    def backward(
        self, layer: str, held: int, gradient: Tensor, *, step: int, need_input: bool, need_weight: bool
    ) -> Pending[Gradients]:
        """Ask for gradients from ``gradient`` (the output's shape) and the held input."""
        ...

    def release(self, held: Iterable[int]) -> None:
        """Forget held inputs; unknown numbers are ignored. Cheap: it is sent along with the next request."""
        ...

    def stats(self) -> Mapping[str, LayerTraffic]:
        """What crossed so far, by layer."""
        ...

    def close(self) -> None:
        """End the session; the accelerator forgets everything. Safe to call again."""
        ...
