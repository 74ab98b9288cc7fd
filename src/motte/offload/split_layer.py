"""One linear operator in two halves: the principal part inside, the perturbed residual on the accelerator.

    forward   x = left @ right + residual          inside
              y = op(left @ right)                 inside, cheap
                + op(M(residual))                  outside, checked
    backward  to x:      op^T(M'(g))               outside, checked
              to weight: from left @ right and g   inside, cheap (then M'')
                       + from M(residual), M'(g)   outside, checked

M, M', M'' clip and add noise where the scheme says so (AsymML, section 3; 3LegRace, section 4). The full activation
exists inside only: the residual is formed in trusted memory, and only then copied out.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from motte.accelerator.interface import Gradients, Pending
from motte.errors import FormatError, LinkError, ResourceError, TrustError
from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.offload import integrity, lowrank
from motte.offload.decompose import Principal, decompose, residual
from motte.offload.held import Held
from motte.offload.releases import Kind
from motte.offload.settings import Mechanism

if TYPE_CHECKING:
    from motte.offload.session import Session
    from motte.offload.timeline import Work

Phase = Literal["forward", "backward"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Dtypes that are split. Any other stays inside."""
_WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Piece:
    """What the trusted side keeps of a forward pass over some samples, **private** but for ``sent``."""

    principal: Principal
    shape: tuple[int, ...]
    sent: Tensor
    held: Held | None


Kept = tuple[Piece, ...]
"""The pieces of one forward pass, in the order of their samples."""


@dataclass(slots=True)
class _Pass:
    """One pass of one layer, and how many pieces of each kind have left in it."""

    phase: Phase
    pieces: dict[Kind, int] = field(default_factory=dict)


class SplitLayer:
    """One layer of a session. Tensors are on the CPU; x is (N, C, *spatial), for linear layers (N, *, C)."""

    def __init__(self, session: Session, name: str, operation: LinearOperation, position: int) -> None:
        self.session = session
        self.name = name
        self.operation = operation
        self.position = position
        self.last_rank: int | None = None
        self._known = False
        self._sent_weight: Tensor | None = None
        self._constant: tuple[int, int, int] | None = None
        self._side: integrity.WeightSide | None = None

    def infer(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product for a weight that nobody changes between calls; nothing is kept. No bias, no autograd.

        Raises:
            IntegrityError: the accelerator lied. LinkError, FrameError: it did not answer properly.
        """
        with torch.no_grad():
            return self.forward(x, weight, keep=False, constant=True)[0]

    def forward(self, x: Tensor, weight: Tensor, *, keep: bool, constant: bool = False) -> tuple[Tensor, Kept | None]:
        """The product in x's dtype and, with ``keep``, what :meth:`backward` needs.

        Raises:
            IntegrityError: the accelerator lied. LinkError, FrameError: it did not answer properly.
        """
        if x.shape[0] == 0:
            return compute.forward(self.operation, x, weight), None
        if keep and self.session.cautions is not None:
            self.session.cautions.forward(self.name, self.operation, x.shape)
        try:
            return self._forward(x, weight, keep, constant)
        except (LinkError, FormatError, TrustError, ResourceError):
            self.session.fail()
            raise

    def backward(
        self, kept: Kept, weight: Tensor, gradient: Tensor, *, need_input: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients to x and to the weight, in the dtypes of ``gradient`` and ``weight``.

        Raises:
            IntegrityError: the accelerator lied. LinkError, FrameError: it did not answer properly.
        """
        if need_weight and self.session.cautions is not None:
            self.session.cautions.weight_gradient()
        try:
            return self._backward(kept, weight, gradient, need_input, need_weight)
        except (LinkError, FormatError, TrustError, ResourceError):
            self.session.fail()
            raise

    # --- the two passes -------------------------------------------------------------------------------------------
    def _forward(self, x: Tensor, weight: Tensor, keep: bool, constant: bool) -> tuple[Tensor, Kept | None]:
        now = _Pass("forward")
        with self._span(now, "send"):
            self._send_weight(weight, constant)
            self.session.release_forgotten()
        flights = [self._depart(now, part, keep) for part in self._parts(x)]
        # While one piece is on its way, the others get their low-rank half, or their check.
        outputs = [self._arrive(now, piece, pending, weight) for piece, pending in flights]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y, tuple(piece for piece, _ in flights) if keep else None

    def _depart(self, now: _Pass, x: Tensor, keep: bool) -> tuple[Piece, Pending[Tensor]]:
        scheme, shape = self.session.scheme, tuple(x.shape)
        with self._span(now, "decompose"):
            matrix = self._matrix(x)
            principal = decompose(
                matrix, scheme.rank, position=self.position, iterations=scheme.iterations, method=scheme.decomposition
            )
            rest = residual(matrix, principal)
            self.last_rank = principal.rank
        mechanism = None if scheme.noise is None else scheme.noise.residual
        with self._span(now, "release"):
            sent = self._released(now, rest, mechanism, "residual", overwrite=True).reshape(shape)
            if scheme.residual_dtype != "same":
                sent = sent.to(_WIRE[scheme.residual_dtype])
        with self._span(now, "send"):
            pending = self.session.accelerator.forward(self._registered(), sent, step=self.session.step, hold=keep)
            held = self._hold() if keep else None
        return Piece(principal, shape, sent, held), pending

    def _arrive(self, now: _Pass, piece: Piece, pending: Pending[Tensor], weight: Tensor) -> Tensor:
        scheme = self.session.scheme
        with self._span(now, "lowrank"):
            y = lowrank.forward(self.operation, piece.principal, piece.shape, weight)
        with self._span(now, "wait"):
            answer = pending.result()
        if scheme.integrity == "freivalds":
            with self._span(now, "check"):
                known = self._checked_weight(weight, piece.sent.dtype)
                integrity.check_forward(
                    self.operation, piece.sent, known, answer, vectors=scheme.integrity_vectors, where=self._where()
                )
        with self._span(now, "merge"):
            return y.add_(answer) if y.dtype == answer.dtype else y.add_(answer.to(y.dtype))

    def _backward(
        self, kept: Kept, weight: Tensor, gradient: Tensor, need_input: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        now, noise = _Pass("backward"), self.session.scheme.noise
        with self._span(now, "send"):
            self._send_weight(weight, constant=False)
        slices = gradient.split([piece.shape[0] for piece in kept])
        flights = [
            self._depart_back(now, piece, each, need_input=need_input, need_weight=need_weight)
            for piece, each in zip(kept, slices, strict=True)
        ]
        update = None if noise is None else noise.update
        to_input: list[Tensor] = []
        inside: Tensor | None = None
        outside: Tensor | None = None
        for piece, each, (sent, pending) in zip(kept, slices, flights, strict=True):
            if need_weight:
                with self._span(now, "lowrank"):
                    clip = None if update is None else update.clip
                    main = lowrank.weight_gradient(self.operation, piece.principal, piece.shape, each, clip=clip)
                    inside = main if inside is None else inside.add_(main)
            answer = self._arrive_back(now, piece, sent, pending, weight)
            if answer.input is not None:
                to_input.append(answer.input.to(gradient.dtype))
            if answer.weight is not None:
                outside = answer.weight if outside is None else outside + answer.weight
        with self._span(now, "merge"):
            whole = None if not need_input else to_input[0] if len(to_input) == 1 else torch.cat(to_input)
        if inside is None or outside is None:
            return whole, None
        with self._span(now, "release"):
            inside = self._released(now, inside, update, "update", per_sample=False)
        with self._span(now, "merge"):
            return whole, (inside.to(outside.dtype) + outside).to(weight.dtype)

    def _depart_back(
        self, now: _Pass, piece: Piece, gradient: Tensor, *, need_input: bool, need_weight: bool
    ) -> tuple[Tensor, Pending[Gradients]]:
        if piece.held is None:
            raise RuntimeError("this forward pass kept nothing for a backward pass")
        noise = self.session.scheme.noise
        with self._span(now, "release"):
            sent = self._released(now, gradient, None if noise is None else noise.gradient, "gradient")
        with self._span(now, "send"):
            pending = self.session.accelerator.backward(
                self._registered(),
                piece.held.number,
                sent,
                step=self.session.step,
                need_input=need_input,
                need_weight=need_weight,
            )
        return sent, pending

    def _arrive_back(
        self, now: _Pass, piece: Piece, sent: Tensor, pending: Pending[Gradients], weight: Tensor
    ) -> Gradients:
        scheme, where = self.session.scheme, self._where()
        with self._span(now, "wait"):
            answer = pending.result()
        if piece.held is not None:
            self.session.use(piece.held)
        if scheme.integrity == "freivalds":
            with self._span(now, "check"):
                count = scheme.integrity_vectors
                if answer.input is not None:
                    integrity.check_input_gradient(
                        self.operation, piece.shape, weight, sent, answer.input, vectors=count, where=where
                    )
                if answer.weight is not None:
                    integrity.check_weight_gradient(
                        self.operation, piece.sent, sent, answer.weight, vectors=count, where=where
                    )
        return answer

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.split(math.ceil(x.shape[0] / self.session.scheme.pieces)))

    # --- what leaves ----------------------------------------------------------------------------------------------
    def _released(
        self,
        now: _Pass,
        clean: Tensor,
        mechanism: Mechanism | None,
        kind: Kind,
        *,
        per_sample: bool = True,
        overwrite: bool = False,
    ) -> Tensor:
        # Counted before it leaves: a release that fails on its way may have been seen.
        if mechanism is None:
            self._count(now, kind, None)
            return clean
        released = self.session.noise.privatise(
            clean,
            mechanism,
            layer=self.name,
            kind=kind,
            step=self.session.step,
            per_sample=per_sample,
            overwrite=overwrite,
        )
        self._count(now, kind, released.release_id)
        return released.tensor

    def _count(self, now: _Pass, kind: Kind, release_id: bytes | None) -> None:
        piece = now.pieces.get(kind, 0)
        now.pieces[kind] = piece + 1
        self.session.releases.count(self.name, kind, release_id, piece=piece)

    def _registered(self) -> str:
        if not self._known:
            self.session.accelerator.register(self.name, self.operation)
            self._known = True
        return self.name

    def _send_weight(self, weight: Tensor, constant: bool) -> None:
        if constant:
            identity = (id(weight), weight.data_ptr(), weight._version)
            if self._constant == identity:
                return
            self._constant, self._sent_weight, self._side = identity, None, None
        else:
            # Compared by value: version counters miss what is written through ``parameter.data``.
            known = self._sent_weight
            if known is not None and known.dtype == weight.dtype and torch.equal(known, weight):
                return
            self._constant, self._sent_weight, self._side = None, weight.detach().clone(), None
        self.session.accelerator.put_weight(self._registered(), weight.detach())

    def _checked_weight(self, weight: Tensor, sent: torch.dtype) -> integrity.WeightSide:
        """What the check compares with; while the weight stays the same, what depends on it alone stays too."""
        if self._side is None or self._side.sent is not sent:
            # Of our own copy where we have one, which nobody changes.
            own = weight if self._sent_weight is None else self._sent_weight
            self._side = integrity.weight_side(self.operation, own, sent)
        return self._side

    def _hold(self) -> Held:
        return Held(self.session.accelerator.last_held(), self.session.forget)

    # --- small things ---------------------------------------------------------------------------------------------
    def _matrix(self, x: Tensor) -> Tensor:
        # Channels by positions for a convolution, tokens by features for a linear layer.
        if self.operation.family == "linear":
            return x.reshape(x.shape[0], -1, x.shape[-1])
        return x.reshape(x.shape[0], x.shape[1], -1)

    def _span(self, now: _Pass, work: Work) -> AbstractContextManager[None]:
        return self.session.timeline.span(self.session.step, self.name, now.phase, work)

    def _where(self) -> str:
        return f"{self.session.accelerator.name}, layer {self.name}, step {self.session.step}"

    def __deepcopy__(self, memo: dict[int, object]) -> SplitLayer:
        return self
