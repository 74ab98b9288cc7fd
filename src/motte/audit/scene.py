"""One scheme of the user's model, ready to be attacked: its views, its truth, and the attacker's own data.

Everything is recorded when it is first asked for, and kept. Scenes of one model share what does not depend on the
scheme: the floor, the ceiling, and what attacks came to there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from motte.audit.interface import Budget, Phase, Position, PublicData, Scored, Subject, Suite, Truth
from motte.audit.views import VictimAccess, in_process, pipeline_of, splittable
from motte.capture.signature import ImagePreprocessing
from motte.errors import InputError, SettingError, UnsupportedError
from motte.offload.protect import protect
from motte.offload.settings import Asymmetric, Schedule
from motte.offload.words import noise_text, rank_text
from motte.train.datasets.batches import normalisation_table, normalise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from motte.audit.views import Link, Pipelines
    from motte.train.data import DataSet
    from motte.zoo.models import BuiltModel

SchemeKind = Literal["trusted", "asymmetric", "accelerator"]
Split = Literal["train", "test"]
_READ: Final = 256


@dataclass(frozen=True, slots=True)
class Audited:
    """A scheme to be judged.

    Args:
        kind: what runs where.
        scheme: of ``asymmetric``, and of nothing else.

    Raises:
        SettingError: a kind without its settings, or settings of another.
    """

    kind: SchemeKind
    scheme: Asymmetric | None = None

    def __post_init__(self) -> None:
        if (self.kind == "asymmetric") != (self.scheme is not None):
            raise SettingError("the scheme asymmetric, and no other, has settings", got=f"{self.kind}, {self.scheme}")

    def __str__(self) -> str:
        scheme = self.scheme
        if scheme is None:
            return self.kind
        said = [self.kind, f"noise {noise_text(scheme.noise).removesuffix(',adjacency=replace')}"]
        if scheme.rank != Schedule():
            said.append(f"rank {rank_text(scheme.rank)}")
        if scheme.integrity == "off":
            said.append("integrity off")
        if scheme.offloaded_layers is not None:
            said.append(f"outside {' '.join(scheme.offloaded_layers)}")
        if scheme.trusted_layers is not None:
            said.append(f"inside {' '.join(scheme.trusted_layers)}")
        return ", ".join(said)


@dataclass(slots=True)
class Stage:
    """A model and its data, for all schemes that are audited.

    Args:
        model: plain, in evaluation mode; never changed.
        data: opened.
        budget: how many records are private, and how many the attacker has.
        link: starts an accelerator.
    """

    name: str
    model: nn.Module
    data: DataSet
    suite: Suite
    budget: Budget
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, ...]
    classes: int
    link: Link = field(default=in_process, repr=False)
    scored: dict[tuple[str, str], Scored] = field(default_factory=dict, repr=False)
    """What attacks came to, by job and by what was seen: at floor and ceiling it is the same under every scheme."""
    subjects: dict[tuple[str, Phase], Subject] = field(default_factory=dict, repr=False)
    truths: dict[Phase, Truth] = field(default_factory=dict, repr=False)

    def records(self, split: Split, count: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
        """See :class:`motte.audit.interface.Scene`."""
        records = self.data.train if split == "train" else self.data.test
        if not 0 <= start < start + count <= len(records):
            raise SettingError(
                "not so many records in the split",
                where=f"{self.data.name}, {split}",
                expected=f"at most {len(records)}",
                got=f"{count} from {start}",
            )
        table = normalisation_table(self.mean, self.std)
        ends = range(start, start + count, _READ)
        read = [records.read(np.arange(at, min(at + _READ, start + count), dtype=np.int64), None) for at in ends]
        pieces = [normalise(self._pixels(each), table) for each in read]
        labels: NDArray[np.int64] = records.labels[start : start + count]
        return torch.from_numpy(np.concatenate(pieces)), torch.from_numpy(np.ascontiguousarray(labels))

    def _pixels(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(N, 1 or C, H, W) as the model takes them."""
        return images if images.shape[1] == self.input_shape[0] else images.repeat(self.input_shape[0], 1)

    def private(self, phase: Phase) -> tuple[Tensor, Tensor]:
        """What is attacked: the first records of the test split at inference, of the training split at training."""
        return self.records("test" if phase == "inference" else "train", self.budget.samples)

    def public(self) -> tuple[Tensor, Tensor]:
        """The attacker's own: the last of the training split, so that none is private."""
        records, samples = len(self.data.train), self.budget.samples
        count = min(self.budget.public_samples, records - samples)
        if count < 1:
            raise InputError("too few records for an attacker to have some too", got=str(records))
        return self.records("train", count, start=records - count)

    def truth(self, phase: Phase) -> Truth:
        """See :class:`motte.audit.interface.Scene`."""
        if phase not in self.truths:
            images, labels = self.private(phase)
            found = activations(self.model, images) if phase == "inference" else {}
            self.truths[phase] = Truth(images, labels, self.mean, self.std, self.model, found)
        return self.truths[phase]

    def subject(self, phase: Phase, pipeline: Pipelines, key: str) -> Subject:
        """What stands behind ``pipeline``, recorded once for each ``key``."""
        known = self.subjects.get((key, phase))
        if known is None:
            images, labels = self.private(phase)
            view = pipeline.observe(images, labels if phase == "training" else None, seed=self.seed)
            public = PublicData(*self.public(), self.mean, self.std, pipeline)
            access = VictimAccess(pipeline, images, labels if phase == "training" else None, self.budget.queries)
            known = self.subjects[(key, phase)] = Subject(view, public, access)
        return known


def make_stage(
    built: BuiltModel, data: DataSet, *, suite: Suite, budget: Budget, seed: int, link: Link = in_process
) -> Stage:
    """The stage for an image classifier.

    Raises:
        UnsupportedError: a model that takes no images, or data that does not fit it.
    """
    signature = built.signature.preprocessing
    mean, std = data.mean, data.std
    if isinstance(signature, ImagePreprocessing):
        mean, std = signature.mean, signature.std
    # Grey images are given to a model of colours as three equal ones, which is how such models are trained on them.
    shape = (len(mean), *data.shape[1:]) if data.shape[0] == 1 else data.shape
    if len(mean) != shape[0]:
        raise UnsupportedError(
            "the model takes images of other colours than the data has",
            where=built.name,
            expected=f"{len(mean)} channels, or one",
            got=f"{data.shape[0]} channels",
        )
    model = built.model.eval()
    try:
        with torch.no_grad():
            answer = model(torch.zeros(2, *shape))
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        raise UnsupportedError(
            "the model does not take images of this data", where=built.name, got=str(problem)[:200]
        ) from problem
    if not isinstance(answer, Tensor) or answer.dim() != 2 or answer.shape[1] < len(data.classes):
        raise UnsupportedError("the audit knows classifiers of images only", where=built.name)
    return Stage(
        name=built.name,
        model=model,
        data=data,
        suite=suite,
        budget=budget,
        seed=seed,
        mean=tuple(mean),
        std=tuple(std),
        input_shape=shape,
        classes=int(answer.shape[1]),
        link=link,
    )


@dataclass(frozen=True, slots=True)
class SchemeScene:
    """See :class:`motte.audit.interface.Scene`."""

    stage: Stage
    what: Audited
    outside: tuple[str, ...]

    @property
    def audited(self) -> str:
        """The scheme in words."""
        return str(self.what)

    @property
    def scheme(self) -> Asymmetric | None:
        """Its settings, where something is split."""
        return self.what.scheme

    @property
    def everything_leaves(self) -> bool:
        """Whether nothing is protected."""
        return self.what.kind == "accelerator"

    @property
    def suite(self) -> Suite:
        """Which suite runs."""
        return self.stage.suite

    @property
    def model(self) -> nn.Module:
        """The victim, plain."""
        return self.stage.model

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel."""
        return self.stage.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel."""
        return self.stage.std

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.stage.input_shape

    @property
    def classes(self) -> int:
        """Of the model's answer."""
        return self.stage.classes

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.stage.data.name

    def pipeline(self, position: Position) -> Pipelines:
        """What runs at ``position``."""
        return pipeline_of(
            self.scheme,
            everything_leaves=self.everything_leaves,
            position=position,
            model=self.stage.model,
            audited=self.audited,
            input_shape=self.stage.input_shape,
            classes=self.stage.classes,
            link=self.stage.link,
        )

    def truth(self, phase: Phase) -> Truth:
        """See :class:`motte.audit.interface.Scene`."""
        return self.stage.truth(phase)

    def subject(self, position: Position, phase: Phase) -> Subject:
        """See :class:`motte.audit.interface.Scene`."""
        return self.stage.subject(phase, self.pipeline(position), f"{self.audited}, {position}")

    def records(self, split: Split, count: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
        """See :class:`motte.audit.interface.Scene`."""
        return self.stage.records(split, count, start=start)

    def known_scores(
        self, job: str, position: Position
    ) -> tuple[MutableMapping[tuple[str, str], Scored], tuple[str, str]]:
        """Where the result of ``job`` at ``position`` is kept: all inside sees what the floor sees, all outside the
        ceiling, under whatever name."""
        seen = str(position)
        if position is Position.SCHEME:
            ends = {"trusted": str(Position.FLOOR), "accelerator": str(Position.CEILING)}
            seen = ends.get(self.what.kind, self.audited)
        return self.stage.scored, (job, seen)


def scenes_of(stage: Stage, audited: Sequence[Audited]) -> tuple[SchemeScene, ...]:
    """A scene for each scheme. Where nothing is split, the layers that a scheme of the list splits are looked at, or
    else those that would run outside by default."""
    outside: dict[str, tuple[str, ...]] = {}
    images, _ = stage.private("inference")
    for each in audited:
        if each.scheme is not None:
            outside[str(each)] = split_layers(stage.model, each.scheme, images[:1])
    common = next(iter(outside.values()), None)
    if common is None:
        common = split_layers(stage.model, Asymmetric(noise=None), images[:1])
    return tuple(SchemeScene(stage, each, outside.get(str(each), common)) for each in audited)


def split_layers(model: nn.Module, scheme: Asymmetric, example: Tensor) -> tuple[str, ...]:
    """The layers that really run outside, in the order in which they run, found by one run with a recorded link."""
    from motte.audit.decode import decode
    from motte.link.recording import Recording

    recording = Recording()
    with in_process(recording) as link, torch.no_grad():
        protect(model, scheme, accelerator=link, example_input=example).eval()(example)
    return tuple(dict.fromkeys(each.layer for each in decode(recording.frames).sightings))


def activations(model: nn.Module, images: Tensor) -> Mapping[str, Tensor]:
    """What every layer with a split form is given for ``images``, by name: (N, ...), padding done inside included."""
    from motte.offload.layers import padding_of

    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            amounts, mode = padding_of(module)
            x = arguments[0].detach()
            found.setdefault(name, []).append(nn.functional.pad(x, amounts, mode=mode) if amounts else x.clone())

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in splittable(model)]
    try:
        with torch.no_grad():
            for batch in images.split(_READ):
                model(batch)
    finally:
        for each in hooks:
            each.remove()
    return {name: torch.cat(pieces) for name, pieces in found.items()}
