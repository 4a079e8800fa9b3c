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
TOLERANCE = 1 / 256  # of a row: the gap at which `pair_fit` stops searching


class Plan(NamedTuple):
    """P pieces of documents in R rows; row r holds pieces ``splits_R1[r]:splits_R1[r + 1]``."""

    documents_P: Ints  # index into the window
    offsets_P: Ints  # first token of the piece within its document
    lengths_P: Ints
    splits_R1: Ints
    truncated: int  # tokens given up because long documents are truncated
    left_L2: Ints  # (document, offset) of pieces in no row: the next window shall place them


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
            row it fits (Johnson 1973), or `pair_fit` where that fills rows badly and this does
            better; ``first_fit`` keeps the documents' order and takes the earliest row with
            room; ``concat`` lays them end to end and cuts at row ends.
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
    was_carried = documents < carried
    stays, fill = _leave(rows, sizes, was_carried, row_length, most, leave)
    if packing.strategy == "best_fit" and fill < WELL_FILLED:
        other = pair_fit(sizes, row_length, most, int(row_length * TOLERANCE))
        other_stays, other_fill = _leave(other, sizes, was_carried, row_length, most, leave)
        if other_fill > fill:
            rows, stays = other, other_stays
    left = np.stack([documents[~stays], offsets[~stays]], axis=1)
    rows, count = _renumbered(rows, stays)
    if seed is not None:
        rows = permuted(0, count, count, seed)[rows]
    documents, offsets, sizes, splits = _by_row(
        documents[stays], offsets[stays], sizes[stays], rows, count
    )
    return Plan(documents, offsets, sizes, splits, truncated, left)


@numba.njit(cache=True, nogil=True)
def _leave(rows_P, sizes_P, carried_P, row_length, max_segments, most):  # type: ignore[no-untyped-def]
    """Which pieces stay, and how full the rows that stay are.

    Rows that are not `WELL_FILLED` are left, the emptiest first, until they hold ``most``
    pieces; not those that no further piece may enter, nor those with a carried one.
    """
    count = 0
    for row in rows_P:
        count = max(count, row + 1)
    filled_R = np.zeros(count, np.int64)
    held_R = np.zeros(count, np.int64)
    stays_R = np.ones(count, np.bool_)
    fixed_R = np.zeros(count, np.bool_)
    for p in range(rows_P.size):
        filled_R[rows_P[p]] += sizes_P[p]
        held_R[rows_P[p]] += 1
        fixed_R[rows_P[p]] |= carried_P[p]
    tokens, rows = filled_R.sum(), count
    while rows > 1:
        worst = -1
        for r in range(count):
            open_ = stays_R[r] and not fixed_R[r] and held_R[r] < max_segments
            if open_ and (worst < 0 or filled_R[r] < filled_R[worst]):
                worst = r
        if worst < 0 or filled_R[worst] >= WELL_FILLED * row_length or held_R[worst] > most:
            break
        stays_R[worst] = False
        most -= held_R[worst]
        tokens -= filled_R[worst]
        rows -= 1
    return stays_R[rows_P], tokens / max(rows * row_length, 1)


@numba.njit(cache=True, nogil=True)
def _renumbered(rows_P, stays_P):  # type: ignore[no-untyped-def]
    """Rows of the pieces that stay, numbered from 0 without gaps, and their number."""
    count = 0
    for row in rows_P:
        count = max(count, row + 1)
    number_R = np.zeros(count + 1, np.int64)
    for p in range(rows_P.size):
        if stays_P[p]:
            number_R[rows_P[p] + 1] = 1
    for r in range(count):
        number_R[r + 1] += number_R[r]
    return number_R[rows_P[stays_P]], number_R[count]


@numba.njit(cache=True, nogil=True)
def _by_row(documents_P, offsets_P, sizes_P, rows_P, count):  # type: ignore[no-untyped-def]
    """Pieces in the order of their rows, and where each row begins."""
    order_P = _sorting(rows_P, count)
    splits_R1 = np.zeros(count + 1, np.int64)
    for row in rows_P:
        splits_R1[row + 1] += 1
    for r in range(count):
        splits_R1[r + 1] += splits_R1[r]
    return documents_P[order_P], offsets_P[order_P], sizes_P[order_P], splits_R1


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
