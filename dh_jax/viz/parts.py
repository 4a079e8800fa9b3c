"""Parts that the figures share: margins in pixels, headings, keys, and labels at curves' ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator

from dh_jax.viz.style import PAINT, Style

Curve = tuple[Sequence[float], Sequence[float]]  # x and y of one run

TEXT = 12.5
SMALL = 11.5
LEFT = 48.0  # pixels left of an axis, for its numbers
START = 0.15  # of a curve's length: what may be cut off where it falls steeply
MOST_POINTS = 240  # points kept of a curve; more cannot be seen at these widths
LABEL_LENGTH = 20
LABEL_GAP = 15.0
MADE_HERE = "dh_jax.viz"  # the gid of our figures, by which a notebook knows them


class Series(NamedTuple):
    """Curves of one source or policy, one a seed. The mean is drawn bold over thin curves."""

    label: str
    style: Style
    curves: Sequence[Curve]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over curves where all are defined: on the x of the first within (others interpolated)
    and on both ends, which no two runs' counts of tokens share."""
    if len(curves) == 1:
        return curves[0]
    start = max(min(x) for x, _ in curves)
    end = min(max(x) for x, _ in curves)
    inside = [x for x in curves[0][0] if start < x < end]
    grid = np.asarray([start, *inside, end] if start < end else [start], dtype=float)
    values = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
    return grid.tolist(), values.tolist()


def figure(
    width: int, height: int, rows: int, columns: int, *,
    left: float = LEFT, right: float = 16, top: float = 32, bottom: float = 42,
    gap: tuple[float, float] = (56, 56),
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure with margins and gaps in pixels, and its axes in reading order."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    figure.set_gid(MADE_HERE)
    inner = width - left - right - gap[0] * (columns - 1)
    tall = height - top - bottom - gap[1] * (rows - 1)
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={
            "left": left / width, "right": 1 - right / width,
            "top": 1 - top / height, "bottom": bottom / height,
            "wspace": gap[0] * columns / inner, "hspace": gap[1] * rows / tall,
        },
    )  # fmt: skip
    for ax in axes.flat:
        ax.patch.set_visible(False)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.spines["bottom"].set_color(PAINT["rule"])
        ax.tick_params(colors=PAINT["muted"], labelsize=SMALL, length=0, pad=6)
        ax.grid(True, color=PAINT["grid"], linewidth=1)
        ax.set_axisbelow(True)
    return figure, list(axes.flat)


def heading(ax: Axes, text: str, outset: float = LEFT) -> None:
    """What is shown, level and above the axis, where it can be read without tilting the head."""
    ax.annotate(plain(text), (0, 1), xytext=(-outset, 11), xycoords="axes fraction",
                textcoords="offset points", fontsize=TEXT, color=PAINT["ink"])  # fmt: skip


def draw(ax: Axes, series: Sequence[Series], *, steps: bool = False) -> None:
    """The curves and their means; ``steps``: a value holds from the point before to its own."""
    drawn = "steps-pre" if steps else "default"
    for s in series:
        paint = PAINT[s.style.colour]
        if len(s.curves) > 1:
            for x, y in s.curves:
                ax.plot(
                    *_thin(x, y), color=paint, linewidth=0.9, alpha=0.4, zorder=2, drawstyle=drawn
                )
        mean = _thin(*mean_curve(s.curves))
        mark = s.style.marker if len(mean[0]) == 1 else None
        ax.plot(*mean, color=paint, linewidth=2.2, linestyle=s.style.dash, marker=mark, zorder=3,
                drawstyle=drawn)  # fmt: skip
    ax.margins(x=0)
    ax.yaxis.set_major_locator(MaxNLocator(5))


def settled(series: Sequence[Series]) -> float | None:
    """The highest value once a steep start is over; None where no curve starts at its highest, or
    the start takes less than half of the height.

    A language model's loss falls so far in its first steps that, drawn whole, what tells two
    runs apart later cannot be seen.
    """
    tops, cut, start = [], False, -np.inf
    for x, y in (curve for s in series for curve in s.curves):
        xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        begin = xs[0] + START * (xs[-1] - xs[0])
        tops += [np.interp(begin, xs, ys), *ys[xs >= begin]]
        if len(ys) > 2 and np.isfinite(ys[0]) and not (ys > ys[0]).any():
            cut, start = True, max(start, ys[0])
    finite = [t for t in tops if np.isfinite(t)]
    if not cut or not finite:
        return None
    high, low = max(finite), min(finite)
    return float(high) if start - low > 2 * (high - low) else None


def cut_top(ax: Axes, top: float | None) -> None:
    """Let what is above ``top`` run out of the axis."""
    if top is not None:
        lines = [np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines()]
        low = float(np.nanmin(np.concatenate(lines)))
        ax.set_ylim(low - 0.06 * (top - low), top + 0.06 * (top - low))


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[npt.NDArray[np.float64], ...]:
    kept = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int))
    return np.asarray(x, dtype=float)[kept], np.asarray(y, dtype=float)[kept]


def token_axis(ax: Axes, few: bool = False) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(3 if few else 5))
    ax.xaxis.set_major_formatter(EngFormatter(sep="\u202f"))
    if not few:
        ax.set_xlabel("tokens", fontsize=SMALL, color=PAINT["muted"])


def row_labels(ax: Axes, labels: Sequence[str], strong: Sequence[bool]) -> None:
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.yaxis.set_major_locator(FixedLocator(list(range(len(labels)))))
    ax.set_yticklabels([short(label) for label in labels], fontsize=TEXT)
    for tick, bold in zip(ax.get_yticklabels(), strong, strict=True):
        tick.set_color(PAINT["ink"])
        tick.set_fontweight("bold" if bold else "normal")


def end_labels(ax: Axes, series: Sequence[Series]) -> None:
    """Name each curve where it ends; names that would overlap are pushed apart and led to."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    tall = ax.get_window_extent().height
    ends = []
    for s in series:
        x, y = mean_curve(s.curves)
        shown = [(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(b)]
        if shown:
            across = (shown[-1][0] - left) / (right - left) if right > left else 1.0
            ends.append(((shown[-1][1] - low) / (high - low), across, s))
    ends.sort(key=lambda end: end[0])
    places = spread_apart([end[0] for end in ends], LABEL_GAP / tall)
    shift = 1 / ax.get_window_extent().width  # a pixel, in axes units
    for (height, across, s), place in zip(ends, places, strict=True):
        ax.plot([across, 1 + 6 * shift, 1 + 12 * shift], [height, place, place],
                transform=ax.transAxes, clip_on=False, linewidth=1.4,
                color=PAINT[s.style.colour])  # fmt: skip
        ax.text(1 + 16 * shift, place, short(s.label), transform=ax.transAxes, va="center_baseline",
                fontsize=TEXT, color=PAINT["ink"])  # fmt: skip


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved as little as they must so that neighbours are ``gap`` apart.

    Neighbours that collide form a block centred on the mean of where its members wanted to be.

    >>> spread_apart([0.0, 1.0, 5.0], 2.0)
    [-0.5, 1.5, 5.0]
    """
    blocks: list[list[float]] = []  # wanted places of each block
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _top(blocks[-2], gap) + gap > _bottom(blocks[-1], gap):
            last = blocks.pop()
            blocks[-1] += last
    return [_bottom(block, gap) + i * gap for block in blocks for i in range(len(block))]


def _bottom(block: list[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: list[float], gap: float) -> float:
    return sum(block) / len(block) + gap * (len(block) - 1) / 2


def key(
    figure: Figure, entries: Sequence[tuple[str, Style]], *,
    marks: bool = False, bars: bool = False, rows: int = 1,
) -> None:  # fmt: skip
    """One row of samples and names at the top left."""
    handles = [
        Line2D(
            [],
            [],
            color=PAINT[s.colour],
            linewidth=9 if bars else 0 if marks else 2.2,
            linestyle=s.dash,  # type: ignore[arg-type]
            solid_capstyle="butt",
            marker=s.marker if marks else None,
            markersize=8,
        )
        for _, s in entries
    ]
    figure.legend(
        handles, [short(name) for name, _ in entries], loc="upper left", borderaxespad=0,
        bbox_to_anchor=(0, 1), frameon=False, ncols=-(-len(entries) // rows), fontsize=TEXT,
        labelcolor=PAINT["ink"], handlelength=1.2 if bars or marks else 2.2, columnspacing=1.4,
        handletextpad=0.5, borderpad=0,
    )  # fmt: skip


def short(label: str) -> str:
    """A name as it is drawn: cut where it is too long, and never read as mathematics.

    >>> short("a_source_of_many_letters")
    'a_source_of_many_le…'
    """
    return plain(label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…")


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: dollars do not begin a formula."""
    return text.replace("$", r"\$")
