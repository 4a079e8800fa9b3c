"""DoGE: more of what points where the target points.

Shapes: M sources.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.mixing.policy import Observation, Policy, equal


class DoGEState(NamedTuple):
    """What DoGE remembers."""

    mean_M: jax.Array  # float32, mean of the weights over all moves: the answer of a proxy run
    moves: jax.Array  # int32


def doge(learning_rate: float = 1.0, *, normalised: bool = True) -> Policy:
    r"""Multiplicative weights on gradient alignment.

    Each move does, with ``g_j`` a source's and ``v`` the target's gradient::

        W_j = <g_j, v>
        w  <- softmax(log w + learning_rate W / s),      s = mean_j |g_j|   (1 if not normalised)

    ``learning_rate`` stands for ``eta_t / mu`` of the paper: the step of the model's optimizer
    over the strength of the Bregman term.

    Args:
        learning_rate: size of a step in log-weight.
        normalised: divide by the mean norm, as the authors' code does and the paper does not;
            gradients shrink and grow by orders of magnitude, and a fixed rate suits one of them.

    Returns:
        A policy that needs ``alignment_M`` and ``norm_M`` and starts uniform.

    References:
        Fan, Pagliardini and Jaggi 2024, arXiv:2310.15393, algorithm 1 and the update of section 2
        (with target gradient: its out-of-domain variant; with every source a probe: the universal
        one). Deviations: rows are drawn by ``w`` where a proxy run of the paper draws uniformly
        and weighs gradients; the authors' clipping of scores to [0, 5] is left out, since it
        hides that a source points away from the target.
    """

    def init(weights_M: jax.Array) -> DoGEState:
        return DoGEState(jnp.zeros_like(weights_M), jnp.zeros((), jnp.int32))

    def update(observation: Observation, state: DoGEState) -> tuple[jax.Array, DoGEState]:
        assert observation.alignment_M is not None
        score_M = observation.alignment_M
        if normalised:
            assert observation.norm_M is not None
            score_M = score_M / observation.norm_M.mean()
        new_M = jax.nn.softmax(jnp.log(observation.weights_M) + learning_rate * score_M)
        moves = state.moves + 1
        return new_M, DoGEState(state.mean_M + (new_M - state.mean_M) / moves, moves)

    needs = {"alignment_M", "norm_M"} if normalised else {"alignment_M"}
    return Policy(equal, init, update, needs=frozenset(needs))
