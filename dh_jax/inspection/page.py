"""A preview as one self-contained HTML page, in the style of the reports of runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from markupsafe import Markup
from omegaconf import OmegaConf

from dh_jax import viz
from dh_jax.config import DataConfig
from dh_jax.inspection.preview import Preview
from dh_jax.inspection.rows import Segment, Span, excerpt, visible
from dh_jax.report import finding
from dh_jax.report.page import page_template, stylesheet, write_page
from dh_jax.report.plots import NARROW, WIDE, Drawing

HERE = Path(__file__).resolve().parent
SHOWN_CHARACTERS = 1500  # of a document of a row


def write_preview(preview: Preview, config: DataConfig, out: Path) -> None:
    """Write the page; the file appears whole or not at all.

    Args:
        preview: what to show.
        config: the data config it was made from, shown at the end.
        out: the HTML file; a folder gets ``inspect.html``.
    """
    write_page(out / "inspect.html" if out.is_dir() else out, render(preview, config))


def render(preview: Preview, config: DataConfig) -> str:
    """The page as text."""
    template = page_template(
        HERE, amount=finding.amount, percent=finding.percent, shown=shown, visible=visible
    )
    return template.render(
        preview=preview,
        headline=headline(preview),
        lengths=lengths(preview),
        styles=viz.source_styles(list(preview.sources)),
        style=Markup(stylesheet() + (HERE / "page.css").read_text(encoding="utf-8")),
        config_text=OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))),
    )


def headline(preview: Preview) -> str:
    """The finding in a sentence."""
    return (
        f"Rows of {preview.row_length:,} tokens are {finding.percent(preview.packing_efficiency)} "
        f"full; {finding.percent(preview.learnt)} of their tokens are learnt"
    )


def lengths(preview: Preview) -> Drawing:
    """The histograms of document lengths, one panel a source."""
    styles = viz.source_styles(list(preview.sources))
    groups = {
        name: viz.Doublings(
            styles[name],
            (source.lengths.documents_K / max(source.lengths.documents_K.sum(), 1)).tolist(),
            (source.lengths.tokens_K / max(source.lengths.tokens_K.sum(), 1)).tolist(),
        )
        for name, source in preview.sources.items()
    }
    title = "How long the documents are"
    caption = (
        "Bars: share of a source’s documents in each doubling of length. Line: share of its "
        f"tokens. Dashed: the length of a row, {preview.row_length:,} tokens."
    )
    wide, narrow = (
        viz.to_svg(
            viz.histograms(
                groups, width, columns, mark=preview.row_length, unit="tokens a document"
            ),
            key=f"lengths-{kind}",
            title=title,
            description=caption,
            kind=kind,
        )
        for kind, width, columns in (("wide", WIDE, 3), ("narrow", NARROW, 1))
    )
    return Drawing(title, caption, wide, narrow)


def shown(segment: Segment) -> tuple[list[Span], int]:
    """As much of a document as the page shows, and how many characters are left out."""
    return excerpt(segment.spans, SHOWN_CHARACTERS)
