"""Figures of data: packed rows, lengths of documents, weights of a mixture.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dh_jax.batch import Batch
from dh_jax.viz import parts
from dh_jax.viz.figures import Doublings, histograms
from dh_jax.viz.style import PAINT, SOURCE_COLOURS, source_styles

WIDTH = 760  # CSS pixels: what a notebook's column holds


def packed_rows(
    batch: Batch, width: int = WIDTH, *, most: int = 8, names: Sequence[str] = ()
) -> Figure:
    """Rows as they reach the model, in the colours of their sources, places from 0 to T.

    Documents have two tones by turns. Tokens that are learnt are drawn full, those that are only
    read (masked, or the last of a document, behind which nothing is to be predicted) pale, empty
    places hatched.

    Args:
        batch: NumPy or JAX arrays.
        width: in CSS pixels.
        most: rows drawn; the first of the batch.
        names: of the sources, as ``source_ids_B`` counts them; without them rows are numbered.
    """
    segments_BT, learnt_BT = np.asarray(batch.segment_ids_BT), np.asarray(batch.loss_mask_BT)
    rows, length = min(most, len(segments_BT)), segments_BT.shape[1]
    sources_B = np.asarray(batch.source_ids_B)
    colours = [PAINT[f"source-{source % SOURCE_COLOURS}"] for source in sources_B.tolist()]
    labels = [f"{b} {names[int(sources_B[b])]}" if len(names) else f"row {b}" for b in range(rows)]
    left = 14 + 7.2 * max(len(parts.short(label)) for label in labels)
    figure, (ax,) = parts.figure(width, 27 * rows + 76, 1, 1, left=left, top=32)
    for y in range(rows):
        # A stretch is constant in document and mask.
        kind_T = 2 * segments_BT[y].astype(np.int64) + learnt_BT[y]
        edges = [0, *(np.flatnonzero(np.diff(kind_T)) + 1).tolist(), length]
        for begin, end in itertools.pairwise(edges):
            document = int(segments_BT[y, begin])
            place = {"y": y, "width": end - begin, "left": begin, "height": 0.68, "linewidth": 0}
            if not document:
                ax.barh(**place, color="none", hatch="////", edgecolor=PAINT["muted"])
                continue
            full = 1.0 if learnt_BT[y, begin] else 0.4
            ax.barh(**place, color=colours[y], alpha=full)
            if document % 2 == 0:
                ax.barh(**place, color=PAINT["ink"], alpha=0.4 * full)
        cuts = np.flatnonzero(np.diff(segments_BT[y])) + 1
        ax.vlines(cuts, y - 0.34, y + 0.34, color=PAINT["paper"], linewidth=1.4)
    parts.row_labels(ax, labels, [False] * rows)
    ax.grid(False)
    ax.set_xlim(0, length)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlabel("place in the row, tokens", fontsize=parts.SMALL, color=PAINT["muted"])
    figure.legend(
        handles=[
            Patch(color=PAINT["source-0"], linewidth=0), Patch(color=PAINT["source-0"], alpha=0.4),
            Patch(facecolor="none", edgecolor=PAINT["muted"], hatch="////", linewidth=0),
        ],
        labels=["learnt", "only read", "empty"], loc="upper left", bbox_to_anchor=(0, 1), ncols=3,
        frameon=False, fontsize=parts.TEXT, labelcolor=PAINT["ink"], borderaxespad=0, borderpad=0,
        handlelength=1.2,
    )  # fmt: skip
    filled, learnt = float((segments_BT > 0).mean()), float(learnt_BT.mean())
    figure.set_label(
        f"{rows} of {len(segments_BT)} packed rows of {length} tokens: {filled:.1%} of all places "
        f"hold a token, {learnt:.1%} are learnt"
    )
    return figure


def length_histograms(
    lengths: Mapping[str, Sequence[int]], row_length: int, width: int = WIDTH, *, columns: int = 3
) -> Figure:
    """How long each source's documents are, over doublings of tokens.

    Bars are shares of documents, the line is shares of tokens, the dashed line a row's length.

    Args:
        lengths: source -> tokens of each of its documents, at least 1.
        row_length: T.
        width: in CSS pixels.
        columns: panels side by side.
    """
    styles, groups = source_styles(list(lengths)), {}
    for name, tokens in lengths.items():
        tokens_N = np.asarray(tokens)
        doubling_N = np.log2(np.maximum(tokens_N, 1)).astype(int)
        groups[name] = Doublings(
            styles[name],
            (np.bincount(doubling_N) / max(len(tokens_N), 1)).tolist(),
            (np.bincount(doubling_N, weights=tokens_N) / max(tokens_N.sum(), 1)).tolist(),
        )
    figure = histograms(
        groups, width, min(columns, len(groups)), mark=row_length, unit="tokens a document"
    )
    medians = ", ".join(f"{name} {np.median(tokens):,.0f}" for name, tokens in lengths.items())
    figure.set_label(f"Lengths of documents in tokens; medians: {medians}")
    return figure


def weight_bars(
    weights: Mapping[str, float],
    width: int = WIDTH,
    *,
    before: Mapping[str, float] | None = None,
) -> Figure:
    """The weights of a mixture in per cent; a tick says what they were ``before``."""
    styles, names = source_styles(list(weights)), list(weights)
    left = 14 + 7.2 * max(len(parts.short(name)) for name in names)
    figure, (ax,) = parts.figure(width, 28 * len(names) + 48, 1, 1, left=left, top=8, right=56)
    for y, name in enumerate(names):
        share = 100 * weights[name]
        ax.barh(y, share, height=0.6, color=PAINT[styles[name].colour])
        most = max(share, 100 * before[name]) if before else share
        ax.annotate(f"{share:.1f} %", (most, y), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize=parts.SMALL, color=PAINT["ink"])  # fmt: skip
        if before:
            ax.vlines(100 * before[name], y - 0.42, y + 0.42, color=PAINT["ink"], linewidth=2)
    parts.row_labels(ax, names, [False] * len(names))
    ax.set_xlim(left=0)
    unit = "weight in the mixture, %" + ("; tick: before" if before else "")
    ax.set_xlabel(unit, fontsize=parts.SMALL, color=PAINT["muted"])
    figure.set_label("Weights: " + ", ".join(f"{n} {w:.1%}" for n, w in weights.items()))
    return figure
