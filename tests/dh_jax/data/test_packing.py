"""Packing against what must hold of any plan, whatever the documents' lengths."""

from __future__ import annotations

import itertools
import json
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import PackingConfig
from dh_jax.data import fitting
from dh_jax.data.fitting import pair_fit
from dh_jax.data.packing import (
    DOCUMENT,
    LENGTH,
    OFFSET,
    PackedDataset,
    Shards,
    TokenShard,
    Window,
    leaves,
)
from dh_jax.data.planning import Plan, plan_rows
from dh_jax.errors import StateError

LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=60)
STRATEGIES = st.sampled_from(["best_fit", "first_fit", "concat"])


def pieces_by_document(plan: Plan) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for d, offset, length in zip(plan.documents_P, plan.offsets_P, plan.lengths_P, strict=True):
        found.setdefault(int(d), []).append((int(offset), int(length)))
    return {d: sorted(pieces) for d, pieces in found.items()}


@given(LENGTHS, STRATEGIES, st.integers(4, 40), st.integers(1, 8), st.none() | st.integers(0, 9))
def test_every_token_stands_exactly_once_and_no_row_overflows(
    lengths: list[int], strategy: str, row_length: int, segments: int, seed: int | None
) -> None:
    packing = PackingConfig(strategy=strategy, max_segments=segments)
    plan = plan_rows(lengths, row_length, packing, seed=seed)
    for document, pieces in pieces_by_document(plan).items():
        at = 0
        for offset, length in pieces:
            assert offset == at and length > 0
            at += length
        assert at == lengths[document]
    assert plan.lengths_P.sum() == sum(lengths)
    assert (np.diff(plan.splits_R1) >= 1).all() and (np.diff(plan.splits_R1) <= segments).all()
    rows = np.add.reduceat(plan.lengths_P, plan.splits_R1[:-1]) if sum(lengths) else np.zeros(0)
    assert (rows <= row_length).all()


@given(LENGTHS, STRATEGIES, st.integers(4, 40), st.integers(1, 8), st.integers(0, 9), st.data())
def test_what_is_left_is_the_ends_of_documents_and_never_left_twice(
    lengths: list[int],
    strategy: str,
    row_length: int,
    segments: int,
    leave: int,
    data: st.DataObject,
) -> None:
    """Carried pieces fit a row, as those that a window leaves do."""
    carried = data.draw(st.integers(0, len(lengths)))
    lengths = [min(n, row_length) for n in lengths[:carried]] + lengths[carried:]
    packing = PackingConfig(strategy=strategy, max_segments=segments)
    plan = plan_rows(lengths, row_length, packing, carried=carried, leave=leave)
    left = {int(d): int(offset) for d, offset in plan.left_L2}
    assert len(left) == plan.left_L2.shape[0] <= leave and min(left, default=carried) >= carried
    placed = dict.fromkeys(range(len(lengths)), 0)
    for d, offset, length in zip(plan.documents_P, plan.offsets_P, plan.lengths_P, strict=True):
        placed[int(d)] += int(length)
        assert offset + length <= left.get(int(d), lengths[d])
    assert placed == {d: left.get(d, n) for d, n in enumerate(lengths)}
    rows = np.add.reduceat(plan.lengths_P, plan.splits_R1[:-1]) if plan.lengths_P.size else []
    assert (np.asarray(rows) <= row_length).all() and (np.diff(plan.splits_R1) <= segments).all()


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(1, 8), st.integers(0, 9))
def test_pair_fit_places_every_piece_and_overfills_nothing(
    sizes: list[int], segments: int, tolerance: int
) -> None:
    rows = pair_fit(np.array(sizes, np.int64), 64, segments, tolerance).tolist()
    assert len(rows) == len(sizes) and set(rows) == set(range(len(set(rows))))
    for row in set(rows):
        held = [size for size, r in zip(sizes, rows, strict=True) if r == row]
        assert sum(held) <= 64 and len(held) <= segments


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 60), st.booleans())
def test_the_best_pair_is_the_best_of_all_pairs(sizes: list[int], space: int, even: bool) -> None:
    count = np.bincount(sizes, minlength=65)
    down = np.maximum(np.arange(65) - 1, 0)
    gap, large, small = fitting._best_pair(down, count, space, 0, even)
    pairs = [a + b for a, b in itertools.combinations(sizes, 2) if a + b <= space]
    assert gap == space - max(pairs, default=0)
    assert large + small == max(pairs, default=0)


@given(LENGTHS, st.sampled_from(["best_fit", "first_fit"]), st.integers(4, 100))
def test_a_document_that_fits_a_row_is_never_cut(
    lengths: list[int], strategy: str, row_length: int
) -> None:
    plan = plan_rows(lengths, row_length, PackingConfig(strategy=strategy))
    for document, pieces in pieces_by_document(plan).items():
        assert len(pieces) == -(-lengths[document] // row_length)


@given(LENGTHS, st.integers(4, 40))
def test_truncation_gives_up_exactly_what_it_counts(lengths: list[int], row_length: int) -> None:
    packing = PackingConfig(long_documents="truncate")
    plan = plan_rows(lengths, row_length, packing)
    assert plan.truncated == sum(max(0, n - row_length) for n in lengths)
    assert plan.lengths_P.sum() + plan.truncated == sum(lengths)


@given(LENGTHS, st.integers(5, 50), st.integers(1, 9))
def test_best_fit_equals_a_literal_transcription(
    lengths: list[int], row_length: int, segments: int
) -> None:
    """Best-fit decreasing in plain Python: same number of rows, same multiset of row fills. A plan,
    which takes `pair_fit` where that fills rows better, never has more rows."""
    sizes = sorted(
        (min(row_length, n - at) for n in lengths for at in range(0, n, row_length)), reverse=True
    )
    rows: list[list[int]] = []
    for size in sizes:
        open_rows = [r for r in rows if sum(r) + size <= row_length and len(r) < segments]
        if open_rows:
            max(open_rows, key=sum).append(size)
        else:
            rows.append([size])
    plan = plan_rows(lengths, row_length, PackingConfig(max_segments=segments))
    assert len(plan.splits_R1) - 1 <= len(rows)
    places = fitting.best_fit(np.array(sizes, np.int64), row_length, segments)
    fills = np.bincount(places, weights=sizes).astype(int)
    if segments > max((len(r) for r in rows), default=0):  # ties may be broken differently else
        assert sorted(fills.tolist()) == sorted(sum(r) for r in rows)


class ListWindows(grain.IterDataset[Window]):
    """Windows of the given lengths, their tokens counting up; counts how often it is read."""

    def __init__(self, lengths: list[list[int]]):
        super().__init__()
        self.lengths, self.reads = lengths, 0
        self.shards: dict[int, Shards] = {}

    def __iter__(self) -> Any:
        outer = self

        class Iterator(grain.DatasetIterator[Window]):
            index = 0

            def __next__(self) -> Window:
                if self.index >= len(outer.lengths):
                    raise StopIteration
                lengths = np.array(outer.lengths[self.index], np.int64)
                self.index += 1
                outer.reads += 1
                tokens = np.arange(lengths.sum(), dtype=np.uint16)
                starts = np.cumsum(lengths) - lengths
                zeros = np.zeros(lengths.size, np.int32)
                ids = np.arange(lengths.size, dtype=np.uint64) + 1000 * self.index
                shards = outer.shards.setdefault(self.index, Shards([TokenShard(tokens)]))
                return Window(shards, zeros, starts, lengths, ids, self.index)

            def get_state(self) -> dict[str, Any]:
                return {"window": self.index}

            def set_state(self, state: dict[str, Any]) -> None:
                self.index = state["window"]

        return Iterator()


def described(rows: Any) -> list[tuple[Any, ...]]:
    return [
        (
            row.packed.window.ids_D[row.pieces_P6[:, DOCUMENT]].tolist(),
            row.pieces_P6[:, OFFSET].tolist(),
            row.pieces_P6[:, LENGTH].tolist(),
        )
        for row in rows
    ]


@pytest.mark.parametrize("row_length", [2048, 8192])
@pytest.mark.parametrize(("mean", "spread"), [(6.3, 0.4), (6.8, 1.1), (7.2, 0.8)])
def test_best_fit_fills_rows_of_documents_of_any_length(
    row_length: int, mean: float, spread: float
) -> None:
    """Few short documents a row are the hard case: lengths are lognormal, like those of prose,
    word problems and code."""
    packing = PackingConfig()
    random = np.random.default_rng(0)
    size = packing.window - leaves(packing)
    lengths = [(random.lognormal(mean, spread, size).astype(int) + 1).tolist() for _ in range(8)]
    rows = list(iter(PackedDataset(ListWindows(lengths), row_length, packing)))
    windows = {id(row.packed): row.packed for row in rows}
    assert max(packed.window.ids_D.size for packed in windows.values()) <= packing.window
    placed = sum(row.tokens for row in rows)
    assert placed == sum(map(sum, lengths))
    whole = [row for row in rows if row.packed.window.ids_D.size > leaves(packing)]
    assert sum(row.tokens for row in whole) / (len(whole) * row_length) > 0.997


@settings(max_examples=25)
@given(st.lists(LENGTHS, min_size=1, max_size=5), STRATEGIES, st.sampled_from([8, 64, 1024]))
def test_every_token_of_every_window_comes_once(
    lengths: list[list[int]], strategy: str, window: int
) -> None:
    packing = PackingConfig(strategy=strategy, window=window)
    seen: dict[int, list[tuple[int, int]]] = {}
    for ids, offsets, sizes in described(PackedDataset(ListWindows(lengths), 32, packing)):
        for document, offset, size in zip(ids, offsets, sizes, strict=True):
            seen.setdefault(document, []).append((offset, size))
    for w, of_window in enumerate(lengths):
        for d, length in enumerate(of_window):
            at = 0
            for offset, size in sorted(seen.pop(1000 * (w + 1) + d, [])):
                assert offset == at
                at += size
            assert at == length
    assert not seen


@settings(max_examples=25)
@given(st.lists(LENGTHS, min_size=1, max_size=4), STRATEGIES)
def test_resume_at_every_row_equals_no_resume(lengths: list[list[int]], strategy: str) -> None:
    rows = PackedDataset(ListWindows(lengths), 32, PackingConfig(strategy=strategy))
    whole = described(iter(rows))
    iterator = iter(rows)
    for taken in range(len(whole) + 1):
        state = json.loads(json.dumps(iterator.get_state()))
        other = iter(rows)
        other.set_state(state)
        assert other.get_state() == state
        assert described(other) == whole[taken:]
        next(iterator, None)


def test_grain_checkpoint_contract_holds() -> None:
    rows = PackedDataset(ListWindows([[5, 9, 30], [70], [1, 2]]), 16, PackingConfig())
    # Described, since rows that are read again lie in other arrays.
    described_rows = rows.map(lambda row: described([row]))
    grain.experimental.assert_equal_output_after_checkpoint(described_rows)


@pytest.mark.parametrize("left", ["1 9", "0+40"])
def test_a_state_of_other_data_is_refused(left: str) -> None:
    iterator = iter(PackedDataset(ListWindows([[5, 9, 30], [70]]), 16, PackingConfig()))
    state = {"window": {"window": 0}, "following": True, "left": left, "row": 0, "skipped": {}}
    iterator.set_state(state)
    with pytest.raises(StateError, match="of a window of 3"):
        next(iterator)


def test_stepping_back_a_few_rows_reads_nothing_again() -> None:
    windows = ListWindows([[10, 10, 10], [10, 10, 10], [10]])
    iterator = iter(PackedDataset(windows, 10, PackingConfig()))
    states = []
    for _ in range(7):
        states.append(iterator.get_state())
        next(iterator)
    assert windows.reads == 3
    iterator.set_state(states[1])
    assert len(described(iterator)) == 6
    assert windows.reads == 3


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit", "concat"])
def test_a_window_without_tokens_gives_no_rows(strategy: str) -> None:
    rows = PackedDataset(ListWindows([[0, 0], [3]]), 8, PackingConfig(strategy=strategy))
    assert len(list(rows)) == 1
