"""Weights straight from influence, without a memory of the weights before.

Shapes: M sources.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.mixing.policy import Observation, Policy, as_configured


class GroupInfluenceState(NamedTuple):
    """What both policies remember."""

    helpful_M: jax.Array  # float32, moving average of -influence, before bias correction
    prior_M: jax.Array  # float32, the configured weights
    moves: jax.Array  # int32


def group_influence(temperature: float = 0.5, smoothing: float = 0.5) -> Policy:
    r"""The mixture of greatest influence that stays near the configured one.

    With helpfulness ``h`` (minus the smoothed influence), each move solves::

        w = argmax  <w, h> / r - temperature KL(w || prior),    r = sqrt(mean((h - mean(h))^2))
          = softmax(log prior + h / (temperature r))

    Args:
        temperature: pull towards the configured weights; infinity keeps them.
        smoothing: share of the old influence estimate kept, in [0, 1).

    Returns:
        A policy that needs ``influence_M``.

    References:
        In the manner of TiKMiX-D (Wang et al. 2025, arXiv:2508.17677), which at each stage sets
        the weights that maximise the groups' influence on several targets. Deviations: a mixture's
        influence is the weighted sum of its sources' (as of any influence function); targets are
        summed with their weights beforehand; what keeps the optimum off a corner is a divergence
        in closed form, where the paper solves a constrained programme.
    """

    def update(
        observation: Observation, state: GroupInfluenceState
    ) -> tuple[jax.Array, GroupInfluenceState]:
        state, estimate_M = _remember(observation, state, smoothing)
        centred_M = estimate_M - estimate_M.mean()
        scale = jnp.sqrt(jnp.square(centred_M).mean())
        gain_M = jnp.where(scale == 0, 0, centred_M / jnp.where(scale == 0, 1, scale))
        return jax.nn.softmax(jnp.log(state.prior_M) + gain_M / temperature), state

    return Policy(as_configured, _init, update, needs=frozenset({"influence_M"}))


def influence_share(smoothing: float = 0.5) -> Policy:
    r"""Weights in proportion to how much each source helps, 0 for one that harms::

        w = max(h, 0) / sum(max(h, 0))

    Where no source helps, the weights stay.

    Args:
        smoothing: share of the old influence estimate kept, in [0, 1).

    Returns:
        A policy that needs ``influence_M``.

    References:
        MobileLLM-R1 (Zhao et al. 2025, arXiv:2509.24945): a data set's weight is the mean influence
        of its samples on capability probes. Deviations: the paper takes it once, from models
        trained beforehand on each domain; here it is taken again at every move, and smoothed.
    """

    def update(
        observation: Observation, state: GroupInfluenceState
    ) -> tuple[jax.Array, GroupInfluenceState]:
        state, estimate_M = _remember(observation, state, smoothing)
        share_M = estimate_M.clip(min=0)
        total = share_M.sum()
        helps = total > 0
        weights_M = jnp.where(helps, share_M / jnp.where(helps, total, 1), observation.weights_M)
        # A comparison with NaN is False: without this line NaN would pass for "nobody helps".
        return jnp.where(jnp.isnan(total), estimate_M, weights_M), state

    return Policy(as_configured, _init, update, needs=frozenset({"influence_M"}))


def _init(weights_M: jax.Array) -> GroupInfluenceState:
    return GroupInfluenceState(jnp.zeros_like(weights_M), weights_M, jnp.zeros((), jnp.int32))


def _remember(
    observation: Observation, state: GroupInfluenceState, smoothing: float
) -> tuple[GroupInfluenceState, jax.Array]:
    """The new state, and the bias-corrected average of helpfulness."""
    assert observation.influence_M is not None, "reweight fills what `needs` names"
    helpful_M = smoothing * state.helpful_M - (1 - smoothing) * observation.influence_M
    moves = state.moves + 1
    return state._replace(helpful_M=helpful_M, moves=moves), helpful_M / (1 - smoothing**moves)
