"""Previews, documents and replayed batches in a terminal.

Every document of a row has a background colour of its own; tokens that are not learnt have none
and are underlined. Control characters in documents are shown, not obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dh_jax.inspection.rows import DecodedRow, Segment, Span, excerpt, visible

if TYPE_CHECKING:  # reading checkpoints brings in JAX, which printing a preview can do without
    from dh_jax.inspection.lookup import Found
    from dh_jax.inspection.preview import Preview
    from dh_jax.inspection.replay import Replay

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "white")
BARS = "·▁▂▃▄▅▆▇█"
SHOWN_CHARACTERS = 400  # of a document in a preview
LEGEND = Text.assemble(
    "one colour a document; ", ("tokens not learnt", "underline"), " have no background"
)


# --- preview ---------------------------------------------------------------------------------


def print_preview(preview: Preview, console: Console) -> None:
    """Tables of counts, shares and lengths, then a few rows."""
    if preview.prepared:
        console.print(_prepared(preview))
    console.print(_mixture(preview))
    console.print(_lengths(preview))
    console.print(_left_out(preview))
    console.print(
        f"packing efficiency {preview.packing_efficiency:.2%}   "
        f"documents a row {preview.documents_a_row:.1f}   "
        f"targets learnt {preview.learnt:.2%} of tokens",
        highlight=False,
    )
    if preview.rows:
        shown = len({row.source for row in preview.rows})
        every = "every source" if shown == len(preview.sources) else f"{shown} sources (--rows)"
        console.print(f"the first rows of {every}, numbered as they came:", highlight=False)
    _print_rows(preview.rows, console, SHOWN_CHARACTERS)


def _prepared(preview: Preview) -> Table:
    splits = list(next(iter(preview.prepared.values())))
    table = _table("documents and tokens in the store", *splits)
    for name, counts in preview.prepared.items():
        table.add_row(
            escape(name), *(f"{n['documents']:,}   {n['tokens']:,}" for n in counts.values())
        )
    return table


def _mixture(preview: Preview) -> Table:
    title = f"{preview.split} split: {preview.batches} batches drawn"
    table = _table(title, "weight", "share of tokens", "rows", "tokens", "targets learnt")
    for name, source in preview.sources.items():
        table.add_row(
            escape(name), f"{source.weight:.3f}", f"{source.share:.3f}", f"{source.rows:,}",
            f"{source.tokens:,}", f"{source.learnt:.2%}",
        )  # fmt: skip
    return table


def _lengths(preview: Preview) -> Table:
    title = "lengths in tokens" + (" of each source's first documents" if preview.streamed else "")
    table = _table(title, "documents", "histogram", "median", "mean", "longest", "over a row")
    first, last = preview.bins
    table.caption = (
        f"a bar a doubling, from {2**first:,} to {2 ** (last + 1) - 1:,}; "
        f"a row is {preview.row_length:,} tokens"
    )
    for name, source in preview.sources.items():
        lengths = source.lengths
        table.add_row(
            escape(name), f"{source.documents:,}", _bars(lengths.documents_K, first, last),
            f"{lengths.median:,.0f}", f"{lengths.mean:,.0f}", f"{lengths.longest:,}",
            f"{lengths.over_row:.1%}",
        )  # fmt: skip
    return table


def _left_out(preview: Preview) -> Table:
    what = "kept, as only a store drops them" if preview.streamed else "dropped"
    table = _table("duplicates, and records left out", f"duplicates ({what})", "left out")
    for name, source in preview.sources.items():
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in source.left_out.items())
        table.add_row(escape(name), f"{source.duplicates:,}", reasons or "none")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("source", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column == "histogram")
    return table


def _bars(counts_K: npt.NDArray[np.int64], first: int, last: int) -> str:
    counts = np.zeros(last + 1)
    counts[: counts_K.size] = counts_K
    heights = np.ceil(counts / (counts.max() or 1) * (len(BARS) - 1)).astype(int)
    return "".join(BARS[h] for h in heights[first:].tolist())


# --- documents and batches -------------------------------------------------------------------


def print_found(found: Found, console: Console, most: int | None = None) -> None:
    """Where a document is, and the first ``most`` characters of its text (None: all)."""
    table = _facts(
        {
            "document": found.document,
            "source": found.source,
            "split": found.split,
            "tokens": f"{len(found.token_ids):,}, of which {found.targets:,} are learnt",
            "shard": found.shard,
            "offset in shard": None if found.offset is None else f"token {found.offset:,}",
            "record": found.where or found.unknown,
        }
    )
    console.print(table)
    console.print(_text(found.spans, COLOURS[0], most, "; --whole prints them"), soft_wrap=True)


def print_replay(replay: Replay, console: Console) -> None:
    """A run's batch: how it was made again, the weights in force, and its rows in full."""
    began = f"the checkpoint of step {replay.since}" if replay.since else "the start of the run"
    agreed = (
        f"batches that agree with their checksums in the log: {replay.compared:,}"
        if replay.compared
        else "the log has no checksum to compare with"
    )
    table = _facts(
        {
            "run": replay.run,
            "step": f"{replay.step:,} of {replay.steps:,}",
            "replayed from": f"{began}; {agreed}",
            "weights in force": "  ".join(f"{name} {w:.4f}" for name, w in replay.weights.items()),
        }
    )
    console.print(table)
    _print_rows(replay.rows, console)


def _facts(facts: Mapping[str, object]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, Text(visible(str(value))))
    return table


def _print_rows(rows: list[DecodedRow], console: Console, most: int | None = None) -> None:
    if rows:
        console.print(LEGEND)
    for row in rows:
        tokens = sum(len(segment.token_ids) for segment in row.segments)
        title = (
            f"row {row.number}  {row.source}: {len(row.segments)} "
            f"document{'s' * (len(row.segments) != 1)}, {tokens:,} tokens, "
            f"{row.padding:,} padding"
        )
        console.rule(Text(title))
        for s, segment in enumerate(row.segments):
            console.print(_label(segment))
            text = _text(segment.spans, COLOURS[s % len(COLOURS)], most)
            console.print(text, soft_wrap=True)


def _label(segment: Segment) -> Text:
    return Text(
        f"{segment.document}  from token {segment.offset:,}  "
        f"({len(segment.token_ids):,} tokens, {segment.targets:,} targets)",
        style="bold",
    )


def _text(spans: list[Span], colour: str, most: int | None = None, cure: str = "") -> Text:
    shown, left_out = (spans, 0) if most is None else excerpt(spans, most)
    text = Text()
    for span in shown:
        style = f"black on {colour}" if span.learnt else f"underline {colour}"
        text.append(visible(span.text), style=style)
    if left_out:
        text.append(f" [{left_out:,} more characters{cure}]", style="dim")
    return text
