"""Online data mixing: a bandit whose reward is the loss.

Shapes: M sources.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.mixing.policy import Observation, Policy, equal


class ODMState(NamedTuple):
    """What the bandit remembers."""

    reward_M: jax.Array  # float32, moving average of loss / probability
    moves: jax.Array  # int32, t


def odm(smoothing: float = 0.9) -> Policy:
    r"""Exp3 with a smoothed reward: sources of high loss are read more often.

    Move ``t`` (from 1) does, for the sources read since the last move::

        R    <- smoothing R + (1 - smoothing) L / pi
        eps_t = min(1 / M, sqrt(ln M / (M t)))
        pi   <- (1 - M eps_{t+1}) softmax(eps_t R) + eps_{t+1}

    The paper moves at every step, and the first ``M ln M`` moves leave the weights uniform, so
    ``interval: 1`` suits it. Target losses are never looked at: it levels losses, and lowers that
    of a target only where that is the same.

    Args:
        smoothing: share of the old reward kept, alpha of the paper.

    Returns:
        A policy that needs ``loss_M`` and ``tokens_M`` and starts uniform.

    References:
        Albalak et al. 2023, arXiv:2312.02406, algorithm 1. Deviations: a batch may hold rows of
        several sources, each of which is then rewarded with its mean loss since the last move
        (the paper draws one source a micro-batch); ``pi`` is what was in force, also where bounds
        changed it. The authors' released code rewards ``exp(L)`` without dividing by ``pi``;
        we follow the paper.
    """

    def init(weights_M: jax.Array) -> ODMState:
        return ODMState(jnp.zeros_like(weights_M), jnp.zeros((), jnp.int32))

    def update(observation: Observation, state: ODMState) -> tuple[jax.Array, ODMState]:
        assert observation.loss_M is not None and observation.tokens_M is not None
        sources = state.reward_M.size

        def exploration(t: jax.Array) -> jax.Array:
            t = t.astype(state.reward_M.dtype)
            return jnp.minimum(1 / sources, jnp.sqrt(jnp.log(sources) / (sources * t)))

        t = state.moves + 1
        probability_M = observation.weights_M.clip(min=jnp.finfo(observation.weights_M.dtype).tiny)
        seen_M = smoothing * state.reward_M + (1 - smoothing) * observation.loss_M / probability_M
        reward_M = jnp.where(observation.tokens_M > 0, seen_M, state.reward_M)
        least = exploration(t + 1)
        pi_M = (1 - sources * least) * jax.nn.softmax(exploration(t) * reward_M) + least
        return pi_M, ODMState(reward_M, t)

    return Policy(equal, init, update, needs=frozenset({"loss_M", "tokens_M"}))
