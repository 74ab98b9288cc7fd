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

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

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
class Kept:
    """What the trusted side keeps of a forward pass, **private** but for ``sent``."""

    principal: Principal
    shape: tuple[int, ...]
    sent: Tensor
    held: Held | None


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
        try:
            return self._backward(kept, weight, gradient, need_input, need_weight)
        except (LinkError, FormatError, TrustError, ResourceError):
            self.session.fail()
            raise

    # --- the two passes -------------------------------------------------------------------------------------------
    def _forward(self, x: Tensor, weight: Tensor, keep: bool, constant: bool) -> tuple[Tensor, Kept | None]:
        scheme, operation, shape = self.session.scheme, self.operation, tuple(x.shape)
        with self._span("forward", "decompose"):
            matrix = self._matrix(x)
            principal = decompose(
                matrix, scheme.rank, position=self.position, iterations=scheme.iterations, method=scheme.decomposition
            )
            rest = residual(matrix, principal)
            self.last_rank = principal.left.shape[2]
        mechanism = None if scheme.noise is None else scheme.noise.residual
        with self._span("forward", "release"):
            sent = self._released(rest, mechanism, "residual", overwrite=True).reshape(shape)
            del rest
            if scheme.residual_dtype != "same":
                sent = sent.to(_WIRE[scheme.residual_dtype])
        with self._span("forward", "send"):
            self._send_weight(weight, constant)
            self.session.release_forgotten()
            pending = self.session.accelerator.forward(self._registered(), sent, step=self.session.step, hold=keep)
            held = self._hold() if keep else None
        with self._span("forward", "lowrank"):
            y = lowrank.forward(operation, principal, shape, weight)
        with self._span("forward", "wait"):
            answer = pending.result()
        if scheme.integrity == "freivalds":
            with self._span("forward", "check"):
                integrity.check_forward(
                    operation, sent, weight, answer, vectors=scheme.integrity_vectors, where=self._where()
                )
        with self._span("forward", "merge"):
            y = y.add_(answer) if y.dtype == answer.dtype else y.add_(answer.to(y.dtype))
        return y, Kept(principal, shape, sent, held) if keep else None

    def _backward(
        self, kept: Kept, weight: Tensor, gradient: Tensor, need_input: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        scheme, operation, held = self.session.scheme, self.operation, kept.held
        if held is None:
            raise RuntimeError("this forward pass kept nothing for a backward pass")
        mechanism = None if scheme.noise is None else scheme.noise.gradient
        with self._span("backward", "release"):
            sent = self._released(gradient, mechanism, "gradient")
        with self._span("backward", "send"):
            self._send_weight(weight, constant=False)
            pending = self.session.accelerator.backward(
                self._registered(),
                held.number,
                sent,
                step=self.session.step,
                need_input=need_input,
                need_weight=need_weight,
            )
        main = self._principal_weight_gradient(kept, gradient) if need_weight else None
        with self._span("backward", "wait"):
            answer = pending.result()
        self.session.use(held)
        if scheme.integrity == "freivalds":
            with self._span("backward", "check"):
                count, where = scheme.integrity_vectors, self._where()
                if answer.input is not None:
                    integrity.check_input_gradient(
                        operation, kept.shape, weight, sent, answer.input, vectors=count, where=where
                    )
                if answer.weight is not None:
                    integrity.check_weight_gradient(
                        operation, kept.sent, sent, answer.weight, vectors=count, where=where
                    )
        with self._span("backward", "merge"):
            to_input = None if answer.input is None else answer.input.to(gradient.dtype)
            to_weight = None
            if main is not None and answer.weight is not None:
                to_weight = (main.to(answer.weight.dtype) + answer.weight).to(weight.dtype)
        return to_input, to_weight

    def _principal_weight_gradient(self, kept: Kept, gradient: Tensor) -> Tensor:
        noise = self.session.scheme.noise
        mechanism = None if noise is None else noise.update
        with self._span("backward", "lowrank"):
            main = lowrank.weight_gradient(
                self.operation,
                kept.principal,
                kept.shape,
                gradient,
                clip=None if mechanism is None else mechanism.clip,
            )
        with self._span("backward", "release"):
            return self._released(main, mechanism, "update", per_sample=False)

    # --- what leaves ----------------------------------------------------------------------------------------------
    def _released(
        self,
        clean: Tensor,
        mechanism: Mechanism | None,
        kind: Kind,
        *,
        per_sample: bool = True,
        overwrite: bool = False,
    ) -> Tensor:
        # Counted before it leaves: a release that fails on its way may have been seen.
        if mechanism is None:
            self.session.releases.count(self.name, kind, None)
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
        self.session.releases.count(self.name, kind, released.release_id)
        return released.tensor

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
            self._constant, self._sent_weight = identity, None
        else:
            # Compared by value: version counters miss what is written through ``parameter.data``.
            known = self._sent_weight
            if known is not None and known.dtype == weight.dtype and torch.equal(known, weight):
                return
            self._constant, self._sent_weight = None, weight.detach().clone()
        self.session.accelerator.put_weight(self._registered(), weight.detach())

    def _hold(self) -> Held:
        return Held(self.session.accelerator.last_held(), self.session.forget)

    # --- small things ---------------------------------------------------------------------------------------------
    def _matrix(self, x: Tensor) -> Tensor:
        # Channels by positions for a convolution, tokens by features for a linear layer.
        if self.operation.family == "linear":
            return x.reshape(x.shape[0], -1, x.shape[-1])
        return x.reshape(x.shape[0], x.shape[1], -1)

    def _span(self, phase: Phase, work: Work) -> AbstractContextManager[None]:
        return self.session.timeline.span(self.session.step, self.name, phase, work)

    def _where(self) -> str:
        return f"{self.session.accelerator.name}, layer {self.name}, step {self.session.step}"

    def __deepcopy__(self, memo: dict[int, object]) -> SplitLayer:
        return self
