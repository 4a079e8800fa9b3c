"""Fitting: sizes of pieces -> the row each one stands in. Compiled with numba.

Every kernel takes ``sizes_P`` [P] int64, each from 1 to ``row_length``, and returns ``rows_P``
[P] int64, in which rows are numbered from 0 in the order they were opened.
"""

from __future__ import annotations

import math

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def best_fit(sizes_P, row_length, max_segments):  # type: ignore[no-untyped-def]
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
def pair_fit(sizes_P, row_length, max_segments, tolerance):  # type: ignore[no-untyped-def]
    """Row of each piece, one row at a time: the first piece left opens it, then come the largest
    that fit, until one piece, or two together, fill it to within ``tolerance``.

    After the minimum bin slack heuristic of Gupta and Ho (1999), whose search we cut to pairs.
    It beats `best_fit` where only two to four documents share a row: that one fills such a row
    with whatever comes next and leaves gaps too small for anything.
    """
    count = np.zeros(row_length + 1, np.int64)  # pieces left of each size
    head = np.full(row_length + 1, -1, np.int64)  # of a list of them, first piece first
    after = np.empty(sizes_P.size, np.int64)
    for p in range(sizes_P.size - 1, -1, -1):
        after[p] = head[sizes_P[p]]
        head[sizes_P[p]] = p
        count[sizes_P[p]] += 1
    down = np.maximum(np.arange(row_length + 1) - 1, 0)  # where to look below a size used up
    smallest = 1
    rows_P = np.full(sizes_P.size, -1, np.int64)
    row = -1
    for opener in range(sizes_P.size):
        if rows_P[opener] >= 0:
            continue
        row += 1
        rows_P[opener] = row
        count[sizes_P[opener]] -= 1
        space = row_length - sizes_P[opener]
        held = 1
        while held < max_segments:
            one, two = _largest(down, count, space), 0
            if one == 0:
                break
            while count[smallest] == 0:
                smallest += 1
            if space - one > tolerance and held + 2 <= max_segments:
                gap, large, small = _best_pair(down, count, space, tolerance, held == 1)
                last_two = space < 3 * smallest and gap < space - one
                if gap <= tolerance or last_two:
                    one, two = large, small
            for size in (one, two):
                if size > 0:
                    piece = head[size]
                    while rows_P[piece] >= 0:  # openers are still in their lists
                        piece = after[piece]
                    head[size] = after[piece]
                    rows_P[piece] = row
                    count[size] -= 1
                    space -= size
                    held += 1
            if two > 0:
                break
    return rows_P


@numba.njit(cache=True, nogil=True)
def _best_pair(down, count, space, tolerance, even):  # type: ignore[no-untyped-def]
    """Two sizes that fill ``space`` to within ``tolerance``, or else best, and the gap they leave
    (``space`` where there is no pair).

    Of those within it the most unequal two; ``even`` takes the most equal two, which keeps small
    pieces for later and is worth a quarter of a percent where three documents share a row.
    """
    best, best_large, best_small = space, 0, 0
    large = _largest(down, count, space - 1)
    while 2 * large >= space - max(best, tolerance) and large > 0:
        small = _largest(down, count, min(space - large, large))
        if small == large and count[large] < 2:
            small = _largest(down, count, large - 1)
        if small > 0 and space - large - small < max(best, tolerance + 1):
            best, best_large, best_small = space - large - small, large, small
            if best <= tolerance and not even:
                break
        large = _largest(down, count, large - 1)
    return best, best_large, best_small


@numba.njit(cache=True, nogil=True)
def _largest(down, count, limit):  # type: ignore[no-untyped-def]
    """The largest size <= ``limit`` of which a piece is left, else 0; shortens the way there."""
    size = limit
    while size > 0 and count[size] == 0:
        size = down[size]
    at = limit
    while at > size:
        below = down[at]
        down[at] = size
        at = below
    return size


@numba.njit(cache=True, nogil=True)
def first_fit(sizes_P, row_length, max_segments):  # type: ignore[no-untyped-def]
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
def concat(lengths_D, row_length, max_segments):  # type: ignore[no-untyped-def]
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
