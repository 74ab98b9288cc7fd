"""Every attack by name, loaded when it is asked for: name -> (module, class).

A class takes no argument and is :class:`motte.audit.interface.Planned`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Final, cast

from motte.audit.interface import Planned
from motte.errors import SettingError

ATTACKS: Final[Mapping[str, tuple[str, str]]] = {
    # What inputs and activations give away:
    "paired-decoder": ("motte.audit.attacks.decoder", "PairedDecoders"),
    "optimisation": ("motte.audit.attacks.optimisation", "ByOptimisations"),
    "gan-prior": ("motte.audit.attacks.gan_prior", "WithGanPriors"),
    "weight-delta": ("motte.audit.attacks.weight_delta", "WeightDeltas"),
    "rank-exhaustion": ("motte.audit.attacks.rank_exhaustion", "RankExhaustions"),
    "labels": ("motte.audit.attacks.labels", "LabelRecoveries"),
    "gradient-leakage": ("motte.audit.attacks.gradient_leakage", "GradientLeakages"),
    # What outcomes, weights and answers give away:
    "membership-threshold": ("motte.audit.attacks.membership", "Membership"),
    "membership-shadow": ("motte.audit.attacks.shadow", "ShadowMembership"),
    "membership-lira": ("motte.audit.attacks.lira", "LiraMembership"),
    "stealing": ("motte.audit.attacks.stealing", "Stealing"),
    "integrity": ("motte.audit.attacks.integrity", "Lying"),
    "empirical-epsilon": ("motte.audit.attacks.membership_releases", "ReleaseGames"),
    "conformance": ("motte.audit.attacks.conformance", "Conforming"),
}


def attack_names() -> tuple[str, ...]:
    """All names, in the order in which a suite runs them."""
    return tuple(ATTACKS)


JUDGED_BY_LPIPS: Final = ("paired-decoder", "optimisation")
"""Attacks whose pictures a learnt metric can judge, where its weights are given."""


ABOUT_WHAT_WAS_LEARNT: Final[Mapping[str, str]] = {
    "stealing": "the weights are random: there is nothing to steal, and no answer of the model to agree with",
}
"""Attacks that ask what a model has learnt, and why they say nothing of one with random weights."""


def load(name: str, *, lpips: Path | None = None) -> Planned:
    """The attack ``name``.

    Args:
        lpips: weights of the learnt metric (:meth:`motte.audit.attacks.image_metrics.Lpips.open`); None: that column
            is n/a.

    Raises:
        SettingError: there is none of that name. ResourceError, FormatError: not such weights.
    """
    if name not in ATTACKS:
        raise SettingError("no attack of that name", expected=", ".join(ATTACKS) or "none", got=repr(name)[:80])
    module, kind = ATTACKS[name]
    made = getattr(import_module(module), kind)
    if lpips is not None and name in JUDGED_BY_LPIPS:
        from motte.audit.attacks.image_metrics import Lpips

        return cast(Planned, made(Lpips.open(lpips)))
    return cast(Planned, made())
