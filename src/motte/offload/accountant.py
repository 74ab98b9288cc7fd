"""The one place where ``dp-accounting`` is called: composition of Gaussian releases to one epsilon.

Privacy loss distributions (Koskela, Jälkö, Honkela 2020; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the
Dots", 2022), rounded pessimistically: the epsilon is an upper bound. For Gaussian mechanisms the exact figure is known
too (:mod:`motte.offload.analytic`); it sets the resolution here, and the tests compare the two.

``dp-accounting`` is an optional package. It takes seconds to load, and nothing else of motte loads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from motte.errors import ResourceError
from motte.offload.analytic import check_delta, epsilon_of

_STEPS: Final = 1 << 14
"""The loss is rounded to this share of epsilon, so that a grid has tens of thousands of points for any epsilon."""
MAX_EPSILON: Final = 1e6
"""Above it dp-accounting's numbers overflow and the closed form stands in for it: there, no digit means anything."""


@dataclass(frozen=True, slots=True)
class GaussianReleases:
    """``count`` Gaussian releases that can depend on one record, alike.

    Args:
        noise_multiplier: standard deviation over clip.
        sensitivity: L2 distance that one record can make, in clips.
        count: how many.
    """

    noise_multiplier: float
    sensitivity: float
    count: int

    @property
    def mu(self) -> float:
        """Sensitivity over standard deviation of all of them together."""
        return self.sensitivity / self.noise_multiplier * math.sqrt(self.count)


def composed_mu(releases: Sequence[GaussianReleases]) -> float:
    """Sensitivity over standard deviation of the one Gaussian mechanism that ``releases`` amount to."""
    return math.sqrt(sum(each.mu**2 for each in releases))


def composed_epsilon(releases: Sequence[GaussianReleases], delta: float) -> float:
    """Epsilon of all of ``releases`` together at ``delta``, by dp-accounting up to :data:`MAX_EPSILON`.

    Raises:
        SettingError: delta out of range.
        ResourceError: dp-accounting is not installed.
    """
    check_delta(delta)
    present = [each for each in releases if each.count]
    package = _dp_accounting()
    if not present:
        return 0.0
    closed_form = epsilon_of(delta, composed_mu(present))
    if closed_form > MAX_EPSILON:
        return closed_form
    interval = max(closed_form, 1e-3) / _STEPS
    accountant = package.pld.PLDAccountant(value_discretization_interval=interval)
    for each in present:
        # The package measures noise in sensitivities.
        event = package.GaussianDpEvent(each.noise_multiplier / each.sensitivity)
        accountant.compose(event, each.count)
    return float(accountant.get_epsilon(delta))


def package_version() -> str:
    """``dp-accounting 0.6.0``.

    Raises:
        ResourceError: it is not installed.
    """
    from importlib.metadata import version

    _dp_accounting()
    return f"dp-accounting {version('dp-accounting')}"


def _dp_accounting() -> Any:
    try:
        return import_module("dp_accounting")
    except ImportError as problem:
        raise ResourceError(
            "composing releases needs the package dp-accounting",
            hint="pip install 'motte[privacy]', or pip install dp-accounting",
        ) from problem
