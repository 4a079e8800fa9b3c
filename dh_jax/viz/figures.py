"""Figures of a training run from plain data, as matplotlib `Figure` objects.

No pyplot and no global state: every function makes its own `Figure`. Sizes are CSS pixels
(72 a matplotlib inch), so that a 12.5 point label is 12.5 px in the page. Axes over tokens are
drawn alike everywhere; colours come from `dh_jax.viz.style`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, PercentFormatter

from dh_jax.viz import parts
from dh_jax.viz.parts import Series
from dh_jax.viz.style import PAINT, Style

LARGE = 1e4  # from here on an axis of either sign takes k and M
Scale = Literal["free", "signed", "amount", "share"]


class Effect(NamedTuple):
    """One row of a forest plot: values by seed, their mean, and an interval or None."""

    label: str
    values: Sequence[float]
    mean: float
    interval: tuple[float, float] | None
    strong: bool


class Doublings(NamedTuple):
    """A histogram over doublings: entry k counts what lies from 2^k to 2^(k+1) - 1."""

    style: Style
    bars: Sequence[float]  # shares, drawn as bars
    steps: Sequence[float]  # other shares over the same bins, drawn as a stepped line


def lines(
    series: Sequence[Series],
    width: int,
    height: int,
    *,
    heading: str,
    scale: Scale = "free",
    top: float | None = None,
) -> Figure:
    """Curves over tokens, each labelled at its end.

    Args:
        series: what to draw; the mean over each one's curves is bold.
        width, height: in CSS pixels.
        heading: what the y axis shows, with its unit, set above it.
        scale: of y: free; signed (a line at 0); amount (from 0, 10 k for 10,000); share (a
            fraction that holds from one point to the next, in per cent from 0).
        top: higher values run out of the axis (see `settled`).
    """
    longest = max((len(parts.short(s.label)) for s in series), default=0)
    figure, (ax,) = parts.figure(width, height, 1, 1, right=22 + 7.2 * longest)
    parts.heading(ax, heading)
    parts.draw(ax, series, steps=scale == "share")
    parts.cut_top(ax, top)
    if scale == "share":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if scale == "amount":
        ax.yaxis.set_major_formatter(EngFormatter(sep="\u202f"))
    if scale in ("share", "amount"):
        ax.set_ylim(bottom=0)
    if scale == "signed":
        if max(map(abs, ax.get_ylim())) >= LARGE:
            ax.yaxis.set_major_formatter(EngFormatter(sep="\u202f"))
        ax.axhline(0, color=PAINT["muted"], linewidth=1, zorder=1)
    parts.token_axis(ax)
    parts.end_labels(ax, series)
    figure.set_label(f"{heading}: {', '.join(s.label for s in series)}")
    return figure


def panels(
    groups: Mapping[str, Sequence[Series]], width: int, columns: int, *, row_height: int = 170
) -> Figure:
    """Small multiples over tokens, one panel a group, with one key above them all.

    Steep starts are cut off (see `settled`).
    """
    rows = -(-len(groups) // columns)
    entries = [(s.label, s.style) for s in next(iter(groups.values()), ())]
    top = 58 if len(entries) > 1 else 32
    height = top - 14 + row_height * rows
    figure, axes = parts.figure(width, height, rows, columns, top=top, right=14, gap=(56, 58))
    for ax, (name, series) in zip(axes, groups.items(), strict=False):
        parts.heading(ax, name)
        parts.draw(ax, series)
        parts.cut_top(ax, parts.settled(series))
        parts.token_axis(ax, few=True)
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    if len(entries) > 1:
        parts.key(figure, entries)
    return figure


def effects(groups: Mapping[str, Sequence[Effect]], width: int, columns: int) -> Figure:
    """Forest plots on one scale: a diamond (mean) on its interval, circles for seeds."""
    most = max(len(rows) for rows in groups.values())
    down = -(-len(groups) // columns)
    height = down * (30 * most + 84)
    longest = max(len(parts.short(e.label)) for rows in groups.values() for e in rows)
    label_width = 14 + 7.2 * longest
    figure, axes = parts.figure(
        width, height, down, columns, left=label_width, right=12, gap=(label_width + 12, 78)
    )
    ends = [v for rows in groups.values() for e in rows for v in (*e.values, *(e.interval or ()))]
    reach = max([abs(v) for v in ends if np.isfinite(v)], default=1.0) * 1.06 or 1.0
    for ax, (name, rows) in zip(axes, groups.items(), strict=False):
        parts.heading(ax, name, outset=label_width)
        ax.axvline(0, color=PAINT["muted"], linewidth=1.2, zorder=1)
        for y, effect in enumerate(rows):
            paint = PAINT["policy-0"] if effect.strong else PAINT["static"]
            if effect.interval is not None:
                ax.plot(effect.interval, [y, y], color=paint, linewidth=2.2, zorder=2)
            ax.plot([effect.mean], [y], marker="D", markersize=7.5, color=paint, zorder=4)
            ax.plot(effect.values, [y + 0.3] * len(effect.values), linestyle="none", marker="o",
                    markersize=5, mfc="none", mec=paint, zorder=3)  # fmt: skip
        parts.row_labels(ax, [e.label for e in rows], [e.strong for e in rows])
        ax.set_xlim(-reach, reach)
        ax.xaxis.set_major_locator(MaxNLocator(5 if width > 500 else 4))
        ax.set_xlabel(
            "nats a token; left of 0 is better", fontsize=parts.SMALL, color=PAINT["muted"]
        )
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    return figure


def dots(
    rows: Sequence[str], series: Mapping[str, tuple[Style, Sequence[float]]], width: int
) -> Figure:
    """A dot plot of amounts: a row a name, a mark a series, from zero."""
    label_width = 14 + 7.2 * max(len(parts.short(name)) for name in rows)
    top = 40 if len(series) > 1 else 8
    figure, (ax,) = parts.figure(width, 30 * len(rows) + top + 34, 1, 1, left=label_width, top=top)
    for y in range(len(rows)):
        values = [amounts[y] for _, amounts in series.values()]
        start = 0.0 if len(series) == 1 else min(values)
        ax.plot([start, max(values)], [y, y], color=PAINT["rule"], linewidth=2, zorder=1)
    for style, amounts in series.values():
        ax.plot(amounts, range(len(rows)), linestyle="none", marker=style.marker, markersize=8,
                color=PAINT[style.colour], zorder=3)  # fmt: skip
    parts.row_labels(ax, rows, [False] * len(rows))
    parts.token_axis(ax)
    ax.set_xlim(left=0, right=1.05 * max(max(a) for _, a in series.values()) or 1.0)
    if len(series) > 1:
        parts.key(figure, [(name, style) for name, (style, _) in series.items()], marks=True)
    return figure


def stacks(
    rows: Sequence[str],
    amounts: Mapping[str, tuple[str, Sequence[float]]],
    width: int,
    *,
    unit: str,
) -> Figure:
    """Stacked horizontal bars: a row a name, a part a colour name and one amount a row."""
    label_width = 14 + 7.2 * max(len(parts.short(name)) for name in rows)
    key_rows = 1 if width > 500 else 2
    figure, (ax,) = parts.figure(
        width, 34 * len(rows) + 22 * key_rows + 54, 1, 1, left=label_width, top=16 + 22 * key_rows
    )
    start = np.zeros(len(rows))
    for colour, part in amounts.values():
        ax.barh(range(len(rows)), part, left=start, height=0.6, color=PAINT[colour],
                edgecolor=PAINT["paper"], linewidth=1)  # fmt: skip
        start += np.asarray(part, dtype=float)
    parts.row_labels(ax, rows, [False] * len(rows))
    ax.set_xlim(0, 1.02 * start.max() or 1.0)
    ax.set_xlabel(unit, fontsize=parts.SMALL, color=PAINT["muted"])
    parts.key(figure, [(n, Style(c)) for n, (c, _) in amounts.items()], bars=True, rows=key_rows)
    return figure


def strips(groups: Mapping[str, tuple[Style, Sequence[float]]], width: int, *, unit: str) -> Figure:
    """Every value of each group as a tick on the group's row, and a diamond at its mean."""
    label_width = 14 + 7.2 * max(len(parts.short(name)) for name in groups)
    figure, (ax,) = parts.figure(width, 30 * len(groups) + 52, 1, 1, left=label_width, top=8)
    ax.axvline(0, color=PAINT["muted"], linewidth=1.2, zorder=1)
    for y, (style, values) in enumerate(groups.values()):
        ax.plot(values, [y] * len(values), linestyle="none", marker="|", markersize=15,
                markeredgewidth=1.4, alpha=0.65, color=PAINT[style.colour], zorder=2)  # fmt: skip
        ax.plot([float(np.mean(values))], [y], marker="D", markersize=7, zorder=3,
                color=PAINT[style.colour], markeredgecolor=PAINT["paper"])  # fmt: skip
    parts.row_labels(ax, list(groups), [False] * len(groups))
    ax.xaxis.set_major_locator(MaxNLocator(5 if width > 500 else 4))
    ax.set_xlabel(unit, fontsize=parts.SMALL, color=PAINT["muted"])
    return figure


def histograms(
    groups: Mapping[str, Doublings], width: int, columns: int, *, mark: float, unit: str
) -> Figure:
    """Small multiples of histograms over doublings, all on the same axes.

    Args:
        groups: name -> its histogram.
        width: in CSS pixels.
        columns: panels side by side.
        mark: where a dashed line stands, in the unit of the bins.
        unit: of the bins.
    """
    rows = -(-len(groups) // columns)
    filled = [k for g in groups.values() for k in np.flatnonzero(g.bars).tolist()]
    first, last = min(filled, default=0), max(filled, default=0)
    figure, axes = parts.figure(width, 180 * rows, rows, columns, right=14, gap=(56, 84))
    for ax, (name, group) in zip(axes, groups.items(), strict=False):
        bars, steps = (np.zeros(last + 1) for _ in range(2))
        bars[: len(group.bars)], steps[: len(group.steps)] = group.bars, group.steps
        edges = np.arange(first, last + 2)
        parts.heading(ax, name)
        ax.bar(edges[:-1], bars[first:], width=0.92, align="edge", color=PAINT[group.style.colour],
               zorder=2)  # fmt: skip
        ax.stairs(steps[first:], edges, color=PAINT["ink"], linewidth=1.4, zorder=3, baseline=None)
        ax.axvline(np.log2(mark), color=PAINT["muted"], linewidth=1.2, linestyle=(0, (5, 2)))
        ax.set_xlim(first, last + 1)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ticks = edges[:: max(1, -(-len(edges) // 6))].tolist()
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.set_xticklabels([_power(k) for k in ticks])
        ax.set_xlabel(unit, fontsize=parts.SMALL, color=PAINT["muted"])
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    return figure


def _power(k: int) -> str:
    """2^k as it is spoken of: 512, 4k, 128k, 1M."""
    return next(f"{2 ** (k - n)}{s}" for n, s in ((20, "M"), (10, "k"), (0, "")) if k >= n)
