"""The Gaussian mechanism exactly: epsilon, delta and noise, without an inequality in between.

Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration and Optimal
Denoising" (ICML 2018), theorem 8: with L2 sensitivity ``s`` and standard deviation ``sigma``, and ``mu = s / sigma``,

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - e^epsilon * Phi(-mu / 2 - epsilon / mu)

is the smallest delta. Gaussian mechanisms compose, adaptively too, to one whose ``mu`` is the root of the sum of the
squares (Dong, Roth, Su, "Gaussian Differential Privacy", 2022, corollary 3.3), so this formula also gives the exact
epsilon of any number of Gaussian releases. Only the standard library is used.
"""

from __future__ import annotations

import math
from typing import Final

from motte.errors import SettingError

_ROOT2: Final = math.sqrt(2)
_ROUNDS: Final = 300
"""Of bisection: more than enough to reach two neighbouring floats."""


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest delta of a Gaussian mechanism, to a relative error of about 1e-9.

    Args:
        epsilon: at least 0.
        mu: sensitivity over standard deviation, at least 0.
    """
    if mu == 0:
        return 0.0
    if epsilon == 0:
        return math.erf(mu / 2 / _ROOT2)
    near, far = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    # e^epsilon Phi(-far) = exp(-near^2 / 2) erfcx(far / sqrt 2) / 2: no overflow, whatever epsilon is.
    scale = math.exp(-near * near / 2)
    if near < 0:
        return max(0.0, scale * (_erfcx(-near / _ROOT2) - _erfcx(far / _ROOT2)) / 2)
    return max(0.0, (math.erfc(-near / _ROOT2) - scale * _erfcx(far / _ROOT2)) / 2)


def epsilon_of(delta: float, mu: float) -> float:
    """The smallest epsilon of a Gaussian mechanism at ``delta``; 0 where delta alone is enough.

    Raises:
        SettingError: delta out of range.
    """
    check_delta(delta)
    if delta_of(0.0, mu) <= delta:
        return 0.0
    # delta(epsilon) <= Phi(mu / 2 - epsilon / mu) <= exp(-(epsilon / mu - mu / 2)^2 / 2).
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if delta_of(middle, mu) <= delta else (middle, high)
    return high


def noise_multiplier(epsilon: float, delta: float, sensitivity: float) -> float:
    """The smallest standard deviation, in clips, for (epsilon, delta) at a sensitivity of ``sensitivity`` clips.

    Raises:
        SettingError: epsilon, delta or sensitivity out of range.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        raise SettingError("sensitivity must be a positive number", got=repr(sensitivity))
    low, high = 0.0, 1.0
    while delta_of(epsilon, high) <= delta:
        low, high = high, 2 * high
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if delta_of(epsilon, middle) <= delta else (low, middle)
    if low == 0:
        raise SettingError("no noise is enough for these", got=f"epsilon {epsilon!r}, delta {delta!r}")
    return math.nextafter(sensitivity / low, math.inf)


def check_epsilon(epsilon: float) -> None:
    """Refuse what is no epsilon to calibrate to.

    Raises:
        SettingError: not a positive number, or above 10^6.
    """
    if not 0 < epsilon <= 1e6:
        raise SettingError("epsilon out of range", expected="above 0, at most 1e6", got=repr(epsilon))


def check_delta(delta: float) -> None:
    """Refuse what is no delta.

    Raises:
        SettingError: below 1e-18, where what is neglected here would matter, or not below 1.
    """
    if not 1e-18 <= delta < 1:
        raise SettingError("delta out of range", expected="1e-18 to below 1", got=repr(delta))


def _erfcx(x: float) -> float:
    """exp(x^2) erfc(x) for x >= 0, which does not underflow."""
    if x < 5:
        return math.exp(x * x) * math.erfc(x)
    # The continued fraction of Laplace, from its tail; 60 terms reach double precision from 5 on.
    tail = x
    for term in range(60, 0, -1):
        tail = x + term / 2 / tail
    return 1 / (math.sqrt(math.pi) * tail)
