"""Colours and line styles: one name a colour, one style a source or policy, in every figure.

The colours of sources are those of Okabe and Ito, "Color Universal Design" (2008), darkened on
white and lightened on black where a line would be too faint; policies differ by dash as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "paper": "#fdfdfb", "panel": "#f4f3ee", "ink": "#1c2026", "muted": "#5c636e",
        "grid": "#e2e1da", "rule": "#c9c8c0", "link": "#0b5a94",
        "source-0": "#0072b2", "source-1": "#c77f00", "source-2": "#00916a", "source-3": "#c2649a",
        "source-4": "#2f93d3", "source-5": "#d55e00", "source-6": "#978a00", "source-7": "#6a7380",
        "policy-0": "#5b3fd1", "policy-1": "#b5267e", "policy-2": "#0b7f8c",
        "static": "#3d444f", "uniform": "#8b929c",
    },
    "dark": {
        "paper": "#15171b", "panel": "#1e2126", "ink": "#e9e7e1", "muted": "#a2a8b2",
        "grid": "#2c3037", "rule": "#434954", "link": "#7cc0f5",
        "source-0": "#3f9fe6", "source-1": "#f0ad2e", "source-2": "#25b98c", "source-3": "#e394bf",
        "source-4": "#93d3fb", "source-5": "#ef7d2c", "source-6": "#e3d64a", "source-7": "#98a2b1",
        "policy-0": "#a996ff", "policy-1": "#f07cbd", "policy-2": "#4fc3cf",
        "static": "#d7dbe2", "uniform": "#8a94a3",
    },
}  # fmt: skip
PAINT = THEMES["light"]  # what figures are drawn with
SOURCE_COLOURS = 8
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

Dash = str | tuple[int, tuple[float, ...]]


class Style(NamedTuple):
    """How one source or policy is drawn wherever it appears: name of its colour, dash, marker."""

    colour: str
    dash: Dash = "solid"
    marker: str = "o"

    @property
    def stroke(self) -> str:
        """The nearest CSS border style: solid, dashed or dotted."""
        return ("solid", "dashed", "dotted", "dashed")[DASHES.index(self.dash)]


def source_styles(sources: Sequence[str]) -> dict[str, Style]:
    """One style a source, by its place in the list; dashes tell apart those beyond eight."""
    return {
        name: Style(f"source-{i % SOURCE_COLOURS}", DASHES[i // SOURCE_COLOURS % len(DASHES)])
        for i, name in enumerate(sources)
    }


def policy_styles(policies: Sequence[str]) -> dict[str, Style]:
    """Greys for the baselines static and uniform, strong colours for steered policies."""
    fixed = {"static": Style("static", DASHES[1], "o"), "uniform": Style("uniform", DASHES[2], "s")}
    steered = [name for name in policies if name not in fixed]
    styles = {
        name: Style(f"policy-{i % 3}", DASHES[0] if i < 3 else DASHES[3], ("D", "^", "v")[i % 3])
        for i, name in enumerate(steered)
    }
    return {name: styles.get(name) or fixed[name] for name in policies}


def css_variables(theme: str) -> str:
    """The theme's colours as CSS custom properties, for example ``--ink: #1c2026;``."""
    return " ".join(f"--{name}: {value};" for name, value in THEMES[theme].items())
