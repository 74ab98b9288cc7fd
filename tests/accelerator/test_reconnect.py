"""A lost or stalled connection is made again with the identical bytes, as often as was allowed and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from motte.accelerator.in_process import InProcessAccelerator
from motte.accelerator.server import AcceleratorServer
from motte.errors import PeerClosed, PeerStalled, ResourceError, SettingError
from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.link.calls import Call, Flag, Op
from motte.link.recording import RecordedFrame, Recording

CONV = LinearOperation("conv", 3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(4, 3, 48, 48, generator=GENERATOR)
W = torch.randn(CONV.weight_shape, generator=GENERATOR)
W2 = torch.randn(CONV.weight_shape, generator=GENERATOR)
G = torch.randn(CONV.output_shape(X.shape), generator=GENERATOR)


class DiesAtTheSecondAnswer(AcceleratorServer):
    answered = 0

    def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
        self.answered += 1
        if self.answered == 2:
            self.wire.close()
        else:
            super().answer(call, tensors, compute_ns)


class FallsSilentAtTheSecondAnswer(DiesAtTheSecondAnswer):
    def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
        self.answered += 1
        if self.answered < 2:
            AcceleratorServer.answer(self, call, tensors, compute_ns)


class AlwaysDies(AcceleratorServer):
    def answer(self, call: Call, tensors: Any, compute_ns: int) -> None:
        self.wire.close()


def step(client: Any) -> torch.Tensor:
    """Two forwards and a backward, the weight replaced between the forwards."""
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    first = client.forward("conv1", X, step=1, hold=True)
    held = client.last_held()
    torch.testing.assert_close(first.result(), compute.forward(CONV, X, W))
    second = client.forward("conv1", X * 2, step=1, hold=False)
    client.put_weight("conv1", W2)
    torch.testing.assert_close(second.result(), compute.forward(CONV, X * 2, W), atol=1e-4, rtol=1e-4)
    gradients = client.backward("conv1", held, G, step=1, need_input=True, need_weight=True).result()
    torch.testing.assert_close(gradients.input, compute.input_gradient(CONV, X.shape, W2, G))
    torch.testing.assert_close(gradients.weight, compute.weight_gradient(CONV, X, G), atol=1e-3, rtol=1e-4)
    return gradients.weight


@pytest.mark.parametrize("region_bytes", [0, 1 << 24], ids=["inline", "shared memory"])
@pytest.mark.parametrize("broken", [DiesAtTheSecondAnswer, FallsSilentAtTheSecondAnswer])
def test_a_step_goes_on_after_the_loss_with_the_identical_bytes(against: Any, broken: Any, region_bytes: int) -> None:
    recording = Recording()
    timeout_s = 1.0 if broken is FallsSilentAtTheSecondAnswer else 20.0
    client, harness = against(
        broken, AcceleratorServer, retries=2, region_bytes=region_bytes, recorder=recording, timeout_s=timeout_s
    )
    step(client)
    assert len(harness.servers) >= 2
    groups: dict[tuple[Any, ...], list[RecordedFrame]] = {}
    for frame in recording.sent():
        if frame.tensors and frame.op is not Op.WEIGHT:
            groups.setdefault((frame.op, frame.step, frame.call.held), []).append(frame)
    again = [frames for frames in groups.values() if len(frames) > 1]
    assert again, "nothing was sent twice: the test lost its point"
    for frames in again:
        assert len({frame.tensors for frame in frames}) == 1
        assert not frames[0].call.flags & Flag.RESENT
        assert all(frame.call.flags & Flag.RESENT for frame in frames[1:])


def test_what_was_released_is_not_sent_again(against: Any) -> None:
    recording = Recording()
    client, harness = against(AcceleratorServer, retries=1, recorder=recording)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    for _ in range(2):
        client.forward("conv1", X, step=1, hold=True).result()
    client.release([1])
    client.forward("conv1", X, step=1, hold=False).result()
    before = len(recording.frames)
    harness.servers[0].wire.interrupt()
    client.forward("conv1", X, step=2, hold=False).result()
    quiet = [f.call.held for f in recording.frames[before:] if f.op is Op.FORWARD and f.call.flags & Flag.QUIET]
    assert quiet == [2]


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_no_more_attempts_than_allowed(against: Any, retries: int) -> None:
    client, harness = against(AlwaysDies, retries=retries)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    with pytest.raises(PeerClosed) as found:
        client.forward("conv1", X, step=5, hold=False).result()
    assert "layer conv1, step 5" in str(found.value.where)
    assert len(harness.servers) == 1 + retries


def test_a_stall_without_retries_stays_a_stall(against: Any) -> None:
    client, harness = against(FallsSilentAtTheSecondAnswer, timeout_s=0.2)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    client.forward("conv1", X, step=5, hold=False).result()
    with pytest.raises(PeerStalled):
        client.forward("conv1", X, step=5, hold=False).result()
    assert len(harness.servers) == 1


def test_without_retain_nothing_is_kept(against: Any) -> None:
    client, _ = against(AcceleratorServer, retries=0)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    client.forward("conv1", X, step=5, hold=True).result()
    assert not client._journal
    assert not client._held
    assert not client._weights


def test_a_retry_without_what_was_sent_is_refused(against: Any) -> None:
    with pytest.raises(SettingError, match="needs what was sent"):
        against(AcceleratorServer, retries=1, retain=False)


def test_what_was_answered_is_not_kept_longer_than_needed() -> None:
    accelerator = InProcessAccelerator(retries=1)
    accelerator.register("conv1", CONV)
    for _ in range(5):
        accelerator.put_weight("conv1", W)
        accelerator.forward("conv1", X, step=5, hold=False).result()
    assert not accelerator._journal
    assert len(accelerator._weights) == 1
    assert not accelerator._held


# --- recorders -------------------------------------------------------------------------------------------------------
def test_what_cannot_be_recorded_is_not_sent(against: Any) -> None:
    recording = Recording(max_bytes=10_000)
    client, harness = against(AcceleratorServer, recorder=recording)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    with pytest.raises(ResourceError, match="recording is full"):
        client.forward("conv1", X, step=1, hold=False)
    assert all(frame.op is not Op.FORWARD for frame in recording.frames)
    harness.threads[0].join(timeout=30)
    assert harness.servers[0].requests == 3


def test_an_interrupt_in_the_middle_ends_the_link(against: Any) -> None:
    class Interrupted:
        armed = False

        def record(self, frame: RecordedFrame) -> None:
            if self.armed:
                raise KeyboardInterrupt

    recorder = Interrupted()
    client, _ = against(AcceleratorServer, recorder=recorder)
    client.register("conv1", CONV)
    client.put_weight("conv1", W)
    recorder.armed = True
    with pytest.raises(KeyboardInterrupt):
        client.forward("conv1", X, step=1, hold=False)
    recorder.armed = False
    from motte.errors import LinkError

    with pytest.raises(LinkError, match="interrupted before"):
        client.forward("conv1", X, step=1, hold=False)
