"""From measured times and a budget of exposure to a placement: a pure function.

The times come from :mod:`motte.offload.trial`, which runs at the owner's only. A running enclave never decides by
times, since the host steers its clock: it reads the placement that was frozen into the plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

from motte.errors import SettingError
from motte.limits import GIB, KIB, MIB
from motte.offload.placement import Placed, Placement

BudgetKind = Literal["layers", "bytes", "energy"]
_BUDGET: Final = re.compile(r"(layers|bytes|energy)=([0-9]{1,15}(?:\.[0-9]{1,9})?)(KiB|MiB|GiB)?")
_UNITS: Final = {None: 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}


@dataclass(frozen=True, slots=True)
class Phase:
    """Measured seconds of one layer in one pass.

    Attributes:
        whole: everything inside, in plain form.
        low_rank: the principal part's product inside; it runs while the accelerator works.
        transfer: to the accelerator and back.
        accelerator: the product there, as far as it says so itself; ``transfer + accelerator`` is what was measured.
        decomposition: and forming the residual.
        noise: clipping and noise on what leaves.
        check: of the accelerator's answers.
        merge: the two halves added.
    """

    whole: float
    low_rank: float
    transfer: float
    accelerator: float
    decomposition: float = 0.0
    noise: float = 0.0
    check: float = 0.0
    merge: float = 0.0

    @property
    def split(self) -> float:
        """Seconds when it is split: the longer of the two that overlap, and all that does not."""
        return max(self.low_rank, self.transfer + self.accelerator) + self.alone

    @property
    def alone(self) -> float:
        """Seconds of trusted work that overlaps nothing."""
        return self.decomposition + self.noise + self.check + self.merge

    @property
    def at_best(self) -> float:
        """Seconds when it is split and neither link nor accelerator takes any time."""
        return self.low_rank + self.alone


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Measured seconds of one layer: forward, and backward where training was measured."""

    forward: Phase
    backward: Phase | None = None

    @property
    def inside(self) -> float:
        """Seconds when it stays inside."""
        return self.forward.whole + (0.0 if self.backward is None else self.backward.whole)

    @property
    def split(self) -> float:
        """Seconds when it is split."""
        return self.forward.split + (0.0 if self.backward is None else self.backward.split)


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may leave: ``layers``, ``bytes`` of one step, or a share of ``energy``.

    Energy: each candidate layer counts the share of its activation's squared norm that is in its residual, noise not
    counted; the mean of these shares over all linear layers of the model, 0 for those inside, is at most ``amount``.

    Raises:
        SettingError: an amount that cannot be.
    """

    kind: BudgetKind
    amount: float

    def __post_init__(self) -> None:
        whole = self.kind != "energy"
        good = math.isfinite(self.amount) and self.amount >= 0 and (float(self.amount).is_integer() or not whole)
        if self.kind not in get_args(BudgetKind) or not good or (not whole and self.amount > 1):
            raise SettingError(
                "not a budget of exposure", expected="layers=N, bytes=SIZE or energy=SHARE up to 1", got=repr(self)
            )

    @staticmethod
    def parse(text: str) -> Budget:
        """``layers=4``, ``bytes=64MiB`` or ``energy=0.1``.

        Raises:
            SettingError: it is none of them.
        """
        found = _BUDGET.fullmatch(text)
        if found is None or (found[3] is not None and found[1] != "bytes"):
            raise SettingError(
                "not a budget of exposure", expected="layers=N, bytes=SIZE (64MiB) or energy=SHARE", got=repr(text)
            )
        return Budget(cast(BudgetKind, found[1]), float(found[2]) * _UNITS[found[3]])

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:.15g}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a trial found about one layer at the rank that it would have; ``energy`` is the residual's share."""

    times: LayerTimes
    bytes_out: int
    energy: float

    def exposure(self, kind: BudgetKind) -> float:
        """How much of a budget of this kind the layer takes."""
        return {"layers": 1.0, "bytes": float(self.bytes_out), "energy": self.energy}[kind]


def place_auto(base: Placement, measured: Mapping[str, Measured], budget: Budget) -> Placement:
    """Of the layers that ``base`` splits, split those that are faster so, most time saved for its exposure first, as
    long as the budget lasts. A pure function of what was measured.

    Raises:
        SettingError: a layer that ``base`` splits was not measured.
    """
    missing = [name for name in base.split if name not in measured]
    if missing:
        raise SettingError("a layer was not measured", got=", ".join(missing)[:400])
    faster = [name for name in base.split if measured[name].times.split < measured[name].times.inside]
    left = budget.amount * (len(base.layers) if budget.kind == "energy" else 1)
    chosen: set[str] = set()
    for name in sorted(faster, key=lambda name: -_gain(measured[name], budget.kind)):
        exposure = measured[name].exposure(budget.kind)
        # Rounding must not refuse what fits exactly.
        if exposure <= left * (1 + 1e-12):
            chosen.add(name)
            left -= exposure
    return Placement(
        tuple(
            each if each.side != "split" else _judged(each.name, measured[each.name], each.name in chosen, budget)
            for each in base.layers
        )
    )


def _gain(measured: Measured, kind: BudgetKind) -> float:
    saved, exposure = measured.times.inside - measured.times.split, measured.exposure(kind)
    return saved / exposure if exposure > 0 else math.inf


def _judged(name: str, measured: Measured, chosen: bool, budget: Budget) -> Placed:
    inside, split = measured.times.inside, measured.times.split
    times = f"{inside * 1e3:.3g} ms inside, {split * 1e3:.3g} ms split"
    if chosen:
        return Placed(name, "split", f"faster: {times}")
    if split < inside:
        return Placed(name, "inside", f"beyond {budget}: {times}")
    return Placed(name, "inside", f"not faster: {times}")
