"""An accelerator that implements the real server and misbehaves: every lie is a typed error that names peer, layer and
step; nothing hangs, and nothing unchecked is handed on."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from motte.accelerator.server import AcceleratorServer
from motte.errors import (
    FrameError,
    InputError,
    IntegrityError,
    LinkError,
    PeerClosed,
    PeerRefused,
    PeerStalled,
    ResourceError,
    SettingError,
)
from motte.linear.compute import forward
from motte.linear.operation import LinearOperation
from motte.link.calls import HEADER, Call, Op, Tensor, encode

CONV = LinearOperation("conv", 3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
W = torch.randn(CONV.weight_shape, generator=torch.Generator().manual_seed(2))
BIG = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(3))
"""Large enough to go through shared memory."""


class Lying(AcceleratorServer):
    """Honest until ``lie`` answers for it."""

    def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
        self.lie(call, tensors)

    def lie(self, call: Call, tensors: Any) -> None:
        raise NotImplementedError

    def reply(self, call: Call, tensors: Any, **changes: Any) -> None:
        described = tuple(Tensor("f32", tuple(each.shape)) for each in tensors)
        made = Call(Op.ANSWER, call.sequence, call.step, call.layer, tensors=described)._replace(**changes)
        self.send(encode(made), *(each.contiguous().numpy().tobytes() for each in tensors))


def ask(client: Any, x: torch.Tensor = X, *, step: int = 7) -> torch.Tensor:
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    return client.forward("conv1", x, step=step, hold=False).result()


def lie_with(function: Any) -> type[Lying]:
    return type("Liar", (Lying,), {"lie": function})


# --- malformed, or not what was asked for ----------------------------------------------------------------------------
LIES: dict[str, Any] = {
    "another shape": lambda s, c, t: s.reply(c, [t[0][:, :, :-1]]),
    "the same number of bytes, transposed": lambda s, c, t: s.reply(c, [t[0].transpose(0, 1)]),
    "one dimension more": lambda s, c, t: s.reply(c, [t[0][None]]),
    "another dtype": lambda s, c, t: s.send(
        encode(Call(Op.ANSWER, c.sequence, c.step, c.layer, tensors=(Tensor("f64", tuple(t[0].shape)),))),
        t[0].double().numpy().tobytes(),
    ),
    "an empty tensor": lambda s, c, t: s.reply(c, [t[0][:0]]),
    "two tensors": lambda s, c, t: s.reply(c, [t[0], t[0]]),
    "no tensor": lambda s, c, t: s.send(encode(Call(Op.ANSWER, c.sequence, c.step, c.layer))),
    "a stale number": lambda s, c, t: s.reply(c, t, sequence=c.sequence - 1),
    "a number of the future": lambda s, c, t: s.reply(c, t, sequence=c.sequence + 1),
    "another layer": lambda s, c, t: s.reply(c, t, layer=c.layer + 1),
    "another step": lambda s, c, t: s.reply(c, t, step=c.step - 1),
    "a place that there is none of": lambda s, c, t: s.send(
        encode(Call(Op.ANSWER, c.sequence, c.step, c.layer, tensors=(Tensor("f32", tuple(t[0].shape), 0),)))
    ),
    "a request": lambda s, c, t: s.send(encode(Call(Op.RELEASE, c.sequence, extra=b"\0" * 8))),
    "a second greeting": lambda s, c, t: s._say_hello("none", None),
    "noise": lambda s, c, t: s.send(bytes(range(256)) * 64),
    "another version": lambda s, c, t: s.send(b"MOTA\x02" + bytes(HEADER.size)),
    "a body beyond every bound": lambda s, c, t: s.send(
        HEADER.pack(b"MOTA", 1, Op.ANSWER, 0, c.sequence, c.step, c.layer, 1, 0, 0, 0, 0, 20, 1 << 60)
    ),
    "descriptors beyond every bound": lambda s, c, t: s.send(
        HEADER.pack(b"MOTA", 1, Op.ANSWER, 0, c.sequence, c.step, c.layer, 1, 0, 0, 0, 0, 1 << 30, 0)
    ),
    "more tensors than any answer has": lambda s, c, t: s.send(
        HEADER.pack(b"MOTA", 1, Op.ANSWER, 0, c.sequence, c.step, c.layer, 255, 0, 0, 0, 0, 0, 0)
    ),
    "a refusal that is no JSON": lambda s, c, t: s.send(encode(Call(Op.REFUSAL, c.sequence, extra=b"{"))),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_was_not_asked_for_is_a_frame_error_with_its_place(against: Any, lie: Any) -> None:
    client, _ = against(lie_with(lie), retries=3)
    with pytest.raises(FrameError) as found:
        ask(client)
    assert "peer" in str(found.value.where)
    assert "layer conv1, step 7" in str(found.value.where)


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_liar_is_not_asked_again(against: Any, lie: Any) -> None:
    client, harness = against(lie_with(lie), retries=3)
    with pytest.raises(FrameError):
        ask(client)
    assert len(harness.servers) == 1
    with pytest.raises(FrameError, match="failed before"):
        client.put_weight("conv1", W)


def test_an_answer_given_twice_is_noticed(against: Any) -> None:
    def twice(server: Lying, call: Call, tensors: Any) -> None:
        server.reply(call, tensors)
        server.reply(call, tensors)

    client, _ = against(lie_with(twice))

    def use() -> None:
        for step in (7, 8):
            ask(client, step=step)

    # With the first answer or with the next one, as the bytes happen to arrive.
    with pytest.raises(FrameError, match="or a second one") as found:
        use()
    assert "layer conv1, step" in str(found.value.where)


def test_yesterdays_answer_is_refused_even_with_the_right_values(against: Any) -> None:
    class Replaying(AcceleratorServer):
        def send(self, *parts: Any) -> None:
            self.old: list[bytes] = getattr(self, "old", [])
            frame = b"".join(map(bytes, parts))
            if frame[5] == Op.ANSWER:
                self.old.append(frame)
                frame = self.old[0]
            super().send(frame)

    client, _ = against(Replaying)
    ask(client)
    with pytest.raises(FrameError, match="stale"):
        client.forward("conv1", X, step=8, hold=False).result()


def test_answers_in_another_order_are_refused(against: Any) -> None:
    class Swapping(Lying):
        kept: Any = None

        def lie(self, call: Call, tensors: Any) -> None:
            if self.kept is None:
                self.kept = (call, tensors)
            else:
                self.reply(call, tensors)
                self.reply(*self.kept)

    client, _ = against(Swapping)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    first = client.forward("conv1", X, step=1, hold=False)
    client.forward("conv1", X, step=2, hold=False)
    with pytest.raises(FrameError, match="out of turn") as found:
        first.result()
    assert "step 1" in str(found.value.where)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("region_bytes", [0, 1 << 22])
def test_what_is_not_finite_is_an_integrity_error(against: Any, value: float, region_bytes: int) -> None:
    class Poisoning(AcceleratorServer):
        def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
            tensors[0].view(-1)[tensors[0].numel() // 2] = value
            super().answer(call, tensors, compute_ns)

    client, harness = against(Poisoning, region_bytes=region_bytes, retries=1)
    with pytest.raises(IntegrityError, match="not finite") as found:
        ask(client, BIG)
    assert "peer, layer conv1, step 7" in str(found.value.where)
    assert len(harness.servers) == 1


def test_large_finite_values_whose_sum_overflows_pass(against: Any) -> None:
    class Huge(AcceleratorServer):
        def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
            tensors[0].fill_(3e38)
            super().answer(call, tensors, compute_ns)

    client, _ = against(Huge)
    assert bool((ask(client) == 3e38).all())


# --- silence, death, refusal -----------------------------------------------------------------------------------------
def test_silence_is_a_stall_within_the_time_limit(against: Any) -> None:
    client, _ = against(lie_with(lambda s, c, t: None), timeout_s=0.2)
    began = time.monotonic()
    with pytest.raises(PeerStalled) as found:
        ask(client)
    assert time.monotonic() - began < 15
    assert "layer conv1, step 7" in str(found.value.where)


def test_half_a_frame_is_a_stall(against: Any) -> None:
    def half(server: Lying, call: Call, tensors: Any) -> None:
        described = (Tensor("f32", tuple(tensors[0].shape)),)
        server.send(encode(Call(Op.ANSWER, call.sequence, call.step, call.layer, tensors=described)), b"\0" * 100)

    client, _ = against(lie_with(half), timeout_s=0.2)
    with pytest.raises(PeerStalled, match="no answer in time") as found:
        ask(client)
    assert "layer conv1, step 7" in str(found.value.where)


def test_a_peer_that_trickles_bytes_is_not_waited_for(against: Any) -> None:
    stop = threading.Event()

    def trickle(server: Lying, call: Call, tensors: Any) -> None:
        described = (Tensor("f32", tuple(tensors[0].shape)),)
        server.send(encode(Call(Op.ANSWER, call.sequence, call.step, call.layer, tensors=described)))
        while not stop.wait(0.002):
            server.send(b"\0")

    client, _ = against(lie_with(trickle), timeout_s=0.2)
    try:
        with pytest.raises(PeerStalled) as found:
            ask(client, BIG)
    finally:
        stop.set()
    assert "layer conv1, step 7" in str(found.value.where)


def test_a_peer_that_takes_nothing_is_a_stall_too(against: Any) -> None:
    stop = threading.Event()

    class Deaf(AcceleratorServer):
        def handle(self, call: Call, tensors: Any) -> None:
            super().handle(call, tensors)
            if call.op is Op.WEIGHT:
                stop.wait(30)

    client, _ = against(Deaf, timeout_s=0.2)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)

    def flood() -> None:
        for _ in range(100):
            client.forward("conv1", BIG, step=7, hold=False)

    try:
        with pytest.raises(PeerStalled, match="while sending") as found:
            flood()
    finally:
        stop.set()
    assert "layer conv1, step 7" in str(found.value.where)


def test_a_peer_that_goes_is_closed(against: Any) -> None:
    client, _ = against(lie_with(lambda s, c, t: s.wire.close()))
    with pytest.raises(PeerClosed) as found:
        ask(client)
    assert "layer conv1, step 7" in str(found.value.where)


def test_a_peer_that_goes_in_the_middle_of_an_answer_is_closed(against: Any) -> None:
    def half(server: Lying, call: Call, tensors: Any) -> None:
        described = (Tensor("f32", tuple(tensors[0].shape)),)
        server.send(encode(Call(Op.ANSWER, call.sequence, call.step, call.layer, tensors=described)), b"\0" * 100)
        server.wire.close()

    client, _ = against(lie_with(half))
    with pytest.raises(PeerClosed) as found:
        ask(client)
    assert "layer conv1, step 7" in str(found.value.where)


def test_a_refusal_names_its_place_and_is_not_retried(against: Any) -> None:
    class Full(AcceleratorServer):
        def handle(self, call: Call, tensors: Any) -> None:
            if call.op is Op.FORWARD:
                raise ResourceError("out of memory on the device")
            super().handle(call, tensors)

    client, harness = against(Full, retries=3)
    with pytest.raises(PeerRefused) as found:
        ask(client)
    assert "layer conv1, step 7" in str(found.value.where)
    assert "out of memory on the device" in str(found.value.got)
    assert len(harness.servers) == 1


def test_a_product_that_torch_cannot_compute_is_a_refusal(against: Any) -> None:
    class Failing(AcceleratorServer):
        def handle(self, call: Call, tensors: Any) -> None:
            if call.op is Op.FORWARD:
                raise RuntimeError("CUDA out of memory")
            super().handle(call, tensors)

    client, _ = against(Failing)
    with pytest.raises(PeerRefused, match="refused") as found:
        ask(client)
    assert "CUDA out of memory" in str(found.value.got)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_over_there_is_no_silence(against: Any) -> None:
    class Broken(AcceleratorServer):
        def handle(self, call: Call, tensors: Any) -> None:
            if call.op is Op.FORWARD:
                raise TypeError("a bug")
            super().handle(call, tensors)

    client, _ = against(Broken)
    with pytest.raises(PeerClosed) as found:
        ask(client)
    assert "layer conv1, step 7" in str(found.value.where)


def test_every_pending_answer_of_a_broken_link_fails(against: Any) -> None:
    client, _ = against(lie_with(lambda s, c, t: s.send(b"noise" * 100)))
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    pending = [client.forward("conv1", X, step=step, hold=False) for step in (1, 2)]
    with pytest.raises(FrameError, match="not a frame"):
        pending[0].result()
    with pytest.raises(FrameError, match="failed before") as found:
        pending[1].result()
    assert "step 2" in str(found.value.where)


def test_a_peer_that_never_greets_is_a_stall(against: Any) -> None:
    class Mute(AcceleratorServer):
        def handle(self, call: Call, tensors: Any) -> None:
            return

    with pytest.raises(PeerStalled):
        against(Mute, timeout_s=0.2)


# --- shared memory ---------------------------------------------------------------------------------------------------
def test_memory_that_changes_while_it_is_read_gives_one_checked_copy(against: Any) -> None:
    """What is handed on is a private copy whose every value was checked after it was copied."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    class Changing(AcceleratorServer):
        def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
            def scribble() -> None:
                while not stop.is_set():
                    tensors[0].fill_(float("nan"))
                    tensors[0].fill_(1.0)

            tensors[0].fill_(1.0)
            threads.append(threading.Thread(target=scribble, daemon=True))
            threads[-1].start()
            super().answer(call, tensors, compute_ns)

    client, _ = against(Changing, region_bytes=1 << 24)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    try:
        for step in range(20):
            try:
                y = client.forward("conv1", BIG, step=step, hold=False).result()
            except IntegrityError:
                continue
            before = y.clone()
            time.sleep(0.002)
            assert bool(torch.isfinite(y).all())
            assert torch.equal(y, before)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_an_answer_in_another_place_is_refused(against: Any) -> None:
    class Elsewhere(AcceleratorServer):
        def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
            moved = tuple(place._replace(offset=(place.offset or 0) + 4096) for place in call.places)
            super().answer(call._replace(places=moved), tensors, compute_ns)

    client, _ = against(Elsewhere, region_bytes=1 << 22)
    with pytest.raises(FrameError, match="another shape, dtype or place"):
        ask(client, BIG)


def test_an_answer_outside_of_the_memory_is_refused(against: Any) -> None:
    class Outside(AcceleratorServer):
        def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
            moved = tuple(place._replace(offset=1 << 22) for place in call.places)
            super().answer(call._replace(places=moved), tensors, compute_ns)

    client, _ = against(Outside, region_bytes=1 << 22)
    with pytest.raises(FrameError, match="outside of the shared memory") as found:
        ask(client, BIG)
    assert "layer conv1, step 7" in str(found.value.where)


def test_memory_that_the_peer_could_shrink_is_refused(against: Any) -> None:
    import os

    class Unsealed(AcceleratorServer):
        def _say_hello(self, kind: str, descriptor: int | None) -> None:
            fd = os.memfd_create("loose")
            os.ftruncate(fd, 1 << 20)
            super()._say_hello(kind, fd)
            os.close(fd)

    with pytest.raises(FrameError, match="not shared memory of a fixed size"):
        against(Unsealed, region_bytes=1 << 20)


def test_a_file_instead_of_memory_is_refused(against: Any, tmp_path: Any) -> None:
    import os

    (tmp_path / "file").write_bytes(bytes(1 << 20))

    class OnDisk(AcceleratorServer):
        def _say_hello(self, kind: str, descriptor: int | None) -> None:
            fd = os.open(tmp_path / "file", os.O_RDWR)
            super()._say_hello(kind, fd)
            os.close(fd)

    with pytest.raises(FrameError, match="not shared memory"):
        against(OnDisk, region_bytes=1 << 20)


def test_memory_that_was_promised_and_did_not_come_is_refused(against: Any) -> None:
    class Forgetful(AcceleratorServer):
        def _say_hello(self, kind: str, descriptor: int | None) -> None:
            super()._say_hello(kind, None)

    with pytest.raises(FrameError, match="shared memory of another kind"):
        against(Forgetful, region_bytes=1 << 20)


# --- our own mistakes ------------------------------------------------------------------------------------------------
def test_wrong_use_is_an_input_error_and_leaves_the_link_usable(against: Any) -> None:
    client, _ = against(AcceleratorServer)
    ask(client)
    with pytest.raises(InputError):
        client.put_weight("conv1", W[:, :1])
    with pytest.raises(InputError):
        client.put_weight("nobody", W)
    with pytest.raises(InputError):
        client.forward("conv1", X.half(), step=1, hold=False)
    with pytest.raises(InputError):
        client.forward("conv1", torch.empty(1, device="meta"), step=1, hold=False)
    with pytest.raises(SettingError):
        client.forward("conv1", X[:, :1], step=1, hold=False)
    with pytest.raises(SettingError):
        client.register("conv1", LinearOperation("linear", 3, 4))
    with pytest.raises(InputError):
        client.backward("conv1", 99, X, step=1, need_input=True, need_weight=True)
    torch.testing.assert_close(ask(client), forward(CONV, X, W))


def test_closed_is_closed(against: Any) -> None:
    client, _ = against(AcceleratorServer)
    ask(client)
    client.close()
    client.close()
    with pytest.raises(LinkError, match="was closed"):
        client.forward("conv1", X, step=1, hold=False)


def test_a_result_is_taken_once(against: Any) -> None:
    client, _ = against(AcceleratorServer)
    ask(client)
    pending = client.forward("conv1", X, step=1, hold=False)
    pending.result()
    with pytest.raises(InputError, match="taken already"):
        pending.result()
