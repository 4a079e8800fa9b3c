"""Packing: windows of documents -> rows of T tokens, planned from lengths alone.

A *window* is a bounded group of documents (at most ``packing.window``) that are planned
together. The plan is a pure function of the documents' lengths, so a packer's state is the
state of its windows plus the index of the next row, and any position is restored by planning
one window again. Nothing crosses a window; no row is carried over.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any, NamedTuple, cast

import grain
import numba
import numpy as np
import numpy.typing as npt

from dh_jax.config import PackingConfig
from dh_jax.errors import ConfigError

Ints = npt.NDArray[np.int64]


class TokenShard(NamedTuple):
    """Tokens of many documents, end to end; the arrays may be memory maps."""

    tokens: npt.NDArray[Any]  # [n] uint16, uint32 or int32
    loss_mask: npt.NDArray[np.bool_] | None = None  # [n]; None: every token is learnt


class Window(NamedTuple):
    """D documents to be packed together, as references into token shards."""

    shards: tuple[TokenShard, ...]
    shards_D: npt.NDArray[np.int32]  # which shard a document lies in
    starts_D: Ints  # its first token within the shard
    lengths_D: Ints  # its tokens
    ids_D: npt.NDArray[np.uint64]
    seed: int  # orders the rows of this window


class Plan(NamedTuple):
    """P pieces of documents in R rows; row r holds pieces ``splits_R1[r]:splits_R1[r + 1]``."""

    documents_P: Ints  # index into the window
    offsets_P: Ints  # first token of the piece within its document
    lengths_P: Ints
    splits_R1: Ints
    truncated: int  # tokens given up because long documents are truncated


class Row(NamedTuple):
    """One packed row: pieces of one window's documents, not yet materialised."""

    window: Window
    documents_P: Ints
    offsets_P: Ints
    lengths_P: Ints
    truncated: int  # tokens this row's window gave up; counted on its first row only

    @property
    def tokens(self) -> int:
        return int(self.lengths_P.sum())


# --- planning --------------------------------------------------------------------------------


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
            order = np.argsort(-sizes, kind="stable")
            documents, offsets, sizes = documents[order], offsets[order], sizes[order]
            rows = _best_fit(sizes, row_length, packing.max_segments)
        elif packing.strategy == "first_fit":
            rows = _first_fit(sizes, row_length, packing.max_segments)
        else:
            raise ConfigError(f"packing.strategy {packing.strategy!r} is unknown")
    count = int(rows.max()) + 1 if rows.size else 0
    if seed is not None and count > 1:
        rows = np.random.default_rng(seed).permutation(count)[rows]
    order = np.argsort(rows, kind="stable")
    splits = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=count), out=splits[1:])
    return Plan(documents[order], offsets[order], sizes[order], splits, truncated)


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
    tree over free spaces answers "smallest non-empty space >= size" in log2(T) steps."""
    leaves = 1
    while leaves < row_length + 1:
        leaves *= 2
    tree = np.zeros(2 * leaves, np.int64)  # rows open at or below each node
    head = np.full(row_length + 1, -1, np.int64)
    below = np.empty(sizes_P.size, np.int64)
    held = np.zeros(sizes_P.size, np.int64)
    rows_P = np.empty(sizes_P.size, np.int64)
    opened = 0
    for p in range(sizes_P.size):
        size = sizes_P[p]
        node = leaves + size
        found = tree[node] > 0
        while not found and node > 1:
            if node % 2 == 0 and tree[node + 1] > 0:
                node += 1
                while node < leaves:
                    node = 2 * node if tree[2 * node] > 0 else 2 * node + 1
                found = True
            else:
                node //= 2
        if found:
            space = node - leaves
            row = head[space]
            head[space] = below[row]
            while node >= 1:
                tree[node] -= 1
                node //= 2
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
            node = leaves + space
            while node >= 1:
                tree[node] += 1
                node //= 2
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


# --- the Grain data set ----------------------------------------------------------------------


class PackedDataset(grain.IterDataset[Row]):
    """Rows of T tokens from a stream of windows: the packing stage of every pipeline.

    Args:
        windows: yields `Window`; its iterator's state must be JSON-able.
        row_length: T, tokens of a row.
        packing: see `PackingConfig`.
        shuffle: whether the rows of a window come in an order drawn from the window's seed.
    """

    def __init__(
        self,
        windows: grain.IterDataset[Window],
        row_length: int,
        packing: PackingConfig,
        *,
        shuffle: bool = True,
    ):
        super().__init__(windows)
        self._row_length, self._packing, self._shuffle = row_length, packing, shuffle

    def __iter__(self) -> PackedIterator:
        windows = cast(grain.DatasetIterator[Window], iter(self._parent))
        return PackedIterator(windows, self._row_length, self._packing, self._shuffle)


class _Planned(NamedTuple):
    window: Window
    plan: Plan
    after: dict[str, Any]  # state of the windows behind this one


class PackedIterator(grain.DatasetIterator[Row]):
    """Iterates rows. The last windows stay in memory, so a loader that steps back by its few
    prefetched batches (after a weight change) reads nothing again."""

    REMEMBERED = 3

    def __init__(
        self,
        windows: grain.DatasetIterator[Window],
        row_length: int,
        packing: PackingConfig,
        shuffle: bool,
    ):
        super().__init__(windows)
        self._row_length, self._packing, self._shuffle = row_length, packing, shuffle
        self._recent: OrderedDict[str, _Planned] = OrderedDict()
        self._at = windows.get_state()  # the window that row `_row` belongs to
        self._row = 0
        self._reader_at = self._at

    def __next__(self) -> Row:
        self._assert_not_closed()
        planned = self._planned()
        while self._row >= planned.plan.splits_R1.size - 1:
            self._at, self._row = planned.after, 0
            planned = self._planned()
        plan, first = planned.plan, self._row == 0
        pieces = slice(plan.splits_R1[self._row], plan.splits_R1[self._row + 1])
        self._row += 1
        return Row(
            planned.window,
            plan.documents_P[pieces],
            plan.offsets_P[pieces],
            plan.lengths_P[pieces],
            plan.truncated if first else 0,
        )

    def _planned(self) -> _Planned:
        key = json.dumps(self._at, sort_keys=True)
        if key in self._recent:
            return self._recent[key]
        if self._reader_at != self._at:
            self._parent.set_state(self._at)
        window = next(self._parent)
        self._reader_at = self._parent.get_state()
        seed = window.seed if self._shuffle else None
        plan = plan_rows(window.lengths_D, self._row_length, self._packing, seed=seed)
        self._recent[key] = _Planned(window, plan, self._reader_at)
        if len(self._recent) > self.REMEMBERED:
            self._recent.popitem(last=False)
        return self._recent[key]

    def get_state(self) -> dict[str, Any]:
        return {"window": self._at, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._at, self._row = state["window"], int(state["row"])
