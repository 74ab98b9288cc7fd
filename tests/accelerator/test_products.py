"""Every operator over every form of the link: answers are those of torch, and traffic is what really crossed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motte.accelerator.calculator import Calculator
from motte.accelerator.connect import connect
from motte.accelerator.in_process import InProcessAccelerator
from motte.accelerator.listen import Listener, ListenSettings
from motte.accelerator.process import LocalAccelerator
from motte.errors import IntegrityError, PeerClosed, PeerRefused
from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.link.address import TcpAddress, UnixAddress
from motte.link.calls import Op
from motte.link.recording import Recording
from motte.seal.tls import TlsIdentity

OPERATIONS = {
    "linear": (LinearOperation("linear", 5, 3), (2, 4, 5)),
    "conv1d": (LinearOperation("conv", 3, 4, (3,), (2,), (1,), (1,), (0,)), (2, 3, 9)),
    "conv2d, strided, grouped": (
        LinearOperation("conv", 4, 6, (3, 2), (2, 1), (1, 0), (1, 2), (0, 0), groups=2),
        (3, 4, 9, 8),
    ),
    "conv3d": (LinearOperation("conv", 2, 3, (2, 2, 2), (1, 1, 1), (0, 1, 0), (1, 1, 1), (0, 0, 0)), (1, 2, 4, 5, 4)),
    "transposed": (LinearOperation("conv_transpose", 4, 3, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)), (2, 4, 5, 5)),
    "large": (LinearOperation("conv", 3, 8, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)), (4, 3, 48, 48)),
}


@pytest.fixture(scope="module", params=["in process", "child", "child, inline", "unix", "tcp", "tls"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(accelerator, its recording) over one form of the link."""
    torch.set_num_threads(1)
    recording = Recording()
    if request.param == "in process":
        yield InProcessAccelerator(recorder=recording), recording
    elif request.param.startswith("child"):
        size = 0 if "inline" in request.param else 1 << 24
        with LocalAccelerator(recorder=recording, shared_memory_bytes=size) as child:
            yield child.link, recording
    else:
        identity = TlsIdentity.new("test") if request.param == "tls" else None
        folder: Path = tmp_path_factory.mktemp("link")
        address = UnixAddress(folder / "a.sock") if request.param == "unix" else TcpAddress("127.0.0.1", 0)
        listener = Listener(ListenSettings(address=address, identity=identity, region_bytes=1 << 24), Calculator)
        found: list[str] = []
        up = threading.Event()

        def listening(where: object) -> None:
            found.append(str(where))
            up.set()

        thread = threading.Thread(target=listener.run, kwargs={"on_listening": listening})
        thread.start()
        assert up.wait(30)
        with connect(found[0], pin=None if identity is None else identity.pin, recorder=recording) as client:
            yield client, recording
        listener.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("batch", ["some", "none"])
def test_products_are_those_of_torch(recorded: Any, name: str, dtype: torch.dtype, batch: str) -> None:
    accelerator, _ = recorded
    operation, shape = OPERATIONS[name]
    shape = shape if batch == "some" else (0, *shape[1:])
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(operation.weight_shape, generator=generator).to(dtype)
    gradient = torch.randn(operation.output_shape(shape), generator=generator).to(dtype)
    layer = f"{name} {dtype}"
    accelerator.register(layer, operation)
    accelerator.put_weight(layer, weight)
    pending = accelerator.forward(layer, x, step=3, hold=True)
    held = accelerator.last_held()
    both = accelerator.backward(layer, held, gradient, step=3, need_input=True, need_weight=True)
    only = accelerator.backward(layer, held, gradient, step=3, need_input=False, need_weight=True)
    answered = torch.float32 if dtype == torch.bfloat16 else dtype
    y, gradients = pending.result(), both.result()
    for got, expected in (
        (y, compute.forward(operation, x, weight)),
        (gradients.input, compute.input_gradient(operation, shape, weight, gradient)),
        (gradients.weight, compute.weight_gradient(operation, x, gradient)),
    ):
        assert got.dtype == answered
        torch.testing.assert_close(got, expected.to(answered))
    last = only.result()
    assert last.input is None
    torch.testing.assert_close(last.weight, gradients.weight)
    accelerator.release([held])


def test_the_recording_holds_exactly_what_crossed(recorded: Any) -> None:
    accelerator, recording = recorded
    operation, shape = OPERATIONS["large"]
    accelerator.register("counted", operation)
    accelerator.put_weight("counted", torch.ones(operation.weight_shape))
    accelerator.forward("counted", torch.ones(shape), step=9, hold=False).result()
    crossed = accelerator.link_bytes()
    assert crossed.stream_received == sum(frame.stream_bytes for frame in recording.received())
    assert crossed.region_sent == sum(frame.region_bytes for frame in recording.sent())
    assert crossed.region_received == sum(frame.region_bytes for frame in recording.received())
    assert crossed.stream_sent == sum(frame.stream_bytes for frame in recording.sent())
    traffic = accelerator.stats()["counted"]
    mine = [frame for frame in recording.frames if frame.layer == "counted"]
    assert traffic.sent_bytes == sum(sum(map(len, f.tensors)) for f in mine if f.direction == "sent")
    assert traffic.received_bytes == sum(sum(map(len, f.tensors)) for f in mine if f.direction == "received")
    assert [frame.op for frame in mine] == [Op.REGISTER, Op.WEIGHT, Op.FORWARD, Op.ANSWER]
    assert mine[2].tensors[0] == torch.ones(shape).numpy().tobytes()
    assert (mine[2].step, mine[3].step) == (9, 9)


def test_many_answers_may_be_outstanding_while_large_requests_are_sent(recorded: Any) -> None:
    accelerator, _ = recorded
    operation, shape = OPERATIONS["large"]
    weight, x = torch.ones(operation.weight_shape), torch.randn(shape, generator=torch.Generator().manual_seed(5))
    accelerator.register("ahead", operation)
    accelerator.put_weight("ahead", weight)
    pending = [accelerator.forward("ahead", x, step=step, hold=False) for step in range(24)]
    expected = compute.forward(operation, x, weight)
    for each in reversed(pending):
        torch.testing.assert_close(each.result(), expected)


def test_what_was_sent_may_be_changed_at_once(recorded: Any) -> None:
    accelerator, _ = recorded
    operation, shape = OPERATIONS["large"]
    weight, x = torch.ones(operation.weight_shape), torch.ones(shape)
    accelerator.register("changed", operation)
    accelerator.put_weight("changed", weight)
    expected = compute.forward(operation, x, weight)
    pending = accelerator.forward("changed", x, step=1, hold=True)
    x.fill_(7.0)
    torch.testing.assert_close(pending.result(), expected)
    gradient = torch.ones_like(expected)
    got = accelerator.backward(
        "changed", accelerator.last_held(), gradient, step=1, need_input=False, need_weight=True
    ).result()
    torch.testing.assert_close(got.weight, compute.weight_gradient(operation, torch.ones(shape), gradient))


def test_strided_tensors_and_tensors_with_a_history_cross_as_their_values(recorded: Any) -> None:
    accelerator, _ = recorded
    operation, shape = OPERATIONS["large"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(torch.ones(operation.weight_shape))
    accelerator.register("strided", operation)
    accelerator.put_weight("strided", weight)
    got = accelerator.forward("strided", x, step=1, hold=False).result()
    torch.testing.assert_close(got, compute.forward(operation, x, weight.detach()))


# --- held inputs -----------------------------------------------------------------------------------------------------
def test_released_inputs_are_forgotten() -> None:
    accelerator = InProcessAccelerator()
    operation, shape = OPERATIONS["large"]
    accelerator.register("layer", operation)
    accelerator.put_weight("layer", torch.ones(operation.weight_shape))
    for _ in range(3):
        accelerator.forward("layer", torch.ones(shape), step=1, hold=True).result()
    assert set(accelerator.calculator._held) == {1, 2, 3}
    accelerator.release([1, 2, 99])
    accelerator.forward("layer", torch.ones(shape), step=2, hold=False).result()
    assert set(accelerator.calculator._held) == {3}


def test_the_calculators_memory_is_its_own() -> None:
    calculator = Calculator()
    operation, shape = OPERATIONS["large"]
    weight, x = torch.ones(operation.weight_shape), torch.ones(shape)
    calculator.register(1, operation)
    calculator.put_weight(1, weight)
    expected = calculator.forward(1, x, hold=5)
    weight.zero_()
    x.zero_()
    again = calculator.forward(1, torch.ones(shape), hold=None)
    torch.testing.assert_close(again, expected)
    got = calculator.backward(1, 5, torch.ones_like(expected), need_input=False, need_weight=True)
    assert float(got.weight.abs().sum()) > 0


# --- lies through the front door -------------------------------------------------------------------------------------
class Doubling(InProcessAccelerator):
    def answer(self, layer: str, y: torch.Tensor) -> torch.Tensor:
        return y * 2 if layer == "second" else y


def test_a_subclass_in_process_can_lie_by_layer() -> None:
    accelerator = Doubling()
    operation, shape = OPERATIONS["linear"]
    x, weight = torch.ones(shape), torch.ones(operation.weight_shape)
    for layer in ("first", "second"):
        accelerator.register(layer, operation)
        accelerator.put_weight(layer, weight)
    honest = accelerator.forward("first", x, step=1, hold=False).result()
    assert torch.equal(accelerator.forward("second", x, step=1, hold=False).result(), honest * 2)


class NotANumber(InProcessAccelerator):
    def answer(self, layer: str, y: torch.Tensor) -> torch.Tensor:
        return torch.full_like(y, float("nan"))


def test_in_process_answers_are_checked_too() -> None:
    accelerator = NotANumber()
    operation, shape = OPERATIONS["linear"]
    accelerator.register("layer", operation)
    accelerator.put_weight("layer", torch.ones(operation.weight_shape))
    with pytest.raises(IntegrityError):
        accelerator.forward("layer", torch.ones(shape), step=1, hold=False).result()


def test_a_forward_without_a_weight_is_refused() -> None:
    accelerator = InProcessAccelerator()
    operation, shape = OPERATIONS["linear"]
    accelerator.register("layer", operation)
    with pytest.raises(PeerRefused, match="refused") as found:
        accelerator.forward("layer", torch.ones(shape), step=4, hold=False).result()
    assert "no weight" in str(found.value.got)
    assert "layer layer, step 4" in str(found.value.where)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["forward", "hold", "backward", "release", "weight"]), max_size=25), st.booleans())
def test_any_order_of_calls_gives_the_products_of_torch(calls: list[str], broken: bool) -> None:
    """Also with the connection broken off now and then: a new one continues where the old one was."""
    accelerator = InProcessAccelerator(retries=1)
    operation, shape = OPERATIONS["linear"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(operation.weight_shape, generator=generator)
    accelerator.register("layer", operation)
    accelerator.put_weight("layer", weight)
    held: dict[int, torch.Tensor] = {}
    for number, call in enumerate(calls):
        if broken and number % 4 == 3:
            accelerator.break_off()
        x = torch.randn(shape, generator=generator)
        if call == "weight":
            weight = torch.randn(operation.weight_shape, generator=generator)
            accelerator.put_weight("layer", weight)
        elif call == "release" and held:
            accelerator.release([min(held)])
            del held[min(held)]
        elif call == "backward" and held:
            key = max(held)
            gradient = torch.randn(operation.output_shape(shape), generator=generator)
            pending = accelerator.backward("layer", key, gradient, step=number, need_input=True, need_weight=True)
            both = pending.result()
            torch.testing.assert_close(
                both.input, compute.input_gradient(operation, shape, weight, gradient), atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                both.weight, compute.weight_gradient(operation, held[key], gradient), atol=1e-5, rtol=1e-5
            )
        else:
            got = accelerator.forward("layer", x, step=number, hold=call == "hold").result()
            torch.testing.assert_close(got, compute.forward(operation, x, weight), atol=1e-5, rtol=1e-5)
            if call == "hold":
                held[accelerator.last_held()] = x
    accelerator.close()


# --- a child of its own ----------------------------------------------------------------------------------------------
def test_a_child_that_is_killed_is_closed_and_a_new_one_works() -> None:
    operation, shape = OPERATIONS["linear"]
    with LocalAccelerator(retries=0) as child:
        child.link.register("layer", operation)
        child.link.put_weight("layer", torch.ones(operation.weight_shape))
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(PeerClosed) as found:
            child.link.forward("layer", torch.ones(shape), step=1, hold=False).result()
        assert "layer layer, step 1" in str(found.value.where)


def test_a_child_that_is_killed_is_replaced_where_that_is_allowed() -> None:
    recording = Recording()
    operation, shape = OPERATIONS["large"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    with LocalAccelerator(retries=1, recorder=recording) as child:
        link = child.link
        link.register("layer", operation)
        link.put_weight("layer", torch.ones(operation.weight_shape))
        y = link.forward("layer", x, step=1, hold=True).result()
        first = child.pid
        os.kill(first, signal.SIGKILL)
        got = link.backward("layer", link.last_held(), y, step=1, need_input=False, need_weight=True).result()
        assert child.pid != first
    torch.testing.assert_close(got.weight, compute.weight_gradient(operation, x, y))
    sent = [frame.tensors[0] for frame in recording.sent() if frame.op is Op.FORWARD]
    assert len(sent) == 2
    assert sent[0] == sent[1]


def test_the_child_keeps_its_own_threads_and_ends_with_us() -> None:
    with LocalAccelerator(threads=2) as child:
        pid = child.pid
        assert child.link.greeting.threads == 2
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"OMP_WAIT_POLICY=PASSIVE" in environment
        assert b"OMP_NUM_THREADS=2" in environment
    assert not Path(f"/proc/{pid}").exists()


def test_an_unknown_device_says_so() -> None:
    with pytest.raises(PeerClosed, match="no such device"):
        LocalAccelerator("cuda:99")


@pytest.mark.parametrize("name", ["linear", "conv2d, strided, grouped", "transposed"])
def test_the_callers_autocast_does_not_reach_in(name: str) -> None:
    operation, shape = OPERATIONS[name]
    x, weight = torch.randn(shape), torch.randn(operation.weight_shape)
    gradient = torch.randn(operation.output_shape(shape))
    expected = compute.forward(operation, x, weight)
    to_input = compute.input_gradient(operation, shape, weight, gradient)
    to_weight = compute.weight_gradient(operation, x, gradient)
    with InProcessAccelerator() as accelerator:
        accelerator.register("layer", operation)
        accelerator.put_weight("layer", weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert compute.forward(operation, x, weight).dtype == torch.bfloat16
            got = accelerator.forward("layer", x, step=1, hold=True).result()
            held = accelerator.last_held()
            back = accelerator.backward("layer", held, gradient, step=1, need_input=True, need_weight=True).result()
            assert torch.is_autocast_enabled("cpu")
    for found, wanted in ((got, expected), (back.input, to_input), (back.weight, to_weight)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
