"""Batching: rows -> one `Batch` and its `Origins`, tokens gathered straight from the shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

from dh_jax.batch import Batch, Origins
from dh_jax.data.packing import Row


class MixedRow(NamedTuple):
    """A row together with the index of the source it came from."""

    source: int
    row: Row


def assemble(
    rows: Sequence[MixedRow], batch_size: int, row_length: int, max_segments: int
) -> tuple[Batch, Origins]:
    """Materialise rows as arrays of B rows, T tokens and at most S segments.

    Targets are the next token of the *same document*: a document's last token has none, while
    the last token of a piece whose document goes on elsewhere has the token that follows it.

    Args:
        rows: at most B rows with their sources; missing ones become padding of source -1,
            so that the last batch of an evaluation has the shape of all others.
        batch_size: B.
        row_length: T.
        max_segments: S, the static bound on segments of a row.

    Returns:
        A NumPy `Batch` (no teacher) and the `Origins` of its segments.
    """
    shape = (batch_size, row_length)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    mask = np.zeros(shape, np.bool_)
    ids = np.zeros((batch_size, max_segments), np.uint64)
    offsets = np.zeros((batch_size, max_segments), np.int64)
    lengths = np.zeros((batch_size, max_segments), np.int32)
    for b, (_, row) in enumerate(rows):
        window, documents_P = row.window, row.documents_P
        pieces = documents_P.size
        ids[b, :pieces] = window.ids_D[documents_P]
        offsets[b, :pieces] = row.offsets_P
        lengths[b, :pieces] = row.lengths_P
        starts_P = window.starts_D[documents_P] + row.offsets_P
        goes_on_P = row.offsets_P + row.lengths_P < window.lengths_D[documents_P]
        columns_P = np.cumsum(row.lengths_P) - row.lengths_P
        shards_P = window.shards_D[documents_P]
        for shard in np.unique(shards_P) if len(window.shards) > 1 else (0,):
            chosen = np.flatnonzero(shards_P == shard)
            source_tokens, source_mask = window.shards[shard]
            _fill(
                tokens[b], targets[b], mask[b], segments[b], positions[b], source_tokens,
                source_mask if source_mask is not None else _NO_MASK, chosen,
                columns_P, starts_P, row.lengths_P, goes_on_P,
            )  # fmt: skip
    sources = np.full(batch_size, -1, np.int32)
    sources[: len(rows)] = [source for source, _ in rows]
    return (
        Batch(tokens, targets, mask, segments, positions, sources),
        Origins(ids, offsets, lengths),
    )


_NO_MASK = np.zeros(0, np.bool_)


@numba.njit(cache=True, nogil=True)
def _fill(  # type: ignore[no-untyped-def]
    tokens_T, targets_T, mask_T, segments_T, positions_T, source_tokens, source_mask,
    chosen, columns_P, starts_P, lengths_P, goes_on_P,
):  # fmt: skip
    """Write the chosen pieces of one row."""
    for p in chosen:
        column, start, length = columns_P[p], starts_P[p], lengths_P[p]
        for i in range(length):
            tokens_T[column + i] = source_tokens[start + i]
            segments_T[column + i] = p + 1
            positions_T[column + i] = i
        for i in range(length if goes_on_P[p] else length - 1):
            targets_T[column + i] = source_tokens[start + i + 1]
            mask_T[column + i] = source_mask.size == 0 or source_mask[start + i + 1]


def trained_tokens(row: Row) -> int:
    """Targets of a row that are learnt."""
    window, total = row.window, 0
    for document, offset, length in zip(
        row.documents_P.tolist(), row.offsets_P.tolist(), row.lengths_P.tolist(), strict=True
    ):
        goes_on = offset + length < window.lengths_D[document]
        loss_mask = window.shards[window.shards_D[document]].loss_mask
        first = int(window.starts_D[document]) + offset + 1
        last = first + length - (0 if goes_on else 1)
        total += last - first if loss_mask is None else int(loss_mask[first:last].sum())
    return total
