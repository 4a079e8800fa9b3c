"""The point-by-point permutation: one to one, even, different for every seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.data.permutation import permuted

SEEDS = st.integers(0, 2**32 - 1)


@given(st.integers(0, 3000), SEEDS)
def test_every_element_comes_exactly_once(count: int, seed: int) -> None:
    assert sorted(permuted(0, count, count, seed).tolist()) == list(range(count))


@given(st.integers(1, 10**12), SEEDS, st.data())
def test_any_place_can_be_asked_for_alone(count: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, count - 1))
    stop = min(start + 20, count)
    places = permuted(start, stop, count, seed)
    assert ((places >= 0) & (places < count)).all() and np.unique(places).size == places.size
    for i in range(start, stop):
        assert permuted(i, i + 1, count, seed)[0] == places[i - start]


@pytest.mark.parametrize("count", [2, 3, 6, 37, 600])
def test_over_seeds_every_element_is_as_likely_at_every_place(count: int) -> None:
    """Chi-square over seeds, place by place: its mean over places stays near 1 a degree."""
    seeds = 200 * count if count < 100 else 6000
    places = min(count, 40)
    counts = np.zeros((places, count))
    for seed in range(seeds):
        counts[np.arange(places), permuted(0, places, count, seed)] += 1
    expected = seeds / count
    chi_square = ((counts - expected) ** 2 / expected).sum(1) / (count - 1)
    assert chi_square.mean() < 1 + 4 * np.sqrt(2 / (count - 1) / places) + 0.5 * (count == 2)


def test_neighbours_in_the_order_are_not_neighbours_in_the_store() -> None:
    count = 100_000
    order = permuted(0, count, count, 5)
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() / (count / 3) - 1) < 0.02  # of independent uniform draws
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    other = permuted(0, count, count, 6)
    assert (order == other).sum() < 10
