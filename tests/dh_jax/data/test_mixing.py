"""Shares, live weights and resume of mixed rows."""

from __future__ import annotations

import json
import math
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import PackingConfig
from dh_jax.data.mixing import MixedDataset, choose_source, normalised
from dh_jax.data.packing import DOCUMENT, OFFSET, PackedDataset, TokenShard
from dh_jax.data.store import StoredDocuments
from dh_jax.data.windows import StoreWindows
from dh_jax.errors import ConfigError, StateError

WEIGHTS = st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3)
ROW = 32


@settings(max_examples=60)
@given(WEIGHTS)
def test_counts_stay_within_one_row_of_the_weights_at_every_prefix(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    deficits, counts = np.zeros(len(shares)), np.zeros(len(shares))
    for t in range(1, 200):
        source = choose_source(deficits, shares, 1.0)
        deficits += shares
        deficits[source] -= 1
        counts[source] += 1
        assert np.abs(counts - shares * t).max() < 1
        assert not counts[shares == 0].any()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10**6)), min_size=2, max_size=12))
def test_under_changing_weights_no_source_drifts_two_rows_away(
    changes: list[tuple[int, int]],
) -> None:
    """Deficits carry over a change, so what was earned before it is still given."""
    deficits = np.zeros(6)
    for steps, seed in changes:
        shares = np.random.default_rng(seed).dirichlet(np.full(6, 0.3))
        for _ in range(steps):
            source = choose_source(deficits, shares, 1.0)
            deficits += shares
            deficits[source] -= 1
            assert np.abs(deficits).max() < 2


def source(name: int, lengths: list[int], *, repeat: bool = True) -> PackedDataset:
    sizes = np.array(lengths, np.int64)
    documents = StoredDocuments(
        (TokenShard(np.arange(sizes.sum(), dtype=np.uint16)),),
        np.zeros(sizes.size, np.int32),
        np.cumsum(sizes) - sizes,
        sizes,
        np.arange(sizes.size, dtype=np.uint64) + 1000 * name,
    )
    epochs = None if repeat else 1
    windows = StoreWindows(documents, 4, seed=name, shuffle=True, epochs=epochs)
    return PackedDataset(windows, ROW, PackingConfig())


def mixture(unit: str = "tokens", *, repeat: bool = True) -> MixedDataset:
    sources = {
        "long": source(1, [100, 64, 31, 90, 12], repeat=repeat),
        "short": source(2, [3, 9, 4, 5, 6, 7, 30, 2, 11], repeat=repeat),
        "full": source(3, [32] * 7, repeat=repeat),
    }
    weights = {"long": 0.5, "short": 0.2, "full": 0.3}
    return MixedDataset(sources, weights, row_length=ROW, unit=unit)


def described(rows: Any) -> list[tuple[Any, ...]]:
    found = []
    for m, row in rows:
        ids = row.packed.window.ids_D[row.pieces_P6[:, DOCUMENT]]
        found.append((m, ids.tolist(), row.pieces_P6[:, OFFSET].tolist()))
    return found


@pytest.mark.parametrize("unit", ["tokens", "rows", "trained_tokens"])
def test_shares_of_the_unit_follow_the_weights_within_a_row(unit: str) -> None:
    from dh_jax.data.batching import trained_tokens

    iterator = iter(mixture(unit))
    given_M = np.zeros(3)
    for _ in range(400):
        m, row = next(iterator)
        given_M[m] += {"tokens": row.tokens, "rows": 1}.get(unit, trained_tokens(row))
        error = np.abs(given_M - given_M.sum() * np.array([0.5, 0.2, 0.3])).max()
        assert error < (1 if unit == "rows" else ROW)


def test_rows_without_a_target_do_not_take_everything() -> None:
    """Documents of one token have no target; they get their share of what they count."""
    sources = {"ones": source(1, [1] * 9), "full": source(2, [32] * 7)}
    weights = {"ones": 0.1, "full": 0.9}
    rows = iter(MixedDataset(sources, weights, row_length=ROW, unit="trained_tokens"))
    full = sum(next(rows).source for _ in range(400))
    assert 9 * (400 - full) == pytest.approx(full * (ROW - 1), abs=9 * ROW)


def test_a_weight_change_holds_from_the_next_row() -> None:
    iterator = iter(mixture("rows"))
    for _ in range(10):
        next(iterator)
    iterator.set_weights({"long": 0, "short": 0, "full": 1})
    assert {next(iterator).source for _ in range(20)} == {2}


@settings(max_examples=20)
@given(st.integers(0, 60), st.sampled_from(["tokens", "rows"]))
def test_resume_at_any_row_equals_no_resume(taken: int, unit: str) -> None:
    iterator = iter(mixture(unit))
    for _ in range(taken):
        next(iterator)
    iterator.set_weights({"long": 1, "short": 2, "full": 3})
    state = json.loads(json.dumps(iterator.get_state(), sort_keys=True))
    other = iter(mixture(unit))
    other.set_state(state)
    assert other.weights == iterator.weights
    assert described(next(iterator) for _ in range(40)) == described(next(other) for _ in range(40))


def test_grain_checkpoint_contract_holds() -> None:
    grain.experimental.assert_equal_output_after_checkpoint(mixture(repeat=False))


def test_a_mixture_without_repeats_gives_every_row_of_every_source_once() -> None:
    rows = described(mixture(repeat=False))
    alone = [
        (m, *rest)
        for m, lengths in enumerate(
            ([100, 64, 31, 90, 12], [3, 9, 4, 5, 6, 7, 30, 2, 11], [32] * 7)
        )
        for _, *rest in described((0, r) for r in source(m + 1, lengths, repeat=False))
    ]
    assert sorted(rows) == sorted(alone)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": -1, "b": 2}, "'a' is -1"),
        ({"a": math.nan, "b": 1}, "'a' is nan"),
        ({"a": 0, "b": 0}, "all weights are 0"),
        ({"a": 1, "b": 1, "c": 1}, "unknown source 'c'"),
        ({"a": 1}, "no weight for source 'b'"),
    ],
)
def test_wrong_weights_are_refused_by_name(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        normalised(weights, ["a", "b"])


def test_a_state_of_other_sources_is_refused() -> None:
    state = iter(mixture()).get_state()
    state["other"] = state.pop("full")
    with pytest.raises(StateError, match="other"):
        iter(mixture()).set_state(state)
