"""A budget decides when weights move: never above its share, as often as it allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.errors import ConfigError
from dh_jax.mixing.pace import Budget, Pace, check_budget, first_pace, next_pace


def moves(budget, cost_of, steps, *, warmup=0, step_seconds=0.5):
    """Steps of the moves, and the pace behind each, where a move costs ``cost_of(k)`` steps."""
    pace, made = first_pace(budget, warmup), []
    for step in range(1, steps + 1):
        if step >= int(pace.due):
            seconds = cost_of(len(made), int(pace.halvings)) * step_seconds
            pace = next_pace(budget, pace, step, seconds, step_seconds)
            made.append((step, pace))
    return made


@given(
    st.sampled_from([0.01, 0.05, 0.3]),
    st.integers(1, 30),
    st.lists(st.floats(0.01, 20), min_size=1, max_size=8),
)
def test_moves_after_the_first_never_cost_more_than_the_share(share, interval, costs):
    """An account kept apart in float64: before each move all earlier ones fit, and the next one
    fits too if it costs what was expected of it."""
    budget = Budget(share, interval, 10**6, 0)
    made = moves(budget, lambda k, h: costs[k % len(costs)], 5000)
    spent, cost, last = 0.0, 0.0, None
    for k, (step, pace) in enumerate(made):
        if last is not None:
            assert step - last >= interval
            assert spent + cost <= share * step * (1 + 1e-5)
            assert step == last + interval or spent + cost > share * (step - 1) * (1 - 1e-5)
        now = costs[k % len(costs)]
        spent += now
        cost = now if cost == 0 else (cost + now) / 2
        np.testing.assert_allclose([pace.spent, pace.cost], [spent, cost], rtol=1e-4)
        last = step


def test_a_steady_cost_gives_a_steady_interval_and_the_configured_one_is_the_least():
    steps = [step for step, _ in moves(Budget(0.05, 10, 10**6, 0), lambda k, h: 2.0, 401)]
    assert steps == [10, 80, 120, 160, 200, 240, 280, 320, 360, 400]
    steps = [step for step, _ in moves(Budget(0.5, 10, 10**6, 0), lambda k, h: 1.0, 50)]
    assert steps == [10, 20, 30, 40, 50]
    assert moves(Budget(0.5, 10, 100, 0), lambda k, h: 1.0, 50, warmup=3)[0][0] == 3


def test_samples_are_halved_before_moves_become_rarer_than_asked():
    """A move of 40 steps at 5 % would come every 800 steps; an eighth of it every hundred."""
    made = moves(Budget(0.05, 10, 100, 3), lambda k, h: 40 / 2**h, 6000)
    assert [int(pace.halvings) for _, pace in made[:5]] == [1, 2, 3, 3, 3]
    gaps = np.diff([step for step, _ in made])
    assert gaps[-1] == 100 and made[-1][1].cost == pytest.approx(5, rel=0.01)
    few = moves(Budget(0.05, 10, 100, 1), lambda k, h: 40 / 2**h, 6000)
    assert [int(pace.halvings) for _, pace in few] == [1] * len(few)


def test_what_was_not_measured_costs_what_the_last_did():
    budget = Budget(0.1, 5, 1000, 0)
    pace = next_pace(budget, first_pace(budget, 0), 5, math.nan, math.nan)
    assert pace == Pace(10, 0, 0, 0)  # the first move is mostly compilation
    pace = next_pace(budget, pace, 10, 3.0, 1.0)
    assert pace == Pace(60, 3, 3, 0)
    assert next_pace(budget, pace, 60, math.nan, 1.0) == Pace(90, 3, 6, 0)  # after a resumption
    far = next_pace(Budget(1e-9, 5, 1000, 0), pace, 60, 1e3, 1.0)
    assert far.due == np.iinfo(np.int32).max


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(0.0, 10, 100, 0), "budget is 0.0; it is a share of training's time, above 0"),
        (Budget(5.0, 10, 100, 0), "budget is 5.0.*below 1"),
        (Budget(math.nan, 10, 100, 0), "budget is nan"),
        (Budget(0.05, 10, 9, 0), "longest is 9 steps, below mixing.interval 10"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(budget, message):
    with pytest.raises(ConfigError, match=message):
        check_budget(budget)
