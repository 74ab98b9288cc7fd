"""Security patch levels of AMD's firmware, as a verifier's owner states them and as reports carry them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from motte.errors import SettingError

_LEVELS: Final = ("fmc", "bootloader", "tee", "snp", "microcode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tcb:
    """Security patch levels of one machine's firmware, 0 to 255 each; ``fmc`` exists on Turin and later alone.

    Raises:
        SettingError: one is no such number.
    """

    bootloader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int = 0

    def __post_init__(self) -> None:
        for name in _LEVELS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= 255:
                raise SettingError("not a security patch level", where=name, expected="0 to 255", got=repr(value)[:40])

    def at_least(self, minimum: Tcb) -> bool:
        """Whether every level is at least that of ``minimum``: levels of different parts do not make up for another."""
        return all(getattr(self, name) >= getattr(minimum, name) for name in _LEVELS)

    def __str__(self) -> str:
        return " ".join(f"{name}={getattr(self, name)}" for name in _LEVELS)
