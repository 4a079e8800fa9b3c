"""When the weights move, if what moving may cost is given instead: a share of training's time.

Costs are counted in training steps, so that one number holds on any machine. What was measured
comes from outside, since a clock is not a pure function; what was decided is a pytree that is
saved with the optimizer, and the log repeats it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from dh_jax.errors import ConfigError

Scalar = jax.Array | np.generic


class Budget(NamedTuple):
    """What may be spent on moves."""

    share: float  # seconds of moves by seconds of training steps, at most
    interval: int  # least steps from one move to the next
    longest: int  # steps; where the share would need more, samples are halved first
    halvings: int  # how often they may be


class Pace(NamedTuple):
    """What was decided so far; scalars, a pytree."""

    due: Scalar  # int32, step of the next move
    cost: Scalar  # float32, of a move, in training steps; 0 until one was measured
    spent: Scalar  # float32, on all moves so far, in training steps
    halvings: Scalar  # int32, samples are 2^-halvings of those configured


def check_budget(budget: Budget) -> Budget:
    """Refuse what cannot be kept.

    Raises:
        ConfigError: the share is not between 0 and 1, or the longest gap is below the least.
    """
    if not 0 < budget.share < 1:
        raise ConfigError(
            f"mixing.budget is {budget.share}; it is a share of training's time, above 0 and "
            "below 1, for example 0.05 (null: move every mixing.interval steps)"
        )
    if budget.longest < budget.interval:
        raise ConfigError(
            f"mixing.longest is {budget.longest} steps, below mixing.interval {budget.interval}"
        )
    return budget


def first_pace(budget: Budget, warmup: int) -> Pace:
    """Before the first move, which comes after the warm-up or the least interval."""
    zero = np.float32(0)
    return Pace(np.int32(warmup or budget.interval), zero, zero, np.int32(0))


def next_pace(
    budget: Budget, pace: Pace, step: int, move_seconds: float, step_seconds: float
) -> Pace:
    """Decide when to move again, behind a move.

    The next move is made as soon as all moves, it included, cost at most the share of all steps
    before it: ``due = ceil((spent + cost) / share)``, and ``interval`` steps away at least. Where
    that is further than ``longest`` steps away, samples are halved, once a move.

    Args:
        budget: what may be spent.
        pace: what was decided before.
        step: training steps made so far.
        move_seconds: of the move just made; NaN where it was not measured, or was compiled.
        step_seconds: of a training step; likewise.

    Returns:
        A pure function of the arguments, in NumPy.
    """
    cost, spent, halvings = float(pace.cost), float(pace.spent), int(pace.halvings)
    measured = move_seconds / step_seconds if step_seconds > 0 else math.nan
    if math.isfinite(measured):
        spent += measured
        cost = (cost + measured) / 2 if cost else measured  # a clock is noisy
    else:
        spent += cost

    def due() -> int:
        return max(step + budget.interval, math.ceil((spent + cost) / budget.share))

    if due() - step > budget.longest and halvings < budget.halvings:
        halvings, cost = halvings + 1, cost / 2
    latest = np.iinfo(np.int32).max
    return Pace(
        np.int32(min(due(), latest)), np.float32(cost), np.float32(spent), np.int32(halvings)
    )


def placed_alike(old: Pace, new: Pace) -> Pace:
    """New values on the devices of the old ones, so that no step is compiled again."""
    return Pace(*(was - was + now for was, now in zip(old, new, strict=True)))
