"""Broken grants and frames: of the sealed link between client and worker, and of the link to an accelerator."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch

from motte.accelerator.calculator import Calculator
from motte.accelerator.client import AcceleratorClient
from motte.accelerator.server import AcceleratorServer, Offer
from motte.audit.attacks.conformance import Trial
from motte.audit.attacks.conformance_drafts import flip
from motte.errors import DecryptError, FrameError, IntegrityError, MotteError, PeerClosed, PeerStalled
from motte.limits import MAX_FRAME_BYTES
from motte.linear.operation import LinearOperation
from motte.link import calls
from motte.link.frames import Frame, FrameHeader, Kind, WireTensor
from motte.link.local import Link
from motte.link.wire import Deadline, MemoryWire, Wire
from motte.provision.grant import SessionKeys, make_grant, open_grant
from motte.seal.primitives import new_x25519, random_bytes
from motte.seal.reader import KeyEncryptionKey
from motte.strict_json import canonical

_TIMEOUT_S: Final = 5.0


# --- grants and the sealed link ---------------------------------------------------------------------------------------
def link_trials() -> Iterator[Trial]:
    """Grants for another, and frames that were replayed, altered, turned round or sent in clear."""
    yield from _grants()
    yield Trial("an honest sealed frame", "C1", (), None, partial(_deliver, lambda frames: frames[:1]))
    for name, change, kinds in (
        ("replayed", lambda frames: [frames[0], frames[0]], (FrameError,)),
        ("out of order", lambda frames: frames[::-1], (FrameError, DecryptError)),
        ("one left out", lambda frames: frames[1:], (FrameError, DecryptError)),
        (
            "replayed under the next number",
            lambda frames: [frames[0], _renumbered(frames[0])],
            (FrameError, DecryptError),
        ),
        ("cut off", lambda frames: [frames[0][:-3]], (PeerClosed,)),
        ("nothing at all", lambda frames: [], (PeerClosed,)),
    ):
        yield Trial(f"sealed frame: {name}", "C1", kinds, None, partial(_deliver, change, count=2))
    for place in (0, 4, 5, 12, 15, 27, 28, 40, -1):
        act = partial(_deliver, partial(_first_flipped, place))
        yield Trial(f"sealed frame: byte {place} flipped", "C1", (FrameError, DecryptError, PeerClosed), None, act)
    yield Trial("sealed frame: sent back to its sender", "C1", (FrameError, DecryptError), None, _reflected)
    yield Trial("a tensor in clear", "C1", (FrameError,), None, partial(_raw, [_clear_tensor()]))
    yield Trial(
        "a clear frame after the keys", "C1", (FrameError,), None, partial(_raw, [_clear(Kind.HELLO)], keyed=True)
    )
    for name, data in (
        ("noise", bytes(range(256)) * 4),
        ("another magic", b"HTTP" + bytes(60)),
        ("a kind that there is none of", b"MOTL\x01\xee" + bytes(60)),
    ):
        yield Trial(f"frame: {name}", "C2", (FrameError,), None, partial(_raw, [data]))
    huge = FrameHeader(Kind.RUN, True, 0, 0, MAX_FRAME_BYTES + 1).encode()
    yield Trial("frame: a body beyond the bound", "C2", (FrameError,), None, partial(_raw, [huge], keyed=True))
    text = canonical({"fields": {}, "tensors": []}).replace(b"{}", b'{"a":1,"a":2}')
    twice = FrameHeader(Kind.HELLO, False, 0, len(text), 0).encode() + text
    yield Trial("frame: a field given twice", "C2", (FrameError,), None, partial(_raw, [twice]))


def _grants() -> Iterator[Trial]:
    private, public = new_x25519()
    stranger, _ = new_x25519()
    bundle, other = random_bytes(16), random_bytes(16)
    sealed, _ = make_grant(KeyEncryptionKey(bundle, 3, random_bytes(32)), public, bundle_id=bundle, release=3)

    def opened(data: bytes, key: bytes, bundle_id: bytes, release: int) -> Callable[[], object]:
        return lambda: open_grant(data, key, bundle_id=bundle_id, release=release)

    yield Trial("an honest grant", "B1", (), None, opened(sealed, private, bundle, 3))
    for name, act in (
        ("another worker's key", opened(sealed, stranger, bundle, 3)),
        ("another bundle", opened(sealed, private, other, 3)),
        ("another release", opened(sealed, private, bundle, 4)),
        ("one bit flipped", opened(flip(sealed, 50), private, bundle, 3)),
        ("cut off", opened(sealed[:-1], private, bundle, 3)),
    ):
        yield Trial(f"grant: {name}", "B1", (DecryptError,), None, act)


@contextlib.contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def _frames(keys: SessionKeys, count: int) -> list[bytes]:
    """What a client sends, as the host sees it."""
    seen: list[bytes] = []
    with _pair() as (a, _):
        sender = Link(a, peer="worker", recorder=lambda _direction, data: seen.append(bytes(data)))
        sending, receiving = keys.client_ciphers()
        sender.secure(sending=sending, receiving=receiving)
        for number in range(count):
            sender.send(Frame(Kind.RUN, {"n": number}, [WireTensor("u8", (64,), bytes(64))]))
    return seen


def _keys() -> SessionKeys:
    return SessionKeys(random_bytes(32), random_bytes(32))


def _deliver(change: Callable[[list[bytes]], Sequence[bytes]], *, count: int = 1) -> None:
    """A worker takes what the host makes of honest frames."""
    keys = _keys()
    sent = change(_frames(keys, count))
    _take(sent, keys, expected=max(1, len(sent)))


def _first_flipped(place: int, frames: list[bytes]) -> list[bytes]:
    return [flip(frames[0], place)]


def _reflected() -> None:
    """A client gets its own frame back."""
    keys = _keys()
    (frame,) = _frames(keys, 1)
    with _pair() as (a, b):
        a.sendall(frame)
        client = Link(b, peer="worker")
        sending, receiving = keys.client_ciphers()
        client.secure(sending=sending, receiving=receiving)
        client.receive(timeout_s=_TIMEOUT_S)


def _raw(data: Sequence[bytes], *, keyed: bool = False) -> None:
    _take(data, _keys() if keyed else None, expected=len(data))


def _take(data: Sequence[bytes], keys: SessionKeys | None, *, expected: int) -> None:
    with _pair() as (a, b):
        for each in data:
            a.sendall(each)
        a.shutdown(socket.SHUT_WR)
        worker = Link(b, peer="client")
        if keys is not None:
            sending, receiving = keys.worker_ciphers()
            worker.secure(sending=sending, receiving=receiving)
        for _ in range(expected):
            worker.receive(timeout_s=_TIMEOUT_S)


def _renumbered(frame: bytes) -> bytes:
    """The same frame under the next number, which its header carries."""
    changed = bytearray(frame)
    changed[15] = 1
    return bytes(changed)


def _clear(kind: Kind) -> bytes:
    text = canonical({"fields": {}, "tensors": []})
    return FrameHeader(kind, False, 0, len(text), 0).encode() + text


def _clear_tensor() -> bytes:
    text = canonical({"fields": {}, "tensors": [["u8", [1]]]})
    return FrameHeader(Kind.RUN, False, 0, len(text), 1).encode() + text + b"x"


# --- the accelerator's link -------------------------------------------------------------------------------------------
_CONV: Final = LinearOperation("conv", 3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
Answer = Callable[["_Hostile", calls.Call, Sequence[torch.Tensor]], None]


class _Hostile(AcceleratorServer):
    """The real server, but for one answer."""

    misbehave: Answer | None = None

    def answer(self, call: calls.Call, tensors: Sequence[torch.Tensor], compute_ns: int) -> None:
        """What it answers is not what it was asked for."""
        if self.misbehave is None:
            super().answer(call, tensors, compute_ns)
        else:
            self.misbehave(self, call, tensors)

    def reply(self, call: calls.Call, tensors: Sequence[torch.Tensor], **changes: Any) -> None:
        """A frame with an answer's form, and other facts."""
        described = tuple(calls.Tensor("f32", tuple(each.shape)) for each in tensors)
        made = calls.Call(calls.Op.ANSWER, call.sequence, call.step, call.layer, tensors=described)._replace(**changes)
        self.send(calls.encode(made), *(each.contiguous().numpy().tobytes() for each in tensors))


class _Client(AcceleratorClient):
    """The real client, connected to a hostile server within this process."""

    def __init__(self, misbehave: Answer | None) -> None:
        self._misbehave = misbehave
        super().__init__(self._dial_here, name="conformance", timeout_s=_TIMEOUT_S)

    def _dial_here(self, deadline: Deadline, again: bool) -> Wire:
        ours, theirs = MemoryWire.pair("hostile accelerator", "client")
        server = _Hostile(theirs, Calculator(), Offer())
        server.misbehave = self._misbehave
        theirs.take = server.take
        return ours


def _header(meta: int, body: int, tensors: int = 1) -> Answer:
    def lie(server: _Hostile, call: calls.Call, _tensors: Sequence[torch.Tensor]) -> None:
        facts = (call.sequence, call.step, call.layer, tensors, 0, 0, 0, 0, meta, body)
        server.send(calls.HEADER.pack(calls.MAGIC, calls.VERSION, calls.Op.ANSWER, 0, *facts))

    return lie


def _poisoned(value: float) -> Answer:
    def lie(server: _Hostile, call: calls.Call, tensors: Sequence[torch.Tensor]) -> None:
        tensors[0].view(-1)[tensors[0].numel() // 2] = value
        server.reply(call, tensors)

    return lie


_MALFORMED: Final[tuple[tuple[str, Answer], ...]] = (
    ("another shape", lambda s, c, t: s.reply(c, [t[0][:, :, :-1]])),
    ("as many bytes, transposed", lambda s, c, t: s.reply(c, [t[0].transpose(0, 1)])),
    ("one dimension more", lambda s, c, t: s.reply(c, [t[0][None]])),
    ("an empty tensor", lambda s, c, t: s.reply(c, [t[0][:0]])),
    ("two tensors", lambda s, c, t: s.reply(c, [t[0], t[0]])),
    ("no tensor", lambda s, c, t: s.reply(c, [])),
    ("a stale number", lambda s, c, t: s.reply(c, t, sequence=c.sequence - 1)),
    ("a number of the future", lambda s, c, t: s.reply(c, t, sequence=c.sequence + 1)),
    ("another layer", lambda s, c, t: s.reply(c, t, layer=c.layer + 1)),
    ("another step", lambda s, c, t: s.reply(c, t, step=c.step - 1)),
    ("a request", lambda s, c, t: s.send(calls.encode(calls.Call(calls.Op.RELEASE, c.sequence, extra=b"\0" * 8)))),
    ("noise", lambda s, c, t: s.send(bytes(range(256)) * 64)),
    ("another version", lambda s, c, t: s.send(b"MOTA\x02" + bytes(calls.HEADER.size))),
    (
        "a refusal that is no JSON",
        lambda s, c, t: s.send(calls.encode(calls.Call(calls.Op.REFUSAL, c.sequence, extra=b"{"))),
    ),
    ("a body beyond every bound", _header(20, 1 << 60)),
    ("descriptors beyond every bound", _header(1 << 30, 0)),
    ("more tensors than any answer has", _header(0, 0, tensors=255)),
)


def accelerator_trials() -> Iterator[Trial]:
    """Answers that were not asked for, given twice, not at all, or not finite."""
    yield Trial("an honest answer", "F10", (), None, partial(_asked, None))
    for name, lie in _MALFORMED:
        yield Trial(f"an answer with {name}", "F10", (FrameError,), None, partial(_asked, lie))
    for value in ("nan", "inf", "-inf"):
        name = f"an answer with {value} in it"
        yield Trial(name, "F10", (IntegrityError,), None, partial(_asked, _poisoned(float(value))))
    yield Trial("an answer given twice", "F10", (FrameError,), None, partial(_asked, _twice, times=2))
    yield Trial("no answer", "F10", (PeerStalled,), None, partial(_asked, lambda s, c, t: None))
    yield Trial("an end in place of an answer", "F10", (PeerClosed,), None, partial(_asked, lambda s, c, t: s.close()))


def _twice(server: _Hostile, call: calls.Call, tensors: Sequence[torch.Tensor]) -> None:
    server.reply(call, tensors)
    server.reply(call, tensors)


def _asked(misbehave: Answer | None, *, times: int = 1) -> None:
    generator = torch.Generator().manual_seed(0)
    client = _Client(misbehave)
    try:
        client.register("layer", _CONV)
        client.put_weight("layer", torch.randn(_CONV.weight_shape, generator=generator))
        for step in range(7, 7 + times):
            x = torch.randn(2, 3, 8, 8, generator=generator)
            client.forward("layer", x, step=step, hold=False).result()
    finally:
        with contextlib.suppress(MotteError):
            client.close()
