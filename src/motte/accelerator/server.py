"""The accelerator's side of one connection: reads requests, has them computed, answers in order.

It runs outside and guards only its own health: who is let in, how much a client may make it read, and that a client
that goes away or stalls does not keep anything. After a refusal the connection ends.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from motte.accelerator.buffers import Buffers, Desk, Room
from motte.accelerator.calculator import Calculator, Work
from motte.accelerator.conversation import PROTOCOL
from motte.accelerator.tensors import RegionTensors, bytes_of
from motte.errors import FrameError, InputError, LinkError, MotteError, PeerRefused, ResourceError
from motte.limits import MAX_CALL_META_BYTES, MAX_TOKEN_BYTES
from motte.linear.operation import LinearOperation
from motte.link.calls import TO_ACCELERATOR, Call, Flag, Op, Tensor, decode_numbers, encode
from motte.link.region import Region
from motte.link.wire import Buffer, Deadline, FrameReader, SocketWire, Wire, feed
from motte.strict_json import Fields, canonical, parse

HELLO_S: Final = 10.0
"""For a new connection to say who it is."""
TAKE_S: Final = 60.0
"""For a client to finish a frame that it began, and to take an answer."""
_AHEAD: Final = 8
"""Requests that may be under way on an asynchronous device while the next is read."""
_MAX_REFUSAL_CHARACTERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Offer:
    """What an accelerator offers to everyone that it lets in.

    ``region_bytes`` of new shared memory for each client that can take a descriptor, or one ``region`` that was made
    before, for one client at a time. With a ``token`` only who knows it is let in.
    """

    region_bytes: int = 0
    region: Region | None = None
    token: str | None = None
    threads: int = 1


class Over(Exception):
    """The connection ends here; everything that had to be said was said."""


class AcceleratorServer:
    """Serves one client.

    Args:
        wire: connected to it; the server owns it.
        calculator: computes; its state is that of this client.
        offer: what the client may use.
    """

    def __init__(self, wire: Wire, calculator: Calculator, offer: Offer) -> None:
        self.wire = wire
        self.calculator = calculator
        self.requests = 0
        self._offer = offer
        self._reader = FrameReader(self, peer=wire.peer, allowed=TO_ACCELERATOR)
        self._region: Region | None = None
        self._shared: RegionTensors | None = None
        self._expected = 0
        self._arriving: tuple[Call, list[Room]] | None = None
        self._desk = Desk(Buffers())
        self._sender: _Sender | None = None
        self._sending = threading.Lock()

    # --- the loop ---------------------------------------------------------------------------------------------------
    def serve(self) -> None:
        """Until the client goes. Nothing is raised for what a client did: it is told, where it still listens."""
        if self.calculator.asynchronous:
            self._sender = _Sender(self)
        deadline, idle = Deadline(HELLO_S), Deadline(None)
        try:
            with self._ending():
                while True:
                    began = self.requests
                    self.wire.fill(self._reader, deadline)
                    # An idle client may take its time; one that began a frame may not.
                    if self.requests != began:
                        deadline = idle if self._reader.between_frames else Deadline(TAKE_S)
                    elif deadline is idle:
                        deadline = Deadline(TAKE_S)
        finally:
            # After a bug of ours too: the client is not to wait for its time limit.
            self.close()

    def take(self, data: bytes) -> None:
        """Bytes that arrive within our own process; see :class:`motte.link.wire.MemoryWire`."""
        with self._ending():
            feed(self._reader, data)
            return
        self.close()

    def close(self) -> None:
        """End the connection and forget what the client left. Safe to call again."""
        self.wire.close()
        if self._sender is not None:
            self._sender.stop()
            self._sender = None
        self.calculator.close()
        self._shared = None
        if self._region is not None and self._region is not self._offer.region:
            self._region.close()
        self._region = None

    # --- frames in --------------------------------------------------------------------------------------------------
    def begin(self, call: Call, head: bytes) -> Sequence[memoryview]:
        """A frame without its body arrived; see :class:`motte.link.wire.Receiver`."""
        if call.sequence != self._expected or (call.op is Op.HELLO) != (not self._expected):
            raise FrameError(
                "frame out of turn",
                where=self.wire.peer,
                expected=f"number {self._expected}",
                got=f"number {call.sequence}, {call.op.name}",
            )
        # No request has two tensors, and a calculator copies what it keeps.
        inline = [self._desk.room(tensor) for tensor in call.tensors if tensor.offset is None]
        self._arriving = (call, inline)
        return [room.bytes for room in inline]

    def finish(self) -> None:
        """The frame is complete; see :class:`motte.link.wire.Receiver`."""
        if self._arriving is None:
            raise RuntimeError("no frame has begun")
        (call, inline), self._arriving = self._arriving, None
        self._expected += 1
        self.requests += 1
        tensors = [self.place(tensor) if tensor.offset is not None else inline.pop(0).tensor for tensor in call.tensors]
        try:
            self.handle(call, tensors)
        except (LinkError, Over):
            raise
        except MotteError as problem:
            self.refuse(problem, call)
            raise Over from problem
        except (RuntimeError, MemoryError) as problem:
            # torch reports what it cannot do, and memory that it does not get, as RuntimeError.
            self.refuse(ResourceError("the product could not be computed", got=str(problem)[:500]), call)
            raise Over from problem

    def handle(self, call: Call, tensors: list[torch.Tensor]) -> None:
        """Do what ``call`` asks for.

        Raises:
            MotteError: it cannot be done.
        """
        calculator = self.calculator
        if call.op is Op.FORWARD and not call.flags & Flag.QUIET:
            hold = call.held if call.flags & Flag.HOLD else None
            self._give(call, calculator.start_forward(call.layer, tensors[0], hold=hold, into=self._into(call)))
        elif call.op is Op.FORWARD:
            calculator.hold(call.layer, call.held, tensors[0])
        elif call.op is Op.BACKWARD:
            work = calculator.start_backward(
                call.layer,
                call.held,
                tensors[0],
                need_input=bool(call.flags & Flag.NEED_INPUT),
                need_weight=bool(call.flags & Flag.NEED_WEIGHT),
                into=self._into(call),
            )
            self._give(call, work)
        elif call.op is Op.WEIGHT:
            calculator.put_weight(call.layer, tensors[0])
        elif call.op is Op.RELEASE:
            for number in decode_numbers(call.extra):
                calculator.release(number)
        elif call.op is Op.REGISTER:
            where = f"{self.wire.peer}, REGISTER"
            value = parse(call.extra, max_bytes=MAX_CALL_META_BYTES, what=where, error=FrameError)
            calculator.register(call.layer, LinearOperation.read(value, where))
        else:
            self._greet(call)

    def place(self, tensor: Tensor) -> torch.Tensor:
        """A tensor in the shared memory, where it lies."""
        if self._shared is None:
            raise FrameError("there is no shared memory", where=self.wire.peer)
        return self._shared.view(tensor)

    # --- frames out -------------------------------------------------------------------------------------------------
    def answer(self, call: Call, tensors: Sequence[torch.Tensor], compute_ns: int) -> None:
        """Send the answer to ``call``: ``tensors`` already lie where its places say, except for inline ones."""
        described: list[Tensor] = []
        inline: list[Buffer] = []
        for place, tensor in zip(call.places, tensors, strict=True):
            if place.offset is None:
                if tensor.shape != place.shape:
                    # Told as it is: the client then says that it asked for another.
                    place = place._replace(shape=tuple(tensor.shape))
                inline.append(bytes_of(tensor))
            described.append(place)
        reply = Call(Op.ANSWER, call.sequence, call.step, call.layer, 0, 0, compute_ns, tuple(described))
        self.send(encode(reply), *inline)

    def refuse(self, problem: MotteError, call: Call | None = None) -> None:
        """Tell the client why its connection ends, if it still listens."""
        text = canonical({"kind": type(problem).__name__, "message": str(problem)[:_MAX_REFUSAL_CHARACTERS]})
        step, layer, sequence = (0, 0, 0) if call is None else (call.step, call.layer, call.sequence)
        with contextlib.suppress(LinkError):
            self.send(encode(Call(Op.REFUSAL, sequence, step, layer, extra=text)))
            if isinstance(self.wire, SocketWire):
                # Closing over unread bytes would reset the connection, and take the refusal with it.
                self.wire.finish_sending(Deadline(1.0))

    def send(self, *parts: Buffer) -> None:
        """Send the bytes of one frame, whole."""
        with self._sending:
            self.wire.send(parts, Deadline(TAKE_S))

    def _give(self, call: Call, work: Work) -> None:
        if self._sender is not None:
            self._sender.put(call, work)
            return
        work.wait()
        self.answer(call, work.tensors, work.compute_ns)

    def _into(self, call: Call) -> list[torch.Tensor | None]:
        return [None if place.offset is None else self.place(place) for place in call.places]

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Ends quietly when the client goes; a client that breaks the protocol is told so."""
        try:
            yield
        except (Over, LinkError):
            pass
        except MotteError as problem:
            self.refuse(problem)

    # --- the greeting -----------------------------------------------------------------------------------------------
    def _greet(self, call: Call) -> None:
        where = f"{self.wire.peer}, HELLO"
        value = parse(call.extra, max_bytes=MAX_CALL_META_BYTES, what=where, error=FrameError)
        fields = Fields(value, where=where, error=FrameError)
        fields.integer("protocol", low=PROTOCOL, high=PROTOCOL)
        wanted = fields.choice("shared_memory", ("none", "descriptor", "path"))
        token = fields.text("token", max_bytes=MAX_TOKEN_BYTES) if fields.has("token") else ""
        fields.done()
        if self._offer.token is not None and not hmac.compare_digest(token.encode(), self._offer.token.encode()):
            raise InputError("the token is missing or wrong", where=self.wire.peer)
        kind, descriptor = "none", None
        if wanted == "path" and self._offer.region is not None:
            kind, self._region = "path", self._offer.region
        elif wanted == "descriptor" and self._offer.region_bytes:
            kind = "descriptor"
            self._region, descriptor = Region.create(self._offer.region_bytes)
        try:
            self._say_hello(kind, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        if self._region is not None:
            self._shared = RegionTensors(self._region)
            self._reader.heads.share(self._region.bytes)
            self.calculator.share(self._shared.all)

    def _say_hello(self, kind: str, descriptor: int | None) -> None:
        size = 0 if self._region is None else self._region.bytes
        told: dict[str, Any] = {"protocol": PROTOCOL, "device": str(self.calculator.device), "shared_memory": kind}
        extra = canonical({**told, "region_bytes": size, "threads": self._offer.threads})
        head = encode(Call(Op.HELLO, 0, extra=extra))
        if descriptor is not None and isinstance(self.wire, SocketWire):
            self.wire.send_with_descriptor([head], descriptor)
        else:
            self.send(head)


class _Sender:
    """Waits for work on an asynchronous device and sends its answers in order, while the next request is read."""

    def __init__(self, server: AcceleratorServer) -> None:
        self._server = server
        self._queue: queue.Queue[tuple[Call, Work] | None] = queue.Queue(_AHEAD)
        self._broken: MotteError | None = None
        self._thread = threading.Thread(target=self._run, name="accelerator answers", daemon=True)
        self._thread.start()

    def put(self, call: Call, work: Work) -> None:
        """Hand work over.

        Raises:
            LinkError, PeerRefused: answering failed before; nobody waits any more.
        """
        if self._broken is not None:
            raise self._broken
        self._queue.put((call, work))

    def stop(self) -> None:
        """End the thread once everything that was handed over is done."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            call, work = item
            if self._broken is not None:
                continue
            try:
                work.wait()
                self._server.answer(call, work.tensors, work.compute_ns)
            except MotteError as problem:
                self._broken = problem
            except RuntimeError as problem:
                self._server.refuse(ResourceError("the product could not be computed", got=str(problem)[:500]), call)
                self._broken = PeerRefused("an answer could not be computed", where=self._server.wire.peer)
                if isinstance(self._server.wire, SocketWire):
                    self._server.wire.interrupt()


def calculator_for(device: str) -> Callable[[], Calculator]:
    """What makes one client's calculator on ``device``.

    Raises:
        InputError: no such device here.
    """
    try:
        kind = torch.device(device)
    except RuntimeError as problem:
        raise InputError("not a device", got=device, expected="cpu or cuda:N") from problem
    if kind.type == "cpu":
        return Calculator
    if kind.type != "cuda" or not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count():
        raise InputError("no such device on this machine", got=device, expected="cpu, or cuda:N where there is one")
    from motte.accelerator.cuda import CudaCalculator

    return lambda: CudaCalculator(kind)
