"""Packing: windows of documents -> rows of T tokens.

A *window* is a bounded group of documents (at most ``packing.window``) that are planned
together. The plan is a pure function of the documents' lengths, so a packer's state is the
state of its windows plus the index of the next row, and any position is restored by planning
one window again. Nothing crosses a window; no row is carried over.

Rows are references until a batch is made of them (`dh_jax.data.batching`): drawing one costs
about a microsecond, and a row that another host delivers is never materialised here.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import grain
import numba
import numpy as np
import numpy.typing as npt

from dh_jax.config import PackingConfig
from dh_jax.data.planning import Ints, plan_rows


class TokenShard(NamedTuple):
    """Tokens of many documents, end to end; the arrays may be memory maps."""

    tokens: npt.NDArray[Any]  # [n] integers of 1, 2, 4 or 8 bytes, contiguous; ids not negative
    loss_mask: npt.NDArray[np.bool_] | None = None  # [n]; None: every token is learnt


class Shards:
    """Token shards of one dtype, and where they lie in memory.

    Compiled code reads thousands of memory maps through their addresses; numba could otherwise
    take them only as a list that it copies element by element.
    """

    def __init__(self, shards: Sequence[TokenShard]):
        self.shards = tuple(shards)
        self.width = self.shards[0].tokens.itemsize if self.shards else 0  # bytes of a token
        table = [(_begin(tokens), 0 if mask is None else _begin(mask)) for tokens, mask in shards]
        self.addresses_S2 = np.array(table, np.int64).reshape(-1, 2)  # tokens, mask (0: none)

    def __getitem__(self, shard: int) -> TokenShard:
        return self.shards[shard]

    def __len__(self) -> int:
        return len(self.shards)


def _begin(array: npt.NDArray[Any]) -> int:
    assert array.flags.c_contiguous and array.dtype.isnative, "shards are contiguous"
    return int(array.__array_interface__["data"][0])


class Window(NamedTuple):
    """D documents to be packed together, as references into token shards."""

    shards: Shards
    shards_D: npt.NDArray[np.int32]  # which shard a document lies in
    starts_D: Ints  # its first token within the shard
    lengths_D: Ints  # its tokens
    ids_D: npt.NDArray[np.uint64]
    seed: int  # orders the rows of this window


class PackedWindow(NamedTuple):
    """A window and its plan: P pieces in R rows, ready to be materialised.

    Row ``r`` holds pieces ``splits_R1[r]:splits_R1[r + 1]``.
    """

    window: Window
    pieces_P6: Ints  # columns: see below
    splits_R1: Ints
    tokens_R: list[int]  # tokens of each row
    truncated: int  # tokens given up because long documents are truncated


# Columns of `pieces_P6`. One array, because a compiled function is called with it for every few
# rows, and each argument of such a call costs as much as copying a hundred tokens.
SHARD, START, LENGTH, GOES_ON, OFFSET, DOCUMENT = range(6)


class Row(NamedTuple):
    """One packed row, not yet materialised."""

    packed: PackedWindow
    place: int  # r
    tokens: int

    @property
    def pieces_P6(self) -> Ints:
        """This row's pieces."""
        splits = self.packed.splits_R1
        return self.packed.pieces_P6[splits[self.place] : splits[self.place + 1]]

    @property
    def truncated(self) -> int:
        """Tokens this row's window gave up; counted on its first row only."""
        return self.packed.truncated if self.place == 0 else 0


def pack(window: Window, row_length: int, packing: PackingConfig, *, shuffle: bool) -> PackedWindow:
    """Plan a window's rows; ``shuffle`` orders them by the window's seed."""
    seed = window.seed if shuffle else None
    plan = plan_rows(window.lengths_D, row_length, packing, seed=seed)
    pieces, tokens = _tabulate(
        plan.documents_P, plan.offsets_P, plan.lengths_P, plan.splits_R1,
        window.shards_D, window.starts_D, window.lengths_D,
    )  # fmt: skip
    return PackedWindow(window, pieces, plan.splits_R1, tokens.tolist(), plan.truncated)


@numba.njit(cache=True, nogil=True)
def _tabulate(  # type: ignore[no-untyped-def]
    documents_P, offsets_P, lengths_P, splits_R1, shards_D, starts_D, lengths_D
):
    """The columns of every piece, and the tokens of every row."""
    pieces_P6 = np.empty((documents_P.size, 6), np.int64)
    for p in range(documents_P.size):
        document, offset, length = documents_P[p], offsets_P[p], lengths_P[p]
        pieces_P6[p, SHARD] = shards_D[document]
        pieces_P6[p, START] = starts_D[document] + offset
        pieces_P6[p, LENGTH] = length
        pieces_P6[p, GOES_ON] = offset + length < lengths_D[document]
        pieces_P6[p, OFFSET] = offset
        pieces_P6[p, DOCUMENT] = document
    tokens_R = np.zeros(splits_R1.size - 1, np.int64)
    for r in range(tokens_R.size):
        for p in range(splits_R1[r], splits_R1[r + 1]):
            tokens_R[r] += lengths_P[p]
    return pieces_P6, tokens_R


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
    packed: PackedWindow
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
        self._planned: _Planned | None = None  # that window, once it is needed

    def __next__(self) -> Row:
        planned = self._planned or self._plan()
        while self._row >= len(planned.packed.tokens_R):
            self._at, self._row = planned.after, 0
            planned = self._plan()
        row = self._row
        self._row = row + 1
        return Row(planned.packed, row, planned.packed.tokens_R[row])

    def _plan(self) -> _Planned:
        self._assert_not_closed()
        key = json.dumps(self._at, sort_keys=True)
        planned = self._recent.get(key)
        if planned is None:
            if self._reader_at != self._at:
                self._parent.set_state(self._at)
            window = next(self._parent)
            self._reader_at = self._parent.get_state()
            packed = pack(window, self._row_length, self._packing, shuffle=self._shuffle)
            planned = self._recent[key] = _Planned(packed, self._reader_at)
            if len(self._recent) > self.REMEMBERED:
                self._recent.popitem(last=False)
        self._planned = planned
        return planned

    def get_state(self) -> dict[str, Any]:
        return {"window": self._at, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        at, row = state["window"], int(state["row"])
        if at != self._at:
            self._planned = None
        self._at, self._row = at, row
