"""Figures from plain data (`lines`, `panels`, ...) and their themable inline SVG (`to_svg`)."""

from __future__ import annotations

from dh_jax.viz.figures import (
    Doublings,
    Effect,
    dots,
    effects,
    histograms,
    lines,
    panels,
    stacks,
    strips,
)
from dh_jax.viz.parts import Series, mean_curve, settled
from dh_jax.viz.style import THEMES, Style, css_variables, policy_styles, source_styles
from dh_jax.viz.svg import to_svg

__all__ = [
    "THEMES",
    "Doublings",
    "Effect",
    "Series",
    "Style",
    "css_variables",
    "dots",
    "effects",
    "histograms",
    "lines",
    "mean_curve",
    "panels",
    "policy_styles",
    "settled",
    "source_styles",
    "stacks",
    "strips",
    "to_svg",
]
