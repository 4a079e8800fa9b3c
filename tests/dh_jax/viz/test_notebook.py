"""What a notebook shows: well-formed HTML with escaped text, for our types and no others."""

from __future__ import annotations

import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.figure import Figure

from dh_jax import viz
from dh_jax.mixing.policy import Policy, static
from dh_jax.viz import notebook
from tests.dh_jax.viz.test_data_figures import batch

EVIL = "<script>alert(1)</script>"


class Piece(NamedTuple):
    text: str
    level: int


class FakeLoader:
    """As much of a loader as is shown."""

    names, weights = ("a", EVIL), {"a": 0.75, EVIL: 0.25}
    batch_size, row_length = 4, 128

    def stats(self) -> dict[str, Any]:
        one = {"share": 0.5, "tokens": 1000, "epoch": 1}
        return {"batches": 2, "tokens": 2000, "sources": {"a": one, EVIL: one}}


def parsed(text: str | None) -> ElementTree.Element:
    """The output as a tree; fails where a tag is not closed or a text not escaped."""
    assert text is not None and EVIL not in text
    return ElementTree.fromstring(f"<root>{text}</root>")


def test_a_figure_is_inline_svg_in_the_pages_colours_with_words_for_it() -> None:
    figure = viz.weight_bars({"a": 0.75, EVIL[:9]: 0.25})
    text = notebook.figure_html(figure)
    root = parsed(text)
    (svg,) = root.iter("svg")
    assert "75.0%" in (svg.find("title").text or "")  # type: ignore[union-attr]
    assert not re.findall(r"#[0-9a-f]{6}", str(text).partition("<div")[2])
    assert text == notebook.figure_html(figure)  # the same in every execution
    other = str(notebook.figure_html(viz.weight_bars({"a": 0.5, "b": 0.5})))
    ids = re.compile(r'(?<![-\w])id="([^"]*)"')
    assert not {*ids.findall(str(text))} & {*ids.findall(other)}


def test_figures_of_others_are_left_to_matplotlib() -> None:
    assert notebook.figure_html(Figure()) is None


def test_batches_loaders_moves_scores_and_documents_are_told_in_words() -> None:
    words = "".join(parsed(notebook.batch_html(batch())).itertext())
    assert "3 rows of 8 tokens, 6 documents or pieces; 83.3% of the places filled" in words
    words = " ".join(parsed(notebook.loader_html(FakeLoader())).itertext())
    assert "75.0%" in words and "2 batches, 2,000 tokens delivered" in words
    move = types.SimpleNamespace(
        step=7, weights_M=np.array([0.5, 0.5]), previous_M=np.array([0.25, 0.75])
    )
    words = " ".join(parsed(notebook.move_html(move)).itertext())
    assert "after step 7" in words and "+25.0%" in words and "-25.0%" in words
    scores = types.SimpleNamespace(
        values_KN=np.array([[1.0, -2.0]]), batch_N=[0, 3], row_N=[0, 1], segment_N=[1, 2]
    )
    words = " ".join(parsed(notebook.scores_html(scores)).itertext())
    assert "-2 (batch 3, row 1, segment 2)" in words and "2 documents" in words
    shown = types.SimpleNamespace(source="a", helpfulness=1.5, pieces=[Piece(EVIL, 4)])
    section = types.SimpleNamespace(
        query="q", helpful=[shown], harmful=[], sources=["other", shown.source]
    )
    root = parsed(notebook.section_html(section))
    assert [e.text for e in root.iter("span") if e.get("class") == "up"] == [EVIL]
    assert "costs nothing" in notebook.policy_html(static())


def test_every_registered_type_is_where_its_entry_says() -> None:
    import importlib

    for home, name, _ in notebook.FORMATTERS:
        assert isinstance(getattr(importlib.import_module(home), name), type)
    assert Policy.__module__ == "dh_jax.mixing.policy"


def test_importing_viz_in_ipython_registers_and_elsewhere_imports_no_ipython() -> None:
    code = "import sys, dh_jax.viz; print('IPython' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    seen: list[tuple[str, str]] = []
    html = types.SimpleNamespace(for_type_by_name=lambda home, name, _: seen.append((home, name)))
    shell = types.SimpleNamespace(
        display_formatter=types.SimpleNamespace(formatters={"text/html": html})
    )
    viz.load_ipython_extension(shell)
    assert seen == [entry[:2] for entry in notebook.FORMATTERS]


@pytest.mark.slow
def test_a_real_ipython_shows_a_batch_as_html() -> None:
    pytest.importorskip("IPython", reason="pip install '.[notebook]'")
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "import dh_jax.viz\n"
        "from tests.dh_jax.viz.test_data_figures import batch\n"
        "data, _ = shell.display_formatter.format(batch())\n"
        "print(sorted(data), '<svg' in data['text/html'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("['text/html', 'text/plain'] True")
