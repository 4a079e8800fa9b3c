"""Planning: lengths of documents -> which piece of which document stands in which row.

A plan is a pure function of lengths, strategy and seed; it never sees a token.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from dh_jax.config import PackingConfig
from dh_jax.data.fitting import best_fit, concat, first_fit, pair_fit
from dh_jax.data.permutation import permuted
from dh_jax.errors import ConfigError

Ints = npt.NDArray[np.int64]
WELL_FILLED = 0.997  # a row below this may be left to the next window
ENOUGH = 0.999  # of all rows that stay: no more is left then
FEW = 16  # pieces a row, on average, up to which `pair_fit` is tried
TOLERANCE = 1 / 256  # of a row: the gap at which `pair_fit` stops searching


class Plan(NamedTuple):
    """P pieces of documents in R rows; row r holds pieces ``splits_R1[r]:splits_R1[r + 1]``."""

    documents_P: Ints  # index into the window
    offsets_P: Ints  # first token of the piece within its document
    lengths_P: Ints
    splits_R1: Ints
    left_L2: Ints  # (document, offset) of pieces in no row: the next window shall place them
    truncated: int  # tokens given up because long documents are truncated


def plan_rows(
    lengths_D: npt.ArrayLike,
    row_length: int,
    packing: PackingConfig,
    *,
    seed: int | None = None,
    carried: int = 0,
    leave: int = 0,
) -> Plan:
    """Cut documents into pieces and place the pieces in rows.

    Args:
        lengths_D: [D] tokens of each document; documents of no tokens take no place.
        row_length: T, tokens of a row.
        packing: strategy, treatment of long documents and the bound on segments.
            ``best_fit`` is best-fit decreasing: pieces by falling length, each into the fullest
            row it fits (Johnson 1973), or `pair_fit` where few share a row, which fills rows
            better there; ``first_fit`` keeps the documents' order and takes the earliest row
            with room; ``concat`` lays them end to end and cuts at row ends.
        seed: shuffles the finished rows; None leaves them in planned order.
        carried: the first so many documents are pieces that the window before left over. Their
            rows are not left again, so that nothing waits for more than one window.
        leave: pieces that may be left to the next window, in the rows that are filled worst.

    Returns:
        A `Plan` in which every token of every document stands exactly once (but for those
        counted in ``truncated`` or left), and no document that fits a row is cut unless by
        ``concat``.
    """
    lengths = np.ascontiguousarray(lengths_D, dtype=np.int64)
    truncated = 0
    if packing.long_documents == "truncate" and packing.strategy != "concat":
        kept = np.minimum(lengths, row_length)
        truncated = int((lengths - kept).sum())
        lengths = kept
    most = packing.max_segments
    if packing.strategy == "concat":
        documents, offsets, sizes, rows = concat(lengths, row_length, most)
    else:
        documents, offsets, sizes = _pieces(lengths, row_length)
        if packing.strategy == "best_fit":
            # Falling size; equal sizes keep their order, so the plan is reproducible.
            order = _sorting(row_length - sizes, row_length)
            if carried:
                first = documents[order] < carried
                order = np.concatenate([order[first], order[~first]])
            documents, offsets, sizes = documents[order], offsets[order], sizes[order]
            rows = best_fit(sizes, row_length, most)
        elif packing.strategy == "first_fit":
            rows = first_fit(sizes, row_length, most)
        else:
            raise ConfigError(f"packing.strategy {packing.strategy!r} is unknown")
    stays, fill = _leave(rows, sizes, documents, row_length, most, carried, leave)
    few = sizes.size <= FEW * stays.size  # pieces a row: with more, best fit finds one that fits
    if packing.strategy == "best_fit" and few and fill < WELL_FILLED:
        others = pair_fit(sizes, row_length, most, int(row_length * TOLERANCE))
        other = _leave(others, sizes, documents, row_length, most, carried, leave)
        if other[1] > fill:
            rows, (stays, fill) = others, other
    count = int(np.count_nonzero(stays))
    order = np.arange(count) if seed is None else permuted(0, count, count, seed)
    placed = _by_row(documents, offsets, sizes, rows, stays, order)
    documents, offsets, sizes, splits, left = placed
    return Plan(documents, offsets, sizes, splits, left, truncated)


@numba.njit(cache=True, nogil=True)
def _leave(  # type: ignore[no-untyped-def]
    rows_P, sizes_P, documents_P, row_length, max_segments, carried, most
):
    """Which rows stay, and how full these are.

    Rows that are not `WELL_FILLED` are left, the emptiest first, until they hold ``most``
    pieces; not those that no further piece may enter, nor those with a carried one.
    """
    count = rows_P.max() + 1 if rows_P.size else 0
    filled_R = np.zeros(count, np.int64)
    held_R = np.zeros(count, np.int64)
    for p in range(rows_P.size):
        filled_R[rows_P[p]] += sizes_P[p]
        held_R[rows_P[p]] += 1
        if documents_P[p] < carried:
            held_R[rows_P[p]] = max_segments
    poor = np.flatnonzero((filled_R < WELL_FILLED * row_length) & (held_R < max_segments))
    stays_R = np.ones(count, np.bool_)
    tokens, rows = filled_R.sum(), count
    for row in poor[np.argsort(filled_R[poor], kind="mergesort")]:
        most -= held_R[row]
        if most < 0 or rows == 1 or tokens >= ENOUGH * rows * row_length:
            break
        stays_R[row] = False
        tokens -= filled_R[row]
        rows -= 1
    return stays_R, tokens / max(rows * row_length, 1)


@numba.njit(cache=True, nogil=True)
def _by_row(documents_P, offsets_P, sizes_P, rows_P, stays_R, order_R):  # type: ignore[no-untyped-def]
    """Pieces of the rows that stay, row by row in the given order; where each row begins; and
    (document, offset) of the other pieces."""
    place_R = np.full(stays_R.size, order_R.size)  # behind all others: left
    place_R[stays_R] = order_R
    splits_R1 = np.zeros(order_R.size + 2, np.int64)
    for row in rows_P:
        splits_R1[place_R[row] + 1] += 1
    splits_R1 = np.cumsum(splits_R1)
    ends_R = splits_R1.copy()
    documents = np.empty_like(documents_P)
    offsets = np.empty_like(offsets_P)
    sizes = np.empty_like(sizes_P)
    for p in range(rows_P.size):
        place = place_R[rows_P[p]]
        at = ends_R[place]
        ends_R[place] += 1
        documents[at], offsets[at], sizes[at] = documents_P[p], offsets_P[p], sizes_P[p]
    splits_R1 = splits_R1[:-1]
    n = splits_R1[-1]
    left_L2 = np.stack((documents[n:], offsets[n:]), axis=1)
    return documents[:n], offsets[:n], sizes[:n], splits_R1, left_L2


@numba.njit(cache=True, nogil=True)
def _sorting(keys_P, count):  # type: ignore[no-untyped-def]
    """Indices that sort keys in ``range(count)``, equal ones in their order (counting sort)."""
    ends = np.zeros(count + 1, np.int64)
    for key in keys_P:
        ends[key + 1] += 1
    for k in range(count):
        ends[k + 1] += ends[k]
    order_P = np.empty(keys_P.size, np.int64)
    for p in range(keys_P.size):
        order_P[ends[keys_P[p]]] = p
        ends[keys_P[p]] += 1
    return order_P


@numba.njit(cache=True, nogil=True)
def _pieces(lengths_D, row_length):  # type: ignore[no-untyped-def]
    """Documents cut at multiples of T, in document order."""
    total = 0
    for length in lengths_D:
        total += (length + row_length - 1) // row_length
    documents = np.empty(total, np.int64)
    offsets = np.empty(total, np.int64)
    sizes = np.empty(total, np.int64)
    p = 0
    for d in range(lengths_D.size):
        start = 0
        while start < lengths_D[d]:
            documents[p] = d
            offsets[p] = start
            sizes[p] = min(row_length, lengths_D[d] - start)
            start += row_length
            p += 1
    return documents, offsets, sizes
