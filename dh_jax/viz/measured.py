"""Figures of what was measured while training: weights, losses, influence, agreement.

Shapes: M sources, K probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from dh_jax.viz import parts
from dh_jax.viz.batches import WIDTH
from dh_jax.viz.figures import lines, panels
from dh_jax.viz.parts import Curve, Series
from dh_jax.viz.style import DASHES, PAINT, Style, source_styles

STRONGEST = 0.55  # opacity of the largest cell; text stays readable on it in both themes
WORDS = 64  # characters of a document's beginning that are drawn


class RankedDocument(NamedTuple):
    """A document and what it did: positive helpfulness lowered the probe's loss."""

    source: str
    text: str
    helpfulness: float


def weights_over_time(curves: Mapping[str, Curve], width: int = WIDTH) -> Figure:
    """Each source's weight over the tokens trained on; curves are (tokens, weights)."""
    figure = lines(_series(curves), width, 300, heading="weight in the mixture", scale="share")
    last = ", ".join(f"{name} {y[-1]:.1%}" for name, (_, y) in curves.items())
    figure.set_label(f"Weights over tokens; at the end: {last}")
    return figure


def loss_by_source(
    curves: Mapping[str, Mapping[str, Curve]], width: int = WIDTH, *, columns: int = 3
) -> Figure:
    """One panel a source, one curve a run: nats a token over the tokens trained on.

    Args:
        curves: run -> source -> (tokens, losses); every run has the same sources.
        width: in CSS pixels.
        columns: panels side by side.
    """
    styles = {
        name: Style(f"policy-{i % 3}", DASHES[i % len(DASHES)]) for i, name in enumerate(curves)
    }
    sources = list(next(iter(curves.values())))
    groups = {
        f"{source}, nats a token": [
            Series(run, styles[run], [by_source[source]]) for run, by_source in curves.items()
        ]
        for source in sources
    }
    figure = panels(groups, width, min(columns, len(sources)))
    last = "; ".join(
        f"{run}: " + ", ".join(f"{s} {c[s][1][-1]:.3f}" for s in sources)
        for run, c in curves.items()
    )
    figure.set_label(f"Loss by source, nats a token; at the end {last}")
    return figure


def influence_matrix(
    helpfulness_MK: np.ndarray, sources: Sequence[str], probes: Sequence[str], width: int = WIDTH
) -> Figure:
    """How much each source helps each probe: blue helps, orange harms, by the largest of all.

    Args:
        helpfulness_MK: float, minus the influence score; NaN where nothing was measured.
        sources: names of the M rows.
        probes: names of the K columns.
        width: in CSS pixels.
    """
    values_MK = np.asarray(helpfulness_MK, dtype=float)
    if values_MK.shape != (len(sources), len(probes)):
        raise ValueError(
            f"helpfulness is of shape {values_MK.shape}; {len(sources)} sources and {len(probes)} "
            "probes are named"
        )
    most = float(np.nanmax(np.abs(values_MK), initial=0.0)) or 1.0
    left = 14 + 7.2 * max(len(parts.short(name)) for name in sources)
    figure, (ax,) = parts.figure(width, 34 * len(sources) + 84, 1, 1, left=left, top=58, bottom=26)
    power = int(np.floor(np.log10(most)))
    decimals = max(0, 1 - power)
    for m in range(len(sources)):
        for k in range(len(probes)):
            value = values_MK[m, k]
            known = bool(np.isfinite(value))
            paint = PAINT["source-0" if known and value >= 0 else "source-5"]
            ax.barh(m, 0.96, left=k - 0.48, height=0.92, color=paint, linewidth=0,
                    alpha=STRONGEST * abs(value) / most if known else 0.0)  # fmt: skip
            words = f"{value:+.{decimals}f}" if decimals < 5 else f"{value:+.1e}"
            ax.text(k, m, words.replace("-", "\u2212") if known else "–", ha="center",
                    va="center_baseline", fontsize=parts.SMALL, color=PAINT["ink"])  # fmt: skip
    parts.row_labels(ax, sources, [False] * len(sources))
    ax.set_xlim(-0.5, len(probes) - 0.5)
    ax.xaxis.set_major_locator(FixedLocator(list(range(len(probes)))))
    ax.set_xticklabels([parts.short(name) for name in probes], fontsize=parts.TEXT)
    ax.xaxis.tick_top()
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    for tick in ax.get_xticklabels():
        tick.set_color(PAINT["ink"])
    figure.text(0, 1, "source  ×  probe", va="top", fontsize=parts.TEXT, color=PAINT["muted"])
    figure.text(0, 0, "helpfulness (minus influence): + lowers the probe's loss", va="bottom",
                fontsize=parts.SMALL, color=PAINT["muted"])  # fmt: skip
    best = [
        f"{sources[int(np.nanargmax(values_MK[:, k]))]} helps {probe} most"
        for k, probe in enumerate(probes)
        if np.isfinite(values_MK[:, k]).any()
    ]
    figure.set_label("Helpfulness of sources for probes: " + ", ".join(best))
    return figure


def top_documents(
    documents: Sequence[RankedDocument], width: int = WIDTH, *, sources: Sequence[str] = ()
) -> Figure:
    """Documents from the most helpful to the most harmful, with how they begin.

    Args:
        documents: in any order.
        width: in CSS pixels.
        sources: in whose order sources have their colours, as in other figures; those that are
            not named follow as they come.
    """
    ordered = sorted(documents, key=lambda d: -d.helpfulness)
    styles = source_styles(list(dict.fromkeys([*sources, *(d.source for d in documents)])))
    left = 14 + 7.2 * max(len(parts.short(d.source)) for d in ordered)
    figure, (ax,) = parts.figure(width, 42 * len(ordered) + 48, 1, 1, left=left, top=8)
    for y, document in enumerate(ordered):
        ax.barh(y + 0.14, document.helpfulness, height=0.34, zorder=2,
                color=PAINT[styles[document.source].colour])  # fmt: skip
        words = " ".join(document.text.split())
        words = words if len(words) <= WORDS else words[: WORDS - 1] + "…"
        ax.annotate(parts.plain(words), (0, y - 0.24), xycoords=("axes fraction", "data"),
                    va="center_baseline", fontsize=parts.SMALL, color=PAINT["ink"])  # fmt: skip
    parts.row_labels(ax, [d.source for d in ordered], [False] * len(ordered))
    ax.grid(False, axis="y")
    ax.axvline(0, color=PAINT["muted"], linewidth=1.2)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("helpfulness (minus influence); right of 0 helps", fontsize=parts.SMALL,
                  color=PAINT["muted"])  # fmt: skip
    figure.set_label(
        f"{len(ordered)} documents; the most helpful is of {ordered[0].source}, the most harmful "
        f"of {ordered[-1].source}"
    )
    return figure


def teacher_agreement(
    agreement: Mapping[str, Curve], divergence: Mapping[str, Curve], width: int = WIDTH
) -> Figure:
    """How near students come to their teacher, over the tokens trained on.

    Args:
        agreement: run -> (tokens, share of targets with the same most probable token).
        divergence: run -> (tokens, nats a token).
        width: in CSS pixels.
    """
    groups = {
        "same most probable token, % of targets": _series(agreement),
        "divergence, nats a token": _series(divergence),
    }
    figure = panels(groups, width, 2, row_height=230)
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    last = ", ".join(f"{name} {y[-1]:.1%}" for name, (_, y) in agreement.items())
    figure.set_label(f"Agreement with the teacher; at the end {last}")
    return figure


def _series(curves: Mapping[str, Curve]) -> list[Series]:
    styles = source_styles(list(curves))
    return [Series(name, styles[name], [curve]) for name, curve in curves.items()]
