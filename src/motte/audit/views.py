"""The three views of one model: what leaves under its scheme, nothing, and everything.

Each is made by running the real thing: :func:`motte.offload.protect.protect` with an accelerator that answers, and a
recorder on the link between them. A view holds what :mod:`motte.audit.decode` finds in those frames. The one addition
stands at the ceiling: weights and buffers that cross no link (biases, norms), which accelerator-only hands over too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.accelerator.in_process import InProcessAccelerator
from motte.accelerator.interface import Accelerator
from motte.audit.decode import Decoded, decode
from motte.audit.everything import telling
from motte.audit.interface import Phase, Position, View
from motte.errors import IntegrityError, ResourceError, SettingError
from motte.limits import GIB
from motte.link.calls import Op
from motte.link.recording import RecordedFrame, Recording
from motte.measure.memory import available_bytes
from motte.offload.modules import can_split
from motte.offload.protect import parametrised, protect
from motte.offload.settings import Asymmetric, Fixed
from motte.zoo.weights import seeded

if TYPE_CHECKING:
    from motte.link.recording import Recorder

LEARNING_RATE: Final = 0.05
"""Of the training steps that are watched: plain SGD, so that a weight's change is its gradient."""
_BATCH: Final = 64
"""Samples of one forward pass at inference."""
_DEFAULT_STEPS: Final = 2
_MOST_BYTES: Final = 4 * GIB
"""Of one recording."""

Link = Callable[["Recorder"], AbstractContextManager[Accelerator]]
"""Starts an accelerator whose frames the recorder sees, for the length of a ``with`` block."""


@contextmanager
def in_process(recorder: Recorder) -> Iterator[Accelerator]:
    """An accelerator in this process: real frames, no second process."""
    link = InProcessAccelerator(recorder=recorder)
    try:
        yield link
    finally:
        link.close()


@contextmanager
def local(recorder: Recorder) -> Iterator[Accelerator]:
    """An accelerator in a process of its own, over shared memory."""
    from motte.accelerator.process import LocalAccelerator

    with LocalAccelerator(recorder=recorder) as process:
        yield process.link


# --- who runs the model ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class _Victim:
    """What all pipelines share.

    Args:
        model: plain, in evaluation mode; never changed.
        audited: the scheme in words.
        position: of whoever watches.
        classes: of the model's answer.
        link: starts the accelerator.
    """

    model: nn.Module
    audited: str
    position: Position
    input_shape: tuple[int, ...]
    classes: int
    link: Link = field(default=in_process, repr=False)

    def _view(self, decoded: Decoded, phase: Phase, weights: Mapping[str, Tensor]) -> View:
        return View(
            audited=self.audited,
            position=self.position,
            phase=phase,
            sightings=decoded.sightings,
            operations=decoded.operations,
            weights=weights,
            input_shape=self.input_shape,
            classes=self.classes,
            learning_rate=LEARNING_RATE if phase == "training" else None,
        )

    def _refuse_other_shapes(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.input_shape or not len(images):
            raise SettingError(
                "not images of this model", expected=f"(N, {self.input_shape})", got=str(tuple(images.shape))
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPipeline(_Victim):
    """The model under an asymmetric scheme. See :class:`motte.audit.interface.Pipeline`."""

    scheme: Asymmetric

    def observe(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        layers: Collection[str] | None = None,
        answers: bool = True,
    ) -> View:
        """See :class:`motte.audit.interface.Pipeline`."""
        self._refuse_other_shapes(images)
        recorder = _Kept(layers, answers)
        with self.link(recorder) as link, seeded(seed):
            self._run(link, images, labels, steps)
        decoded = decode(recorder.frames)
        return self._view(decoded, "inference" if labels is None else "training", decoded.weights)

    def record(self, images: Tensor, recorder: Recorder) -> None:
        """Inference on ``images`` with every frame given to ``recorder``, such as a file."""
        self._refuse_other_shapes(images)
        with self.link(recorder) as link:
            self._run(link, images, None, None)

    def lie(self, images: Tensor, labels: Tensor | None, answer: Callable[[str, Tensor], Tensor]) -> View:
        """Run once against an accelerator that gives ``answer(layer, y)`` in the place of each honest product ``y``.

        Where integrity checks catch it, the run ends, and the view with it.
        """
        self._refuse_other_shapes(images)
        recorder = _Kept(None, answers=True)
        link = _Liar(recorder, answer)
        try:
            self._run(link, images, labels, None)
        except IntegrityError:
            # What had left by then is what was seen.
            link.break_off()
        finally:
            link.close()
        decoded = decode(recorder.frames)
        return self._view(decoded, "inference" if labels is None else "training", decoded.weights)

    def _run(self, link: Accelerator, images: Tensor, labels: Tensor | None, steps: int | None) -> None:
        model = self.model if labels is None else copy.deepcopy(self.model)
        split = protect(model, self.scheme, accelerator=link, example_input=images[:1])
        _infer(split, images) if labels is None else _train(split, images, labels, steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPipeline(_Victim):
    """The plain model with everything told, as accelerator-only is. See :class:`motte.audit.interface.Pipeline`."""

    def observe(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        layers: Collection[str] | None = None,
        answers: bool = True,
    ) -> View:
        """See :class:`motte.audit.interface.Pipeline`."""
        self._refuse_other_shapes(images)
        recorder = _Kept(layers, answers)
        model = self.model if labels is None else copy.deepcopy(self.model)
        with self.link(recorder) as link, seeded(seed), telling(model, link):
            _infer(model, images) if labels is None else _train(model, images, labels, steps)
        decoded = decode(recorder.frames)
        everything = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        phase: Phase = "inference" if labels is None else "training"
        return self._view(decoded, phase, everything | dict(decoded.weights))

    def steered(self) -> SplitPipeline:
        """The same where answers are believed and steer what follows: all layers outside, nothing decomposed."""
        scheme = Asymmetric(noise=None, rank=Fixed(0), integrity="off", offloaded_layers=splittable(self.model) or None)
        return SplitPipeline(
            model=self.model,
            audited=self.audited,
            position=self.position,
            input_shape=self.input_shape,
            classes=self.classes,
            link=self.link,
            scheme=scheme,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentPipeline(_Victim):
    """Everything inside: nothing leaves. See :class:`motte.audit.interface.Pipeline`."""

    def observe(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        layers: Collection[str] | None = None,
        answers: bool = True,
    ) -> View:
        """See :class:`motte.audit.interface.Pipeline`. The model need not run: no link exists."""
        self._refuse_other_shapes(images)
        return self._view(Decoded((), {}, 0), "inference" if labels is None else "training", {})


Pipelines = SplitPipeline | OpenPipeline | SilentPipeline


def pipeline_of(
    scheme: Asymmetric | None,
    *,
    everything_leaves: bool,
    position: Position,
    model: nn.Module,
    audited: str,
    input_shape: tuple[int, ...],
    classes: int,
    link: Link = in_process,
) -> Pipelines:
    """The pipeline at ``position`` for a scheme: split, or (None) all inside or all outside."""
    shared = {"model": model, "audited": audited, "position": position, "link": link}
    if position is Position.FLOOR or (position is Position.SCHEME and scheme is None and not everything_leaves):
        return SilentPipeline(input_shape=input_shape, classes=classes, **shared)  # type: ignore[arg-type]
    if position is Position.CEILING or scheme is None:
        return OpenPipeline(input_shape=input_shape, classes=classes, **shared)  # type: ignore[arg-type]
    return SplitPipeline(input_shape=input_shape, classes=classes, scheme=scheme, **shared)  # type: ignore[arg-type]


def splittable(model: nn.Module) -> tuple[str, ...]:
    """Every layer that has a split form, by name."""
    return tuple(name for name, module in parametrised(model).items() if can_split(module))


@dataclass(slots=True)
class VictimAccess:
    """What an active attacker may do. See :class:`motte.audit.interface.Access`.

    Args:
        pipeline: of its position.
        images, labels: private, run by :meth:`lie`; labels where training is attacked.
        queries: how many inputs may be asked about.
    """

    pipeline: Pipelines
    images: Tensor
    labels: Tensor | None
    queries: int
    asked: int = 0

    def query(self, images: Tensor) -> Tensor:
        """See :class:`motte.audit.interface.Access`."""
        if self.asked + len(images) > self.queries:
            raise SettingError("more queries than the budget has", expected=f"at most {self.queries}")
        self.asked += len(images)
        with torch.no_grad():
            return torch.cat([self.pipeline.model(each) for each in images.split(_BATCH)])

    def lie(self, answer: Callable[[str, Tensor], Tensor]) -> View:
        """See :class:`motte.audit.interface.Access`."""
        if isinstance(self.pipeline, SilentPipeline):
            return self.pipeline.observe(self.images, self.labels)
        steered = self.pipeline.steered() if isinstance(self.pipeline, OpenPipeline) else self.pipeline
        return replace(steered).lie(self.images, self.labels, answer)


# --- one run --------------------------------------------------------------------------------------------------------
def _infer(model: nn.Module, images: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        for batch in images.split(_BATCH):
            model(batch)


def _train(model: nn.Module, images: Tensor, labels: Tensor, steps: int | None) -> None:
    count = min(len(images), _DEFAULT_STEPS) if steps is None else steps
    if not 1 <= count <= len(images) or len(labels) != len(images):
        raise SettingError("not as many steps as records allow", expected=f"1 to {len(images)}", got=str(count))
    model.train()
    for batch, target in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
        model.zero_grad()
        functional.cross_entropy(model(batch), target).backward()
        # Plain SGD, written out: torch.optim takes seconds to load its compiler.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=LEARNING_RATE)


class _Kept(Recording):
    """A recording without the layers and answers that nobody wants to look at."""

    def __init__(self, layers: Collection[str] | None, answers: bool) -> None:
        # What is recorded is decoded beside it and kept, with copies of the weights, for every scheme and phase.
        super().__init__(max_bytes=min(_MOST_BYTES, available_bytes() // 8))
        self._layers = None if layers is None else frozenset(layers)
        self._answers = answers

    def record(self, frame: RecordedFrame) -> None:
        """See :class:`motte.link.recording.Recorder`."""
        if self._layers is not None and frame.layer not in self._layers:
            return
        if not self._answers and frame.op is Op.ANSWER:
            return
        try:
            super().record(frame)
        except ResourceError as problem:
            problem.hint = "audit a smaller model, or this one on a machine with more free memory"
            raise


class _Liar(InProcessAccelerator):
    def __init__(self, recorder: Recorder, answer: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__(recorder=recorder)
        self._put = answer

    def answer(self, layer: str, y: Tensor) -> Tensor:
        """See :class:`InProcessAccelerator`."""
        return self._put(layer, y)
