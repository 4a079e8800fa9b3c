"""Figures of batches, mixtures and influence hold what they were given, in words as well."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from dh_jax import viz
from dh_jax.batch import Batch
from dh_jax.viz.style import PAINT

LENGTHS = [[5, 3], [4], [2, 2, 4]]  # tokens of each document of a row of 8


def batch() -> Batch:
    segments = np.zeros((3, 8), np.int32)
    mask = np.zeros((3, 8), bool)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths, 1):
            segments[row, at : at + length] = number
            mask[row, at : at + length - 1] = True
            at += length
    mask[0, 1:3] = False
    zeros = np.zeros_like(segments)
    return Batch(zeros, zeros, mask, segments, zeros, np.array([1, 0, 1], np.int32))


def drawn(figure: Figure) -> list[tuple[float, float, float, float]]:
    """Begin, width, row and opacity of every bar, but for those that darken another."""
    ink = to_rgba(PAINT["ink"])[:3]
    bars = [b for b in figure.axes[0].patches if b.get_facecolor()[:3] != ink]
    return [(b.get_x(), b.get_width(), round(b.get_y() + 0.34), b.get_alpha() or 1) for b in bars]


def test_packed_rows_cover_each_row_once_and_tell_learnt_from_read() -> None:
    given = batch()
    figure = viz.packed_rows(given, names=["code", "maths"])
    learnt, covered = np.zeros((3, 8), bool), np.zeros((3, 8), int)
    for begin, width, row, alpha in drawn(figure):
        place = slice(int(begin), int(begin + width))
        covered[row, place] += 1
        learnt[row, place] = alpha == 1 and given.segment_ids_BT[row, place].all()
    assert (covered == 1).all()
    np.testing.assert_array_equal(learnt, given.loss_mask_BT)
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["0 maths", "1 code", "2 maths"]
    assert "3 of 3 packed rows of 8 tokens: 83.3% of all places" in figure.get_label()


def test_packed_rows_have_their_sources_colours_and_documents_two_tones() -> None:
    given = batch()
    figure = viz.packed_rows(given)
    ink = to_rgba(PAINT["ink"])[:3]
    darker = np.zeros((3, 8), bool)
    for bar in figure.axes[0].patches:
        row = round(bar.get_y() + 0.34)
        place = slice(int(bar.get_x()), int(bar.get_x() + bar.get_width()))
        source = PAINT[f"source-{given.source_ids_B[row]}"]
        if bar.get_facecolor()[:3] == ink:
            darker[row, place] = True
        elif given.segment_ids_BT[row, place].all():
            assert bar.get_facecolor()[:3] == to_rgba(source)[:3]
    np.testing.assert_array_equal(
        darker, (given.segment_ids_BT > 0) & (given.segment_ids_BT % 2 == 0)
    )


def test_packed_rows_draw_no_more_rows_than_asked_for() -> None:
    figure = viz.packed_rows(batch(), most=2)
    assert {row for _, _, row, _ in drawn(figure)} == {0, 1}


def test_length_histograms_count_documents_and_tokens_by_doublings() -> None:
    figure = viz.length_histograms({"a": [1, 2, 3, 100]}, 64)
    bars = figure.axes[0].patches[:-1]
    assert [bar.get_height() for bar in bars] == [0.25, 0.5, 0, 0, 0, 0, 0.25]
    values, _, _ = figure.axes[0].patches[-1].get_data()  # type: ignore[attr-defined]
    np.testing.assert_allclose(values, np.array([1, 5, 0, 0, 0, 0, 100]) / 106)
    assert "medians: a 2" in figure.get_label()


def test_weight_bars_are_in_per_cent_with_a_tick_where_they_were() -> None:
    figure = viz.weight_bars({"a": 0.75, "b": 0.25}, before={"a": 0.5, "b": 0.5})
    ax = figure.axes[0]
    assert [bar.get_width() for bar in ax.patches] == [75, 25]
    ticks = [segment[0, 0] for c in ax.collections for segment in c.get_segments()]  # type: ignore[attr-defined]
    assert ticks == [50, 50]
    assert [t.get_text() for t in ax.texts] == ["75.0 %", "25.0 %"]


def test_influence_matrix_shows_sign_by_colour_and_size_by_opacity() -> None:
    values = np.array([[1.0, -2.0], [np.nan, 0.5]])
    figure = viz.influence_matrix(values, ["a", "b"], ["p", "q"])
    cells = figure.axes[0].patches
    alphas = np.array([cell.get_alpha() for cell in cells]).reshape(2, 2)
    np.testing.assert_allclose(alphas / alphas.max(), [[0.5, 1], [0, 0.25]])
    assert [t.get_text() for t in figure.axes[0].texts] == ["+1.0", "−2.0", "–", "+0.5"]
    assert cells[0].get_facecolor()[:3] != cells[1].get_facecolor()[:3]
    assert figure.get_label().endswith("a helps p most, b helps q most")
    with pytest.raises(ValueError, match=r"shape \(2, 2\); 1 sources and 2 probes"):
        viz.influence_matrix(values, ["a"], ["p", "q"])


def test_top_documents_run_from_helpful_to_harmful() -> None:
    documents = [
        viz.RankedDocument("a", "costs $5 and $6", -1.0),
        viz.RankedDocument("b", "many\n words " * 20, 3.0),
    ]
    ax = viz.top_documents(documents).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [3.0, -1.0]
    first, second = (text.get_text() for text in ax.texts)
    assert first.startswith("many words many") and first.endswith("…") and len(first) == 64
    assert second == r"costs \$5 and \$6"
    colours = [to_rgba(PAINT[f"source-{i}"]) for i in range(3)]
    assert [bar.get_facecolor() for bar in ax.patches] == [colours[1], colours[0]]
    named = viz.top_documents(documents, sources=["c", "b", "a"]).axes[0]
    assert [bar.get_facecolor() for bar in named.patches] == [colours[1], colours[2]]


def test_curves_over_tokens_are_drawn_as_given_with_their_ends_in_words() -> None:
    x = [10.0, 20.0, 30.0]
    figure = viz.weights_over_time({"a": (x, [0.5, 0.4, 0.25]), "b": (x, [0.5, 0.6, 0.75])})
    ys = [list(line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert [0.5, 0.4, 0.25] in ys and [0.5, 0.6, 0.75] in ys
    assert "a 25.0%, b 75.0%" in figure.get_label()
    losses = {run: {"a": (x, [3.0, 2.0, low])} for run, low in (("one", 1.0), ("two", 1.5))}
    figure = viz.loss_by_source(losses)
    ys = [list(line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert [3.0, 2.0, 1.0] in ys and [3.0, 2.0, 1.5] in ys
    assert "one: a 1.000; two: a 1.500" in figure.get_label()
    agreed = {"live": (x, [0.0, 0.2, 0.3])}
    figure = viz.teacher_agreement(agreed, {"live": (x, [3.0, 2.0, 1.0])})
    assert list(figure.axes[0].get_lines()[0].get_ydata()) == [0.0, 0.2, 0.3]
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [3.0, 2.0, 1.0]
