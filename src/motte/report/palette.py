"""The colours of figures and of the page, light and dark.

The eight of a theme were found by maximising the smallest distance between any two under normal sight and under
simulated protanopia, deuteranopia and tritanopia (matrices of Machado, Oliveira, Fernandes 2009), with a contrast of at
least 3 to the background (WCAG 2.2, 1.4.11). Tests compute both again. No figure tells series apart by colour alone:
lines and points also differ by the shape of their marks, bars by their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours as ``#RRGGBB``. ``series``: of figures, in order of use."""

    background: str
    surface: str
    text: str
    quiet: str
    link: str
    line: str
    grid: str
    banner: str
    banner_text: str
    good: str
    bad: str
    trusted: str
    trusted_text: str
    outside: str
    outside_text: str
    series: tuple[str, ...]


LIGHT: Final = Theme(
    background="#FFFFFF",
    surface="#F4F6F8",
    text="#16191D",
    quiet="#4C5560",
    link="#0B4FA8",
    line="#7A838E",
    grid="#DDE2E7",
    banner="#B3120E",
    banner_text="#FFFFFF",
    good="#0A6B3D",
    bad="#A8180F",
    trusted="#DCEBFA",
    trusted_text="#0A2F57",
    outside="#FBE3D2",
    outside_text="#5A2300",
    series=("#0E44D1", "#E8481C", "#005F40", "#A8418A", "#222222", "#659F38", "#2599E7", "#A78C72"),
)
DARK: Final = Theme(
    background="#14171C",
    surface="#1E232A",
    text="#E9ECEF",
    quiet="#AAB3BD",
    link="#8CC4FF",
    line="#7F8994",
    grid="#333A43",
    banner="#B3120E",
    banner_text="#FFFFFF",
    good="#5FD39A",
    bad="#FF9A8F",
    trusted="#173A5E",
    trusted_text="#DCEBFA",
    outside="#5A2E12",
    outside_text="#FBE3D2",
    series=("#4CB5F6", "#D47135", "#07FF84", "#FAAACD", "#D9FDD0", "#F0E442", "#3B70D0", "#A4A280"),
)
MARKERS: Final = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star")
"""Shapes of points, by the names that plotly gives them."""


def luminance(colour: str) -> float:
    """Relative luminance of ``#RRGGBB``, 0 to 1 (WCAG 2.2)."""
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def css_variables(theme: Theme) -> str:
    """The theme as CSS custom properties, ``--text:#16191D;...``, series as ``--series-0`` and on."""
    plain = [name for name in Theme.__slots__ if name != "series"]
    pairs = [(name.replace("_", "-"), getattr(theme, name)) for name in plain]
    pairs += [(f"series-{index}", colour) for index, colour in enumerate(theme.series)]
    return "".join(f"--{name}:{colour};" for name, colour in pairs)


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
