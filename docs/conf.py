"""Sphinx: Markdown (MyST), the executed notebooks, and an API reference from docstrings.

What is made at every build (the configuration reference, the API's pages, copies of the
notebooks and of the README's parts) lies in ``docs/generated/``, which git ignores.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generate  # noqa: E402

project = "data-handler"
author = "The data-handler authors"
copyright = f"2026, {author}"
release = metadata.version("data-handler")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["build", "jupyter_execute", "generated/commands.md", "generated/readme_*.md"]
html_theme = "furo"
html_title = f"data-handler {release}"
html_static_path = ["static"]
html_css_files = ["page.css"]
html_copy_source = False
language = "en"

# Each colour keeps 4.5 : 1 against its background in both themes.
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5a94", "color-brand-content": "#0b5a94",
                            "color-foreground-muted": "#5c636e"},
    "dark_css_variables": {"color-brand-primary": "#7cc0f5", "color-brand-content": "#7cc0f5"},
}  # fmt: skip

nb_execution_mode = "off"  # `make notebooks` executes; the pages show what was kept
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# `Mix` and `InfluenceAwareOptimizer` are names of both halves; a link to the first will do.
suppress_warnings = ["ref.python"]
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": False}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype, napoleon_use_ivar = False, True
default_role = "code"  # `name` in docstrings

generate.everything(HERE / "generated")


def mend(app: Any, error: Exception | None) -> None:
    """What axe-core finds serious in any page of Sphinx: blocks that scroll must be reachable by
    the keyboard, and the captions of the table of contents are headings without a level."""
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        text = page.read_text(encoding="utf-8")
        mended = text.replace("<pre>", '<pre tabindex="0">')
        mended = mended.replace('role="heading">', 'role="heading" aria-level="2">')
        table = '<div class="table-wrapper'
        mended = mended.replace(table, table.replace("<div ", '<div tabindex="0" '))
        if mended != text:
            page.write_text(mended, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("build-finished", mend)
