"""Windows over a store: every document once a pass, and as many passes as asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.data.packing import TokenShard
from dh_jax.data.store import StoredDocuments
from dh_jax.data.windows import StoreWindows
from dh_jax.errors import DataError


def stored(count: int) -> StoredDocuments:
    ones = np.ones(count, np.int64)
    shard = TokenShard(np.arange(count, dtype=np.uint16))
    zeros = np.zeros(count, np.int32)
    ids = np.arange(count, dtype=np.uint64)
    return StoredDocuments((shard,), zeros, np.cumsum(ones) - ones, ones, ids)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 3), st.booleans())
def test_every_document_comes_once_a_pass(
    count: int, size: int, epochs: int, shuffle: bool
) -> None:
    dataset = StoreWindows(stored(count), size, seed=1, shuffle=shuffle, epochs=epochs)
    windows = list(dataset)
    sizes = [window.ids_D.size for window in windows]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    seen = Counter(int(i) for window in windows for i in window.ids_D)
    assert seen == dict.fromkeys(range(count), epochs)
    first = np.concatenate([w.ids_D for w in windows[: len(windows) // epochs]])
    assert sorted(first.tolist()) == list(range(count))
    if not shuffle:
        assert first.tolist() == list(range(count))


def test_documents_without_a_token_are_refused() -> None:
    empty = stored(3)._replace(lengths_D=np.zeros(3, np.int64))
    with pytest.raises(DataError, match="none of the 3 stored documents has a token; prepare"):
        StoreWindows(empty, 2, seed=0, shuffle=True, epochs=None)


def test_epochs_come_in_different_orders_and_seeds_too() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        dataset = StoreWindows(stored(100), 100, seed=seed, shuffle=True, epochs=None)
        ids: list[int] = dataset.window(epoch, 0).ids_D.tolist()
        return ids

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 1) == orders[1]
