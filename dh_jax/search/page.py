"""The report of a search: the weights, and how far to believe them, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from omegaconf import OmegaConf

from dh_jax import viz
from dh_jax.config import public_run
from dh_jax.report import finding as words
from dh_jax.report.page import page_template, stylesheet, write_page
from dh_jax.report.plots import NARROW, WIDE, Drawing
from dh_jax.search.config import SearchRunConfig
from dh_jax.search.find import Finding, warning_of
from dh_jax.viz import parts
from dh_jax.viz.style import PAINT

HERE = Path(__file__).resolve().parent
METHODS = {"regmix": "RegMix", "doremi": "DoReMi"}


class Figured(NamedTuple):
    """One number at the top of the page."""

    name: str
    value: str
    meaning: str


def write_search_report(config: SearchRunConfig, finding: Finding, out: Path) -> None:
    """Write the page; the file appears whole or not at all.

    Args:
        config: of the search.
        finding: what it found.
        out: the HTML file.
    """
    write_page(out, render(config, finding))


def render(config: SearchRunConfig, finding: Finding) -> str:
    """The page as text."""
    template = page_template(HERE, number=words.number, signed=words.signed, percent=words.percent)
    training = config.training
    aim = words.join(list(finding.targets))
    return template.render(
        name=config.data.name or "data",
        method=METHODS[finding.method],
        finding=finding,
        headline=headline(finding),
        figures=figures(finding),
        sentences=sentences(finding),
        runs=runs(config),
        tokens=training.steps * training.batch_size * config.data.max_length,
        styles=viz.source_styles(list(finding.weights)),
        weights=draw_weights(finding),
        weights_caption="Shares of the mixture, as configured and as found.",
        belief=draw_fit(finding) if finding.fit else draw_moves(finding),
        measured_caption=f"Held-out loss on {aim}, nats a token, of two runs as long as the "
        "proxies. One seed each: no measure of spread.",
        written=str(Path(config.out) / "data.yaml"),
        config_text=OmegaConf.to_yaml(OmegaConf.create(public_run(config))),
        style=Markup(stylesheet()),
    )


def runs(config: SearchRunConfig) -> int:
    """How many small runs a search makes."""
    search = config.search
    tried = search.proxies if search.method == "regmix" else 2 * search.rounds
    return tried + (2 if search.confirm else 0)


def plan_of(config: SearchRunConfig) -> str:
    """What the small runs of a search are, in a line."""
    search = config.search
    tried = f"{search.proxies} proxies"
    if search.method == "doremi":
        tried = "a reference and a proxy" + (f", {search.rounds} times" * (search.rounds > 1))
    proof = ", then one with the configured weights and one with those found" * search.confirm
    return f"{runs(config)} small runs: {tried}{proof}"


def headline(finding: Finding) -> str:
    """The finding in a sentence."""
    most = max(finding.weights, key=lambda name: finding.weights[name])
    share = f"the most, {words.percent(finding.weights[most])} of the mixture"
    if finding.weights[most] > 1 - 1e-6:
        share = "all of the mixture"
    lead = f"{METHODS[finding.method]} gives {most} {share}"
    if finding.measured is None:
        return lead
    gain = finding.measured["found"] - finding.measured["configured"]
    said = "lower" if gain < 0 else "higher"
    return (
        f"{lead}; with its weights a small run’s loss is {words.number(abs(gain))} nats a token "
        f"{said} than with the configured ones"
    )


def figures(finding: Finding) -> list[Figured]:
    """The numbers at the top."""
    found = []
    if (fit := finding.fit) is not None:
        found += [
            Figured("mixtures tried", f"{len(fit.measured_N)}", "each by one small run"),
            Figured(
                "leave-one-out error", words.number(fit.error),
                f"nats a token; knowing nothing it would be {words.number(fit.spread)}",
            ),
            Figured(
                "rank correlation", f"{fit.rank_correlation:.2f}",
                "of predictions left out with what was measured",
            ),
        ]  # fmt: skip
    if finding.predicted is not None and finding.measured is not None:
        off = finding.measured["found"] - finding.predicted["found"]
        said = "nats a token, measured less predicted, at the weights found"
        found.append(Figured("missed by", words.signed(off), said))
    if finding.excess is not None:
        excess = finding.excess
        most = max(excess, key=lambda name: excess[name])
        said = f"nats a token at the end, on {most}"
        found.append(Figured("largest excess loss", words.signed(excess[most]), said))
        found.append(Figured("moves", f"{len(finding.tried):,}", "whose mean is the answer"))
    return found


def sentences(finding: Finding) -> list[str]:
    """What a reader must know before believing the weights."""
    if (fit := finding.fit) is None:
        return [
            "The proxy has more of what it learns worse than the reference did; the answer is the "
            "mean of its weights over all moves. DoReMi knows no target: it aims at the source "
            "that lags most."
        ]
    said = []
    if fit.error > 0.8 * fit.spread:
        said.append(
            "The fit hardly predicts a mixture that it has not seen better than their mean does: "
            "do not trust these weights. Train more proxies (search.proxies) or longer ones."
        )
    if finding.measured is not None and finding.predicted is not None:
        best = min(fit.measured_N)
        off = finding.measured["found"] - finding.predicted["found"]
        said.append(
            f"At the weights found the fit predicts {words.number(finding.predicted['found'])} "
            f"nats a token and a run measured {words.number(finding.measured['found'])} "
            f"({words.signed(off)}); the best mixture tried gave {words.number(best)}."
        )
    if (warning := warning_of(finding)) is not None:
        said.append(f"{warning[0].upper()}{warning[1:]}.")
    return said


# --- drawings ------------------------------------------------------------------------------------


def _drawing(key: str, title: str, caption: str, draw: Callable[[int], Figure]) -> Drawing:
    wide, narrow = (
        viz.to_svg(draw(width), key=f"{key}-{kind}", title=title, description=caption, kind=kind)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    )
    return Drawing(title, caption, wide, narrow)


def draw_weights(finding: Finding) -> Drawing:
    """A row a source: the configured weight, and an arrow to the one found."""
    names = list(finding.weights)
    styles = viz.source_styles(names)

    def draw(width: int) -> Figure:
        label_width = 14 + 7.2 * max(len(parts.short(name)) for name in names)
        figure, (ax,) = parts.figure(
            width, 30 * len(names) + 50, 1, 1, left=label_width, top=12, bottom=38
        )
        for y, name in enumerate(names):
            paint = PAINT[styles[name].colour]
            ends = finding.configured[name], finding.weights[name]
            ax.plot(ends, [y, y], color=paint, linewidth=2.2)
            ax.plot(ends[0], y, "o", color=PAINT["paper"], mec=paint, mew=1.6, markersize=7)
            ax.plot(ends[1], y, "o", color=paint, markersize=9)
        parts.row_labels(ax, names, [False] * len(names))
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return figure

    caption = "Hollow: the configured weight. Filled: the one found. Shares of tokens."
    return _drawing("weights", "What the search moves", caption, draw)


def draw_fit(finding: Finding) -> Drawing:
    """Each proxy's measured loss over what the others predict for it."""
    fit = finding.fit
    assert fit is not None

    def draw(width: int) -> Figure:
        figure, (ax,) = parts.figure(width, 330, 1, 1, left=56, right=20)
        parts.heading(ax, "measured, nats a token", outset=56)
        ends = np.array([*fit.measured_N, *fit.left_out_N])
        low, high = ends.min(), ends.max()
        room = 0.05 * (high - low or 1.0)
        line = [low - room, high + room]
        ax.plot(line, line, color=PAINT["muted"], linewidth=1.2, zorder=1)
        ax.plot(fit.left_out_N, fit.measured_N, "o", color=PAINT["policy-0"], mfc="none", ms=7)
        if finding.measured is not None and finding.predicted is not None:
            for name, mark in (("found", "D"), ("configured", "s")):
                at = finding.predicted[name], finding.measured[name]
                ax.plot(*at, mark, color=PAINT["policy-1"], markersize=8, clip_on=False)
                ax.annotate(name, at, xytext=(9, -4), textcoords="offset points",
                            fontsize=parts.TEXT, color=PAINT["ink"])  # fmt: skip
        ax.set_xlabel("predicted", fontsize=parts.SMALL, color=PAINT["muted"])
        return figure

    caption = (
        "Circles: the mixtures tried, each predicted by a fit on all others. On the line a "
        "prediction is exact."
    )
    return _drawing("fit", "Predicted and measured", caption, draw)


def draw_moves(finding: Finding) -> Drawing:
    """The proxy's weights after every move."""
    styles = viz.source_styles(list(finding.weights))
    moves = list(range(1, len(finding.tried) + 1))
    series = [
        viz.Series(name, styles[name], [(moves, [move[name] for move in finding.tried])])
        for name in finding.weights
    ]

    def draw(width: int) -> Figure:
        figure = viz.lines(series, width, 330, heading="weight", scale="share")
        figure.axes[0].set_xlabel("moves", fontsize=parts.SMALL, color=PAINT["muted"])
        return figure

    return _drawing("moves", "The weights over the proxy’s steps", "One line a source.", draw)
