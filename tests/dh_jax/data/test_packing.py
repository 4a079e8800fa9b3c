"""Packing against what must hold of any plan, whatever the documents' lengths."""

from __future__ import annotations

import json
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import PackingConfig
from dh_jax.data.packing import (
    DOCUMENT,
    LENGTH,
    OFFSET,
    PackedDataset,
    Shards,
    TokenShard,
    Window,
)
from dh_jax.data.planning import Plan, plan_rows

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
    """Best-fit decreasing in plain Python: same number of rows, same multiset of row fills."""
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
    fills = np.add.reduceat(plan.lengths_P, plan.splits_R1[:-1]) if rows else np.zeros(0)
    if segments > max((len(r) for r in rows), default=0):  # ties may be broken differently else
        assert sorted(fills.tolist()) == sorted(sum(r) for r in rows)


def test_best_fit_fills_rows_of_realistic_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(6.8, 1.1, 1024).astype(int) + 1
    plan = plan_rows(lengths, 2048, PackingConfig())
    assert lengths.sum() / ((plan.splits_R1.size - 1) * 2048) > 0.997


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
    grain.experimental.assert_equal_output_after_checkpoint(rows)


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
