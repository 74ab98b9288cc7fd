"""Views: what an attacker sees comes from recorded frames, decoded, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from motte.accelerator.in_process import InProcessAccelerator
from motte.accelerator.interface import Accelerator
from motte.audit.decode import decode
from motte.audit.interface import Position, View
from motte.audit.scene import activations
from motte.audit.views import (
    LEARNING_RATE,
    OpenPipeline,
    SilentPipeline,
    SplitPipeline,
    VictimAccess,
    local,
    pipeline_of,
)
from motte.errors import FormatError, ResourceError, SettingError
from motte.link.recording import RecordedFrame, Recording
from motte.offload.settings import Asymmetric, Fixed, Gaussian, Mechanism

CHANNELS, CLASSES, SIDE = 6, 4, 8
IMAGES = torch.randn(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
PLAIN = Asymmetric(noise=None, rank=Fixed(2))


def pipeline(bars: Any, scheme: Asymmetric | None, position: Position, *, open_: bool = False, **more: Any) -> Any:
    return pipeline_of(
        scheme,
        everything_leaves=open_,
        position=position,
        model=bars.victim(),
        audited="a test",
        input_shape=(1, SIDE, SIDE),
        classes=CLASSES,
        **more,
    )


def test_which_pipeline_stands_where(bars: Any) -> None:
    assert isinstance(pipeline(bars, PLAIN, Position.FLOOR), SilentPipeline)
    assert isinstance(pipeline(bars, PLAIN, Position.SCHEME), SplitPipeline)
    assert isinstance(pipeline(bars, PLAIN, Position.CEILING), OpenPipeline)
    assert isinstance(pipeline(bars, None, Position.SCHEME), SilentPipeline)
    assert isinstance(pipeline(bars, None, Position.SCHEME, open_=True), OpenPipeline)


# --- where it comes from --------------------------------------------------------------------------------------------
class Altering:
    """Stands between link and recorder, and passes on frames of its own making."""

    def __init__(self, inner: Any, fill: int | None) -> None:
        self.inner, self.fill = inner, fill

    def record(self, frame: RecordedFrame) -> None:
        if self.fill is not None:
            self.inner.record(replace(frame, tensors=tuple(bytes([self.fill]) * len(raw) for raw in frame.tensors)))


@pytest.mark.parametrize("scheme", [PLAIN, None], ids=["split", "open"])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["inference", "training"])
def test_a_view_holds_what_the_frames_hold_and_nothing_of_the_trusted_sides_memory(
    bars: Any, scheme: Asymmetric | None, labels: Tensor | None
) -> None:
    def watched(fill: int | None) -> View:
        @contextmanager
        def link(recorder: Any) -> Iterator[Accelerator]:
            yield InProcessAccelerator(recorder=Altering(recorder, fill))

        position = Position.CEILING if scheme is None else Position.SCHEME
        view: View = pipeline(bars, scheme, position, link=link).observe(IMAGES, labels)
        return view

    zeros, nothing = watched(0), watched(None)
    assert len(zeros.sightings) > 5
    assert all(not each.tensor.any() for each in zeros.sightings), "the frames said zero, so the view says zero"
    assert nothing.sightings == ()
    assert nothing.operations == {}
    if scheme is not None:
        assert not any(value.any() for value in zeros.weights.values())
        assert nothing.weights == {}


def test_a_view_is_cut_off_from_the_model(bars: Any) -> None:
    found = pipeline(bars, None, Position.CEILING)
    view = found.observe(IMAGES)
    before = {name: value.clone() for name, value in view.weights.items()}
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(view.weights[name], before[name]) for name in before)


# --- what it holds --------------------------------------------------------------------------------------------------
def test_floor_scheme_and_ceiling_at_inference(bars: Any) -> None:
    floor, scheme, ceiling = (pipeline(bars, PLAIN, each).observe(IMAGES) for each in Position)
    whole = activations(bars.victim(), IMAGES)
    assert floor.sightings == ()
    assert floor.batch("3") is None
    assert floor.weights == {}
    assert scheme.layers == ("3", "5")
    assert ceiling.layers == ("0", "3", "5", "8")
    assert set(scheme.weights) == {"3.weight", "5.weight"}
    assert set(ceiling.weights) == set(bars.victim().state_dict())
    for layer in ("3", "5"):
        left, everything = scheme.batch(layer), ceiling.batch(layer)
        assert left is not None
        assert everything is not None
        assert torch.equal(everything, whole[layer]), "the ceiling is the full activation"
        stayed = (whole[layer] - left).flatten(2).double()
        assert torch.linalg.matrix_rank(stayed, rtol=1e-4).tolist() == [2] * len(IMAGES), "what stayed is of rank 2"
    assert torch.equal(ceiling.batch("0"), IMAGES)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(ceiling.batch("8", "output") + bars.victim()[8].bias, bars.victim()(IMAGES), atol=1e-5)  # type: ignore[operator]
    assert ceiling.operations["5"].stride == (2, 2)


def test_training_shows_output_gradients_and_successive_weights(bars: Any) -> None:
    ceiling = pipeline(bars, None, Position.CEILING).observe(IMAGES, LABELS)
    assert ceiling.phase == "training"
    assert ceiling.learning_rate == LEARNING_RATE
    # The plain model's own first step, computed apart.
    model = bars.victim().train()
    logits: list[Tensor] = []
    model[8].register_forward_hook(lambda _module, _arguments, output: logits.append(output))
    nn.functional.cross_entropy(model(IMAGES[:3]), LABELS[:3]).backward()
    first = ceiling.of("8", "gradient")[0]
    wanted = (logits[0].softmax(1) - nn.functional.one_hot(LABELS[:3], CLASSES)) / 3
    assert torch.allclose(first, wanted, atol=1e-6), "the exposed softmax gradient, from which labels can be read"
    before, after = ceiling.of("3", "weight")
    assert torch.allclose((before - after) / LEARNING_RATE, model[3].weight.grad, atol=1e-5)
    assert torch.allclose(ceiling.of("3", "weight-gradient")[0], model[3].weight.grad, atol=1e-5)
    split = pipeline(bars, PLAIN, Position.SCHEME).observe(IMAGES, LABELS, steps=3)
    assert split.layers == ("3", "5")
    assert [len(each) for each in split.of("3", "gradient")] == [2, 2, 2]
    assert len(split.of("5", "weight")) == 3
    assert split.batch("3", "gradient", step=2).shape == (2, CHANNELS, SIDE, SIDE)  # type: ignore[union-attr]


def test_a_victim_is_never_changed_and_noise_is_fresh(bars: Any) -> None:
    noise = Gaussian(residual=Mechanism(1.0, 0.5))
    for found in (pipeline(bars, PLAIN, Position.SCHEME), pipeline(bars, None, Position.CEILING)):
        state = {name: value.clone() for name, value in found.model.state_dict().items()}
        found.observe(IMAGES, LABELS)
        assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.model.modules())
    noised = pipeline(bars, Asymmetric(noise=noise, rank=Fixed(2)), Position.SCHEME)
    first, second = (noised.observe(IMAGES).batch("3") for _ in range(2))
    assert not torch.equal(first, second)


def test_a_recording_takes_a_part_of_the_memory_that_is_left(bars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pipeline(bars, None, Position.CEILING)
    room = [1 << 30]
    monkeypatch.setattr("motte.audit.views.available_bytes", lambda: room[0])
    found.observe(IMAGES, LABELS)
    room[0] = 4 * 1000
    with pytest.raises(ResourceError, match="recording is full") as caught:
        found.observe(IMAGES, LABELS)
    assert "500 bytes" in str(caught.value.expected)
    assert "smaller model" in str(caught.value.hint)


def test_what_is_not_wanted_is_not_kept(bars: Any) -> None:
    found = pipeline(bars, PLAIN, Position.SCHEME)
    view = found.observe(IMAGES, layers=("5",), answers=False)
    assert {(each.layer, each.kind) for each in view.sightings} == {("5", "weight"), ("5", "activation")}
    assert torch.equal(view.batch("5"), found.observe(IMAGES).batch("5"))
    with pytest.raises(SettingError, match="not images of this model"):
        found.observe(IMAGES[:, :, :4])
    with pytest.raises(SettingError, match="steps"):
        found.observe(IMAGES, LABELS, steps=7)


@pytest.mark.slow
def test_an_accelerator_in_a_process_of_its_own_shows_the_same(bars: Any) -> None:
    here = pipeline(bars, PLAIN, Position.SCHEME).observe(IMAGES)
    there = pipeline(bars, PLAIN, Position.SCHEME, link=local).observe(IMAGES)
    assert [(each.layer, each.kind) for each in here.sightings] == [(each.layer, each.kind) for each in there.sightings]
    assert torch.equal(here.batch("3"), there.batch("3"))  # type: ignore[arg-type]


# --- active attackers -----------------------------------------------------------------------------------------------
def test_lies_end_the_run_with_integrity_on_and_steer_it_with_integrity_off(bars: Any) -> None:
    def planted(layer: str, y: Tensor) -> Tensor:
        return y + 10.0 if layer == "3" else y

    for integrity, seen in (("freivalds", ("3",)), ("off", ("3", "5"))):
        scheme = Asymmetric(noise=None, rank=Fixed(2), integrity=integrity)  # type: ignore[arg-type]
        access = VictimAccess(pipeline(bars, scheme, Position.SCHEME), IMAGES, None, 10)
        view = access.lie(planted)
        assert view.layers == seen
        honest = access.lie(lambda _layer, y: y)
        assert honest.layers == ("3", "5")
        if integrity == "off":
            assert not torch.equal(view.batch("5"), honest.batch("5")), "the lie shows in what left next"  # type: ignore[arg-type]
    assert VictimAccess(pipeline(bars, None, Position.FLOOR), IMAGES, None, 10).lie(planted).sightings == ()
    ceiling = VictimAccess(pipeline(bars, None, Position.CEILING), IMAGES, None, 10).lie(planted)
    assert ceiling.layers == ("0", "3", "5")


def test_queries_are_counted(bars: Any) -> None:
    access = VictimAccess(pipeline(bars, PLAIN, Position.SCHEME), IMAGES, None, 8)
    with torch.no_grad():
        assert torch.equal(access.query(IMAGES), bars.victim()(IMAGES))
    with pytest.raises(SettingError, match="more queries"):
        access.query(IMAGES)


# --- decoding -------------------------------------------------------------------------------------------------------
def test_answers_that_nobody_asked_for_are_refused(bars: Any) -> None:
    recording = Recording()
    scheme = SplitPipeline(
        model=bars.victim(), audited="a", position=Position.SCHEME, input_shape=(1, SIDE, SIDE), classes=4, scheme=PLAIN
    )
    scheme.record(IMAGES, recording)
    frames = recording.frames
    assert len(decode(frames).sightings) == 6
    asked = next(frame for frame in frames if frame.direction == "sent" and frame.op.name == "FORWARD")
    with pytest.raises(FormatError, match="nobody asked for"):
        decode([frame for frame in frames if frame is not asked])
    resent = replace(asked, call=asked.call._replace(flags=asked.call.flags | 16))
    found = decode([*frames, resent])
    assert (len(found.sightings), found.resent) == (6, 1)
    with pytest.raises(FormatError, match="no layer"):
        decode([replace(asked, layer="")])
