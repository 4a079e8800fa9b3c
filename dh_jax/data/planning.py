"""Planning: lengths of documents -> which piece of which document stands in which row.

A plan is a pure function of lengths, strategy and seed; it never sees a token. Kernels are
compiled with numba.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from dh_jax.config import PackingConfig
from dh_jax.data.permutation import permuted
from dh_jax.errors import ConfigError

Ints = npt.NDArray[np.int64]


class Plan(NamedTuple):
    """P pieces of documents in R rows; row r holds pieces ``splits_R1[r]:splits_R1[r + 1]``."""

    documents_P: Ints  # index into the window
    offsets_P: Ints  # first token of the piece within its document
    lengths_P: Ints
    splits_R1: Ints
    truncated: int  # tokens given up because long documents are truncated


def plan_rows(
    lengths_D: npt.ArrayLike, row_length: int, packing: PackingConfig, *, seed: int | None = None
) -> Plan:
    """Cut documents into pieces and place the pieces in rows.

    Args:
        lengths_D: [D] tokens of each document; documents of no tokens take no place.
        row_length: T, tokens of a row.
        packing: strategy, treatment of long documents and the bound on segments.
            ``best_fit`` is best-fit decreasing: pieces by falling length, each into the fullest
            row it fits (Johnson 1973); ``first_fit`` keeps the documents' order and takes the
            earliest row with room; ``concat`` lays them end to end and cuts at row ends.
        seed: shuffles the finished rows; None leaves them in planned order.

    Returns:
        A `Plan` in which every token of every document stands exactly once (but for those
        counted in ``truncated``), and no document that fits a row is cut unless by ``concat``.
    """
    lengths = np.ascontiguousarray(lengths_D, dtype=np.int64)
    truncated = 0
    if packing.long_documents == "truncate" and packing.strategy != "concat":
        kept = np.minimum(lengths, row_length)
        truncated = int((lengths - kept).sum())
        lengths = kept
    if packing.strategy == "concat":
        documents, offsets, sizes, rows = _concat(lengths, row_length, packing.max_segments)
    else:
        documents, offsets, sizes = _pieces(lengths, row_length)
        if packing.strategy == "best_fit":
            # Falling size; equal sizes keep their order, so the plan is reproducible.
            order = _sorting(row_length - sizes, row_length)
            documents, offsets, sizes = documents[order], offsets[order], sizes[order]
            rows = _best_fit(sizes, row_length, packing.max_segments)
        elif packing.strategy == "first_fit":
            rows = _first_fit(sizes, row_length, packing.max_segments)
        else:
            raise ConfigError(f"packing.strategy {packing.strategy!r} is unknown")
    count = int(rows.max()) + 1 if rows.size else 0
    if seed is not None:
        rows = permuted(0, count, count, seed)[rows]
    documents, offsets, sizes, splits = _by_row(documents, offsets, sizes, rows, count)
    return Plan(documents, offsets, sizes, splits, truncated)


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


@numba.njit(cache=True, nogil=True)
def _best_fit(sizes_P, row_length, max_segments):  # type: ignore[no-untyped-def]
    """Row of each piece. Open rows hang in one list per free space (``head``, ``below``); a
    bitmap of the lists that are not empty answers "smallest space >= size that a row has"."""
    bitmap = np.zeros(row_length // 64 + 1, np.uint64)
    head = np.full(row_length + 1, -1, np.int64)
    below = np.empty(sizes_P.size, np.int64)
    held = np.zeros(sizes_P.size, np.int64)
    rows_P = np.empty(sizes_P.size, np.int64)
    opened = 0
    for p in range(sizes_P.size):
        size = sizes_P[p]
        word = size // 64
        bits = (bitmap[word] >> np.uint64(size % 64)) << np.uint64(size % 64)
        while bits == 0 and word + 1 < bitmap.size:
            word += 1
            bits = bitmap[word]
        if bits:
            lowest = bits & (~bits + np.uint64(1))
            space = 64 * word + math.frexp(np.float64(lowest))[1] - 1  # exact: a power of two
            row = head[space]
            head[space] = below[row]
            if head[space] < 0:
                bitmap[word] ^= lowest
        else:
            space = row_length
            row = opened
            opened += 1
        rows_P[p] = row
        held[row] += 1
        space -= size
        if space > 0 and held[row] < max_segments:
            below[row] = head[space]
            head[space] = row
            bitmap[space // 64] |= np.uint64(1) << np.uint64(space % 64)
    return rows_P


@numba.njit(cache=True, nogil=True)
def _first_fit(sizes_P, row_length, max_segments):  # type: ignore[no-untyped-def]
    """Row of each piece; a tree of largest free spaces finds the earliest row with room."""
    leaves = 1
    while leaves < max(sizes_P.size, 1):
        leaves *= 2
    tree = np.full(2 * leaves, row_length, np.int64)
    held = np.zeros(leaves, np.int64)
    rows_P = np.empty(sizes_P.size, np.int64)
    for p in range(sizes_P.size):
        node = 1
        while node < leaves:
            node = 2 * node if tree[2 * node] >= sizes_P[p] else 2 * node + 1
        row = node - leaves
        rows_P[p] = row
        held[row] += 1
        tree[node] = tree[node] - sizes_P[p] if held[row] < max_segments else 0
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return rows_P


@numba.njit(cache=True, nogil=True)
def _concat(lengths_D, row_length, max_segments):  # type: ignore[no-untyped-def]
    """Pieces end to end; a row ends when it is full or holds ``max_segments`` pieces."""
    most = lengths_D.size
    for length in lengths_D:
        most += length // row_length + 1
    documents = np.empty(most, np.int64)
    offsets = np.empty(most, np.int64)
    sizes = np.empty(most, np.int64)
    rows = np.empty(most, np.int64)
    p = 0
    row = 0
    free = row_length
    held = 0
    for d in range(lengths_D.size):
        start = 0
        while start < lengths_D[d]:
            if free == 0 or held == max_segments:
                row += 1
                free = row_length
                held = 0
            size = min(free, lengths_D[d] - start)
            documents[p] = d
            offsets[p] = start
            sizes[p] = size
            rows[p] = row
            start += size
            free -= size
            held += 1
            p += 1
    return documents[:p], offsets[:p], sizes[:p], rows[:p]
