"""DoReMi: more of what a model learns worse than a reference did.

Shapes: M sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.errors import ConfigError
from dh_jax.mixing.policy import Observation, Policy, equal


class DoReMiState(NamedTuple):
    """What DoReMi remembers."""

    excess_M: jax.Array  # float32, last excess loss seen of each source
    mean_M: jax.Array  # float32, mean of the weights over all moves: DoReMi's answer
    moves: jax.Array  # int32


def doremi(
    reference_M: Sequence[float], learning_rate: float = 1.0, exploration: float = 1e-3
) -> Policy:
    r"""Group DRO on the excess loss over a reference.

    Each move does, with ``l`` the model's and ``r`` the reference's loss on a source::

        lambda = max(l - r, 0)
        w     <- (1 - exploration) softmax(log w + learning_rate lambda) + exploration / M

    What the paper then trains on is the mean of ``w`` over all moves of a small proxy run
    (`DoReMiState.mean_M`); `average_weights` takes it from a list of weights. In a run, sources
    are read in the proportion ``w`` itself.

    Args:
        reference_M: loss of a reference model on each source, nats a target.
        learning_rate: eta of the paper, which takes 1.
        exploration: c of the paper, which takes 1e-3.

    Returns:
        A policy that needs ``loss_M`` and ``tokens_M`` and starts uniform.

    References:
        Xie et al. 2023, arXiv:2305.10429, algorithm 1. Deviations: excess is clipped at 0 for a
        source's mean and not token by token, since the reference is known by its losses alone;
        rows are drawn by ``w`` where the paper draws uniformly and weighs the loss by ``w``; a
        source not read since the last move keeps its last excess (as in the authors' code).

    Raises:
        ConfigError: a reference loss is not a finite number.
    """
    if not np.isfinite(reference_M).all():
        raise ConfigError(f"reference losses are {list(reference_M)}; each must be finite")

    def init(weights_M: jax.Array) -> DoReMiState:
        zeros_M = jnp.zeros_like(weights_M)
        return DoReMiState(zeros_M, zeros_M, jnp.zeros((), jnp.int32))

    def update(observation: Observation, state: DoReMiState) -> tuple[jax.Array, DoReMiState]:
        assert observation.loss_M is not None and observation.tokens_M is not None
        weights_M = observation.weights_M
        now_M = (observation.loss_M - jnp.asarray(reference_M, weights_M.dtype)).clip(min=0)
        excess_M = jnp.where(observation.tokens_M > 0, now_M, state.excess_M)
        moved_M = jax.nn.softmax(jnp.log(weights_M) + learning_rate * excess_M)
        new_M = (1 - exploration) * moved_M + exploration / weights_M.size
        moves = state.moves + 1
        mean_M = state.mean_M + (new_M - state.mean_M) / moves
        return new_M, DoReMiState(excess_M, mean_M, moves)

    return Policy(equal, init, update, needs=frozenset({"loss_M", "tokens_M"}))


def average_weights(weights_SM: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """(M,) the weights that a proxy run recommends: their mean over its moves, summing to 1.

    The last step of DoReMi (algorithm 1) and of DoGE (algorithm 1) alike.

    Raises:
        ConfigError: there is no move to average over.
    """
    moves_SM = np.asarray(weights_SM, np.float64)
    if moves_SM.size == 0:
        raise ConfigError("the proxy run moved no weights; lower mixing.interval or mixing.warmup")
    mean_M = moves_SM.mean(axis=0)
    return np.asarray(mean_M / mean_M.sum())
