"""Policies made of policies: bounds, averages, delays, and one policy after another.

Each takes a policy and returns a policy, so they nest in any order::

    policy = bounded(smoothed(odm(), 0.5), low=0.02, high=0.9)

The policy within always sees the weights in force, that is after everything around it.

Shapes: M sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dh_jax.errors import ConfigError
from dh_jax.mixing.policy import Observation, Policy, PolicyState
from dh_jax.mixing.simplex import check_bounds, project

Move = tuple[jax.Array, PolicyState]  # weights_M, state


def bounded(policy: Policy, low: ArrayLike = 0.0, high: ArrayLike = 1.0) -> Policy:
    """Keep every weight between its bounds, by exact projection (`simplex.project`).

    Clamping and renormalising would not do: after renormalising a clamped weight is outside again.
    Weights that are not finite pass as they are, for the caller to see which they were.

    Args:
        policy: what proposes weights.
        low: least weight, for all sources or (M,).
        high: greatest weight, likewise.

    Raises:
        ConfigError: from ``start``: no mixture of so many sources keeps the bounds.
    """

    def keep(weights_M: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(weights_M).all(), project(weights_M, low, high), weights_M)

    def start(weights_M: jax.Array) -> jax.Array:
        check_bounds(weights_M.size, low, high)
        return keep(policy.start(weights_M))

    def update(observation: Observation, state: PolicyState) -> Move:
        weights_M, state = policy.update(observation, state)
        return keep(weights_M), state

    return policy._replace(start=start, update=update)


def smoothed(policy: Policy, decay: float) -> Policy:
    """Move only part of the way: ``decay w + (1 - decay) w'``, an average over moves.

    Args:
        policy: what proposes weights ``w'``.
        decay: share of the weights in force that is kept, in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"the share of old weights kept is {decay}; it must be in [0, 1)")

    def update(observation: Observation, state: PolicyState) -> Move:
        weights_M, state = policy.update(observation, state)
        return decay * observation.weights_M + (1 - decay) * weights_M, state

    return policy._replace(update=update)


def only_when(policy: Policy, moves: Callable[[jax.Array], jax.Array]) -> Policy:
    """Move at steps where ``moves(step)`` is True; elsewhere weights and state stay."""

    def update(observation: Observation, state: PolicyState) -> Move:
        def stay(observation: Observation, state: PolicyState) -> Move:
            return observation.weights_M, state

        return jax.lax.cond(moves(observation.step), policy.update, stay, observation, state)

    return policy._replace(update=update)


def warmed_up(policy: Policy, steps: int) -> Policy:
    """Keep the first weights until ``steps`` optimizer steps have been made."""
    return only_when(policy, lambda step: step >= steps)


def every(policy: Policy, interval: int) -> Policy:
    """Move at multiples of ``interval`` steps alone."""
    if interval < 1:
        raise ConfigError(f"the interval between moves is {interval} steps; the least is 1")
    return only_when(policy, lambda step: step % interval == 0)


def frozen(policy: Policy, after: int) -> Policy:
    """Keep the weights as they are once ``after`` optimizer steps have been made."""
    return only_when(policy, lambda step: step < after)


class ScheduledState(NamedTuple):
    """States of the policies that follow one another."""

    inner: tuple[PolicyState, ...]


def scheduled(policies: Sequence[Policy], boundaries: Sequence[int]) -> Policy:
    """One policy after another; each begins with the weights that the one before it left.

    Args:
        policies: the first one's ``start`` gives the first weights.
        boundaries: step from which each policy but the first is in charge, ascending.

    Raises:
        ConfigError: there is not one boundary between every two policies, or they do not ascend.
    """
    if len(boundaries) != len(policies) - 1 or list(boundaries) != sorted(set(boundaries)):
        raise ConfigError(
            f"{len(policies)} policies with boundaries {list(boundaries)}; "
            "give one ascending step between every two policies"
        )
    edges = np.asarray(boundaries, np.int32)

    def init(weights_M: jax.Array) -> ScheduledState:
        return ScheduledState(tuple(policy.init(weights_M) for policy in policies))

    def update(observation: Observation, state: ScheduledState) -> Move:
        def turn(k: int) -> Callable[[Observation, tuple[PolicyState, ...]], Move]:
            def move(observation: Observation, inner: tuple[PolicyState, ...]) -> Move:
                weights_M, new = policies[k].update(observation, inner[k])
                return weights_M, (*inner[:k], new, *inner[k + 1 :])

            return move

        now = (observation.step >= jnp.asarray(edges)).sum()
        turns = [turn(k) for k in range(len(policies))]
        weights_M, inner = jax.lax.switch(now, turns, observation, state.inner)
        return weights_M, ScheduledState(inner)

    return Policy(policies[0].start, init, update, frozenset().union(*(p.needs for p in policies)))
