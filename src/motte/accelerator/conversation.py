"""One connection to an accelerator, seen from the trusted side: frames out, checked answers in.

Nothing that comes back is used before it lies in our own memory and fits what was asked for. Losing the connection,
and making a new one, is the business of :mod:`motte.accelerator.client`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from motte.accelerator.buffers import Array, Buffers, as_tensor, bytes_of_array
from motte.accelerator.interface import LayerTraffic
from motte.accelerator.tensors import RegionTensors, bytes_of, copy_in, is_finite
from motte.errors import FrameError, IntegrityError, LinkError, MotteError, PeerRefused
from motte.limits import MAX_CALL_META_BYTES, MAX_NAME_BYTES, MAX_REGION_BYTES
from motte.linear.operation import LinearOperation
from motte.link.calls import FROM_ACCELERATOR, Call, Flag, Op, Tensor, encode
from motte.link.recording import Direction, RecordedFrame, Recorder
from motte.link.region import Places, Region
from motte.link.wire import Buffer, Deadline, FrameReader, SocketWire, Wire
from motte.strict_json import Fields, canonical, parse

PROTOCOL: Final = 1
INLINE_BYTES: Final = 16 << 10
"""Tensors up to this size travel in the frame: a system call carries them faster than two views of shared memory."""
_MAX_REFUSAL_TEXT_BYTES: Final = 4096
_LAST_WORDS_S: Final = 1.0


@dataclass(slots=True)
class Counts:
    """The figures of one layer while they grow; :class:`LayerTraffic` is what others see of them."""

    sent_frames: int = 0
    received_frames: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    send_s: float = 0.0
    wait_s: float = 0.0
    receive_s: float = 0.0
    compute_s: float = 0.0

    def seen(self) -> LayerTraffic:
        """As they are now."""
        return LayerTraffic(**{name: getattr(self, name) for name in Counts.__slots__})


@dataclass(slots=True)
class Layer:
    """A registered layer."""

    number: int
    name: str
    operation: LinearOperation
    counts: Counts = field(default_factory=Counts)
    seen: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Inputs that were checked before, with the answer that belongs to them."""


@dataclass(slots=True, eq=False)
class Request:
    """One frame to the accelerator, what it is to be answered with, and the answer once it is there."""

    op: Op
    layer: Layer | None = None
    step: int = 0
    flags: int = Flag.NONE
    held: int = 0
    extra: bytes = b""
    tensor: torch.Tensor | None = None
    described: Tensor | None = None
    answers: tuple[Tensor, ...] = ()
    """Types and shapes that are asked for; empty: no answer follows."""
    call: Call | None = None
    """As it was sent last."""
    results: list[torch.Tensor] = field(default_factory=list)
    problem: MotteError | None = None
    done: bool = False

    def where(self, peer: str) -> str:
        """For errors: peer, layer and step."""
        return peer if self.layer is None else f"{peer}, layer {self.layer.name}, step {self.step}"


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the accelerator says of itself. **Unverified**."""

    device: str
    threads: int
    shared_memory: str
    region_bytes: int


class Conversation:
    """The frames of one connection.

    Args:
        wire: connected; the conversation owns it.
        on_answer: called when a request was answered in full.
        buffers: where answers are copied to.
        recorder: sees every frame.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        timeout_s: float,
        on_answer: Callable[[Request], None],
        buffers: Buffers,
        recorder: Recorder | None = None,
    ) -> None:
        self.wire = wire
        self.region_sent_bytes = 0
        self.region_received_bytes = 0
        self._timeout_s = timeout_s
        self._on_answer = on_answer
        self._buffers = buffers
        self._recorder = recorder
        self._reader = FrameReader(self, peer=wire.peer, allowed=FROM_ACCELERATOR)
        self._sequence = 0
        self._expected: deque[Request] = deque()
        self._latest: Request | None = None
        self._occupied: deque[tuple[int, list[int]]] = deque()
        self._places = Places(0)
        self._region: Region | None = None
        self._shared: RegionTensors | None = None
        self._arriving: tuple[Call, bytes] | None = None
        self._room: list[Array] = []
        self._greeting: Greeting | None = None
        self._secret: bytes | None = None

    # --- the start --------------------------------------------------------------------------------------------------
    def greet(self, deadline: Deadline, *, shared_memory: str | None, token: str | None) -> Greeting:
        """Exchange HELLO, and map the shared memory.

        Args:
            shared_memory: ``auto`` (by descriptor, where the socket can pass one), the path of a file that the host
                made, or None.
            token: what lets us in.

        Raises:
            LinkError, FrameError: the peer is none, or not of our protocol. ResourceError: no memory to share.
        """
        wire = self.wire
        by_descriptor = shared_memory == "auto" and isinstance(wire, SocketWire) and wire.is_local
        kind = "descriptor" if by_descriptor else "none" if shared_memory in ("auto", None) else "path"
        hello: dict[str, Any] = {"protocol": PROTOCOL, "shared_memory": kind}
        if token is not None:
            hello["token"] = token
            self._secret = canonical(token)[1:-1]
        if isinstance(wire, SocketWire):
            wire.take_descriptors = by_descriptor
        self.send(Request(Op.HELLO, extra=canonical(hello)))
        self._secret = None
        while self._greeting is None:
            wire.fill(self._reader, deadline)
        self._map(kind, shared_memory, self._greeting)
        return self._greeting

    def _map(self, asked: str, path: str | None, greeting: Greeting) -> None:
        wire = self.wire
        descriptors: list[int] = []
        if isinstance(wire, SocketWire):
            wire.take_descriptors = False
            descriptors, wire.descriptors = wire.descriptors, []
        if greeting.shared_memory not in (asked, "none") or len(descriptors) != (
            greeting.shared_memory == "descriptor"
        ):
            wire_descriptors = f"{greeting.shared_memory}, {len(descriptors)} descriptors"
            if isinstance(wire, SocketWire):
                wire.descriptors = descriptors  # closed with it
            raise FrameError("shared memory of another kind", where=wire.peer, expected=asked, got=wire_descriptors)
        if greeting.shared_memory == "descriptor":
            self._region = Region.receive(descriptors[0], greeting.region_bytes, peer=wire.peer)
        elif greeting.shared_memory == "path":
            self._region = Region.open(Path(path or ""), greeting.region_bytes)
        if self._region is not None:
            self._shared = RegionTensors(self._region)
            self._places = Places(self._region.bytes)
            self._reader.heads.share(self._region.bytes)

    # --- requests ---------------------------------------------------------------------------------------------------
    def send(self, *requests: Request) -> None:
        """Send requests in one go. Their tensors may be changed when this returns.

        Raises:
            LinkError, FrameError: each names peer, layer and step. What the recorder raises; nothing was sent then.
        """
        began = time.perf_counter()
        parts: list[Buffer] = []
        for request in requests:
            call, body = self._lay_out(request)
            head = encode(call)
            if self._recorder is not None:
                # Of the same length, so that every byte is counted: the one secret in any frame is not for a file.
                shown = head if self._secret is None else head.replace(self._secret, b"*" * len(self._secret))
                self._record("sent", call, shown, request.layer, [] if request.tensor is None else [request.tensor])
            request.call = call
            parts.append(head)
            if body is not None:
                parts.append(body)
            if request.answers:
                self._expected.append(request)
            if request.layer is not None:
                counts = request.layer.counts
                counts.sent_frames += 1
                counts.sent_bytes += call.tensor_bytes
            self._sequence += 1
            if self._shared is not None:
                self.region_sent_bytes += call.region_bytes
        try:
            self.wire.send(parts, Deadline(self._timeout_s), self._reader)
        except (LinkError, FrameError) as problem:
            raise self._located(problem, requests[-1]) from problem
        if (layer := requests[-1].layer) is not None:
            # What goes before it belongs to no layer.
            layer.counts.send_s += time.perf_counter() - began

    def wait(self, request: Request) -> None:
        """Until ``request`` is answered.

        Raises:
            LinkError, FrameError: each names the peer, and layer and step of the request that is next in turn.
        """
        deadline = Deadline(self._timeout_s)
        began, copying = time.perf_counter(), 0.0
        if request.layer is not None:
            copying = request.layer.counts.receive_s
        try:
            while not request.done:
                self.wire.fill(self._reader, deadline)
        except (LinkError, FrameError) as problem:
            raise self._located(problem) from problem
        if request.layer is not None:
            counts = request.layer.counts
            counts.wait_s += max(0.0, time.perf_counter() - began - (counts.receive_s - copying))

    def drain(self) -> None:
        """After sending failed: take in what the peer said before it closed, for a moment.

        Raises:
            PeerRefused: that it refused, and why. PeerClosed, PeerStalled: nothing more came.
        """
        deadline = Deadline(min(self._timeout_s, _LAST_WORDS_S))
        try:
            while True:
                self.wire.fill(self._reader, deadline)
        except (LinkError, FrameError) as problem:
            raise self._located(problem) from problem

    def close(self) -> None:
        """End the connection and give the shared memory back."""
        self.wire.close()
        self._shared = None
        if self._region is not None:
            self._region.close()

    def _lay_out(self, request: Request) -> tuple[Call, memoryview | None]:
        number = 0 if request.layer is None else request.layer.number
        tensors: tuple[Tensor, ...] = () if request.described is None else (request.described,)
        places = request.answers
        if self._shared is not None:
            occupied: list[int] = []
            tensors = tuple(self._place(tensor, occupied) for tensor in tensors)
            places = tuple(self._place(answer, occupied) for answer in places)
            if occupied:
                self._occupied.append((self._sequence, occupied))
        body = None
        if request.tensor is not None and tensors:
            if tensors[0].offset is not None and self._shared is not None:
                self._shared.view(tensors[0]).copy_(request.tensor)
            else:
                body = bytes_of(request.tensor.contiguous())
        call = Call(
            request.op, self._sequence, request.step, number, request.flags, request.held, 0, tensors, places,
            request.extra,
        )  # fmt: skip
        return call, body

    def _place(self, tensor: Tensor, occupied: list[int]) -> Tensor:
        size = tensor.bytes
        if size <= INLINE_BYTES:
            return tensor
        offset = self._places.take(size)
        if offset is None:
            return tensor
        occupied.append(offset)
        return tensor._replace(offset=offset)

    # --- answers ----------------------------------------------------------------------------------------------------
    def begin(self, call: Call, head: bytes) -> Sequence[memoryview]:
        """A frame without its body arrived; see :class:`motte.link.wire.Receiver`."""
        self._arriving = (call, head)
        if call.op is not Op.ANSWER:
            return ()
        self._match(call)
        self._room = [self._buffers.take(tensor) for tensor in call.tensors]
        pairs = zip(self._room, call.tensors, strict=True)
        return [bytes_of_array(array) for array, tensor in pairs if tensor.offset is None]

    def finish(self) -> None:
        """The frame is complete; see :class:`motte.link.wire.Receiver`."""
        if self._arriving is None:
            raise RuntimeError("no frame has begun")
        (call, head), self._arriving = self._arriving, None
        if call.op is Op.HELLO:
            self._greeted(call, head)
        elif call.op is Op.REFUSAL:
            self._refused(call, head)
        else:
            self._answered(call, head)

    def _match(self, call: Call) -> None:
        """Refuse ``call`` unless it is exactly the answer that comes next."""
        peer = self.wire.peer
        if not self._expected:
            where = peer if self._latest is None else self._latest.where(peer)
            raise FrameError(
                "answer that nobody asked for, or a second one", where=where, got=f"number {call.sequence}"
            )
        request = self._expected[0]
        sent = request.call
        if sent is None:
            raise RuntimeError("a request is expected that was not sent")
        if call.sequence != sent.sequence:
            what = "stale answer, or a second one" if call.sequence < sent.sequence else "answer out of turn"
            raise FrameError(
                what,
                where=request.where(peer),
                expected=f"number {sent.sequence}",
                got=f"number {call.sequence}",
            )
        if call.layer != sent.layer or call.step != sent.step:
            got = f"layer {call.layer}, step {call.step}"
            raise FrameError("answer for another layer or step", where=request.where(peer), got=got)
        if call.tensors != sent.places:
            raise FrameError(
                "answer of another shape, dtype or place than was asked for",
                where=request.where(peer),
                expected=_describe(sent.places),
                got=_describe(call.tensors),
            )

    def _answered(self, call: Call, head: bytes) -> None:
        began = time.perf_counter()
        request = self._latest = self._expected.popleft()
        finite = True
        request.results = []
        for array, tensor in zip(self._room, call.tensors, strict=True):
            result = as_tensor(array, tensor.dtype)
            if tensor.offset is None or self._shared is None:
                finite = is_finite(array) and finite
            else:
                finite = copy_in(self._shared.view(tensor), result) and finite
            request.results.append(result)
        self._room = []
        self._record("received", call, head, request.layer, request.results)
        self._free(call.sequence)
        if not finite:
            request.problem = IntegrityError(
                "the answer is not finite",
                where=request.where(self.wire.peer),
                hint="the accelerator lies or is broken; or what was sent was not finite, or large enough to overflow",
            )
            request.results = []
        request.done = True
        if self._shared is not None:
            self.region_received_bytes += call.region_bytes
        if request.layer is not None:
            counts = request.layer.counts
            counts.received_frames += 1
            counts.received_bytes += call.tensor_bytes
            counts.compute_s += call.compute_ns / 1e9
            counts.receive_s += time.perf_counter() - began
        self._on_answer(request)

    def _free(self, sequence: int) -> None:
        # Requests are worked off in order: with an answer, everything before it has been read too.
        while self._occupied and self._occupied[0][0] <= sequence:
            for offset in self._occupied.popleft()[1]:
                self._places.give_back(offset)

    def _greeted(self, call: Call, head: bytes) -> None:
        if self._greeting is not None or call.sequence or self._sequence != 1:
            raise FrameError("greeting out of turn", where=self.wire.peer)
        self._record("received", call, head, None, [])
        where = f"{self.wire.peer}, HELLO"
        value = parse(call.extra, max_bytes=MAX_CALL_META_BYTES, what=where, error=FrameError)
        fields = Fields(value, where=where, error=FrameError)
        fields.integer("protocol", low=PROTOCOL, high=PROTOCOL)
        self._greeting = Greeting(
            device=fields.text("device", max_bytes=MAX_NAME_BYTES),
            threads=fields.integer("threads", low=1, high=1 << 16),
            shared_memory=fields.choice("shared_memory", ("none", "descriptor", "path")),
            region_bytes=fields.integer("region_bytes", low=0, high=MAX_REGION_BYTES),
        )
        fields.done()

    def _refused(self, call: Call, head: bytes) -> None:
        self._record("received", call, head, None, [])
        where = f"{self.wire.peer}, REFUSAL"
        value = parse(call.extra, max_bytes=MAX_CALL_META_BYTES, what=where, error=FrameError)
        fields = Fields(value, where=where, error=FrameError)
        kind = fields.text("kind", max_bytes=MAX_NAME_BYTES)
        message = fields.text("message", max_bytes=_MAX_REFUSAL_TEXT_BYTES)
        fields.done()
        raise PeerRefused("the accelerator refused", where=self.wire.peer, got=f"{kind}: {message}")

    def _record(
        self, direction: Direction, call: Call, head: bytes, layer: Layer | None, tensors: Sequence[torch.Tensor]
    ) -> None:
        if self._recorder is not None:
            copies = tuple(bytes(bytes_of(tensor.contiguous())) for tensor in tensors)
            self._recorder.record(RecordedFrame(direction, "" if layer is None else layer.name, call, head, copies))

    def _located(self, problem: LinkError | FrameError, request: Request | None = None) -> LinkError | FrameError:
        """The wire knows the peer; here an error learns layer and step, of the answer that is due or of ``request``."""
        due = self._expected[0] if self._expected else request or self._latest
        if due is None or due.layer is None or (problem.where and ", layer " in problem.where):
            return problem
        facts = {name: getattr(problem, name) for name in ("expected", "got", "hint")}
        return type(problem)(problem.message, where=due.where(self.wire.peer), **facts)


def _describe(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(
        f"{tensor.dtype}{list(tensor.shape)} {'inline' if tensor.offset is None else f'at {tensor.offset}'}"
        for tensor in tensors
    )
