"""What attacks and findings are: the words that every file of the audit shares.

An attack gets a :class:`View` (what one attacker saw, decoded from recorded frames) and :class:`PublicData`; it never
gets what it is scored against. It is run three times by :func:`bracketed`: where the attacker sees nothing (floor),
what the scheme lets leave, and everything (ceiling). A :class:`Finding` without all three cannot be constructed.

The steps of one attack, at each position::

    attack.fit(public, context)                 the attacker's own data, through the real pipeline of that position
    result = attack.attack(view, context)       a guess, from the view alone
    scored = attack.score(result, truth, context)   the audit compares the guess with what was private
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, Protocol

from motte.audit.finding import (
    BUDGETS,
    FULL,
    QUICK,
    SUITES,
    Bracket,
    Budget,
    Finding,
    Knowledge,
    Metric,
    Phase,
    Position,
    Suite,
)
from motte.errors import SettingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from motte.audit.epsilon import EmpiricalEpsilon
    from motte.linear.operation import LinearOperation
    from motte.link.recording import Direction
    from motte.offload.settings import Asymmetric

__all__ = [
    "BUDGETS",
    "FULL",
    "KINDS",
    "QUICK",
    "SUITES",
    "Access",
    "Attack",
    "Bracket",
    "Budget",
    "Check",
    "Context",
    "Curve",
    "Finding",
    "Job",
    "Kind",
    "Knowledge",
    "Metric",
    "Outcome",
    "Phase",
    "Picture",
    "Pipeline",
    "Planned",
    "Position",
    "Progress",
    "PublicData",
    "Result",
    "Scene",
    "Scored",
    "Sighting",
    "Subject",
    "Suite",
    "Truth",
    "View",
    "bracketed",
    "silent",
    "standard_job",
    "to_pixels",
]

Kind = Literal["activation", "gradient", "weight", "output", "input-gradient", "weight-gradient"]
"""What a tensor on the link is. Sent: ``activation`` (the residual of a split scheme, the whole activation at the
ceiling), ``gradient`` (of the layer's output), ``weight``. Received: ``output``, ``input-gradient`` and
``weight-gradient``, the products that the accelerator computed from those."""
KINDS: Final[tuple[Kind, ...]] = ("activation", "gradient", "weight", "output", "input-gradient", "weight-gradient")


# --- what an attacker sees ------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Sighting:
    """One tensor of one recorded frame, decoded.

    Attributes:
        step: in which it crossed; a weight has the number of the step before the one that it is for.
        tensor: on the CPU, in the dtype that crossed.
        sequence: number of the request on the link; an answer has the number of its request.
    """

    direction: Direction
    layer: str
    kind: Kind
    step: int
    sequence: int
    tensor: Tensor

    @property
    def bytes(self) -> int:
        """What crossed for it."""
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True, slots=True)
class View:
    """What one attacker sees. Made by :mod:`motte.audit.views` from recorded frames, and from nothing of the victim's.

    Attributes:
        audited: the scheme in words.
        position: of this attacker.
        phase: whether inference or training was watched.
        sightings: every tensor that crossed, in order.
        operations: geometry of each layer that runs outside, from the REGISTER frames.
        weights: what the scheme makes public, by ``state_dict`` name, as it left last: nothing at the floor, those of
            the layers outside, all at the ceiling.
        input_shape: (C, H, W) of one input; shapes are public.
        classes: number of classes.
        learning_rate: of the training that was watched, public as a recipe is; None in inference.
    """

    audited: str
    position: Position
    phase: Phase
    sightings: tuple[Sighting, ...]
    operations: Mapping[str, LinearOperation]
    weights: Mapping[str, Tensor]
    input_shape: tuple[int, ...]
    classes: int
    learning_rate: float | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers of which something crossed, in the order in which they appeared."""
        return tuple(dict.fromkeys(each.layer for each in self.sightings))

    def of(self, layer: str, kind: Kind, *, step: int | None = None) -> tuple[Tensor, ...]:
        """Tensors of a layer in the order in which they crossed; pieces of a batch are one each."""
        return tuple(
            each.tensor
            for each in self.sightings
            if each.layer == layer and each.kind == kind and step in (None, each.step)
        )

    def batch(self, layer: str, kind: Kind = "activation", *, step: int | None = None) -> Tensor | None:
        """All of them along the first axis, (N, ...); None where nothing of the kind crossed (the floor)."""
        import torch

        found = self.of(layer, kind, step=step)
        return torch.cat(found) if found else None


class Pipeline(Protocol):
    """The victim's model under one scheme, real frames and all, at one position. What runs inside stays hidden."""

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
        """Run ``images`` (N, C, H, W), normalised as the model takes them, and give what was seen of it.

        With ``labels`` (N,) int64 it is training on a copy of the model: plain SGD, the images cut into ``steps``
        batches (2 if not given), one step each; the weights that a step leaves behind are seen when the next begins.
        Without labels it is inference. Noise is fresh and secret, as it is in a real run.

        Args:
            seed: of what the model itself draws (dropout).
            layers: keep only what crossed for these, to spare memory; None: all.
            answers: whether to keep what the accelerator answered.
        """
        ...


class Access(Protocol):
    """What an active attacker may do to the victim while it runs its *private* records."""

    def query(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of the deployed model for inputs of the attacker's choice.

        Raises:
            SettingError: more queries than the budget has.
        """
        ...

    def lie(self, answer: Callable[[str, Tensor], Tensor]) -> View:
        """Let the victim run its private records once against an accelerator whose honest product ``y`` of ``layer``
        becomes ``answer(layer, y)``; gives what left. With integrity on it may end early: the view ends there, too."""
        ...


@dataclass(frozen=True, slots=True)
class PublicData:
    """The attacker's own records: like the private ones, and none of them.

    Attributes:
        images: (N, C, H, W) float32, normalised as the model takes them.
        labels: (N,) int64.
        mean, std: per channel, to come back to pixels in [0, 1].
        pipeline: of the position that is attacked.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pipeline: Pipeline

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images -> pixels, clamped to [0, 1]."""
        return to_pixels(images, self.mean, self.std)


@dataclass(frozen=True, slots=True)
class Truth:
    """What was private: for scoring only, never given to an attack.

    Attributes:
        images: (N, C, H, W) float32, normalised, in the order in which they ran.
        labels: (N,) int64.
        mean, std: per channel.
        model: the victim, plain, in evaluation mode. Never changed.
        activations: what each layer outside was given inside, (N, ...), by layer; empty at training.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: nn.Module
    activations: Mapping[str, Tensor] = field(default_factory=dict)

    def pixels(self) -> Tensor:
        """The private images in [0, 1]."""
        return to_pixels(self.images, self.mean, self.std)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised (N, C, H, W) -> pixels, clamped to [0, 1]."""
    middle = images.new_tensor(mean).reshape(1, -1, 1, 1)
    spread = images.new_tensor(std).reshape(1, -1, 1, 1)
    return (images * spread + middle).clamp(0.0, 1.0)


# --- one run of an attack -------------------------------------------------------------------------------------------
class Progress(Protocol):
    """Told how far an attack is; may raise KeyboardInterrupt."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` units of ``what``."""
        ...


def silent(done: int, total: int, what: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True, slots=True)
class Context:
    """What an attack is given besides data.

    Args:
        seed: of everything random; the same seed gives the same result.
        budget: see :class:`Budget`.
        progress: called now and then.
        access: for active attackers; None: passive.
        started: monotonic seconds from which ``budget.seconds`` count.
    """

    seed: int
    budget: Budget
    progress: Progress = silent
    access: Access | None = None
    started: float = field(default_factory=time.monotonic)

    def out_of_time(self) -> bool:
        """Whether the budget's seconds are spent."""
        return time.monotonic() - self.started > self.budget.seconds

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of this seed and ``purpose``: other purposes give independent numbers."""
        import torch

        digest = hashlib.sha256(f"{self.seed}\n{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True, slots=True)
class Result:
    """What an attacker came to, from a view alone: named tensors (``images``, ``labels``, ``scores``), and notes."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """Rows of images for the report, (N, C, H, W) float32 in [0, 1], each row with its title: originals first.

    ``position`` is filled in by :func:`bracketed`.
    """

    title: str
    rows: tuple[tuple[str, Tensor], ...]
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve for the report: a ROC, leakage by layer. Points (x, y) in order."""

    title: str
    x_label: str
    y_label: str
    points: tuple[tuple[float, float], ...]
    log_axes: bool = False
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A guess compared with the truth: a bracket for each metric of the attack."""

    brackets: Mapping[str, Bracket]
    pictures: tuple[Picture, ...] = ()
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()


class Attack(Protocol):
    """One attack on one layer, or on all. A fresh one is made for each position."""

    name: str
    reference: str
    """The paper: authors, title, year."""
    metrics: tuple[Metric, ...]
    knowledge: tuple[Knowledge, ...]
    layer: str | None

    def fit(self, public: PublicData, context: Context) -> None:
        """Learn from the attacker's own data. Raises nothing for a view of nothing: the floor is a position, too."""
        ...

    def attack(self, view: View, context: Context) -> Result:
        """Guess. From a view of nothing (the floor) an attack gives its best guess without it."""
        ...

    def score(self, result: Result, truth: Truth, context: Context) -> Scored:
        """Compare, with a bracket for each of :attr:`metrics`."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """What is attacked at one position."""

    view: View
    public: PublicData
    access: Access | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a conformance list: something that must hold or be refused, tried.

    Args:
        name: what was tried, ``a part of another bundle``.
        claim: number of the claim of THREAT_MODEL.md that it tests, ``A2``.
        held: whether it met the refusal that the claim promises.
        how: what happened, in a few words.
    """

    name: str
    claim: str
    held: bool
    how: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that one job gave: findings, or checks, and what the report shows beside them."""

    findings: tuple[Finding, ...] = ()
    pictures: tuple[Picture, ...] = ()
    curves: tuple[Curve, ...] = ()
    checks: tuple[Check, ...] = ()
    epsilons: tuple[EmpiricalEpsilon, ...] = ()
    """Measured lower bounds beside stated upper ones; a contradiction ends the audit with a failure."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Named figures that are no findings: ``empirical epsilon, lower bound``."""


def bracketed(
    make: Callable[[], Attack],
    floor: Subject,
    scheme: Subject,
    ceiling: Subject,
    truth: Truth,
    *,
    seed: int,
    budget: Budget,
    progress: Progress = silent,
    known: Callable[[Position], tuple[MutableMapping[tuple[str, str], Scored], tuple[str, str]]] | None = None,
) -> Outcome:
    """Run an attack at all three positions, the one way in which findings are made.

    Args:
        make: gives a fresh attack; called once for each position.
        seed: the same at all positions, so that only what is seen differs.
        known: where a result at a position is kept, and its key: floor and ceiling are the same under every scheme.

    Raises:
        SettingError: a subject at another position than it is given for, or an attack that scored too little.
    """
    subjects = {Position.FLOOR: floor, Position.SCHEME: scheme, Position.CEILING: ceiling}
    scored: dict[Position, Scored] = {}
    notes: list[str] = []
    attack = make()
    for position, subject in subjects.items():
        if subject.view.position is not position:
            raise SettingError("a view of another position", expected=position, got=subject.view.position)
        attack = make()
        kept, key = ({}, ("", "")) if known is None else known(position)
        if key not in kept:
            context = Context(seed, budget, progress, subject.access)
            attack.fit(subject.public, context)
            result = attack.attack(subject.view, context)
            one = attack.score(result, truth, context)
            kept[key] = replace(one, notes=(*result.notes, *one.notes))
        scored[position] = kept[key]
        missing = [each.name for each in attack.metrics if each.name not in scored[position].brackets]
        if missing:
            raise SettingError(
                "an attack gave no result for its metric", where=attack.name, expected=", ".join(missing)
            )
        notes += [f"{position}: {note}" for note in scored[position].notes]
    findings = tuple(
        Finding(
            attack=attack.name,
            audited=scheme.view.audited,
            metric=metric.name,
            unit=metric.unit,
            higher_is_worse=metric.higher_is_worse,
            layer=attack.layer,
            floor=scored[Position.FLOOR].brackets[metric.name],
            scheme=scored[Position.SCHEME].brackets[metric.name],
            ceiling=scored[Position.CEILING].brackets[metric.name],
            knowledge=attack.knowledge,
            budget=budget,
            seed=seed,
            notes=tuple(dict.fromkeys(notes)),
        )
        for metric in attack.metrics
    )
    pictures = tuple(replace(each, position=at) for at, one in scored.items() for each in one.pictures)
    curves = tuple(replace(each, position=at) for at, one in scored.items() for each in one.curves)
    return Outcome(findings, pictures, curves)


# --- what the runner asks of a registered attack --------------------------------------------------------------------
class Scene(Protocol):
    """One scheme of the user's model, ready to be attacked. Made by :mod:`motte.audit.scene`.

    It is the audit's own, not the attacker's: an attack gets a :class:`Subject` of it. Views are recorded when they
    are first asked for, and kept.
    """

    @property
    def audited(self) -> str:
        """The scheme in words."""
        ...

    @property
    def suite(self) -> Suite:
        """Which suite runs."""
        ...

    @property
    def model(self) -> nn.Module:
        """The victim, plain, in evaluation mode. Never changed."""
        ...

    @property
    def scheme(self) -> Asymmetric | None:
        """None for ``trusted`` and ``accelerator``, where nothing is split."""
        ...

    @property
    def everything_leaves(self) -> bool:
        """True for ``accelerator``."""
        ...

    @property
    def outside(self) -> tuple[str, ...]:
        """Layers that are attacked, in the order in which they run: those that run outside under the scheme; where
        nothing is split (``trusted``, ``accelerator``) those that run outside under the schemes beside it."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, as :attr:`std`."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel: pixels = images * std + mean."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        ...

    @property
    def classes(self) -> int:
        """Of the model's answer."""
        ...

    @property
    def data(self) -> str:
        """Name of the data set, ``fashion-mnist``."""
        ...

    def truth(self, phase: Phase) -> Truth:
        """The private records of that phase: of the test split at inference, of the training split at training."""
        ...

    def subject(self, position: Position, phase: Phase) -> Subject:
        """What stands at ``position``."""
        ...

    def records(self, split: Literal["train", "test"], count: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
        """Normalised images (N, C, H, W) float32 and labels (N,) int64 of the data set, in its own order: for attacks
        that train models of their own (shadow models, surrogates)."""
        ...

    def known_scores(
        self, job: str, position: Position
    ) -> tuple[MutableMapping[tuple[str, str], Scored], tuple[str, str]]:
        """Where the result of ``job`` at ``position`` is kept, and under which key."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of a suite."""

    name: str
    run: Callable[[Context], Outcome]


class Planned(Protocol):
    """A registered attack: says what it would run on a scene. Nothing runs while it plans."""

    def plan(self, scene: Scene) -> Sequence[Job]:
        """Jobs for this scene, in their order; none where the attack does not apply (or not in this suite)."""
        ...


def standard_job(name: str, make: Callable[[], Attack], scene: Scene, phase: Phase) -> Job:
    """The usual job: ``make`` at floor, scheme and ceiling of the scene."""

    def run(context: Context) -> Outcome:
        floor, middle, ceiling = (scene.subject(position, phase) for position in Position)
        return bracketed(
            make,
            floor,
            middle,
            ceiling,
            scene.truth(phase),
            seed=context.seed,
            budget=context.budget,
            progress=context.progress,
            known=lambda position: scene.known_scores(name, position),
        )

    return Job(name, run)
