"""A release happens once: steps that are tried again, and runs that are continued, send the identical bytes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.errors import PeerClosed
from motte.offload.protect import protect
from motte.offload.session import Session
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

SOME = Mechanism(clip=1.0, noise_multiplier=1.0)
NOISE = Gaussian(residual=SOME, gradient=SOME, update=SOME)
SCHEME = Asymmetric(noise=NOISE, rank=Fixed(2))


class Failing(InProcessAccelerator):
    """Listens, and closes the link at the call number ``at``, after it has seen the bytes."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.seen: list[bytes] = []
        self.at, self.calls = at, 0

    def forward(self, layer: str, x: Tensor, *, step: int, hold: bool):
        self._see(x)
        return super().forward(layer, x, step=step, hold=hold)

    def backward(self, layer: str, held: int, gradient: Tensor, *, step: int, need_input: bool, need_weight: bool):
        self._see(gradient)
        return super().backward(layer, held, gradient, step=step, need_input=need_input, need_weight=need_weight)

    def _see(self, tensor: Tensor) -> None:
        self.seen.append(tensor.numpy().tobytes())
        self.calls += 1
        if self.calls == self.at:
            raise PeerClosed("the link was closed", where=self.name)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), *pool, nn.Linear(8, 5))


def batch(seed: int) -> Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, seed: int) -> None:
    nn.functional.cross_entropy(model(batch(seed)), torch.arange(4)).backward()


@pytest.mark.parametrize(("pieces", "at"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 4), (2, 7), (2, 8)])
def test_a_step_that_is_tried_again_sends_the_identical_bytes(pieces: int, at: int) -> None:
    accelerator = Failing(at)
    split = protect(net(), replace(SCHEME, pieces=pieces), accelerator=accelerator)
    session = split.motte_session
    with pytest.raises(PeerClosed):
        step(split, seed=1)
    first, accelerator.seen = accelerator.seen, []
    assert session.step == 1
    step(split, seed=1)
    assert session.step == 1
    assert accelerator.seen[: len(first)] == first
    assert len(accelerator.seen) == 4 * pieces
    assert {count.total for count in session.releases.counts.values()} == {1}, "a retry is no new release"


def test_other_data_in_a_step_that_is_tried_again_gets_noise_of_its_own() -> None:
    accelerator = Failing(at=2)
    split = protect(net(), SCHEME, accelerator=accelerator)
    with pytest.raises(PeerClosed):
        step(split, seed=1)
    (first, _), accelerator.seen = accelerator.seen, []
    step(split, seed=2)
    assert accelerator.seen[0] != first
    assert split.motte_session.releases.counts["1", "residual"].total == 2


def test_the_same_batch_in_the_next_step_is_another_release() -> None:
    accelerator = Failing()
    split = protect(net().eval(), SCHEME, accelerator=accelerator)
    with torch.no_grad():
        split(batch(1))
        split(batch(1))
    assert accelerator.seen[0] != accelerator.seen[2]
    assert split.motte_session.releases.counts["1", "residual"].total == 2


def test_a_run_that_is_continued_sends_what_was_sent() -> None:
    torch.set_num_threads(1)
    accelerator = Failing()
    model = net()
    split = protect(model, SCHEME, accelerator=accelerator)
    step(split, seed=1)
    state, weights = split.motte_session.state(), copy.deepcopy(model.state_dict())
    accelerator.seen.clear()
    model.zero_grad()
    step(split, seed=2)
    sent = list(accelerator.seen)
    again = net()
    again.load_state_dict(weights)
    accelerator = Failing()
    split = protect(again, SCHEME, accelerator=accelerator)
    split.motte_session.restore(state)
    step(split, seed=2)
    assert accelerator.seen == sent
    assert "noise_key=..." in repr(state)
    assert state.noise_key.hex() not in repr(state)


def test_two_sessions_never_share_noise() -> None:
    first, second = Failing(), Failing()
    for accelerator in (first, second):
        with torch.no_grad():
            protect(net().eval(), SCHEME, accelerator=accelerator)(batch(1))
    assert first.seen[0] != second.seen[0]


def test_layer_names_are_taken_once(accelerator: InProcessAccelerator) -> None:
    from motte.errors import SettingError
    from motte.linear.operation import LinearOperation

    session = Session(SCHEME, accelerator)
    session.layer("a", LinearOperation("linear", 3, 3), 0)
    with pytest.raises(SettingError, match="same name"):
        session.layer("a", LinearOperation("linear", 3, 3), 1)
