"""Figures hold the data they were given, and their SVG fits into any page."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax import viz
from dh_jax.viz.parts import spread_apart

X = [10.0, 20.0, 30.0, 40.0]
STYLE = viz.Style("source-0")


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_line_colour_stands_out_from_the_paper(theme: str) -> None:
    colours = viz.THEMES[theme]
    drawn = [n for n in colours if n.startswith(("source", "policy")) or n in ("static", "uniform")]
    assert min(contrast(colours[n], colours["paper"]) for n in drawn) >= 3  # WCAG: graphics
    assert min(contrast(colours[n], colours["paper"]) for n in ("ink", "muted", "link")) >= 4.5


def test_both_themes_name_the_same_colours_and_no_colour_twice() -> None:
    light, dark = viz.THEMES["light"], viz.THEMES["dark"]
    assert light.keys() == dark.keys()
    assert len(set(light.values())) == len(light)  # to_svg finds a name by its colour


def test_styles_differ_and_do_not_depend_on_what_else_is_drawn() -> None:
    names = [f"source {i}" for i in range(20)]
    assert len({(s.colour, s.dash) for s in viz.source_styles(names).values()}) == 20
    assert viz.source_styles(names[:3])["source 2"] == viz.source_styles(names)["source 2"]
    alone, among = viz.policy_styles(["static"]), viz.policy_styles(["influence", "odm", "static"])
    assert alone["static"] == among["static"]
    assert len(set(among.values())) == 3


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), min_size=1, max_size=5))
def test_mean_curve_is_the_mean_where_all_have_the_same_points(rows: list[list[float]]) -> None:
    x, y = viz.mean_curve([(X, row) for row in rows])
    assert list(x) == X
    np.testing.assert_allclose(y, np.mean(rows, axis=0), rtol=1e-12, atol=1e-9)


def test_mean_curve_keeps_to_where_every_curve_is_defined() -> None:
    x, y = viz.mean_curve([([0, 10, 20, 30], [0, 1, 2, 3]), ([5, 15, 25], [10, 10, 10])])
    assert list(x) == [5, 10, 20, 25]  # to the very ends, which few runs share
    assert list(y) == [5.25, 5.5, 6.0, 6.25]
    x, y = viz.mean_curve([([0, 10], [0, 1]), ([10, 20], [3, 4])])
    assert (list(x), list(y)) == ([10], [2.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.3))
def test_labels_spread_apart_never_overlap_and_keep_their_order(
    wanted: list[float], gap: float
) -> None:
    wanted = sorted(wanted)
    places = spread_apart(wanted, gap)
    assert len(places) == len(wanted)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    if all(b - a > gap for a, b in pairwise(wanted)):
        np.testing.assert_allclose(places, wanted)
    assert np.mean(places) == pytest.approx(np.mean(wanted))


def test_only_a_falling_start_is_cut_off() -> None:
    x = list(range(101))
    falling = [9.0 * 0.9**i for i in x]
    rising = [float(i) for i in x]
    assert viz.settled([viz.Series("a", STYLE, [(x, falling)])]) == pytest.approx(falling[15])
    assert viz.settled([viz.Series("a", STYLE, [(x, rising)])]) is None
    assert viz.settled([viz.Series("a", STYLE, [(x, [float("nan")] * 101)])]) is None
    few = [0.0, 20.0, 40.0], [1.862, 1.789, 1.775]  # the start is most of what there is to see
    assert viz.settled([viz.Series("a", STYLE, [few])]) is None


def test_lines_draws_every_seed_and_their_mean() -> None:
    curves = [(X, [1.0, 2.0, 3.0, 4.0]), (X, [3.0, 2.0, 1.0, 0.0])]
    ax = viz.lines([viz.Series("a", STYLE, curves)], 600, 300, heading="loss").axes[0]
    drawn = [line.get_ydata() for line in ax.get_lines()]
    for _, y in curves:
        assert any(np.array_equal(y, d) for d in drawn)
    assert any(np.array_equal([2.0, 2.0, 2.0, 2.0], d) for d in drawn)
    assert "a" in [text.get_text() for text in ax.texts]


def test_stacks_end_where_their_parts_add_up_to() -> None:
    parts = {"train": ("static", [3.0, 5.0]), "eval": ("uniform", [1.0, 0.5])}
    ax = viz.stacks(["one", "two"], parts, 600, unit="s").axes[0]
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(0.0, 3.0), (0.0, 5.0), (3.0, 1.0), (5.0, 0.5)]


def test_dots_and_strips_and_effects_mark_the_values_given() -> None:
    ax = viz.dots(["a", "b"], {"p": (STYLE, [5.0, 7.0])}, 600).axes[0]
    assert any(list(line.get_xdata()) == [5.0, 7.0] for line in ax.get_lines())
    ax = viz.strips({"a": (STYLE, [1.0, 2.0, 6.0])}, 600, unit="").axes[0]
    assert [list(line.get_xdata()) for line in ax.get_lines()[1:]] == [[1.0, 2.0, 6.0], [3.0]]
    row = viz.Effect("maths", [-1.0, -3.0], -2.0, (-4.0, 0.5), True)
    ax = viz.effects({"a minus b": [row]}, 600, 1).axes[0]
    drawn = [list(line.get_xdata()) for line in ax.get_lines()]
    assert [-4.0, 0.5] in drawn and [-1.0, -3.0] in drawn and [-2.0] in drawn


def svg(key: str = "k", title: str = "T", text: str = "D") -> str:
    series = [viz.Series("a <b> $x$", STYLE, [(X, [0.00123, 0.00456, 0.00789, 0.00999])])]
    figure = viz.lines(series, 600, 300, heading="rate & $2$ more")
    return viz.to_svg(figure, key=key, title=title, description=text, kind="wide")


def test_svg_is_well_formed_titled_and_in_the_pages_colours() -> None:
    text = svg(title='<i>"x"</i>', text="a & b")
    root = ElementTree.fromstring(text)
    assert root.find("title").text == '<i>"x"</i>'  # type: ignore[union-attr]
    assert root.find("desc").text == "a & b"  # type: ignore[union-attr]
    assert not re.findall(r"#[0-9a-f]{6}", text), "a colour that no theme can change"
    assert "var(--source-0)" in text and "font-family" not in text
    assert "http" not in text
    words = [node.text for node in root.iter("text")]
    assert {"0.002", "0.004", "a <b> $x$", "rate & $2$ more"} <= set(words), (
        "numbers are not cut short"
    )


def test_svg_ids_are_unique_between_drawings_and_every_reference_is_kept() -> None:
    ids = [re.findall(r'(?<![-\w])id="([^"]*)"', svg(key)) for key in ("one", "two")]
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1])
    text = svg("one")
    assert {*re.findall(r"url\(#([^)]*)\)", text), *re.findall(r'href="#([^"]*)"', text)} <= {
        *ids[0]
    }


def test_the_same_figure_gives_the_same_svg_and_leaves_no_trace_in_matplotlib() -> None:
    before = dict(matplotlib.rcParams)
    assert svg() == svg()
    assert dict(matplotlib.rcParams) == before


def test_drawing_imports_no_pyplot_and_no_jax() -> None:
    code = "import sys, dh_jax.viz; print({'matplotlib.pyplot', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_histograms_show_both_shares_on_the_same_doublings() -> None:
    short = viz.Doublings(STYLE, [0, 0, 0.5, 0.25, 0.25], [0, 0, 0.2, 0.3, 0.5])
    long = viz.Doublings(STYLE, [0] * 11 + [1.0], [0] * 11 + [1.0])
    figure = viz.histograms({"a": short, "b": long}, 800, 2, mark=96, unit="tokens")
    for ax, group in zip(figure.axes, (short, long), strict=True):
        bars, line = ax.patches[:-1], ax.patches[-1]
        assert [bar.get_x() for bar in bars] == list(range(2, 12))
        heights = [*group.bars, *[0] * 12][2:12]
        assert [bar.get_height() for bar in bars] == heights
        values, edges, _ = line.get_data()  # type: ignore[attr-defined]
        assert list(values) == [*group.steps, *[0] * 12][2:12] and list(edges) == list(range(2, 13))
        assert ax.get_lines()[0].get_xdata()[0] == np.log2(96)  # type: ignore[index]
        assert ax.get_xlim() == (2, 12)
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert labels == ["4", "16", "64", "256", "1k", "4k"]
