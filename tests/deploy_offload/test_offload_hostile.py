"""Bundles that contradict themselves, hosts that add an accelerator, accelerators that lie, die or stall."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from motte.errors import (
    BundleError,
    InputError,
    IntegrityError,
    PeerClosed,
    PeerStalled,
    SettingError,
    TrustError,
    WorkerClosed,
)
from motte.link.calls import Op
from motte.offload.settings import Asymmetric, Fixed

PLAIN = Asymmetric(noise=None, rank=Fixed(1))
X = torch.randn(2, 3, 12, 12)


def test_a_split_layer_that_the_header_does_not_mark_is_refused_before_anything_is_sent(
    offload_tools, accelerator, tmp_path: Path
) -> None:
    sealed = offload_tools.seal_many(tmp_path, PLAIN, ["strided", "dilated"], public=["strided.weight", "dilated.bias"])
    other = accelerator()
    with pytest.raises(BundleError, match=r"does not mark public.*layer dilated, weight dilated.weight") as caught:
        sealed.load(accelerator=other.address)
    assert caught.value.check == "M-3"
    assert other.seen.calls == []


def test_an_accelerator_for_a_bundle_without_a_scheme_is_refused(offload_tools, accelerator, tmp_path: Path) -> None:
    other = accelerator()
    # Weights marked public are not enough: it is the placement that sends them.
    sealed = offload_tools.seal_many(tmp_path, None, public=["strided.weight"])
    with pytest.raises(SettingError, match="lets nothing out to an accelerator"):
        sealed.load(accelerator=other.address)
    assert other.seen.calls == []


def test_a_bundle_that_names_its_accelerators_is_refused_where_nobody_can_tell_them_apart(
    offload_tools, accelerator, tmp_path: Path
) -> None:
    other = accelerator()
    scheme = Asymmetric(noise=None, rank=Fixed(2))
    sealed = offload_tools.seal_many(tmp_path, scheme, peers=(other.address,))
    with pytest.raises(SettingError, match="cannot tell which one it was given"):
        sealed.load(accelerator=other.address)
    assert other.seen.calls == []


def test_a_lie_is_found_and_nothing_is_answered(sealed, offload_tools, accelerator) -> None:
    other = accelerator(offload_tools.kinds["Liar"])
    model = sealed.load(accelerator=other.address)
    with pytest.raises(IntegrityError, match=r"layer strided, step 1"):
        model(X)
    # The first lie ends it: nothing that follows from it has left.
    assert len(other.seen.of(Op.FORWARD)) == 1
    with pytest.raises(WorkerClosed):
        model(X)
    with pytest.raises(ProcessLookupError):
        os.kill(model.pid, 0)


def test_an_accelerator_that_dies_in_the_middle_is_a_typed_error(sealed, offload_tools, accelerator) -> None:
    other = accelerator(offload_tools.kinds["Dying"])
    model = sealed.load(accelerator=other.address)
    third = sealed.plan.offload.split[2]
    with pytest.raises(PeerClosed, match=f"accelerator unix:.*layer {third}, step 1"):
        model(X)
    with pytest.raises(WorkerClosed):
        model(X)


def test_an_accelerator_that_says_nothing_is_a_stall_within_the_time_limit(sealed, offload_tools, accelerator) -> None:
    other = accelerator(offload_tools.kinds["Mute"])
    model = sealed.load(accelerator=other.address, timeout_s=6.0)
    began = time.monotonic()
    with pytest.raises(PeerStalled, match=r"accelerator unix:.*layer strided, step 1.*within 2 s"):
        model(X)
    assert time.monotonic() - began < 6.0


def test_a_local_accelerator_that_is_killed(sealed) -> None:
    model = sealed.load(accelerator="local")
    assert model(X).shape == (2, 5)
    pid = int(model.offload.accelerator.rpartition(" ")[2])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(PeerClosed, match="local accelerator on cpu, pid"):
        model(X)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_refused_input_ends_neither_worker_nor_accelerator(sealed, accelerator) -> None:
    other = accelerator()
    with sealed.load(accelerator=other.address) as model:
        with pytest.raises(InputError, match="another type"):
            model(X.double())
        assert other.seen.of(Op.FORWARD) == []
        assert model(X).shape == (2, 5)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("unix:/nowhere/a.sock", PeerClosed, "no accelerator there"),
        ("fd:3", InputError, "not by number"),
        ("somewhere", InputError, "not an address"),
        ("tcp:192.0.2.1:9", InputError, "another machine"),
    ],
)
def test_bad_addresses_are_refused_before_a_worker_starts(sealed, address: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        sealed.load(accelerator=address)


# --- the door ------------------------------------------------------------------------------------------------------
class Sink:
    """An accelerator that notes what it is asked for."""

    name = "sink"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, what: str):
        def ask(*given, **named):
            self.asked.append(what)

        return ask


def test_the_door_lets_nothing_else_through(offload_tools) -> None:
    from motte.linear.operation import LinearOperation
    from motte.trusted.gate import Gate

    allowed, sink = LinearOperation("linear", 3, 4), Sink()
    gate, x = Gate(sink, {"a": allowed}), torch.zeros(1, 2, 3)
    attempts = [
        lambda: gate.register("b", allowed),
        lambda: gate.register("a", replace(allowed, out_channels=5)),
        lambda: gate.put_weight("b", torch.zeros(4, 3)),
        lambda: gate.forward("b", x, step=1, hold=False),
        lambda: gate.forward("a", x, step=1, hold=True),
        lambda: gate.backward("a", 1, x, step=1, need_input=True, need_weight=False),
        gate.last_held,
    ]
    for attempt in attempts:
        with pytest.raises(TrustError):
            attempt()
    assert sink.asked == []
    gate.register("a", allowed)
    for _ in range(3):
        gate.put_weight("a", torch.zeros(4, 3))
        gate.forward("a", x, step=1, hold=False)
    assert sink.asked == ["register", "put_weight", "forward", "forward", "forward"]
