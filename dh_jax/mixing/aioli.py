"""Aioli: try each source for a moment, and see what it does to the target's loss.

Shapes: M sources.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.errors import ConfigError
from dh_jax.mixing.policy import Observation, Policy, equal


class AioliState(NamedTuple):
    """Where in a round Aioli is, and what it has measured of it."""

    moves: jax.Array  # int32
    proportions_M: jax.Array  # float32, p: the answer of the last round
    loss: jax.Array  # float32, the target's loss at the last move
    drops_M: jax.Array  # float32, how far it fell in each trial
    trials_MM: jax.Array  # float32, the weights that were in force in each trial


def aioli(learning_rate: float = 1.0, exploration: float = 0.25, hold: int = 6) -> Policy:
    r"""Estimate a linear mixing law by trials, then take an exponentiated step along it.

    A round has ``M + hold`` moves. In trial ``j`` source ``j`` has weight ``1 - exploration`` and
    the others share the rest, row ``W_j``; ``d_j`` is how far the target's loss fell meanwhile.
    After ``M`` trials::

        a  = W^-1 d
        a <- (a - min(a, 0)) / sum      with min(a, 0) = min over sources, where that is negative
        p <- softmax(log p + learning_rate a)

    and ``p`` is in force for the next ``hold`` moves.

    Args:
        learning_rate: eta of the paper.
        exploration: weight outside the source on trial, from 0 to below ``1 - 1 / M``, where all
            trials would be alike; 1 - the paper's one-hot factor.
        hold: moves for which a round's proportions are in force, at least 1.

    Returns:
        A policy that needs ``target_loss`` and starts uniform.

    References:
        Chen et al. 2025, arXiv:2411.05735, algorithms 1 (Aioli) and 2 (LearnParams). Deviations:
        the update reads only the sum of ``A`` over the groups that are judged, so the (weighted)
        sum over targets is taken first and normalised, which with several targets shifts by
        another minimum; one sweep in the sources' order where the paper shuffles; ``W`` is what
        was in force, also where bounds changed it; no average of ``A`` over rounds.

    Raises:
        ConfigError: a number lies outside its range; from ``start``: ``exploration`` is too large
            for so many sources.
    """
    if not 0 <= exploration < 1:
        raise ConfigError(f"mixing.exploration is {exploration}; it must be in [0, 1)")
    if hold < 1:
        raise ConfigError(f"mixing.hold is {hold} moves; the least is 1")

    def start(weights_M: jax.Array) -> jax.Array:
        M = weights_M.size
        if M > 1 and exploration >= 1 - 1 / M:
            raise ConfigError(
                f"mixing.exploration is {exploration}; with {M} sources it must be below "
                f"{1 - 1 / M:.3g} (1 - 1 / sources), or a trial gives its source no more than the "
                "others; take 0.25"
            )
        return equal(weights_M)

    def init(weights_M: jax.Array) -> AioliState:
        zeros_M = jnp.zeros_like(weights_M)
        trials_MM = jnp.zeros((weights_M.size, weights_M.size), weights_M.dtype)
        return AioliState(jnp.zeros((), jnp.int32), weights_M, zeros_M[0], zeros_M, trials_MM)

    def update(observation: Observation, state: AioliState) -> tuple[jax.Array, AioliState]:
        assert observation.target_loss is not None
        sources = state.proportions_M.size
        at = state.moves % (sources + hold)  # trial at - 1 is over, if it was one
        ended_M = jnp.arange(sources) == at - 1
        drops_M = jnp.where(ended_M, state.loss - observation.target_loss, state.drops_M)
        trials_MM = jnp.where(ended_M[:, None], observation.weights_M, state.trials_MM)

        def step() -> jax.Array:
            # As the inverse, but where bounds made trials alike, what they do not tell is 0.
            law_M = jnp.matmul(jnp.linalg.pinv(trials_MM), drops_M, precision="highest")
            law_M = law_M - law_M.min().clip(max=0)
            law_M = law_M / jnp.where(law_M.sum() > 0, law_M.sum(), 1)
            return jax.nn.softmax(jnp.log(state.proportions_M) + learning_rate * law_M)

        proportions_M = jax.lax.cond(at == sources, step, lambda: state.proportions_M)
        rest = exploration / max(sources - 1, 1)
        trial_M = jnp.where(jnp.arange(sources) == at, 1 - exploration, rest)
        trial_M = (trial_M / trial_M.sum()).astype(proportions_M.dtype)
        weights_M = jnp.where(at < sources, trial_M, proportions_M)
        loss = observation.target_loss.astype(state.loss.dtype)
        return weights_M, AioliState(state.moves + 1, proportions_M, loss, drops_M, trials_MM)

    return Policy(start, init, update, needs=frozenset({"target_loss"}))
