"""Packing: windows of documents -> rows of T tokens.

A *window* is a bounded group of documents (at most ``packing.window``) that are planned
together. The documents of its emptiest rows are left to the next window, so that rows are full
whatever the documents' lengths. The plan is a pure function of lengths; what was left by the
window before is listed in the packer's state, and nothing is left twice, so any position is
restored by reading two windows and planning one.

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
from dh_jax.errors import StateError


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
        assert len({tokens.itemsize for tokens, _ in shards}) <= 1, "shards are of one dtype"
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
    # The first C entries are pieces that the window before left over: where in their documents
    # they begin.
    offsets_C: Ints = np.zeros(0, np.int64)


class PackedWindow(NamedTuple):
    """A window and its plan: P pieces in R rows, ready to be materialised.

    Row ``r`` holds pieces ``splits_R1[r]:splits_R1[r + 1]``.
    """

    window: Window
    pieces_P6: Ints  # columns: see below
    splits_R1: Ints
    tokens_R: list[int]  # tokens of each row
    truncated: int  # tokens given up because long documents are truncated
    left: str  # to the next window: "3 14+2048" is document 3, and 3 + 14 from token 2048 on


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


def leaves(packing: PackingConfig) -> int:
    """Pieces that a window may leave to the next one; a window and these are ``packing.window``."""
    return packing.window // 16


def pack(window: Window, row_length: int, packing: PackingConfig, *, shuffle: bool) -> PackedWindow:
    """Plan a window's rows; ``shuffle`` orders them by the window's seed."""
    plan = plan_rows(
        window.lengths_D,
        row_length,
        packing,
        seed=window.seed if shuffle else None,
        carried=window.offsets_C.size,
        leave=leaves(packing),
    )
    pieces, tokens = _tabulate(
        plan.documents_P, plan.offsets_P, plan.lengths_P, plan.splits_R1,
        window.shards_D, window.starts_D, window.lengths_D, window.offsets_C,
    )  # fmt: skip
    left = _write_left(plan.left_L2, window.offsets_C.size)
    return PackedWindow(window, pieces, plan.splits_R1, tokens.tolist(), plan.truncated, left)


def _write_left(left_L2: Ints, first: int) -> str:
    """What is left as short text, for it is in the state of every source: steps from document to
    document, the first of them counted from ``first`` (what was carried is never left)."""
    steps = []
    for document, at in sorted(left_L2.tolist()):
        steps.append(f"{document - first}+{at}" if at else f"{document - first}")
        first = document
    return " ".join(steps)


def _read_left(left: str) -> Ints:
    """(document, offset) of each piece."""
    document, found = 0, []
    for piece in left.split():
        step, _, at = piece.partition("+")
        document += int(step)
        found.append((document, int(at or 0)))
    return np.array(found, np.int64)


@numba.njit(cache=True, nogil=True)
def _tabulate(  # type: ignore[no-untyped-def]
    documents_P, offsets_P, lengths_P, splits_R1, shards_D, starts_D, lengths_D, offsets_C
):
    """The columns of every piece, and the tokens of every row."""
    pieces_P6 = np.empty((documents_P.size, 6), np.int64)
    for p in range(documents_P.size):
        document, offset, length = documents_P[p], offsets_P[p], lengths_P[p]
        base = offsets_C[document] if document < offsets_C.size else 0
        pieces_P6[p, SHARD] = shards_D[document]
        pieces_P6[p, START] = starts_D[document] + offset
        pieces_P6[p, LENGTH] = length
        pieces_P6[p, GOES_ON] = offset + length < lengths_D[document]
        pieces_P6[p, OFFSET] = base + offset
        pieces_P6[p, DOCUMENT] = document
    tokens_R = np.zeros(splits_R1.size - 1, np.int64)
    for r in range(tokens_R.size):
        for p in range(splits_R1[r], splits_R1[r + 1]):
            tokens_R[r] += lengths_P[p]
    return pieces_P6, tokens_R


def carry(before: Window, left: str, window: Window | None) -> Window:
    """A window that begins with what the one before left over, each the end of a document;
    ``window`` is None behind the last.

    Raises:
        StateError: ``left`` speaks of documents that the window before does not have.
    """
    documents, offsets = _read_left(left).T
    if documents[-1] >= before.lengths_D.size or (offsets >= before.lengths_D[documents]).any():
        raise StateError(
            f"the state says that documents {left!r} of a window of {before.lengths_D.size} are "
            "still to come; it was saved with other data"
        )
    shards, first = before.shards, 0
    if window is None:
        none = slice(0)
        window = Window(
            shards, before.shards_D[none], before.starts_D[none], before.lengths_D[none],
            before.ids_D[none], before.seed,
        )  # fmt: skip
    elif window.shards is not before.shards:  # each window of a stream has its own
        shards, first = Shards([*before.shards.shards, *window.shards.shards]), len(before.shards)
    return Window(
        shards,
        np.concatenate([before.shards_D[documents], window.shards_D + np.int32(first)]),
        np.concatenate([before.starts_D[documents] + offsets, window.starts_D]),
        np.concatenate([before.lengths_D[documents] - offsets, window.lengths_D]),
        np.concatenate([before.ids_D[documents], window.ids_D]),
        window.seed,
        offsets,
    )


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


class _Read(NamedTuple):
    window: Window | None  # None behind the last
    after: dict[str, Any]  # state of the windows behind it
    skipped: dict[str, int]  # what the windows so far left out, by reason; empty for a store


class _Planned(NamedTuple):
    read: _Read
    packed: PackedWindow  # its window, joined by what was left before
    before: dict[str, Any]  # state of the windows in front of it


class PackedIterator(grain.DatasetIterator[Row]):
    """Iterates rows. The last windows stay in memory, so a loader that steps back by its few
    prefetched batches (after a weight change) reads nothing again.

    A position is (state, following, left, row): the row is of the window that the windows yield
    from that state or, if ``following``, of the one after it, joined by what the former left.
    """

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
        self._at = windows.get_state()
        self._reader_at: dict[str, Any] | None = self._at  # None: amid a window that failed
        self._following, self._left, self._row = False, "", 0
        self._skipped: dict[str, int] = {}  # by the windows up to that of the last row
        self._planned: _Planned | None = None  # the window of the next row, once it is needed

    def __next__(self) -> Row:
        planned = self._planned or self._plan(None)
        while self._row >= len(planned.packed.tokens_R):
            self._at, self._following = planned.before, True
            self._left, self._row = planned.packed.left, 0
            self._planned = None
            planned = self._plan(planned)
        row = self._row
        self._row, self._skipped = row + 1, planned.read.skipped
        return Row(planned.packed, row, planned.packed.tokens_R[row])

    def _plan(self, last: _Planned | None) -> _Planned:
        """Plan the window of this position; ``last`` is the one before, if it is at hand."""
        self._assert_not_closed()
        key = json.dumps([self._at, self._following, self._left], sort_keys=True)
        planned = self._recent.get(key)
        if planned is None:
            planned = self._recent[key] = self._read_and_plan(last)
            if len(self._recent) > self.REMEMBERED:
                self._recent.popitem(last=False)
        self._planned = planned
        return planned

    def _read_and_plan(self, last: _Planned | None) -> _Planned:
        before, at = None, self._at
        if self._following:
            before, at, _ = last.read if last else self._read(at)
        read = self._read(at)
        if self._left and before:
            joined = carry(before, self._left, read.window)
        elif read.window is None:
            self._skipped = read.skipped
            raise StopIteration
        else:
            joined = read.window
        packed = pack(joined, self._row_length, self._packing, shuffle=self._shuffle)
        return _Planned(read, packed, at)

    def _read(self, at: dict[str, Any]) -> _Read:
        """The window behind a state."""
        if self._reader_at != at:
            self._parent.set_state(at)
        self._reader_at = None  # a read that fails stops anywhere; the next one sets the state anew
        window = next(self._parent, None)
        self._reader_at = after = self._parent.get_state()
        return _Read(window, after, dict(getattr(self._parent, "skipped", {})))

    def get_state(self) -> dict[str, Any]:
        """JSON-able state behind the last row: epoch, window, row, what was left over, and what
        had been left out by then."""
        return {
            "window": self._at,
            "following": self._following,
            "left": self._left,
            "row": self._row,
            "skipped": self._skipped,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on behind the row that was the last one when ``state`` was taken."""
        at = state["window"], bool(state["following"]), state["left"]
        if at != (self._at, self._following, self._left):
            self._planned = None
        self._at, self._following, self._left = at
        self._row, self._skipped = int(state["row"]), dict(state["skipped"])
