"""A matplotlib figure as inline SVG that takes the page's fonts and its light or dark colours."""

from __future__ import annotations

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure

from dh_jax.viz.style import THEMES

VARIABLES = {value: name for name, value in THEMES["light"].items()}


def to_svg(figure: Figure, *, key: str, title: str, description: str, kind: str = "") -> str:
    """Render a figure for the inside of an HTML page.

    Every named colour becomes a CSS variable, text stays text in the page's font, and ids are
    made unique, so that many drawings can live in one page.

    Args:
        figure: made by `dh_jax.viz`.
        key: unique in the page; prefixes every id (what an id may not hold becomes ``-``).
        title: the drawing's name, for those who cannot see it; also its tooltip.
        description: what it shows, in a sentence.
        kind: CSS class of the ``<svg>``.

    Returns:
        One ``<svg>`` element. The same figure and key give the same text.
    """
    key = re.sub(r"[^\w-]+", "-", key)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    width, height = (figure.get_size_inches() * 72).round().astype(int)
    body = text[text.index("</defs>") + len("</defs>") : text.rindex("</svg>")]
    open_tag = (
        f'<svg class="{html.escape(kind)}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{html.escape(title)}</title>'
        f'<desc id="{key}-desc">{html.escape(description)}</desc>'
    )
    return f"{open_tag}{_tidy(body, key)}</svg>"


def _tidy(body: str, key: str) -> str:
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r'(?<![-\w])id="', f'id="{key}-', body)
    body = body.replace("url(#", f"url(#{key}-").replace('xlink:href="#', f'href="#{key}-')
    body = re.sub(r'font-family: [^;"]*;?', "", body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", body)
    body = re.sub(r'="[^"]*"', lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m.group()), body)
    body = re.sub(r"#[0-9a-f]{6}", lambda m: _variable(m.group()), body)
    return re.sub(r"\s*\n\s*", " ", body).strip()


def _variable(colour: str) -> str:
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour
