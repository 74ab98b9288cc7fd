"""A statement of privacy: the figures of a run and the sentences that go with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from motte.errors import SettingError
from motte.offload.accountant import MAX_EPSILON, GaussianReleases, composed_epsilon, composed_mu, package_version
from motte.offload.analytic import epsilon_of
from motte.offload.calibration import Kind
from motte.offload.settings import Adjacency, Mechanism

Accountant = Literal["dp-accounting", "closed-form"]
Words = Callable[[float, str | None], tuple[str, ...]]
"""From epsilon, and the reason why it is infinite, to sentences."""

CLOSED_FORM: Final = "closed form for Gaussian mechanisms (Balle and Wang 2018; Dong, Roth, Su 2022)"
WEAK: Final = 10.0
"""An epsilon above this is called weak."""
_MISSING: Final[dict[Kind, str]] = {
    "residual": "residuals leave as they are: the activations but for the part that stays inside",
    "gradient": "output gradients leave as they are; with successive weights they determine the principal part",
    "update": "weight updates are not privatised; successive weights and output gradients determine the principal part",
}


@dataclass(frozen=True, slots=True)
class KindStatement:
    """One kind of release.

    Args:
        kind: residual, gradient or update.
        mechanism: clip and noise; None: not privatised.
        releases: of the whole run, layers times steps; a retry is none.
        per_record: of these, how many can depend on one record.
        samples: rows of one release that one record can change.
        sensitivity: by how much, L2, in clips.
    """

    kind: Kind
    mechanism: Mechanism | None
    releases: int
    per_record: int
    samples: int
    sensitivity: float

    @property
    def composed(self) -> GaussianReleases | None:
        """What an accountant composes; None: not privatised."""
        if self.mechanism is None:
            return None
        return GaussianReleases(self.mechanism.noise_multiplier, self.sensitivity, self.per_record)


@dataclass(frozen=True, slots=True)
class PrivacyStatement:
    """What is promised to one record, and what is not.

    Args:
        task: ``training`` or ``inference``.
        adjacency: which data sets count as neighbours.
        delta: of epsilon and of forward_only_epsilon.
        accountant: what composed.
        kinds: one entry a kind of release.
        epsilon: of everything that leaves together; infinite where something is not privatised.
        infinite_because: why, where it is.
        forward_only_epsilon: of the residuals alone, as if nothing else left and nothing were learnt. For training it
            is **not** a guarantee, only comparable with figures that were published like this.
        sentences: what this does and does not protect.
    """

    task: Literal["training", "inference"]
    adjacency: Adjacency
    delta: float
    accountant: str
    kinds: tuple[KindStatement, ...]
    epsilon: float
    infinite_because: str | None
    forward_only_epsilon: float
    sentences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite epsilon is the text ``infinite``."""
        return {
            "task": self.task,
            "adjacency": self.adjacency,
            "delta": self.delta,
            "accountant": self.accountant,
            "releases": [_kind_json(each) for each in self.kinds],
            "epsilon": _finite_or_text(self.epsilon),
            "infinite_because": self.infinite_because,
            "forward_only_epsilon": _finite_or_text(self.forward_only_epsilon),
            "sentences": list(self.sentences),
        }


def stated(
    task: Literal["training", "inference"],
    adjacency: Adjacency,
    delta: float,
    kinds: Sequence[KindStatement],
    alone: KindStatement,
    accountant: Accountant,
    words: Words,
) -> PrivacyStatement:
    """Compose ``kinds`` to one epsilon, and ``alone`` to the forward-only figure.

    Raises:
        SettingError: an unknown accountant.
        ResourceError: dp-accounting is asked for and not installed.
    """
    if accountant not in ("dp-accounting", "closed-form"):
        raise SettingError("unknown accountant", expected="dp-accounting or closed-form", got=repr(accountant))
    missing = [_MISSING[each.kind] for each in kinds if each.mechanism is None and each.releases]
    because = "; ".join(missing) or None
    epsilon = _epsilon(kinds, delta, accountant)
    named = CLOSED_FORM
    if accountant == "dp-accounting":
        named = f"{package_version()}, privacy loss distributions (above {MAX_EPSILON:.0e}: closed form)"
    return PrivacyStatement(
        task,
        adjacency,
        delta,
        named,
        tuple(kinds),
        epsilon,
        because,
        _epsilon([alone], delta, accountant),
        words(epsilon, because),
    )


def training_words(
    adjacency: Adjacency, *, records: int, uses: int, steps: int, trained: bool, coupled: bool, delta: float
) -> Words:
    """What a training run's figure means.

    Args:
        records, steps, delta: of the run.
        uses: steps that one record takes part in.
        trained: whether parameters inside learn from exact gradients.
        coupled: whether samples of a batch meet.
    """

    def words(epsilon: float, because: str | None) -> tuple[str, ...]:
        said = [_promise(adjacency, epsilon, because, delta)]
        if trained and because is None:
            said.append(
                f"All {steps:,} steps count for each record, not only the {uses:,} that it takes part in: what stays"
                " inside (first and last layer, norms, biases) learns from exact gradients and carries each record on"
                " into every later release."
            )
        if coupled:
            said.append("One record changes every row of its batch, because samples of a batch meet.")
        if delta >= 1 / records:
            said.append(
                f"Delta is not below one over the number of records ({1 / records:.1e}): giving one record away at"
                " random would satisfy it."
            )
        said += [
            "Per record, not per person: k records of one person count as one with a noise k times smaller.",
            "Not protected: the weights of split layers, shapes, the number of records and steps, times (a rank that is"
            " found per batch shows in them), and whether the run ended early.",
            "Not protected: the trained model, once it is published or answers anybody. What stays inside is trained"
            " without noise.",
        ]
        if because is None:
            said.append(
                "It holds only while nothing else that is computed from private data steers the split layers' weights:"
                " no gradient norm taken over all layers, no learning rate or early stop by a private loss."
            )
        return tuple(said)

    return words


def inference_words(adjacency: Adjacency, *, queries: int, delta: float) -> Words:
    """What the figure of ``queries`` about one record means."""

    def words(epsilon: float, because: str | None) -> tuple[str, ...]:
        many = "one query" if queries == 1 else f"{queries:,} queries"
        return (
            _promise(adjacency, epsilon, because, delta),
            f"It is for {many} about the same record; each further one adds to it.",
            "Not protected: the weights and the graph of split layers, shapes, the number of queries, and times (a rank"
            " that is found per batch shows in them).",
            "Not protected: what the answer itself tells to whoever receives it.",
        )

    return words


def _promise(adjacency: Adjacency, epsilon: float, because: str | None, delta: float) -> str:
    if because is not None:
        return f"Epsilon is infinite, so nothing is promised: {because}."
    changed = "replaced by any other" if adjacency == "replace" else "taken out, its place left empty"
    said = (
        f"If any one record were {changed}, the probability of anything that can be learnt from all that leaves would"
        f" change by a factor of at most e^{epsilon:.4g}, but for {delta:g}."
    )
    return said + (" At this size that is next to no promise." if epsilon > WEAK else "")


def _epsilon(kinds: Sequence[KindStatement], delta: float, accountant: Accountant) -> float:
    releases: list[GaussianReleases] = []
    for each in kinds:
        if each.composed is None and each.releases:
            return math.inf
        if each.composed is not None and each.per_record:
            releases.append(each.composed)
    if accountant == "dp-accounting":
        return composed_epsilon(releases, delta)
    return epsilon_of(delta, composed_mu(releases))


def _kind_json(each: KindStatement) -> dict[str, Any]:
    return {
        "kind": each.kind,
        "clip": None if each.mechanism is None else each.mechanism.clip,
        "noise_multiplier": None if each.mechanism is None else each.mechanism.noise_multiplier,
        "sigma": None if each.mechanism is None else each.mechanism.sigma,
        "releases": each.releases,
        "releases_per_record": each.per_record,
        "rows_per_release": each.samples,
        "sensitivity_in_clips": each.sensitivity,
    }


def _finite_or_text(epsilon: float) -> float | str:
    return epsilon if math.isfinite(epsilon) else "infinite"
