"""Figures from plain data (`lines`, `panels`, ...) and their themable inline SVG (`to_svg`).

In a notebook, importing this also teaches IPython how batches, loaders, policies, scores and these
figures look; ``%load_ext dh_jax.viz`` does it by name.
"""

from __future__ import annotations

from typing import Any

from dh_jax.viz.batches import length_histograms, packed_rows, weight_bars
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
from dh_jax.viz.measured import (
    RankedDocument,
    influence_matrix,
    loss_by_source,
    teacher_agreement,
    top_documents,
    weights_over_time,
)
from dh_jax.viz.notebook import register, register_if_there
from dh_jax.viz.parts import Series, mean_curve, settled
from dh_jax.viz.style import THEMES, Style, css_variables, policy_styles, source_styles
from dh_jax.viz.svg import to_svg

__all__ = [
    "THEMES",
    "Doublings",
    "Effect",
    "RankedDocument",
    "Series",
    "Style",
    "css_variables",
    "dots",
    "effects",
    "histograms",
    "influence_matrix",
    "length_histograms",
    "lines",
    "load_ipython_extension",
    "loss_by_source",
    "mean_curve",
    "packed_rows",
    "panels",
    "policy_styles",
    "settled",
    "source_styles",
    "stacks",
    "strips",
    "teacher_agreement",
    "to_svg",
    "top_documents",
    "weight_bars",
    "weights_over_time",
]


def load_ipython_extension(shell: Any) -> None:
    """What ``%load_ext dh_jax.viz`` calls."""
    register(shell)


register_if_there()
