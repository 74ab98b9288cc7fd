"""Model stealing: a surrogate that starts from every visible weight, and learns the rest from the victim's answers.

Zhang et al., "No Privacy Left Outside" (S&P 2024): partial shielding is judged between the thief who has queries only
(floor) and the one who has all weights (ceiling); hidden weights start from a public initialisation, and the whole is
fine-tuned on inputs of the thief's own, labelled by the victim. Orekondy, Schiele, Fritz, "Knockoff Nets" (CVPR 2019)
is the attack at the floor.

Three figures: the surrogate's accuracy; its fidelity, how often it says what the victim says (Jagielski, Carlini,
Berthelot, Kurakin, Papernot, "High Accuracy and High Fidelity Extraction of Neural Networks", USENIX Security 2020);
and how many adversarial examples made on it fool the victim.

The thief keeps the state that agrees best with the victim on answers that it set aside, its start included: so what is
visible is never trained away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.audit.attacks.membership_models import answers, fresh_like
from motte.audit.attacks.stealing_placements import (
    Placement,
    all_inside,
    all_outside,
    layers_outside,
    usual_placements,
)
from motte.audit.attacks.stealing_transfer import Ball, fgsm, pgd
from motte.audit.interface import Bracket, Context, Finding, Job, Knowledge, Metric, Outcome, Position, Scored
from motte.audit.statistics import clopper_pearson
from motte.errors import SettingError
from motte.zoo.weights import seeded

if TYPE_CHECKING:
    from motte.audit.interface import Scene

REFERENCE: Final = "Zhang et al., No Privacy Left Outside, S&P 2024"
METRICS: Final = (
    Metric("surrogate accuracy", "share"),
    Metric("surrogate fidelity", "share"),
    Metric("fgsm transfer", "share"),
    Metric("pgd transfer", "share"),
)
KNOWLEDGE: Final = (Knowledge.ARCHITECTURE, Knowledge.WEIGHTS, Knowledge.PUBLIC_DATA, Knowledge.QUERIES)
DISTANCE: Final = 8 / 255
"""Of adversarial examples, per pixel."""
_PGD_STEPS: Final = 10
_BATCH: Final = 64
_LOOKS: Final = 10
"""How often the thief compares with the answers that it set aside."""
_JUDGED: Final = 1000
"""Records of the test split by which surrogates are judged."""
_FOOLED: Final = 128
"""Of these, from how many adversarial examples are made."""


@dataclass(frozen=True, slots=True, eq=False)
class Loot:
    """What a theft gave.

    Attributes:
        surrogate: in evaluation mode.
        agreement: with the victim on the answers that were set aside: at the start, and of what was kept.
        queries: that were asked.
    """

    surrogate: nn.Module
    agreement: tuple[float, float]
    queries: int


def initial(architecture: nn.Module, victim: nn.Module, placement: Placement, *, seed: int) -> nn.Module:
    """A surrogate with every visible number of the victim, and a public initialisation elsewhere."""
    surrogate = fresh_like(architecture, seed)
    state, secret = surrogate.state_dict(), victim.state_dict()
    with torch.no_grad():
        for name, mask in placement.visible.items():
            state[name].copy_(torch.where(mask, secret[name], state[name]))
    return surrogate


def steal(
    victim: nn.Module,
    placement: Placement,
    images: Tensor,
    context: Context,
    *,
    architecture: nn.Module | None = None,
    query: Callable[[Tensor], Tensor] | None = None,
) -> Loot:
    """Play the thief.

    Args:
        victim: of which nothing is read but the visible numbers and, through ``query``, its answers.
        images: the thief's own inputs (N, C, H, W), normalised; ``budget.queries`` of them are asked at most.
        architecture: a module like the victim, if the thief starts from public weights; None: of the victim's shape.
        query: logits (N, classes); None: the victim's in evaluation mode.

    Raises:
        SettingError: fewer than two inputs.
    """
    asked = images[: context.budget.queries]
    if len(asked) < 2:
        raise SettingError("a thief needs inputs to ask about", expected="two at least", got=str(len(asked)))
    told = (query or answers(victim))(asked).detach()
    surrogate = initial(architecture or victim, victim, placement, seed=context.seed)
    aside = max(1, len(asked) // 5)
    kept, agreement = _fine_tuned(surrogate, asked, told, aside, context, placement)
    surrogate.load_state_dict(kept)
    return Loot(surrogate.eval(), agreement, len(asked))


def _fine_tuned(
    surrogate: nn.Module, images: Tensor, told: Tensor, aside: int, context: Context, placement: Placement
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Learn the victim's answers; the best state by agreement on the ones set aside, and how that began and ended."""
    learn, teach = images[aside:], told[aside:]
    steps = context.budget.steps
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = best = _agreement(surrogate, images[:aside], told[:aside])
    kept = copy.deepcopy(surrogate.state_dict())
    with seeded(context.seed):
        for step in range(1, steps + 1):
            _mode(surrogate, placement)
            chosen = torch.randint(len(learn), (min(_BATCH, len(learn)),))
            loss = functional.kl_div(
                surrogate(learn[chosen]).log_softmax(1),
                teach[chosen].log_softmax(1),
                log_target=True,
                reduction="batchmean",
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            context.progress(step, steps, f"steps of a thief ({placement.name})")
            last = step == steps or context.out_of_time()
            if last or step % max(1, steps // _LOOKS) == 0:
                found = _agreement(surrogate, images[:aside], told[:aside])
                # (share of equal answers, minus the distance): the distance decides between equal shares.
                if found > best:
                    best, kept = found, copy.deepcopy(surrogate.state_dict())
            if last:
                break
    return kept, (first[0], best[0])


def _agreement(surrogate: nn.Module, images: Tensor, told: Tensor) -> tuple[float, float]:
    said = answers(surrogate)(images)
    same = float((said.argmax(1) == told.argmax(1)).double().mean())
    distance = functional.kl_div(said.log_softmax(1), told.log_softmax(1), log_target=True, reduction="batchmean")
    return same, -float(distance)


def _mode(surrogate: nn.Module, placement: Placement) -> None:
    """Training mode, but norms whose running statistics are visible keep them."""
    surrogate.train()
    for name, module in surrogate.named_modules():
        if f"{name}.running_mean" in placement.visible or (not name and "running_mean" in placement.visible):
            module.eval()


# --- judging ----------------------------------------------------------------------------------------------------------
def judge(
    loot: Loot, victim: nn.Module, images: Tensor, labels: Tensor, ball: Ball, context: Context
) -> dict[str, Bracket]:
    """Brackets of :data:`METRICS` on records (N, C, H, W), (N,) that nobody was trained on.

    Transfer counts among records that the victim gets right: adversarial examples made on the surrogate, tried on it.

    Raises:
        SettingError: the victim gets none of them right.
    """
    said, truth = answers(loot.surrogate)(images).argmax(1), answers(victim)(images).argmax(1)
    right = (truth == labels).nonzero().squeeze(1)[:_FOOLED]
    if not len(right):
        raise SettingError("the victim gets no record right, so nothing can be judged", got=f"{len(images)} records")
    found = {
        "surrogate accuracy": clopper_pearson(int((said == labels).sum()), len(labels)),
        "surrogate fidelity": clopper_pearson(int((said == truth).sum()), len(labels)),
    }
    x, y = images[right], labels[right]
    generator = context.generator("pgd")
    made = {
        "fgsm transfer": fgsm(loot.surrogate, x, y, ball),
        "pgd transfer": pgd(loot.surrogate, x, y, ball, steps=_PGD_STEPS, generator=generator),
    }
    for name, changed in made.items():
        fooled = int((answers(victim)(changed).argmax(1) != y).sum())
        found[name] = clopper_pearson(fooled, len(y))
    return found


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of records (N, C, H, W), (N,) that ``model`` gets right, in evaluation mode."""
    return float((answers(model)(images).argmax(1) == labels).double().mean())


class Stealing:
    """The planned thefts: of the scheme as it is, and in the full suite of the usual partial-shielding schemes."""

    def plan(self, scene: Scene) -> Sequence[Job]:
        """One job for the scheme; in the full suite one for each of :func:`usual_placements`."""
        jobs = [Job("stealing", partial(self._run, scene, None))]
        if scene.suite == "full":
            for placement in usual_placements(scene.model):
                name = f"stealing ({placement.name})"
                jobs.append(Job(name, partial(self._run, scene, placement)))
        return jobs

    def _run(self, scene: Scene, placement: Placement | None, context: Context) -> Outcome:
        audited, job = scene.audited, "stealing"
        if placement is None:
            placement = _of_scheme(scene)
        else:
            audited = f"partial shielding: {placement.name}"
            job = f"stealing ({placement.name})"
        placements = {
            Position.FLOOR: all_inside(),
            Position.SCHEME: placement,
            Position.CEILING: all_outside(scene.model),
        }
        return rob(scene, placements, audited=audited, job=job, context=context)


def rob(scene: Scene, placements: dict[Position, Placement], *, audited: str, job: str, context: Context) -> Outcome:
    """Steal at each position, with the same inputs, seed and number of steps, and judge on test records.

    Args:
        job: under which the scene keeps the scheme's result; floor and ceiling are the same for all.
    """
    found: dict[Position, Scored] = {}
    for position, placement in placements.items():
        kept, key = scene.known_scores(job if position is Position.SCHEME else "stealing", position)
        if key not in kept:
            kept[key] = _robbed(scene, placement, context)
        found[position] = kept[key]
    notes = [
        "Hidden weights start from a fresh initialisation, not from a model trained on other data: a thief who has one"
        " begins higher.",
        f"Adversarial examples: {255 * DISTANCE:g}/255 a pixel, PGD {_PGD_STEPS} steps.",
        *(f"{position}: {note}" for position, each in found.items() for note in each.notes),
    ]
    findings = tuple(
        Finding(
            attack="stealing",
            audited=audited,
            metric=metric.name,
            unit=metric.unit,
            higher_is_worse=metric.higher_is_worse,
            layer=None,
            scheme=found[Position.SCHEME].brackets[metric.name],
            floor=found[Position.FLOOR].brackets[metric.name],
            ceiling=found[Position.CEILING].brackets[metric.name],
            knowledge=KNOWLEDGE,
            budget=context.budget,
            seed=context.seed,
            notes=tuple(notes),
        )
        for metric in METRICS
    )
    return Outcome(findings)


def _robbed(scene: Scene, placement: Placement, context: Context) -> Scored:
    victim = scene.model
    images, labels = _judged(scene)
    own = scene.subject(Position.SCHEME, "inference").public.images
    share = replace(context.budget, seconds=context.budget.seconds / len(Position))
    loot = steal(victim, placement, own, Context(context.seed, share, context.progress))
    found = judge(loot, victim, images, labels, Ball(DISTANCE, scene.mean, scene.std), context)
    shown = 100 * placement.share(victim)
    note = (
        f"{placement.name}, {shown:.1f} % of the parameters visible, {loot.queries} queries, agreement"
        f" {loot.agreement[0]:.3f} before and {loot.agreement[1]:.3f} after learning; the victim's own accuracy on"
        f" these {len(labels)} records is {accuracy(victim, images, labels):.4f}."
    )
    return Scored(found, notes=(note,))


def _judged(scene: Scene) -> tuple[Tensor, Tensor]:
    """As many records of the test split as there are, at most a thousand or so: halved until it has them."""
    count = _JUDGED
    while True:
        try:
            return scene.records("test", count)
        except SettingError:
            if count == 1:
                raise
            count //= 2


def _of_scheme(scene: Scene) -> Placement:
    if scene.everything_leaves:
        return all_outside(scene.model)
    if scene.scheme is None:
        return all_inside()
    return layers_outside(scene.model, scene.outside, "as the scheme places it")
