"""The report of one influence run: one self-contained HTML page, in the style of run reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf

from dh_jax import viz
from dh_jax.attribution.findings import EVERY, LEVELS, Findings, Shown
from dh_jax.attribution.units import unit_of
from dh_jax.influence.estimator import ENOUGH
from dh_jax.inspection.rows import visible
from dh_jax.report import finding
from dh_jax.report.page import page_template, stylesheet, write_page
from dh_jax.report.plots import NARROW, WIDE, Drawing

HERE = Path(__file__).resolve().parent
FEW = 100  # pieces of text, below which averages are to be mistrusted
MILLION = 1_000_000


def write_report(path: Path, findings: Findings, facts: Mapping[str, Any]) -> None:
    """Write the page; the file appears whole or not at all.

    Args:
        path: the HTML file.
        findings: what to show.
        facts: the content of ``influence.json``.
    """
    write_page(path, render(findings, facts))


def render(findings: Findings, facts: Mapping[str, Any]) -> str:
    """The page as text."""
    template = page_template(
        HERE,
        amount=finding.amount,
        percent=finding.percent,
        duration=duration,
        figure=finding.figures(
            d.helpfulness for s in findings.sections for d in (*s.helpful, *s.harmful)
        ),
        first_words=first_words,
        visible=visible,
    )
    return template.render(
        findings=findings,
        facts=facts,
        config=facts["config"],
        headline=headline(findings),
        unit=unit_of(facts["config"]["estimator"]),
        notes=notes(findings, facts),
        drawings=[drawing(findings, k) for k in range(len(findings.queries))],
        styles=viz.source_styles(findings.sources),
        million=MILLION * (findings.pace or 0.0),
        levels=LEVELS,
        every=EVERY,
        style=Markup(stylesheet() + (HERE / "page.css").read_text(encoding="utf-8")),
        config_text=OmegaConf.to_yaml(OmegaConf.create(dict(facts["config"]))),
    )


def duration(seconds: float) -> str:
    """As in other reports; in days where hours would be hundreds."""
    days = seconds / 86_400
    return f"{days:,.0f} days" if days >= 3 else finding.seconds(seconds)


def first_words(shown: Shown) -> str:
    words = " ".join("".join(piece.text for piece in shown.pieces)[:400].split())
    return words[:90] + ("…" if len(words) > 90 else "")


def headline(findings: Findings) -> str:
    """Which source helps each query most, on average."""
    best: dict[str, list[str]] = {}
    named = [(k, name) for k, name in enumerate(findings.queries) if name != EVERY]
    for k, query in named[:6]:
        means = findings.statistics.mean_KM[k]
        there = [m for m in range(len(findings.sources)) if not math.isnan(means[m])]
        top = max(there, key=lambda m: means[m])
        best.setdefault(findings.sources[top], []).append(query)
    said = [f"{source} helps {finding.join(queries)} most" for source, queries in best.items()]
    return f"Of {findings.pieces:,} pieces of text, on average {finding.join(said)}"


def notes(findings: Findings, facts: Mapping[str, Any]) -> list[str]:
    """What a reader must know before relying on the page."""
    said = []
    if findings.pieces < FEW:
        said.append(
            f"{findings.pieces:,} pieces are few: what holds of them on average may not hold of "
            "the next ones."
        )
    if facts["coverage"] < ENOUGH:
        said.append(
            f"Only {finding.percent(facts['coverage'])} of the parameters are measured; what "
            "the others would say is not known."
        )
        if facts["config"]["model"]["tied"] and facts["config"]["estimator"]["taps"]:
            said[-1] += (
                " The embedding is among those left out: it is the head as well, and gradients "
                "by taps see but one of its uses."
            )
    estimator = facts["config"]["estimator"]["name"]
    if estimator.startswith("gradient_"):
        said.append(
            "Gradients are compared without the curvature of the loss: what is common to all "
            "documents counts as much as what is particular to a few."
        )
    if "not trained" in facts["model"]:
        said.append("The model was drawn at random and never trained.")
    errors = facts.get("low_rank_error") or []
    if errors:
        said.append(
            f"Queries are kept at rank {facts['config']['queries']['low_rank']}: "
            f"{finding.percent(max(errors))} of a query's norm is left out at most."
        )
    reasons: dict[str, list[str]] = {}
    for source, counts in facts["skipped"].items():
        for reason, count in counts.items():
            if count:
                reasons.setdefault(reason, []).append(f"{source} {count:,}")
    for reason, each in reasons.items():
        said.append(f"Left out, {reason.replace('_', ' ')}: {', '.join(each)}.")
    return said


def drawing(findings: Findings, k: int) -> Drawing:
    """Every source's documents and their mean, for one query."""
    styles = viz.source_styles(findings.sources)
    groups = {name: (styles[name], values) for name, values in findings.samples[k].items()}
    query = findings.queries[k]
    title = f"Helpfulness for {query}"
    caption = "Every tick is a piece of text, the diamond is the source's mean. Right of 0 helps."
    wide, narrow = (
        viz.to_svg(
            viz.strips(groups, width, unit="helpfulness (minus the score)"),
            key=f"sources-{k}-{kind}",
            title=title,
            description=caption,
            kind=kind,
        )
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    )
    return Drawing(title, caption, wide, narrow)
