"""The trusted side's accelerator: any connection behind :class:`motte.accelerator.interface.Accelerator`.

A lost connection may be made again, with the **identical bytes**: what was sent is kept until nothing can need it any
more. Noise is never drawn here, so a retry cannot be a second release.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

import torch

from motte.accelerator.buffers import Buffers
from motte.accelerator.conversation import Conversation, Greeting, Layer, Request
from motte.accelerator.interface import Gradients, LayerTraffic
from motte.accelerator.tensors import ANSWER_DTYPES, wire_dtype
from motte.errors import InputError, LinkError, MotteError, PeerClosed, PeerStalled, SettingError
from motte.limits import MAX_ACCELERATOR_LAYERS, MAX_FRAME_BYTES, MAX_HELD_INPUTS, MAX_NAME_BYTES
from motte.linear.operation import LinearOperation
from motte.link.calls import MAX_RELEASED, Flag, Op, Tensor, decode_numbers, encode_numbers
from motte.link.recording import Recorder
from motte.link.wire import Deadline, Wire
from motte.strict_json import canonical

T = TypeVar("T")
Dial = Callable[[Deadline, bool], Wire]
"""Connects within a deadline; True: again, so that a peer that is just starting is waited for."""
_NO_DIM_OVER: Final = 1 << 32
_MAX_SEEN: Final = 1024


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """What crossed on the present connection, every byte: through the socket, and through shared memory."""

    stream_sent: int
    stream_received: int
    region_sent: int
    region_received: int


class _Pending(Generic[T]):
    def __init__(self, client: AcceleratorClient, request: Request, read: Callable[[list[torch.Tensor]], T]) -> None:
        self._client, self._request, self._read = client, request, read

    def result(self) -> T:
        """See :class:`motte.accelerator.interface.Pending`."""
        return self._read(self._client._await(self._request))


class AcceleratorClient:
    """See :class:`motte.accelerator.interface.Accelerator`.

    Args:
        dial: makes the connection.
        name: what it is called in errors.
        timeout_s: for each frame to be taken, and for each answer that is waited for.
        retries: how often in a row, without an answer in between, a lost or stalled connection is made again.
        retain: keep what a new connection needs: weights, held inputs and unanswered requests, a copy of each. None:
            as ``retries`` says.
        recorder: sees every frame.
        shared_memory: see :meth:`Conversation.greet`.
        token: what lets us in.
        start_timeout_s: for a connection and its greeting; None: as ``timeout_s``.

    Raises:
        LinkError, FrameError: no accelerator answers there.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        name: str,
        timeout_s: float = 60.0,
        retries: int = 0,
        retain: bool | None = None,
        recorder: Recorder | None = None,
        shared_memory: str | None = "auto",
        token: str | None = None,
        start_timeout_s: float | None = None,
    ) -> None:
        if retries < 0 or not timeout_s > 0:
            raise SettingError("retries and time limit must be positive", got=f"{retries}, {timeout_s}")
        if retain is False and retries:
            raise SettingError("a retry needs what was sent", expected="retain=True, or retries=0")
        self.name = name
        self._dial = dial
        self._timeout_s = timeout_s
        self._retries = retries
        self._retain = bool(retries) if retain is None else retain
        self._recorder = recorder
        self._shared_memory = shared_memory
        self._token = token
        self._start_timeout_s = timeout_s if start_timeout_s is None else start_timeout_s
        self._buffers = Buffers()
        self._layers: dict[str, Layer] = {}
        self._step = 0
        self._next_held = 0
        self._held_shapes: dict[int, tuple[Layer, tuple[int, ...]]] = {}
        self._released: list[int] = []
        # What a new connection starts from, and what was sent since and is not known to have been worked off.
        self._registered: list[Request] = []
        self._weights: dict[int, Request] = {}
        self._held: dict[int, Request] = {}
        self._journal: deque[Request] = deque()
        self._lost = 0
        self._problem: BaseException | None = None
        self._closed = False
        self.greeting: Greeting
        self._conversation = self._open(again=False)

    # --- the interface ----------------------------------------------------------------------------------------------
    def register(self, layer: str, operation: LinearOperation) -> int:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        known = self._layers.get(layer)
        if known is not None:
            if known.operation != operation:
                raise SettingError("layer is registered with another operation", where=layer)
            return known.number
        if len(self._layers) >= MAX_ACCELERATOR_LAYERS or len(layer.encode()) > MAX_NAME_BYTES:
            raise SettingError("too many layers, or a name too long", where=layer[:80])
        made = Layer(len(self._layers) + 1, layer, operation)
        self._layers[layer] = made
        self._submit(Request(Op.REGISTER, made, self._step, extra=canonical(operation.to_json())))
        return made.number

    def put_weight(self, layer: str, weight: torch.Tensor) -> None:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        known = self._known(layer)
        described = self._describe(weight, known, self._step)
        if described.shape != known.operation.weight_shape:
            raise self._shape_problem(known, known.operation.weight_shape, described.shape)
        self._submit(Request(Op.WEIGHT, known, self._step, tensor=_bare(weight), described=described))

    def forward(self, layer: str, x: torch.Tensor, *, step: int, hold: bool) -> _Pending[torch.Tensor]:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        known = self._known(layer)
        described, answer = self._forward_types(x, known, step)
        if hold:
            if len(self._held_shapes) >= MAX_HELD_INPUTS:
                raise InputError("too many held inputs", where=layer, expected=f"at most {MAX_HELD_INPUTS}")
            self._next_held += 1
            self._held_shapes[self._next_held] = (known, described.shape)
        request = Request(
            Op.FORWARD, known, step, Flag.HOLD if hold else Flag.NONE, self._next_held if hold else 0,
            tensor=_bare(x), described=described, answers=(answer,),
        )  # fmt: skip
        self._step = step
        self._submit(request)
        return _Pending(self, request, _only)

    def last_held(self) -> int:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        return self._next_held

    def backward(
        self, layer: str, held: int, gradient: torch.Tensor, *, step: int, need_input: bool, need_weight: bool
    ) -> _Pending[Gradients]:
        """See :class:`motte.accelerator.interface.Accelerator`.

        Raises:
            InputError: ``held`` is no held input of this layer, or ``gradient`` has not the output's shape.
        """
        known = self._known(layer)
        owner, shape = self._held_shapes.get(held, (None, ()))
        if owner is not known:
            raise InputError("no such held input of this layer", where=layer, got=str(held))
        described = self._describe(gradient, known, step)
        if described.shape != known.operation.output_shape(shape):
            raise self._shape_problem(known, known.operation.output_shape(shape), described.shape)
        if not need_input and not need_weight:
            raise InputError("nothing is asked for", where=layer)
        dtype = ANSWER_DTYPES[described.dtype]
        wanted = [shape] * need_input + [known.operation.weight_shape] * need_weight
        request = Request(
            Op.BACKWARD, known, step,
            (Flag.NEED_INPUT if need_input else Flag.NONE) | (Flag.NEED_WEIGHT if need_weight else Flag.NONE), held,
            tensor=_bare(gradient), described=described,
            answers=tuple(self._bounded(Tensor(dtype, each), known, step) for each in wanted),
        )  # fmt: skip
        self._step = step
        self._submit(request)

        def read(results: list[torch.Tensor]) -> Gradients:
            return Gradients(results[0] if need_input else None, results[-1] if need_weight else None)

        return _Pending(self, request, read)

    def release(self, held: Iterable[int]) -> None:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        for each in held:
            if self._held_shapes.pop(each, None) is not None:
                self._released.append(each)

    def stats(self) -> Mapping[str, LayerTraffic]:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        return {name: layer.counts.seen() for name, layer in self._layers.items()}

    def close(self) -> None:
        """See :class:`motte.accelerator.interface.Accelerator`."""
        self._closed = True
        self._conversation.close()
        self._forget()

    def link_bytes(self) -> LinkBytes:
        """What crossed on the present connection."""
        talk = self._conversation
        return LinkBytes(
            talk.wire.sent_bytes, talk.wire.received_bytes, talk.region_sent_bytes, talk.region_received_bytes
        )

    def __enter__(self) -> AcceleratorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- sending and waiting ----------------------------------------------------------------------------------------
    def _submit(self, request: Request) -> None:
        self._usable(request)
        waiting = self._releases()
        if self._retain:
            if request.tensor is not None:
                request.tensor = request.tensor.clone(memory_format=torch.contiguous_format)
            self._journal.extend((*waiting, request))
        try:
            try:
                self._conversation.send(*waiting, request)
            except (PeerClosed, PeerStalled) as problem:
                self._recover(self._last_words(problem))
        except BaseException as problem:
            self._break(problem)
            raise
        if not self._retain:
            request.tensor = None

    def _await(self, request: Request) -> list[torch.Tensor]:
        """The answer's tensors.

        Raises:
            See :class:`motte.accelerator.interface.Pending`.
        """
        while not request.done:
            self._usable(request)
            try:
                try:
                    self._conversation.wait(request)
                except (PeerClosed, PeerStalled) as problem:
                    self._recover(problem)
            except BaseException as problem:
                self._break(problem)
                raise
        if request.problem is not None:
            raise request.problem
        results, request.results = request.results, []
        if not results:
            raise InputError("the result was taken already", where=request.where(self.name))
        return results

    def _releases(self) -> list[Request]:
        if not self._released:
            return []
        numbers, self._released = self._released, []
        return [
            Request(Op.RELEASE, step=self._step, extra=encode_numbers(tuple(numbers[start : start + MAX_RELEASED])))
            for start in range(0, len(numbers), MAX_RELEASED)
        ]

    # --- losing the connection --------------------------------------------------------------------------------------
    def _open(self, *, again: bool) -> Conversation:
        deadline = Deadline(self._start_timeout_s)
        wire = self._dial(deadline, again)
        talk = Conversation(
            wire,
            timeout_s=self._timeout_s,
            on_answer=self._acknowledge,
            buffers=self._buffers,
            recorder=self._recorder,
        )
        try:
            self.greeting = talk.greet(deadline, shared_memory=self._shared_memory, token=self._token)
        except BaseException:
            talk.close()
            raise
        return talk

    def _recover(self, problem: PeerClosed | PeerStalled) -> None:
        """Connect again and send everything that is needed once more, or raise ``problem``."""
        while self._lost < self._retries:
            self._lost += 1
            self._conversation.close()
            try:
                self._conversation = self._open(again=True)
                for request in self._to_send_again():
                    self._conversation.send(request)
                return
            except (PeerClosed, PeerStalled) as another:
                problem = another
        raise problem

    def _to_send_again(self) -> list[Request]:
        quiet = Flag.HOLD | Flag.QUIET | Flag.RESENT
        held = [replace(each, flags=quiet, answers=()) for each in self._held.values()]
        for each in (*self._registered, *self._weights.values(), *self._journal):
            if each.op is not Op.RELEASE and each.call is not None:
                each.flags |= Flag.RESENT
        return [*self._registered, *self._weights.values(), *held, *self._journal]

    def _acknowledge(self, answered: Request) -> None:
        """Everything up to ``answered`` has been worked off."""
        self._lost = 0
        while self._retain and self._journal:
            request = self._journal.popleft()
            if request.op is Op.REGISTER:
                self._registered.append(request)
            elif request.op is Op.WEIGHT and request.layer is not None:
                self._weights[request.layer.number] = request
            elif request.op is Op.RELEASE:
                for number in decode_numbers(request.extra):
                    self._held.pop(number, None)
            elif request.flags & Flag.HOLD:
                # A copy: who waits for the answer keeps the request, and need not keep the input alive by that.
                self._held[request.held] = replace(request, results=[])
            if request.op is not Op.WEIGHT:
                request.tensor = None
            if request is answered:
                return

    def _last_words(self, problem: PeerClosed | PeerStalled) -> PeerClosed | PeerStalled:
        """A peer that refuses says why and closes: read that before its silence is reported.

        Raises:
            PeerRefused: it did.
        """
        with contextlib.suppress(PeerClosed, PeerStalled):
            self._conversation.drain()
        return problem

    # --- checks -----------------------------------------------------------------------------------------------------
    def _break(self, problem: BaseException) -> None:
        """Whatever went through left the connection in the middle of something: it is not used again."""
        self._problem = problem
        self._conversation.close()
        self._forget()

    def _forget(self) -> None:
        self._registered, self._weights, self._held = [], {}, {}
        self._journal.clear()

    def _usable(self, request: Request) -> None:
        if not self._closed and self._problem is None:
            return
        where = request.where(self.name)
        if self._closed:
            raise LinkError("the accelerator was closed", where=where)
        if isinstance(self._problem, MotteError):
            facts = {name: getattr(self._problem, name) for name in ("expected", "got", "hint")}
            raise type(self._problem)(f"the link failed before: {self._problem.message}", where=where, **facts)
        if self._problem is not None:
            raise LinkError("the link was interrupted before", where=where, got=type(self._problem).__name__)

    def _known(self, layer: str) -> Layer:
        known = self._layers.get(layer)
        if known is None:
            raise InputError("the layer is not registered", where=layer)
        return known

    def _forward_types(self, x: torch.Tensor, layer: Layer, step: int) -> tuple[Tensor, Tensor]:
        """Types and shapes of an input and of its answer; remembered, since a layer sees the same ones every step."""
        key = (x.dtype, x.shape, x.is_cpu, x.layout)
        known = layer.seen.get(key)
        if known is None:
            described = self._describe(x, layer, step)
            output = Tensor(ANSWER_DTYPES[described.dtype], layer.operation.output_shape(described.shape))
            if len(layer.seen) >= _MAX_SEEN:
                layer.seen.clear()
            known = layer.seen[key] = (described, self._bounded(output, layer, step))
        return known

    def _describe(self, tensor: torch.Tensor, layer: Layer, step: int) -> Tensor:
        name = wire_dtype(tensor, where=f"{self.name}, layer {layer.name}, step {step}")
        return self._bounded(Tensor(name, tuple(tensor.shape)), layer, step)

    def _bounded(self, tensor: Tensor, layer: Layer, step: int) -> Tensor:
        if tensor.bytes > MAX_FRAME_BYTES or any(extent >= _NO_DIM_OVER for extent in tensor.shape):
            raise InputError(
                "tensor too large for a frame",
                where=f"{self.name}, layer {layer.name}, step {step}",
                expected=f"at most {MAX_FRAME_BYTES} bytes",
                got=f"{tensor.bytes}",
                hint="a smaller batch",
            )
        return tensor

    def _shape_problem(self, layer: Layer, expected: tuple[int, ...], got: tuple[int, ...]) -> InputError:
        return InputError("tensor of another shape", where=layer.name, expected=str(expected), got=str(got))


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _only(results: list[torch.Tensor]) -> torch.Tensor:
    return results[0]
