"""Move weights towards sources whose rows lower the probe's loss, by a bounded step.

Shapes: M sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.mixing.combinators import bounded
from dh_jax.mixing.policy import Observation, Policy, as_configured

Helpful = Callable[[Observation], jax.Array]  # (M,) what to have more of


class InfluencePolicyState(NamedTuple):
    """What the influence policy remembers between moves."""

    helpful_M: jax.Array  # float32, moving average of helpfulness, before bias correction
    spread: jax.Array  # float32, moving mean square of the centred average, likewise
    moves: jax.Array  # int32, moves made


def influence(
    learning_rate: float = 0.5,
    smoothing: float = 0.0,
    min_weight: float = 0.0,
    max_weight: float = 1.0,
    memory: float = 0.9,
) -> Policy:
    r"""Bounded exponentiated-gradient ascent on helpfulness, with a scale-free step.

    With influence ``I`` (positive raises the probe's loss) and weights ``w``, move ``t`` does::

        a_t = smoothing a_{t-1} - (1 - smoothing) I      h = a_t / (1 - smoothing^t)
        d   = h - sum(w h)
        s_t = memory s_{t-1} + (1 - memory) mean(d^2)
        r   = sqrt(max(s_t / (1 - memory^t), mean(d^2)))
        w  <- project(w exp(learning_rate d / r) / sum)  onto [min_weight, max_weight]

    Influence has no natural scale (it grows as gradients shrink), hence the division by ``r``; as
    ``r`` remembers earlier moves, steps shrink when sources cease to differ. The ``max`` bounds
    ``|d / r|`` by ``sqrt(M)`` at every move, also when the scale suddenly grows.

    A weight of exactly 0 stays 0 unless ``min_weight`` lifts it. Weights configured outside the
    bounds are projected before the first step.

    Args:
        learning_rate: size of a step in log-weight, for a source one ``r`` from the mean.
        smoothing: share of the old influence estimate kept, in [0, 1).
        min_weight: least weight of a source.
        max_weight: greatest weight of a source.
        memory: share of the old spread kept, in [0, 1).

    Returns:
        A policy that needs ``influence_M``.

    References:
        Kivinen and Warmuth 1997, Exponentiated gradient versus gradient descent for linear
        predictors; Kingma and Ba 2015, Adam, section 3 (bias correction); Reddi et al. 2018,
        AMSGrad (the maximum).
    """

    def helpful(observation: Observation) -> jax.Array:
        assert observation.influence_M is not None, "reweight fills what `needs` names"
        return -observation.influence_M

    step = _ascent(helpful, learning_rate, smoothing, memory, frozenset({"influence_M"}))
    return bounded(step, min_weight, max_weight)


def alignment(
    learning_rate: float = 0.5,
    smoothing: float = 0.0,
    min_weight: float = 0.0,
    max_weight: float = 1.0,
    memory: float = 0.9,
) -> Policy:
    """`influence` without curvature: helpfulness is the dot product of a source's gradient with
    the target's, so a move costs one gradient a source and none of each row.

    Args and References: as `influence`. DoGE (`dh_jax.mixing.doge`) steps along the same dot
    product, scaled by gradient norms instead of by what the sources differ in.

    Returns:
        A policy that needs ``alignment_M``.
    """

    def helpful(observation: Observation) -> jax.Array:
        assert observation.alignment_M is not None, "reweight fills what `needs` names"
        return observation.alignment_M

    step = _ascent(helpful, learning_rate, smoothing, memory, frozenset({"alignment_M"}))
    return bounded(step, min_weight, max_weight)


def _ascent(
    helpful: Helpful, learning_rate: float, smoothing: float, memory: float, needs: frozenset[str]
) -> Policy:
    def init(weights_M: jax.Array) -> InfluencePolicyState:
        zero = jnp.zeros((), weights_M.dtype)
        return InfluencePolicyState(jnp.zeros_like(weights_M), zero, jnp.zeros((), jnp.int32))

    def update(
        observation: Observation, state: InfluencePolicyState
    ) -> tuple[jax.Array, InfluencePolicyState]:
        weights_M = observation.weights_M
        moves = state.moves + 1
        helpful_M = smoothing * state.helpful_M + (1 - smoothing) * helpful(observation)
        estimate_M = helpful_M / (1 - smoothing**moves)
        centred_M = estimate_M - (weights_M * estimate_M).sum()
        now = jnp.square(centred_M).mean()
        spread = memory * state.spread + (1 - memory) * now
        scale = jnp.sqrt(jnp.maximum(spread / (1 - memory**moves), now))
        step_M = jnp.where(scale == 0, 0, centred_M / jnp.where(scale == 0, 1, scale))
        moved_M = jax.nn.softmax(jnp.log(weights_M) + learning_rate * step_M)
        return moved_M, InfluencePolicyState(helpful_M, spread, moves)

    return Policy(as_configured, init, update, needs)
